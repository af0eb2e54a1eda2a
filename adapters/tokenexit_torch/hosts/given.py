"""A plain vision transformer under a decoder that is given: any module that reads feature maps."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from tokenexit.errors import require
from tokenexit_torch.hosts.protocol import Embedded, Host
from tokenexit_torch.hosts.registry import require_loaded

__all__ = ["DecodedViT", "GivenDecoder"]

Features = Literal["normalised", "raw"]
"""What a decoder reads of a token: behind the final norm of the network, or as its block left it."""

Reads = Literal["patches", "patches and prefix"]
"""Whether a decoder is given the prefix tokens too, cls and registers."""


class DecodedViT(nn.Module):
    """A vision transformer and its decoder, which own the weights.

    Attributes:
        vit: The vision transformer.
        decoder: The decoder.
    """

    def __init__(self, vit: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.vit = vit
        self.decoder = decoder
        self.training = vit.training


class GivenDecoder:
    """A host under a decoder that is given; it follows `DecodingHost`.

    Args:
        host: The host of the vision transformer.
        decoder: From a feature map `(images, dim, grid_height, grid_width)`, or a list of one for each of several taps,
            to whatever it likes.
        taps: After how many blocks maps are taken, ascending; the last after all blocks.
        features: What it reads of a token.
        reads: Whether it is given prefix tokens, `(images, prefix, dim)`, after each map, as a second argument.

    Raises:
        TokenExitError: If an argument is none of these.
    """

    classes: int | None = None

    def __init__(
        self, host: Host, decoder: nn.Module, /, *, taps: Sequence[int], features: Features, reads: Reads
    ) -> None:
        require(isinstance(decoder, nn.Module), "decoder", "be a torch.nn.Module", repr(decoder))
        require(features in ("normalised", "raw"), "features", "be `normalised` or `raw`", repr(features))
        require(
            reads in ("patches", "patches and prefix"), "reads", "be `patches` or `patches and prefix`", repr(reads)
        )
        require_loaded(decoder, "decoder")
        self._host, self._features = host, features
        self._reads: Reads = reads
        self._pair = DecodedViT(host.module, decoder)
        self.taps = tuple(taps)
        self.module: nn.Module = self._pair
        self.width = host.width

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See `Host.blocks`."""
        return tuple(self._host.blocks)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """See `Host.image_shape`."""
        return self._host.image_shape

    @property
    def decoder(self) -> nn.Module:
        """The decoder."""
        return self._pair.decoder

    @property
    def reads(self) -> Reads:
        """Whether it is given prefix tokens too."""
        return self._reads

    @property
    def embedding(self) -> nn.Module:
        """See `DecodingHost`."""
        return self._host.module

    def embed(self, images: Float[Tensor, "images channels height width"], /) -> Embedded:
        """See `Host.embed`."""
        return self._host.embed(images)

    def run(self, index: int, tokens: Tensor, positions: Shaped[Tensor, "tokens ..."] | None, /) -> Tensor:
        """See `Host.run`."""
        return self._host.run(index, tokens, positions)

    def finish(self, tokens: Float[Tensor, "*tokens width"], /) -> Float[Tensor, "*tokens width"]:
        """See `DecodingHost`: the final norm is the decoder's part."""
        return tokens

    def finished(self, tokens: Float[Tensor, "*tokens width"], /) -> Float[Tensor, "*tokens width"]:
        """Tokens as the decoder reads them.

        Args:
            tokens: The tokens, as a block leaves them.
        """
        return self._host.finish(tokens) if self._features == "normalised" else tokens

    def dense(
        self, images: Float[Tensor, "images channels height width"], /
    ) -> Float[Tensor, "images slots channels_out"]:
        """See `Host.dense`: all blocks, without the final norm."""
        embedded = self._host.embed(images)
        tokens = embedded.tokens
        for index in range(len(self._host.blocks)):
            tokens = self._host.run(index, tokens, embedded.positions)
        return tokens

    def own(self, images: Float[Tensor, "images channels height width"], /, **inputs: Any) -> Any:
        """See `DecodingHost`: the model's own dense forward, where the last map alone is read behind the norm."""
        embedded = self._host.embed(images)
        if self._features == "normalised" and len(self.taps) == 1:
            return self._read([self._host.dense(images)], embedded, inputs)
        taken, tokens = {}, embedded.tokens
        for index in range(len(self._host.blocks)):
            tokens = self._host.run(index, tokens, embedded.positions)
            taken[index + 1] = tokens
        return self.decode(taken, embedded, images, **inputs)

    def decode(
        self,
        taken: Mapping[int, Float[Tensor, "images slots channels_out"]],
        embedded: Embedded,
        images: Tensor,  # noqa: ARG002
        /,
        **inputs: Any,
    ) -> Any:
        """See `DecodingHost`: the decoder is handed the other inputs by name."""
        return self._read([self.finished(taken[tap]) for tap in self.taps], embedded, inputs)

    def _read(self, maps: Sequence[Tensor], embedded: Embedded, inputs: Mapping[str, Any]) -> Any:
        (height, width), prefix = embedded.grid, embedded.prefix
        laid = [
            rearrange(
                one[:, prefix:], "images (height width) dim -> images dim height width", height=height, width=width
            )
            for one in maps
        ]
        given: list[Any] = [laid if len(laid) > 1 else laid[0]]
        if self._reads == "patches and prefix":
            first = [one[:, :prefix] for one in maps]
            given.append(first if len(first) > 1 else first[0])
        return self._pair.decoder(*given, **inputs)

    def class_scores(self, decoded: Any, /) -> Tensor:
        """See `DecodingHost`: it is not known what a decoder gives."""
        raise NotImplementedError
