"""Run a first time: images, training and result, without any data."""
