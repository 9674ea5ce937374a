"""Run the verbs that are typed, a file for each. Hold the one help text and the only exits."""
