"""Guarantees: the cheapest setting of a model with exits whose loss is certified to be small enough.

`risks` are the losses, `ladders` the orders of settings, `bounds` the tests; `calibration` chooses a setting, and
`certificate` is what was certified, for which model; `drift` compares the images in use with those of the calibration.
`calibrate` is the whole workflow around a model of any framework, and `plot` draws what it found.
"""

from tokenexit.guarantees import bounds, calibrate, calibration, certificate, drift, ladders, plot, risks

__all__ = ["bounds", "calibrate", "calibration", "certificate", "drift", "ladders", "plot", "risks"]
