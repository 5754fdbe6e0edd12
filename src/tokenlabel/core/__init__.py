"""The method itself, pure tensors and arrays: views, score maps, targets, mixes, outputs and their loss."""
