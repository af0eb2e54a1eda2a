"""Calibration of models with exits, certificates, and traces for replays."""

from tokenexit_torch.calibration.adapted import calibrate, default_settings, drift_sample
from tokenexit_torch.calibration.certificate import fingerprints, load_certificate, save_certificate
from tokenexit_torch.calibration.traces import Trace, trace

__all__ = [
    "Trace",
    "calibrate",
    "default_settings",
    "drift_sample",
    "fingerprints",
    "load_certificate",
    "save_certificate",
    "trace",
]
