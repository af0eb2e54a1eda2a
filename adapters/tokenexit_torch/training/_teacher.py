"""A frozen network as a teacher of exit heads: patches before every exit, and the outputs that are to be foretold."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from tokenexit.area import Area
from tokenexit.errors import require
from tokenexit.features import FINAL, LAST, TARGET, Rows, pixel_patches
from tokenexit.schedule import Merge
from tokenexit_torch._files import digest, fingerprint
from tokenexit_torch._images import Batch, parted
from tokenexit_torch._modules import evaluating
from tokenexit_torch.exits.base import WithExits
from tokenexit_torch.heads.reading import radius_of

__all__ = ["Seen", "Teacher", "label_share"]

Seen = Callable[[Tensor], tuple[dict[int, Tensor], Tensor, Area | None, tuple[int, int]]]
"""From images: patches by exit, and those of the last block by its number if translators are fitted to them; class
scores `(images, patches, classes)`, the area that they cover, and the grid."""


class Teacher:
    """A frozen network that gives rows of batches.

    Args:
        model: The network; of its exit heads it matters only whether, and how far, they look around tokens.
        seen: Its features and outputs for images.
        label_weight: What labels weigh in the target of a patch with a label on every pixel.
        ignore: Label of pixels that do not count.
        merges: How tokens merge before the heads, if they do.
        keys: As what merged tokens are keys of attention (`Schedule.keys`).
    """

    def __init__(
        self,
        model: WithExits,
        seen: Seen,
        *,
        label_weight: float,
        ignore: int,
        merges: Sequence[Merge] = (),
        keys: str = "tokens",
    ) -> None:
        self._merges, self._keys = tuple(merges), keys
        require(0 <= label_weight <= 1, "label_weight", "be between 0 and 1", label_weight)
        self._model, self._seen = model, seen
        self._label_weight, self._ignore = label_weight, ignore

    @property
    def marks(self) -> dict[str, str]:
        """What the rows depend on beside the images, by name: all weights are gone through."""
        weights = self._model.state_dict().items()
        frozen = [value for name, value in weights if not name.startswith("exit_heads.")]
        labels = {"label_weight": str(self._label_weight), "ignore": str(self._ignore)}
        read = [f"{after}: {radius_of(head)}" for after, head in self._model.exit_heads.items()]
        read += ["last block"] if self._model.translated_after else []
        found = {"model": fingerprint(frozen), "exits": ", ".join(read)} | labels
        if self._merges:
            heads = [head for head in map(self._head_of, self._merges) if head is not None]
            weights = [value for head in heads for value in head.state_dict().values()]
            found["merges"] = f"{self._merges}, {fingerprint(weights)}"
            found |= {} if self._keys == "tokens" else {"keys": self._keys}
        return found

    def _head_of(self, merge: Merge) -> nn.Module | None:
        return None if merge.agreed is None else self._model.exit_heads[str(merge.after)]

    def digests(self, batch: Batch, /) -> tuple[str, ...]:
        """The digest of each image, after a check of the batch."""
        return tuple(map(digest, parted(batch)[0]))

    def fingerprint(self, batch: Batch, /) -> str:
        """The fingerprint of a batch, labels included."""
        return fingerprint(part for part in parted(batch) if part is not None)

    def part(self, batch: Batch, images: slice, /) -> Batch:
        """Some images of a batch, with their labels."""
        every, label = parted(batch)
        return every[images] if label is None else (every[images], label[images])

    @torch.no_grad()
    def rows(self, batch: Batch, /) -> tuple[Rows, list[int]]:
        """Rows of a batch, and how many there are of each image: patches with a NaN or an infinity are left out."""
        images, label = parted(batch)
        with evaluating(self._model):
            exits, scores, area, grid = self._seen(images)
        scores = scores.float()
        target = scores.softmax(dim=-1)
        classes = target.shape[-1]
        if label is not None:
            require(classes > 0, "images", "come without labels for translators that give no class scores", "labels")
            known = {"classes": classes, "ignore": self._ignore}
            share = label_share(label.to(target.device), grid, area, **known)
            target = target + self._label_weight * (share - share.sum(dim=-1, keepdim=True) * target)
        finite = torch.stack([part.isfinite().all(dim=-1) for part in (scores, *exits.values())]).all(dim=0)
        depth = self._model.depth
        every = {LAST if after == depth else str(after): patches for after, patches in exits.items()}
        final = scores.argmax(dim=-1).int() if classes else torch.zeros_like(finite, dtype=torch.int32)
        every |= {TARGET: target, FINAL: final}
        return {name: value[finite] for name, value in every.items()}, finite.sum(dim=1).tolist()


def label_share(
    label: Integer[Tensor, "images height width"],
    grid: tuple[int, int],
    area: Area | None = None,
    /,
    *,
    classes: int,
    ignore: int,
) -> Float[Tensor, "images patches classes"]:
    """Which share of its pixels each patch has of each class; they sum to the share of the pixels with a label.

    A pixel belongs to the one patch that its upper left corner is in, whatever the size of the label map. Pixels that
    no patch covers do not count, nor do those by which an image was padded.
    """
    images = len(label)
    known = label != ignore
    fits = bool(((label >= 0) & (label < classes) | ~known).all())
    rule = f"have labels from 0 to {classes - 1}, or {ignore} to be ignored"
    require(fits, "images", rule, f"{int(label.min())} to {int(label.max())}")
    patch = pixel_patches(label, grid, area)
    label, known = (one[:, : patch.shape[0], : patch.shape[1]] for one in (label, known))
    patches = grid[0] * grid[1]
    pixels = patch.flatten().bincount(minlength=patches)
    # One bin more than there are classes, for pixels without a label.
    image = torch.arange(images, device=label.device)[:, None, None]
    bins = (image * patches + patch) * (classes + 1) + torch.where(known, label, classes)
    counts = bins.flatten().bincount(minlength=images * patches * (classes + 1))
    return counts.view(images, patches, classes + 1)[..., :classes] / pixels.clamp(min=1)[:, None]
