"""Fit classifiers on some features, test them on others, and score them."""
