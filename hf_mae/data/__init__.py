"""From what the user typed to batches of images: sources, decoding, augmentation, order."""
