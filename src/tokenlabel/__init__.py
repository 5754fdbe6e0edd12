"""Train vision models with token labeling."""
