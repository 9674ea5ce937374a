"""Make the two random views of an image: draw, crop, colour."""
