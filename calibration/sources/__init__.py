"""Where batches come from: files of arrays, images, readers and functions."""
