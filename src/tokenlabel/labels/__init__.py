"""Score maps on disk: their bytes, the store that holds them, label files of others, and what is in them."""
