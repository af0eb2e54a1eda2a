"""Plans of heads, which read class scores off tokens.

A plan is plain frozen data that every adapter builds in its own framework, so that heads fitted in one can be loaded
in another. `Linear`, `MLP` and `FCN` treat each token by itself: they take tokens as a block leaves them,
`(..., width)`, and give `(..., classes)`. `Neighbourhood` looks around each token, `ATM` at all patches of an image.
`Translator` gives no class scores but a token, which the final head reads.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Real

from tokenexit._array import Array, array_namespace, in_64_bits, number_beside
from tokenexit._plain import MOST, from_plain, is_whole, require_counts, require_sizes, to_plain
from tokenexit.errors import require

__all__ = [
    "ATM",
    "FCN",
    "KINDS",
    "MLP",
    "HeadCost",
    "HeadPlan",
    "Linear",
    "Neighbourhood",
    "Reads",
    "Translator",
    "atm_head",
    "from_dict",
    "to_dict",
]

Reads = Literal["tokens", "neighbourhoods", "images"]
"""Input of a head: each token by itself, each beside the mean of its neighbourhood, or all patches of an image."""


@dataclass(frozen=True)
class HeadCost:
    """Multiply-adds of a head: so many for each token that it reads, and so many for its own work on an image.

    A head that treats each token by itself has no work of its own. One with class queries does: they attend to the
    tokens, which is linear in tokens, and to each other, which is not about tokens at all.

    Attributes:
        per_token: For each token that the head reads.
        fixed: For each image of which it reads any token.
    """

    per_token: int
    fixed: int = 0

    def __add__(self, other: "HeadCost", /) -> "HeadCost":
        """Cost of two heads, one on what the other gives.

        Args:
            other: Cost of the other one.
        """
        return HeadCost(self.per_token + other.per_token, self.fixed + other.fixed)

    def multiply_adds(self, tokens: Real[Array, "images"], /) -> Real[Array, "images"]:
        """Multiply-adds of the head for each image.

        Args:
            tokens: How many tokens of each image the head reads; it does not run for an image without any.

        Returns:
            Multiply-adds per image: int64, or float32 where the library has no 64-bit integers (JAX by default).
        """
        xp = array_namespace(tokens)
        tokens = in_64_bits(tokens)
        ran = tokens * number_beside(self.per_token, tokens) + number_beside(self.fixed, tokens)
        return xp.where(tokens > 0, ran, xp.zeros_like(tokens))


@dataclass(frozen=True)
class HeadPlan(ABC):
    """Plan of a head: plain data that an adapter builds a head from. Subclasses are `KINDS`.

    Attributes:
        reads: Input of the head.
        gives_masks: Whether it gives a mask for every class, and the presence of classes, instead of class scores.
        translates: Whether it gives a token, which the final head reads, instead of class scores.
        least_classes: How many classes it takes at least.
    """

    reads: ClassVar[Reads] = "tokens"
    gives_masks: ClassVar[bool] = False
    translates: ClassVar[bool] = False
    least_classes: ClassVar[int] = 2

    @property
    def final(self) -> "HeadPlan":
        """Plan of a final head that is built beside exit heads of this plan: the same, if it gives class scores."""
        return self

    @abstractmethod
    def cost(self, *, width: int, classes: int, norm: int = 0) -> HeadCost:
        """Multiply-adds of the head alone, of sizes that `cost.of_head` has checked."""


@dataclass(frozen=True)
class Linear(HeadPlan):
    """LayerNorm and one linear layer."""

    def cost(self, *, width: int, classes: int, norm: int = 0) -> HeadCost:
        """See `HeadPlan.cost`."""
        return HeadCost(norm * width + width * classes)


@dataclass(frozen=True)
class MLP(HeadPlan):
    """LayerNorm and two linear layers with a GELU between them: the library's default.

    Attributes:
        hidden: Channels between the layers; the width of the tokens if None.
    """

    hidden: int | None = None

    def __post_init__(self) -> None:
        """Check the field.

        Raises:
            TokenExitError: If `hidden` is neither None nor a whole number from 1 to 1,000,000.
        """
        if self.hidden is not None:
            _require_size("hidden", self.hidden)

    def cost(self, *, width: int, classes: int, norm: int = 0) -> HeadCost:
        """See `HeadPlan.cost`."""
        return HeadCost(norm * width + (width + classes) * (self.hidden or width))


@dataclass(frozen=True)
class FCN(HeadPlan):
    """Two 1 x 1 convolutions with batch norm and ReLU between them: the auxiliary head of DToP and DoViT.

    A 1 x 1 convolution is a linear layer on every token. In training the norm takes its statistics over all tokens.

    Attributes:
        hidden: Channels between the layers. Published: 256 (DoViT, 2023).
    """

    hidden: int = 256

    def __post_init__(self) -> None:
        """Check the field.

        Raises:
            TokenExitError: If `hidden` is not a whole number from 1 to 1,000,000.
        """
        _require_size("hidden", self.hidden)

    def cost(self, *, width: int, classes: int, norm: int = 0) -> HeadCost:  # noqa: ARG002
        """See `HeadPlan.cost`."""
        return HeadCost((width + classes) * self.hidden)


@dataclass(frozen=True)
class Neighbourhood(HeadPlan):
    """Two linear layers with a GELU between them, on a token and the mean of its neighbourhood, each standardised.

    New in this library: for networks with early blocks that were not trained to be read (`tokenexit.surroundings`). Of
    a neighbourhood, the head reads what still runs.

    Attributes:
        hidden: Channels between the layers; those of the tokens if None.
        radius: The neighbourhood is the square of 2 radius + 1 places around the token.
    """

    reads: ClassVar[Reads] = "neighbourhoods"
    hidden: int | None = None
    radius: int = 1

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If `hidden` is neither None nor a whole number from 1 to 1,000,000, or `radius` is not a
                whole number from 1 to 16.
        """
        if self.hidden is not None:
            _require_size("hidden", self.hidden)
        _require_size("radius", self.radius, most=16)

    def cost(self, *, width: int, classes: int, norm: int = 0) -> HeadCost:
        """See `HeadPlan.cost`."""
        return HeadCost(norm * width + (2 * width + classes) * (self.hidden or width))


@dataclass(frozen=True)
class Translator(HeadPlan):
    """A linear layer on a token, plus an MLP of it (LayerNorm, linear, GELU, linear): what the last block makes of it.

    As the affine translators of the tuned lens (Belrose et al., 2023), which begin as the identity too, with an MLP
    beside them and for networks of vision. It gives a token `(..., width)` as the last block would leave it. Class
    scores at its exit are those of the network's own final head on that token, behind the final norm, so that there is
    one set of weights for each exit; under `carries.Translated` the token is what leavers leave behind. Under a decoder
    it gives a token for each of the taps behind it, and no class scores.

    A second output is the logarithm of the squared error that it foretells for itself, relative to each channel's
    variance: what `policies.ErrorBelow` compares, which asks for no class.

    Attributes:
        hidden: Channels between the layers of the MLP; twice those of the tokens if None.
    """

    translates: ClassVar[bool] = True
    hidden: int | None = None

    def __post_init__(self) -> None:
        """Check the field.

        Raises:
            TokenExitError: If `hidden` is neither None nor a whole number from 1 to 1,000,000.
        """
        if self.hidden is not None:
            _require_size("hidden", self.hidden)

    @property
    def final(self) -> HeadPlan:
        """See `HeadPlan.final`: the library's default."""
        return MLP()

    def cost(self, *, width: int, classes: int, norm: int = 0, targets: int = 1) -> HeadCost:  # noqa: ARG002
        """See `HeadPlan.cost`; `cost.of_head` adds the final head. It gives the tokens of so many later blocks."""
        hidden = self.hidden or 2 * width
        return HeadCost(norm * width + targets * width * width + ((1 + targets) * width + 1) * hidden)


@dataclass(frozen=True)
class ATM(HeadPlan):
    """Attention to mask: one learned query for each class attends to all patches of an image.

    The head of SegViT (NeurIPS 2022, section 3) as DToP (ICCV 2023) uses it. It gives a mask logit for every patch and
    class, and for every class the probability that it is in the image. In the head, tokens have half their channels.

    Attributes:
        layers: Decoder layers. Published: 3.
        attention_heads: Into how many its attention is split; must divide half the width of the tokens. None: one for
            each 32 of these channels, at least one.
    """

    reads: ClassVar[Reads] = "images"
    gives_masks: ClassVar[bool] = True
    least_classes: ClassVar[int] = 1
    layers: int = 3
    attention_heads: int | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If `layers` is not a whole number from 1 to 64, or `attention_heads` neither None nor a
                whole number from 1 to 1,000,000.
        """
        _require_size("layers", self.layers, most=64)  # a damaged or hostile file must not ask for a million modules
        if self.attention_heads is not None:
            _require_size("attention_heads", self.attention_heads)

    def cost(self, *, width: int, classes: int, norm: int = 0) -> HeadCost:
        """See `HeadPlan.cost`."""
        return atm_head(width=width, classes=classes, layers=self.layers, norm=norm)


def atm_head(*, width: int, classes: int, layers: int = 3, norm: int = 0) -> HeadCost:
    """Cost of the attention-to-mask head of SegViT (NeurIPS 2022, section 3) as DToP (ICCV 2023) uses it.

    A linear layer and a norm halve the channels of the tokens. There is one query per class. In each layer the queries
    attend to each other, then to the tokens, and pass an MLP of four times their channels, with a norm after each of
    the three. The masks are the query-key products of the last layer; a linear layer reads two presence scores off
    each query.

    Args:
        width: Channels of the tokens, even; the head has half of them.
        classes: Class count, which is that of the queries.
        layers: Decoder layers. Published: 3.
        norm: Multiply-adds for an element of a LayerNorm; not counted if 0.

    Returns:
        The cost.

    Raises:
        TokenExitError: If `width` is odd, a size is less than 1, or `norm` is negative.
    """
    require_sizes(width=width, classes=classes, layers=layers)
    require(width % 2 == 0, "width", "be even", width)
    require_counts(norm=norm)
    half = width // 2
    keys_and_values = 2 * half * half
    attended = 2 * classes * half  # by every query, in both products
    among_queries = 4 * half * half + 2 * classes * half
    queries_and_out = 2 * half * half
    mlp = 8 * half * half
    per_query = layers * (among_queries + queries_and_out + mlp + 3 * norm * half) + 2 * half
    return HeadCost(
        per_token=width * half + norm * half + layers * (keys_and_values + attended), fixed=classes * per_query
    )


KINDS: Mapping[str, type[HeadPlan]] = {
    "linear": Linear,
    "mlp": MLP,
    "fcn": FCN,
    "neighbourhood": Neighbourhood,
    "atm": ATM,
    "translator": Translator,
}
"""All plans, by the names in files."""


def to_dict(plan: HeadPlan, /) -> dict[str, Any]:
    """The plan as plain data, for JSON.

    Args:
        plan: One of the plans of this module.

    Returns:
        `{"kind": ..., field: value, ...}`.

    Raises:
        TokenExitError: If it is anything else.
    """
    return to_plain(plan, KINDS, argument="plan")


def from_dict(data: Mapping[str, Any], /) -> HeadPlan:
    """The plan that `to_dict` wrote down.

    Args:
        data: What `to_dict` returned, or its like read from a file.

    Returns:
        The plan.

    Raises:
        TokenExitError: If the kind is unknown, a field is missing or unknown, or a value is out of its range.
    """
    return from_plain(data, KINDS, argument="plan")


def _require_size(argument: str, value: object, *, most: int = MOST) -> None:
    ok = isinstance(value, int) and is_whole(value, least=1) and value <= most
    require(ok, argument, f"be a whole number from 1 to {most:,}", repr(value))
