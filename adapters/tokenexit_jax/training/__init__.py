"""Training with exits."""
