"""Inference: whole images, windows, and export."""

from tokenexit_torch.inference.export import EXPORTED, export_onnx, export_program
from tokenexit_torch.inference.predictor import Predictor
from tokenexit_torch.inference.windows import WindowedOutput, Windows, sliding

__all__ = [
    "EXPORTED",
    "Predictor",
    "WindowedOutput",
    "Windows",
    "export_onnx",
    "export_program",
    "sliding",
]
