"""Networks with learned gates: tokens that are skipped keep their feature and may come back (SViT, WACV 2024)."""

from tokenexit_jax.gates.model import GatedModel
from tokenexit_jax.gates.outputs import GatedOutput
from tokenexit_jax.gates.thresholds import gate_thresholds
from tokenexit_jax.gates.training import Drawing, sampled

__all__ = ["Drawing", "GatedModel", "GatedOutput", "gate_thresholds", "sampled"]
