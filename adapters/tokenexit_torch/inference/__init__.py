"""Inference: whole images, windows, and export."""
