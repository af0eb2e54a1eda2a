"""Training with exits, and fitting of exit heads on frozen networks."""
