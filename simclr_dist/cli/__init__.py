"""What is typed: a file for each verb, one help text, the only exits."""
