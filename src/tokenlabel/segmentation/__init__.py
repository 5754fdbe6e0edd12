"""Semantic segmentation: backbones of this package under FCN and UPerNet heads."""
