"""Application of heads: to the tokens that run, in either layout, and to all patches of a batch."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tokenexit import scores, surroundings
from tokenexit.errors import require
from tokenexit.exits import HeadOutput
from tokenexit.heads import Reads
from tokenexit.tokens import Receipt, Selection
from tokenexit_torch._modules import counts_batches, is_training
from tokenexit_torch.heads.build import NeighbourhoodHead, TokenTranslator
from tokenexit_torch.heads.masks import MaskHead, Masks, log_scores, patch_rows, widened

__all__ = [
    "Final",
    "apply_head",
    "apply_head_dense",
    "detached",
    "dim_in",
    "head_input",
    "radius_of",
    "reads_of",
    "translates",
]

Final = tuple[Callable[[Tensor], Tensor], nn.Module]
"""The final norm and the final head of a network, which read what a translator gives."""


def reads_of(head: nn.Module, /) -> Reads:
    """Input of a head, as its plan has it: tokens, neighbourhoods or images."""
    if isinstance(head, MaskHead):
        return "images"
    return "neighbourhoods" if isinstance(head, NeighbourhoodHead) else "tokens"


def radius_of(head: nn.Module, /) -> int:
    """Radius of the neighbourhood that a head reads; 0 for one that treats each token by itself."""
    return head.radius if isinstance(head, NeighbourhoodHead) else 0


def dim_in(head: nn.Module, dim: int, /) -> int:
    """Channels that a head reads for each token of so many channels."""
    return 2 * dim if reads_of(head) == "neighbourhoods" else dim


def translates(head: nn.Module, /) -> bool:
    """Whether a head gives tokens, which the final head reads."""
    return isinstance(head, TokenTranslator)


def apply_head(
    head: nn.Module,
    row: Float[Tensor, "entries dim"],
    receipt: Receipt,
    /,
    *,
    lengths: Sequence[int],
    grid: tuple[int, int],
    prefix: int,
    final: Final | None = None,
) -> HeadOutput:
    """Output of a head for the tokens that run.

    Args:
        head: The head.
        row: The tokens, in one row.
        receipt: Their receipt.
        lengths: Entries of each image in the row.
        grid: Height and width of the patch grid.
        prefix: Tokens of an image that come before its patches. A mask head does not read them.
        final: What reads what a translator gives; None under a decoder: then there are no class scores.

    Returns:
        The output, in the layout of the receipt.

    Raises:
        TokenExitError: If the head has batch norm in training in the static layout, or is a mask head for packed rows
            alone there.
    """
    if isinstance(head, MaskHead):
        return _masks(head, row, receipt, lengths, prefix)
    if isinstance(head, TokenTranslator):
        translated, log_error = head.foretell(row)
        translated = translated.to(row.dtype)
        if final is None:
            output = HeadOutput(row.new_zeros(*receipt.layout, 0))
        else:
            finish, last = final
            output = apply_head(last, finish(translated), receipt, lengths=lengths, grid=grid, prefix=prefix)
        features, error = (one.unflatten(0, receipt.layout) for one in (translated, log_error.exp()))
        return replace(output, features=features, error=error)
    if isinstance(head, NeighbourhoodHead):
        laid = row.reshape(*receipt.layout, row.shape[-1])
        row = surroundings.beside_running(laid, receipt, grid=grid, radius=head.radius).flatten(0, -2)
    return HeadOutput(_scored(head, row, receipt, lengths, prefix).unflatten(0, receipt.layout))


def _scored(head: nn.Module, row: Tensor, receipt: Receipt, lengths: Sequence[int], prefix: int) -> Tensor:
    """Class scores of every token of the row."""
    if isinstance(receipt, Selection):  # which entries hold a patch is known on the device alone
        rule = "have no batch norm in training, which would count entries without a patch: train by `Staged`, packed"
        require(not counts_batches(head), "model", rule, type(head).__name__)
        return head(row)
    if prefix == 0 or not is_training(head):
        return head(row)
    # What a head learns from, statistics of batch norm among it, are patches alone.
    rows, _ = patch_rows(lengths, prefix, row.device)
    found = head(row.index_select(0, rows))
    return found.new_zeros(row.shape[0], *found.shape[1:]).index_copy(0, rows, found)


def _masks(head: MaskHead, row: Tensor, receipt: Receipt, lengths: Sequence[int], prefix: int) -> HeadOutput:
    if isinstance(receipt, Selection):
        patches = row.unflatten(0, receipt.layout)[:, prefix:]
        found = widened(head.padded(patches, receipt.valid[:, prefix:]))
        mask_logits = nn.functional.pad(found.mask_logits, (0, 0, prefix, 0))
    else:
        rows, counts = patch_rows(lengths, prefix, row.device)
        found = widened(head(row.index_select(0, rows), counts))
        nothing = found.mask_logits.new_zeros(row.shape[0], found.mask_logits.shape[1])
        mask_logits = nothing.index_copy(0, rows, found.mask_logits)
    masks = Masks(mask_logits, found.presence_logits)
    presence = masks.presence_logits.index_select(0, receipt.image).reshape(masks.mask_logits.shape)
    class_scores = scores.mask_scores(masks.mask_logits.detach(), presence.detach().sigmoid())
    return HeadOutput(log_scores(masks.mask_logits, presence), class_scores, *masks)


def apply_head_dense(
    head: nn.Module,
    patches: Float[Tensor, "images patches dim"],
    /,
    *,
    grid: tuple[int, int],
    final: Final | None = None,
) -> HeadOutput:
    """Output of a head for all patches of a batch."""
    if isinstance(head, TokenTranslator):
        translated, log_error = head.foretell(patches)
        translated = translated.to(patches.dtype)
        if final is None:
            output = HeadOutput(patches.new_zeros(*patches.shape[:2], 0))
        else:
            finish, last = final
            output = apply_head_dense(last, finish(translated), grid=grid)
        return replace(output, features=translated, error=log_error.exp())
    if not isinstance(head, MaskHead):
        return HeadOutput(head(head_input(head, patches, grid=grid)))
    images, places, _ = patches.shape
    found = widened(head(rearrange(patches, "images places dim -> (images places) dim"), [places] * images))
    mask_logits = found.mask_logits.reshape(images, places, found.mask_logits.shape[1])
    presence = found.presence_logits
    return HeadOutput(log_scores(mask_logits, presence[:, None]), mask_logits=mask_logits, presence_logits=presence)


def head_input(
    head: nn.Module, patches: Float[Tensor, "images patches dim"], /, *, grid: tuple[int, int]
) -> Float[Tensor, "images patches dim_in"]:
    """Input of a head: all patches of a batch, beside the means of their neighbourhoods if it reads these."""
    if not isinstance(head, NeighbourhoodHead):
        return patches
    return surroundings.beside_all(patches, grid=grid, radius=head.radius)


def detached(output: HeadOutput, /) -> HeadOutput:
    """The same output as constants."""
    masks = (None if part is None else part.detach() for part in (output.mask_logits, output.presence_logits))
    features, error = (None if part is None else part.detach() for part in (output.features, output.error))
    return HeadOutput(output.logits.detach(), output.class_scores, *masks, features=features, error=error)
