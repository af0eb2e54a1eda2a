"""Early exit of tokens: models, their forward pass and outputs."""

from tokenexit_jax.exits.model import ExitingModel
from tokenexit_jax.exits.outputs import Output

__all__ = [
    "ExitingModel",
    "Output",
]
