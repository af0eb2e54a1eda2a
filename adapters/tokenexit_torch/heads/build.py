"""Heads in PyTorch, built from the plans of `tokenexit.heads`."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from tokenexit import TokenExitError
from tokenexit.heads import ATM, FCN, MLP, HeadPlan, Linear, Neighbourhood, Translator
from tokenexit_torch.heads.masks import AttentionToMask

__all__ = ["NeighbourhoodHead", "TokenTranslator", "build"]


def build(plan: HeadPlan, /, *, width: int, classes: int) -> nn.Module:
    """A new head with random weights.

    Args:
        plan: Which kind of head.
        width: Channels of a token.
        classes: Class count.

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
            return TokenTranslator(width, plan.hidden or 2 * width)
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

    Args:
        width: Channels of a token.
        hidden: Channels between the layers of the MLP.
    """

    def __init__(self, width: int, hidden: int, /) -> None:
        super().__init__()
        self.skip = nn.Linear(width, width)
        last = nn.Linear(hidden, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), last)
        nn.init.eye_(self.skip.weight)
        for constant in (self.skip.bias, last.weight, last.bias):
            nn.init.zeros_(constant)

    def forward(self, tokens: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        """The tokens as the last block would leave them."""
        return self.skip(tokens) + self.mlp(tokens)


class _TokenBatchNorm(nn.BatchNorm1d):
    """Batch norm over all leading axes; the channels are the last one."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        if self.training and rows.shape[0] < 2:  # all but one have left: a single token has no variance
            known = self.running_mean, self.running_var, self.weight, self.bias
            return functional.batch_norm(rows, *known, training=False, eps=self.eps).reshape(input.shape)
        return super().forward(rows).reshape(input.shape)
