"""timm, also where torchvision's wheel does not fit the installed torch."""

import functools
import importlib
import sys
from types import ModuleType

import torch
from torch import library

_TORCHVISION_OPERATORS = ("nms", "qnms")


def import_timm() -> ModuleType:
    """Import timm, also beside a torchvision wheel whose operators do not fit the installed torch.

    timm needs only torchvision's Python side, whose import fails where the wheel's operators could not be loaded;
    declaring the two it asks for is then enough. A torchvision that works is left alone.
    """
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    _declare_torchvision_operators()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("timm", "torchvision")]:
        del sys.modules[name]
    return importlib.import_module("timm")


@functools.cache
def _declare_torchvision_operators() -> library.Library:
    """Declare what is not there yet; cached, as a declaration lives no longer than its library object."""
    declared = library.Library("torchvision", "FRAGMENT")
    for name in _TORCHVISION_OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return declared
