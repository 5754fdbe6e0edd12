"""From image files to batches: sources, decoding, augmentation, order, and the processes that do it."""
