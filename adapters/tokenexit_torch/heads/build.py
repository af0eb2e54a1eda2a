"""Heads in PyTorch, built from the plans of `tokenexit.heads`."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from tokenexit import TokenExitError
from tokenexit.heads import ATM, FCN, MLP, HeadPlan, Linear, Neighbourhood, Translator
from tokenexit_torch.heads.masks import AttentionToMask

__all__ = ["NeighbourhoodHead", "TokenTranslator", "build"]


def build(plan: HeadPlan, /, *, width: int, classes: int, targets: int = 1) -> nn.Module:
    """A new head with random weights.

    Args:
        plan: Which kind of head.
        width: Channels of a token.
        classes: Class count.
        targets: For `Translator`, of how many later blocks it gives the token.

    Returns:
        A module from `(..., width)` to `(..., classes)`; for `ATM`, an `AttentionToMask`; for `Neighbourhood` one from
        twice the channels, a `NeighbourhoodHead`; for `Translator` one to tokens, a `TokenTranslator`.

    Raises:
        TokenExitError: If `plan` is not of `tokenexit.heads`, or an `ATM` does not fit the width.
    """
    match plan:
        case Linear():
            return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
        case MLP():
            hidden = plan.hidden or width
            return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, classes))
        case FCN():
            first = nn.Linear(width, plan.hidden, bias=False)
            return nn.Sequential(first, _TokenBatchNorm(plan.hidden), nn.ReLU(), nn.Linear(plan.hidden, classes))
        case Neighbourhood():
            return NeighbourhoodHead(width, plan.hidden or width, classes, radius=plan.radius)
        case ATM():
            return AttentionToMask(width, classes, layers=plan.layers, attention_heads=plan.attention_heads)
        case Translator():
            return TokenTranslator(width, plan.hidden or 2 * width, targets=targets)
    raise TokenExitError(f"`plan` must be a plan of tokenexit.heads, got {plan!r}")


class NeighbourhoodHead(nn.Sequential):
    """A head on tokens beside the mean of their neighbourhoods, as `tokenexit.surroundings` puts them together.

    Args:
        width: Channels of a token.
        hidden: Channels between the layers.
        classes: Class count.
        radius: Of the neighbourhood.

    Attributes:
        radius: The same.
    """

    def __init__(self, width: int, hidden: int, classes: int, /, *, radius: int) -> None:
        super().__init__(nn.Linear(2 * width, hidden), nn.GELU(), nn.Linear(hidden, classes))
        self.radius = radius


class TokenTranslator(nn.Module):
    """A linear layer on tokens, plus an MLP of them; a new one gives them back as they are.

    A second output, a linear layer on the hidden channels, is the logarithm of the error that it foretells for itself;
    that of a new one is zero: as large as the variance.

    Args:
        width: Channels of a token.
        hidden: Channels between the layers of the MLP.
        targets: Of how many later blocks it gives the token.

    Attributes:
        targets: The same.
    """

    def __init__(self, width: int, hidden: int, /, *, targets: int = 1) -> None:
        super().__init__()
        self.targets = targets
        self.skip = nn.Linear(width, targets * width)
        last = nn.Linear(hidden, targets * width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), last)
        self.log_error = nn.Linear(hidden, 1)
        with torch.no_grad():
            self.skip.weight.copy_(torch.eye(width, device=self.skip.weight.device).repeat(targets, 1))
        for constant in (self.skip.bias, last.weight, last.bias, self.log_error.weight, self.log_error.bias):
            nn.init.zeros_(constant)

    def forward(self, tokens: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens channels"]:
        """The tokens as later blocks would leave them, one after the other along the channels."""
        return self.skip(tokens) + self.mlp(tokens)

    def foretell(
        self, tokens: Float[Tensor, "*tokens width"], /
    ) -> tuple[Float[Tensor, "*tokens channels"], Float[Tensor, "*tokens"]]:
        """The same, and the logarithm of the greatest of their squared errors, in float32.

        Args:
            tokens: The tokens.
        """
        hidden = self.mlp[:3](tokens)
        return self.skip(tokens) + self.mlp[3](hidden), self.log_error(hidden)[..., 0].float()


class _TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm over all leading axes; the channels are the last one."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        if self.training and rows.shape[0] < 2:  # all but one have left: a single token has no variance
            known = self.running_mean, self.running_var, self.weight, self.bias
            return functional.batch_norm(rows, *known, training=False, eps=self.eps).reshape(input.shape)
        return super().forward(rows).reshape(input.shape)
