"""From the name of a data set to batches of images: locating, reading, decoding, transforms, order."""
