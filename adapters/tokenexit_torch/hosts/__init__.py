"""Hosts: what a wrapped vision transformer offers, for every model that is known."""
