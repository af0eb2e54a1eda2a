"""Hosts with a decoder of their own: it needs the whole grid, which is restored for it.

Nothing of a decoder is written again here. A model's own forward is run on a `view` of the model, in which stand-ins
hand out the tokens that blocks have made already.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Protocol, TypeVar, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from tokenexit_torch.hosts.protocol import Embedded, Host

__all__ = ["DecodingHost"]

Module = TypeVar("Module", bound=nn.Module)


@runtime_checkable
class DecodingHost(Host, Protocol):
    """What a model must offer whose vision transformer feeds a decoder of its own.

    It is a `Host` whose `blocks` are those before the last tap: in them tokens may leave. What follows them, a final
    norm as well, belongs to the decoder, so that `finish` hands tokens on as they are.

    Attributes:
        embedding: What embeds patches; its linear and convolution layers are counted for every patch where `embed`
            cannot be run to count its multiply-adds.
        taps: After how many blocks the decoder is given all tokens, ascending; the last after all `blocks`.
        classes: How many classes the model's output scores; None if it does not.
    """

    classes: int | None

    @property
    def embedding(self) -> nn.Module:
        """What embeds patches."""
        ...

    @property
    def taps(self) -> Sequence[int]:
        """After how many blocks the decoder is given all tokens."""
        ...

    def own(self, images: Float[Tensor, "images channels height width"], /, **inputs: Any) -> Any:
        """The model's own forward, from images to output: what the self-check compares with.

        Args:
            images: The images.
            inputs: What else the model takes, such as labels.

        Returns:
            The model's own output.
        """
        ...

    def decode(
        self,
        taken: Mapping[int, Float[Tensor, "images slots channels_out"]],
        embedded: Embedded,
        images: Float[Tensor, "images channels height width"],
        /,
        **inputs: Any,
    ) -> Any:
        """What the model makes of tokens.

        Args:
            taken: All tokens by tap, prefix tokens included.
            embedded: What `embed` gave.
            images: The images, for their size.
            inputs: What else the model takes, such as labels.

        Returns:
            The model's own output.
        """
        ...

    def class_scores(self, decoded: Any, /) -> Float[Tensor, "images classes height width"]:
        """Logits of every class, at any resolution, from the model's own output. Not called if `classes` is None.

        Its map is of the area that the grid covers (`Embedded.covers`): of the whole image, as a rule.
        """
        ...


def view(model: Module, /, **parts: nn.Module) -> Module:
    """A model that shares everything with another, weights and settings, but for some parts. Not public.

    The other is not touched, so that threads may run it meanwhile.

    Args:
        model: The other model.
        parts: Children to put in place of its own, by name.

    Returns:
        The model. It lives for one call: what is set on the other later is not set on it.
    """
    seen = object.__new__(type(model))
    # Compiled code, or a forward that was put on the object, would run the other model.
    settings = {name: value for name, value in vars(model).items() if name != "forward"}
    vars(seen).update(settings, _modules=model._modules | parts, _compiled_call_impl=None)
    return seen


class Given(nn.Module):
    """Module that returns a constant; extra attributes are copied from `known`."""

    def __init__(self, held: Any, **known: Any) -> None:
        super().__init__()
        self._held = held
        vars(self).update(known)

    def forward(self, *_args: Any, **_inputs: Any) -> Any:
        """What it holds."""
        return self._held


class Passing(nn.Module):
    """A block that does nothing. It is no part of the public API."""

    def forward(self, tokens: Tensor, *_args: Any, **_inputs: Any) -> Tensor:
        """The tokens."""
        return tokens


class Last(nn.Module):
    """A block that nothing runs after: it raises `Reached`. It is no part of the public API."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block = block

    def forward(self, *args: Any, **inputs: Any) -> NoReturn:
        """Run the block, and no further."""
        raise Reached(self._block(*args, **inputs))


class Reached(Exception):
    """Not an error: it carries tokens out of a forward, past all that would still be computed. Not public."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens
