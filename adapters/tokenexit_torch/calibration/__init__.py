"""Calibration of models with exits, certificates, and traces for replays."""
