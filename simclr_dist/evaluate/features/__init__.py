"""Features of images by an encoder: made once for each image, and kept in files."""
