"""The two random views of an image: drawn, cropped, coloured."""
