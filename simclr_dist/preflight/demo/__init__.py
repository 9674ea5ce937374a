"""The first run: images, training and result, without any data."""
