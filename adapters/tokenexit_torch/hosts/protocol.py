"""Hosts: a vision transformer, seen as the parts between which tokens can leave.

A host declares what it has; nothing is guessed from a shape. `registry` knows the models that are taken as they are.
For a ViT of your own, any object that follows `Host` will do: a handful of lines.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from tokenexit import TokenExitError
from tokenexit.adapting import LARGEST, NORMALISED, warn_of_pixels
from tokenexit.area import Area
from tokenexit.errors import require

__all__ = ["Embedded", "Host"]


@dataclass(frozen=True)
class Embedded:
    """Images as tokens, ready for the first block.

    Attributes:
        tokens: The tokens; prefix tokens first, then the patches of the grid, row by row.
        prefix: How many leading tokens are no patches (cls, registers). They never leave.
        grid: Height and width of the patch grid.
        positions: What belongs to each slot and travels with its token to every block (rotary tables), if anything.
        covers: Height and width of the area that the grid covers, in pixels of the images, from their top left corner
            on; None if it is the whole image, in patches of one size. It is smaller than the image where pixels beyond
            the last whole patch are left out, and larger where images are padded to whole patches. If patches of
            another size cover the whole image, give the size of the image.
        pairs: Axis of `positions` of which one half holds sines and the other cosines, so that merged tokens can be
            turned by the angle of their centroid; None if there are no positions, or others, which then cannot merge.
    """

    tokens: Float[Tensor, "images slots width"]
    prefix: int
    grid: tuple[int, int]
    positions: Shaped[Tensor, "slots ..."] | None = None
    covers: tuple[int, int] | None = None
    pairs: int | None = None


@runtime_checkable
class Host(Protocol):
    """What a vision transformer must offer.

    Attributes:
        module: The model; it owns the weights. It stays the same.
        blocks: Its blocks, in order, looked up in the model whenever they are asked for: one that was exchanged runs.
            Attention in them must go through `torch.nn.functional.scaled_dot_product_attention`, without a mask.
        width: Channels of a token.
    """

    module: nn.Module
    width: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of an image that it takes, `(channels, height, width)`; the self-check draws one."""
        ...

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Its blocks."""
        ...

    def embed(self, images: Float[Tensor, "images channels height width"], /) -> Embedded:
        """All that happens before the first block."""
        ...

    def run(
        self, index: int, tokens: Float[Tensor, "rows tokens width"], positions: Shaped[Tensor, "tokens ..."] | None, /
    ) -> Float[Tensor, "rows tokens width"]:
        """Block `index` on any tokens, with the positions that belong to them.

        Not under gradient checkpointing: what is computed again later would attend across images.
        """
        ...

    def finish(self, tokens: Float[Tensor, "*tokens width"], /) -> Float[Tensor, "*tokens width"]:
        """What follows the last block and works on each token alone: the final norm."""
        ...

    def dense(
        self, images: Float[Tensor, "images channels height width"], /
    ) -> Float[Tensor, "images slots channels_out"]:
        """The model's own forward up to and including `finish`: what the self-check compares with."""
        ...


class Inattentive:
    """A host whose blocks treat each token by itself, and call no attention. It is no part of the public API."""


def embedded_by(host: Host, images: Tensor, /, *, patch: tuple[int, int] | None = None) -> Embedded:
    """What a host makes of images, after a check that it can take them. It is no part of the public API.

    Args:
        host: The host.
        images: The images.
        patch: Pixels of a patch where the host does not say what its grid covers (`patch_of`), if they are known.

    Raises:
        TokenExitError: If the shape, device or dtype of the images is not one that the model takes, or it is not known
            where on them the patches lie.
    """
    embedded = embedded_anywhere(host, images)
    patch_of(embedded, images, patch)
    return embedded


def embedded_anywhere(host: Host, images: Tensor, /) -> Embedded:
    """What a host makes of images, wherever its patches lie on them. It is no part of the public API.

    Raises:
        TokenExitError: If the shape, device or dtype of the images is not one that the model takes.
    """
    require(isinstance(images, Tensor), "images", "be a torch.Tensor", type(images).__name__)
    channels = host.image_shape[0]
    require(
        images.ndim == 4 and images.shape[1] == channels,
        "images",
        f"have shape (images, {channels}, height, width)",
        f"shape {tuple(images.shape)}",
    )
    require(images.layout == torch.strided, "images", "be dense", str(images.layout))
    weight = next(host.module.parameters())
    _require_whole(weight, images)
    there = images.device == weight.device
    require(there, "images", f"be on the device of the model, {weight.device}", str(images.device))
    require(images.is_floating_point(), "images", f"be {NORMALISED}", images.dtype)
    cast = torch.is_autocast_enabled(images.device.type) and images.is_floating_point()
    require(
        cast or images.dtype == weight.dtype, "images", f"have the dtype of the model, {weight.dtype}", images.dtype
    )
    _warn_unless_normalised(images)
    warn_if_drawing(host.module, *host.module.children())
    try:
        found = host.embed(images)
    except (TokenExitError, torch.OutOfMemoryError):
        raise
    except _OF_SIZES as error:
        if not _takes_its_own_size_alone(host, images):
            raise
        own = " x ".join(map(str, host.image_shape[1:]))
        rule = f"have a size that the model takes, as {own}: resize them, or cut windows (docs/howto/folder.md)"
        raise TokenExitError(f"`images` must {rule}, got {tuple(images.shape)}: {error}") from error
    rule = "give an Embedded: `tokenexit_torch.Embedded(tokens, prefix=..., grid=(rows, columns))`"
    require(isinstance(found, Embedded), "model.embed", rule, full_name(found))
    return found


_OF_SIZES = (AssertionError, ValueError, RuntimeError, IndexError)
"""What networks raise at images of a size that they do not take."""


def _takes_its_own_size_alone(host: Host, images: Tensor) -> bool:
    """Whether images of the size that a host names embed, and these are of another: then they failed by their size."""
    if images.shape[1:] == host.image_shape:
        return False
    try:
        host.embed(images.new_zeros((1, *host.image_shape)))
    except _OF_SIZES:
        return False
    return True


def _warn_unless_normalised(images: Tensor) -> None:
    """Warn of pixels from 0 to 255. It is no error, for there are networks that are trained on such.

    One pixel of 64 is looked at, and none on an accelerator, which would have to be waited for.
    """
    if images.device.type != "cpu" or torch.compiler.is_compiling() or type(images) is not Tensor:
        return
    few = images.detach()[..., ::8, ::8].float().numpy()
    if np.abs(few).max(initial=0) > LARGEST:
        warn_of_pixels()


def warn_if_drawing(*modules: nn.Module) -> None:
    """Warn of parts in training mode where there are no gradients: they are meant to be in evaluation mode. Not public.

    With gradients nothing is said, as nothing is by PyTorch: that is how networks are trained.

    Args:
        modules: Parts of the network; below one in evaluation mode nothing is looked at, which takes no time.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    training = (module for module in modules if module.training)
    every = (named for module in training for named in module.named_modules())
    drawing = [name or type(part).__name__ for name, part in every if part.training and _draws(part)]
    if drawing:
        rule = "be in evaluation mode where no gradients are taken: call `eval()` on what `wrap` returned"
        warnings.warn(f"`model` should {rule}, got training mode with `{drawing[0]}`", UserWarning, stacklevel=2)


def _draws(module: nn.Module) -> bool:
    """Whether a part draws at random, or looks at the whole batch, in training mode."""
    rate = getattr(module, "p", getattr(module, "drop_prob", 0.0))
    drops = "drop" in type(module).__name__.lower() and isinstance(rate, float) and rate > 0
    return drops or isinstance(module, BatchNorm)


def _require_whole(weight: Tensor, images: Tensor) -> None:
    """Weights must be there: parts are called one by one, so that what loads weights for a whole call does not."""
    if weight.is_meta:
        rule = "have its weights on a device: offloading brings them for calls of modules that are not called here"
        raise TokenExitError(f"`model` must {rule}, got weights on meta")
    plain = type(weight) in (nn.Parameter, Tensor, type(images))
    if not plain and type(weight).__module__.startswith("torch.distributed.tensor"):
        rule = (
            "have its weights whole: shard what `wrap` returns and not the model in it, and name other methods than"
            " its forward to torch.distributed.fsdp.register_fsdp_forward_method"
        )
        raise TokenExitError(f"`model` must {rule}, got sharded weights")


def patch_of(embedded: Embedded, images: Tensor, known: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Height and width of a patch in pixels; None if the host says what its grid covers. Not public.

    Args:
        embedded: What the host has made of the images.
        images: The images.
        known: What a patch must be; any whole number of pixels if None.

    Raises:
        TokenExitError: If the images are no whole patches of that size, or the area that the grid covers is none.
    """
    height, width = images.shape[-2:]
    (rows, columns), covers = embedded.grid, embedded.covers
    if covers is not None:
        if min(covers) <= 0:
            got = f"{height} x {width} pixels, of which the grid covers {covers[0]} x {covers[1]}"
            require(False, "images", "hold a whole patch", got)
        return None
    patch = (height // rows, width // columns)
    if (rows * patch[0], columns * patch[1]) != (height, width) or known not in (None, patch):
        size = "whole" if known is None else f"of {known[0]} x {known[1]} pixels, as they are for `image_shape`"
        rule = f"have sides of patches that are {size}, or `model.embed` say what area the grid covers"
        declared = "Embedded(..., covers=(height, width))"
        got = f"{height} x {width} pixels in a grid of {rows} x {columns}"
        require(False, "images", f"{rule}: {declared}", got)
    return patch


def area_of(embedded: Embedded, images: Tensor) -> Area | None:
    """The area of the images that the grid covers; None if it is the whole of them. It is no part of the public API."""
    height, width = images.shape[-2:]
    rows, columns = embedded.covers or (height, width)
    return None if (rows, columns) == (height, width) else Area((rows, columns), (height, width))


def require_covered(area: Area | None) -> None:
    """Raise unless patches cover the images exactly: losses on bare logits know of nothing else. Not public.

    Raises:
        TokenExitError: If they do not.
    """
    if area is not None:
        (height, width), (rows, columns) = area.image, area.covered
        rule = "be covered exactly by their patches for losses: cut or pad them and their labels to whole patches"
        require(False, "images", rule, f"{height} x {width} pixels, of which patches cover {rows} x {columns}")


def full_name(model: object) -> str:
    """Module and name of a model's class. It is no part of the public API."""
    return f"{type(model).__module__}.{type(model).__qualname__}"
