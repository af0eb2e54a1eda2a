"""What translators are fitted to: tokens of the last block, as the final norm and the final head read them."""

import copy
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenexit_torch.heads.reading import Final
from tokenexit_torch.hosts.protocol import Host

__all__ = ["Imitation"]


class Imitation:
    """The final norm and head of a network in float32, and the variance of each channel between them.

    The network itself is left alone: its weights get no gradients, and may have been made in inference mode.

    Args:
        host: The network.
        final: Its final norm and head.
    """

    def __init__(self, host: Host, final: Final) -> None:
        blocks = {id(weight) for block in host.blocks for weight in block.parameters()}
        self._reader = _Reader(host.module, final)
        self._weights = {
            name: weight.detach().clone().float()
            for name, weight in self._reader.named_parameters(remove_duplicate=False)
            if id(weight) not in blocks
        }
        self._variance: Tensor | None = None

    def read(
        self, tokens: Float[Tensor, "rows dim"], /
    ) -> tuple[Float[Tensor, "rows dim_out"], Float[Tensor, "rows classes"]]:
        """Tokens behind the final norm, and the class scores of the final head on them."""
        # Each name of a tied weight is there, so that they need not be looked for, which takes longer than the call.
        return torch.func.functional_call(self._reader, self._weights, (tokens,), tie_weights=False)

    @torch.no_grad()
    def wish(self, last: Float[Tensor, "rows dim"], /) -> Float[Tensor, "rows dim_out"]:
        """Tokens of the last block behind the final norm."""
        return self.read(last.float())[0]

    @torch.no_grad()
    def measure(self, chunks: Iterable[Float[Tensor, "rows dim"]], /) -> None:
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
        self._variance = variance.clamp(min=1e-6 * float(variance.mean())).float().to(self._device)

    def errors(
        self, finished: Float[Tensor, "rows dim_out"], wish: Float[Tensor, "rows dim_out"], /
    ) -> Float[Tensor, "rows"]:
        """Squared errors behind the final norm, relative to each channel's variance, the mean over channels."""
        assert self._variance is not None
        return ((finished - wish).square() / self._variance).mean(dim=-1)

    @property
    def _device(self) -> torch.device:
        return next(iter(self._weights.values())).device


class _Reader(nn.Module):
    """Final norm and head, as a module whose weights can be others for a call."""

    def __init__(self, network: nn.Module, final: Final) -> None:
        super().__init__()
        self._finish, head = final
        self.network, self.head = network, copy.deepcopy(head).float().eval()

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        finished = self._finish(tokens)
        return finished, self.head(finished)
