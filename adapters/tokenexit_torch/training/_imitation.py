"""What translators are fitted to: tokens of later blocks, as what reads them does."""

import copy
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenexit_torch.exits.base import WithExits

__all__ = ["Imitation", "log_worst"]

FLOOR = 1e-6
"""Least error whose logarithm is foretold: a translation that is right to the last bit has none."""


class Imitation:
    """The final norm of a network, and its head if there is one, in float32, and the variance of each channel.

    The network itself is left alone: its weights get no gradients, and may have been made in inference mode. Tokens of
    several taps lie side by side along the channels.

    Args:
        model: The network.
    """

    def __init__(self, model: WithExits) -> None:
        blocks = {id(weight) for block in model.host.blocks for weight in block.parameters()}
        self.taps, self._dim = model.taps, model.host.width
        self._reader = _Reader(model.host.module, model.finished, None if model.final is None else model.final[1])
        self._weights = {
            name: weight.detach().clone().float()
            for name, weight in self._reader.named_parameters(remove_duplicate=False)
            if id(weight) not in blocks
        }
        self._mean = self._variance = torch.zeros(())

    def read(
        self, tokens: Float[Tensor, "rows channels"], /
    ) -> tuple[Float[Tensor, "rows taps dim_out"], Float[Tensor, "rows classes"] | None]:
        """Tokens by tap as they are read, and the class scores of the final head on the last of them."""
        tokens = tokens.unflatten(-1, (-1, self._dim))
        # Each name of a tied weight is there, so that they need not be looked for, which takes longer than the call.
        return torch.func.functional_call(self._reader, self._weights, (tokens,), tie_weights=False)

    @torch.no_grad()
    def wish(self, last: Float[Tensor, "rows channels"], /) -> Float[Tensor, "rows taps dim_out"]:
        """Tokens of all taps as they are read."""
        return self.read(last.float())[0]

    @torch.no_grad()
    def measure(self, chunks: Iterable[Float[Tensor, "rows channels"]], /) -> None:
        """The variance of each channel over all rows, from pieces of them, one after the other (Chan et al., 1979)."""
        count = 0
        mean = squares = torch.zeros((), dtype=torch.float64, device="cpu")
        for chunk in (chunk for chunk in chunks if len(chunk) > 0):
            both = torch.var_mean(self.wish(chunk.to(self._device)), dim=0, correction=0)
            variance, own = (one.cpu().double() for one in both)
            gap, rows, total = own - mean, len(chunk), count + len(chunk)
            squares = squares + variance * rows + gap.square() * (count * rows / total)
            mean, count = mean + gap * (rows / total), total
        variance = squares / max(count, 1)
        # A channel that never changes must not weigh without bound.
        least = 1e-6 * variance.mean(dim=-1, keepdim=True)
        self._variance = variance.clamp(min=least).float().to(self._device)
        self._mean = mean.float().to(self._device)

    def errors(
        self, finished: Float[Tensor, "rows taps dim_out"], wish: Float[Tensor, "rows all_taps dim_out"], /
    ) -> Float[Tensor, "rows taps"]:
        """Squared errors as tokens are read, relative to each channel's variance, the mean over channels.

        Args:
            finished: Translations for the last of the taps.
            wish: Tokens of all taps.
        """
        taps = finished.shape[1]
        return ((finished - wish[:, -taps:]).square() / self._variance[-taps:]).mean(dim=-1)

    def variance(self, finished: Float[Tensor, "rows taps dim_out"], /) -> Float[Tensor, "rows taps"]:
        """Squared distances from the mean of what is wished for, relative to its variance, the mean over channels."""
        taps = finished.shape[1]
        return ((finished - self._mean[-taps:]).square() / self._variance[-taps:]).mean(dim=-1)

    @property
    def _device(self) -> torch.device:
        return next(self._reader.parameters()).device


def log_worst(errors: Float[Tensor, "rows taps"], /) -> Float[Tensor, "rows"]:
    """Logarithm of the greatest error of each row: what a translator foretells."""
    return errors.detach().amax(dim=-1).clamp(min=FLOOR).log()


class _Reader(nn.Module):
    """Final norm and head, as a module whose weights can be others for a call."""

    def __init__(self, network: nn.Module, finish: Callable[[Tensor], Tensor], head: nn.Module | None) -> None:
        super().__init__()
        self._finish, self.network = finish, network
        self.head = None if head is None else copy.deepcopy(head).float().eval()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        finished = self._finish(tokens)
        return finished, None if self.head is None else self.head(finished[:, -1])
