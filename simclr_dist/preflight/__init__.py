"""Prepare a training: the plan, the checks, the demo."""
