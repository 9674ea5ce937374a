"""What features are worth: classifiers that learn from some and are asked about others, and their scores."""
