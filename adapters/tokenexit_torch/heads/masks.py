"""Heads that look at all patches of an image, and give a mask for every class: attention to mask (ATM).

Such a head cannot be called on tokens of several images as if they were one. It is given which belong together, and
reads patches alone: prefix tokens are left out.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tokenexit.cost import HeadCost, atm_head
from tokenexit.errors import TokenExitError, require

__all__ = ["AttentionToMask", "MaskHead", "MaskMaps", "Masks"]


class Masks(NamedTuple):
    """What a mask head predicts for a row of patches.

    Attributes:
        mask_logits: For every patch and class, the logit of the patch being of the class, if the class is there at all.
        presence_logits: For every image and class, the logit of the class being in the image. For an image without
            any patch it means nothing, and is finite.
    """

    mask_logits: Float[Tensor, "*patches classes"]
    presence_logits: Float[Tensor, "images classes"]


class MaskMaps(NamedTuple):
    """What a mask head predicts for whole images: what `mask_loss` is computed from.

    Attributes:
        mask_logits: The mask of every class, at the size of the patch grid.
        presence_logits: For every image and class, the logit of the class being in the image.
    """

    mask_logits: Float[Tensor, "images classes grid_height grid_width"]
    presence_logits: Float[Tensor, "images classes"]


class MaskHead(nn.Module, ABC):
    """A head that reads masks and presence off all patches of an image; `wrap` takes any of them."""

    @property
    @abstractmethod
    def cost(self) -> HeadCost:
        """Multiply-adds of the head."""

    @abstractmethod
    def forward(self, row: Float[Tensor, "patches width"], lengths: Sequence[int]) -> Masks:
        """Read patches, image by image.

        Args:
            row: Patches of all images, one image after the other.
            lengths: How many of them belong to each image, in order; 0 for an image that has none left.

        Returns:
            Mask logits of these patches, and presence in each image. An image's do not depend on other images.
        """

    def padded(self, entries: Float[Tensor, "images entries width"], valid: Bool[Tensor, "images entries"]) -> Masks:
        """Read patches of the static layout, in which shapes do not depend on the data; for `StaticModel` alone.

        Args:
            entries: As many entries for each image; those that are not valid hold nothing to be read, but are finite.
            valid: Which entries hold a patch.

        Returns:
            Mask logits of all entries, and presence in each image.

        Raises:
            TokenExitError: If the head does not implement it.
        """
        del entries, valid
        rule = "have mask heads that implement `padded`, for the static layout"
        raise TokenExitError(f"`model` must {rule}, got {type(self).__name__}")


class AttentionToMask(MaskHead):
    """One query for each class attends to the patches (SegViT, NeurIPS 2022, section 3; as in DToP, ICCV 2023).

    In each layer the queries attend to each other, then to the patches, and pass an MLP; a norm follows each of the
    three. The mask of a class is the scaled query-key product of the last layer, before the softmax, averaged over the
    attention's heads.

    Args:
        width: Channels of the patches, even; the head has half of them.
        classes: Class count.
        layers: Decoder layers. Published: 3.
        attention_heads: Must divide half the width. None: one for each 32 of its channels, at least one.

    Raises:
        TokenExitError: If a size does not fit.
    """

    def __init__(self, width: int, classes: int, *, layers: int = 3, attention_heads: int | None = None) -> None:
        super().__init__()
        self._cost = atm_head(width=width, classes=classes, layers=layers)
        half = width // 2
        heads = max(half // 32, 1) if attention_heads is None else attention_heads
        require(heads >= 1 and half % heads == 0, "attention_heads", f"divide half the width, {half}", heads)
        self.memory = nn.Sequential(nn.Linear(width, half), nn.LayerNorm(half))
        self.queries = nn.Parameter(torch.randn(classes, half))
        self.layers = nn.ModuleList(_Layer(half, heads) for _ in range(layers))
        self.presence = nn.Linear(half, 2)

    @property
    def cost(self) -> HeadCost:
        """Multiply-adds of the head: `tokenexit.cost.atm_head`."""
        return self._cost

    def forward(self, row: Float[Tensor, "patches width"], lengths: Sequence[int]) -> Masks:
        """Read patches, image by image; images are padded to the longest of them, and those without any left out."""
        padding = _pad(lengths, row.device)
        product, odds = self._read(self.memory(row), padding)
        everywhere = odds.new_zeros(len(lengths), odds.shape[1]).index_copy(0, padding.image, odds)
        flat = rearrange(product, "images places classes -> (images places) classes")
        return Masks(flat.index_select(0, padding.place), everywhere)

    def padded(self, entries: Float[Tensor, "images entries width"], valid: Bool[Tensor, "images entries"]) -> Masks:
        """Read patches of the static layout; see `MaskHead.padded`."""
        # Of an image without any patch all entries are read: its softmax must be over something.
        return Masks(*self._read(self.memory(entries), _Valid(valid | ~valid.any(dim=1, keepdim=True))))

    def _read(self, memory: Tensor, padding: "_Padding | _Valid") -> tuple[Tensor, Tensor]:
        """Query-key products of the last layer, and the logit of presence of every class."""
        # A copy: without gradients, torch's FLOP counter cannot follow a view of a parameter.
        queries = self.queries.repeat(padding.real.shape[0], 1, 1)
        product = memory.new_zeros(*padding.real.shape, len(self.queries))
        for layer in self.layers:
            queries, product = layer(queries, memory, padding)
        absent, present = self.presence(queries).unbind(dim=-1)
        # Of a softmax of two, the difference of the logits is all there is.
        return product, present - absent


class _Padding(NamedTuple):
    """A ragged row as a padded batch of the images that have any patch.

    Attributes:
        image: Which images these are.
        real: Which places of the batch hold a patch.
        place: Place of every patch of the row, in the flattened batch.
    """

    image: Int[Tensor, "images"]
    real: Bool[Tensor, "images places"]
    place: Int[Tensor, "patches"]

    def fill(self, row: Float[Tensor, "patches width"]) -> Float[Tensor, "images places width"]:
        """The padded batch. What pads is zero: a weight of 0 would not hide another image's NaN."""
        empty = row.new_zeros(self.real.numel(), row.shape[1])
        return empty.index_copy(0, self.place, row).reshape(*self.real.shape, row.shape[1])


class _Valid(NamedTuple):
    """A batch that is padded already.

    Attributes:
        real: Which places of it are read.
    """

    real: Bool[Tensor, "images places"]

    def fill(self, batch: Float[Tensor, "images places width"]) -> Float[Tensor, "images places width"]:
        """The batch, zero where nothing is read."""
        return torch.where(self.real[..., None], batch, 0)


def _pad(lengths: Sequence[int], device: torch.device) -> _Padding:
    held = [index for index, length in enumerate(lengths) if length]
    longest = max(lengths, default=0)
    image, start = _segments([lengths[index] for index in held], device)
    count = torch.tensor([lengths[index] for index in held], dtype=torch.int64, device=device)
    place = image * longest + torch.arange(len(image), device=device) - start.index_select(0, image)
    real = torch.arange(longest, device=device) < count[:, None]
    return _Padding(torch.tensor(held, dtype=torch.int64, device=device), real, place)


def _segments(lengths: Sequence[int], device: torch.device) -> tuple[Int[Tensor, "tokens"], Int[Tensor, "images"]]:
    """Image of every token of a row, and where each image starts; without waiting for the device."""
    count = torch.tensor(lengths, dtype=torch.int64, device=device)
    images = torch.arange(len(lengths), device=device)
    return torch.repeat_interleave(images, count, output_size=sum(lengths)), count.cumsum(0) - count


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.among = nn.Linear(width, 3 * width)
        self.among_out = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(
        self,
        queries: Float[Tensor, "images classes width"],
        memory: Float[Tensor, "*patches width"],
        padding: _Padding | _Valid,
    ) -> tuple[Float[Tensor, "images classes width"], Float[Tensor, "images places classes"]]:
        """The queries after this layer, and its query-key products."""
        q, k, v = (self._split(part) for part in self.among(queries).chunk(3, dim=-1))
        attended = functional.scaled_dot_product_attention(q, k, v)
        queries = self.norms[0](queries + self.among_out(_join(attended)))
        q = self._split(self.query(queries))
        k, v = (self._split(padding.fill(part)) for part in self.key_value(memory).chunk(2, dim=-1))
        product = q @ k.mT * q.shape[-1] ** -0.5
        weight = product.masked_fill(~padding.real[:, None, None], -torch.inf).softmax(dim=-1)
        queries = self.norms[1](queries + self.out(_join(weight.to(v.dtype) @ v)))
        queries = self.norms[2](queries + self.mlp(queries))
        return queries, rearrange(product.mean(dim=1), "images classes places -> images places classes")

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "images tokens (heads width) -> images heads tokens width", heads=self.heads)


def _join(x: Tensor) -> Tensor:
    return rearrange(x, "images heads tokens width -> images tokens (heads width)")


def log_scores(
    mask_logits: Float[Tensor, "*patches classes"], presence_logits: Float[Tensor, "*#patches classes"]
) -> Float[Tensor, "*patches classes"]:
    """Logarithm of `tokenexit.scores.mask_scores`: class scores that can be interpolated, and compared near 1."""
    return functional.logsigmoid(presence_logits) + functional.logsigmoid(mask_logits)


def widened(masks: Masks) -> Masks:
    """The same in float32 at least, in which all scores are computed."""
    return Masks(*(part.to(torch.promote_types(part.dtype, torch.float32)) for part in masks))


def patch_rows(lengths: Sequence[int], prefix: int, device: torch.device) -> tuple[Int[Tensor, "patches"], list[int]]:
    """Which tokens of a row are patches, and how many of each image, read off the lengths alone.

    The prefix tokens of an image come first, and run for as long as any of its patches does.
    """
    patches = [max(length - prefix, 0) for length in lengths]
    image, _ = _segments(patches, device)
    skipped = torch.tensor([count > 0 for count in patches], dtype=torch.int64, device=device).cumsum(0) * prefix
    return torch.arange(len(image), device=device) + skipped.index_select(0, image), patches


def as_maps(
    mask_logits: Float[Tensor, "images patches classes"],
    presence_logits: Float[Tensor, "images classes"],
    grid: tuple[int, int],
) -> MaskMaps:
    """Masks of all patches, laid out on the grid."""
    height, width = grid
    pattern = "images (height width) classes -> images classes height width"
    return MaskMaps(rearrange(mask_logits, pattern, height=height, width=width), presence_logits)
