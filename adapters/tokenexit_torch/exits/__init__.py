"""Early exit of tokens: models, their forward pass, its layouts and outputs."""

from tokenexit_torch.exits.decoder import DecodingModel
from tokenexit_torch.exits.model import ExitingModel
from tokenexit_torch.exits.outputs import DecodedOutput, Output
from tokenexit_torch.exits.static import StaticModel, needed_capacity

__all__ = [
    "DecodedOutput",
    "DecodingModel",
    "ExitingModel",
    "Output",
    "StaticModel",
    "needed_capacity",
]
