"""What can be known before you train: the plan, the checks, the demo."""
