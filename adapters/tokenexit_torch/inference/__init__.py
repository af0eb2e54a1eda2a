"""Inference: whole images, windows, and export."""

from tokenexit.windows import Windows
from tokenexit_torch.inference.export import EXPORTED, export_onnx, export_program
from tokenexit_torch.inference.predictor import Predictor
from tokenexit_torch.inference.windows import WindowedOutput, sliding

__all__ = [
    "EXPORTED",
    "Predictor",
    "WindowedOutput",
    "Windows",
    "export_onnx",
    "export_program",
    "sliding",
]
