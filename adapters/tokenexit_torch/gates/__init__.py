"""Networks with learned gates: tokens that are skipped keep their feature and may come back (SViT, WACV 2024)."""

from tokenexit_torch.gates.model import GatedModel
from tokenexit_torch.gates.outputs import GatedOutput
from tokenexit_torch.gates.thresholds import gate_thresholds
from tokenexit_torch.gates.training import Drawing, Sampled

__all__ = ["Drawing", "GatedModel", "GatedOutput", "Sampled", "gate_thresholds"]
