"""Application of heads: to the patches of the static layout, and to all patches of a batch."""

from collections.abc import Callable
from dataclasses import replace

import jax
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Float

from tokenexit import scores, surroundings
from tokenexit.exits import HeadOutput
from tokenexit.heads import ATM, HeadPlan, Neighbourhood
from tokenexit.tokens import Selection
from tokenexit_jax._layers import Weights
from tokenexit_jax.heads.build import read, read_in_training, translate
from tokenexit_jax.heads.masks import log_scores, read_masks

__all__ = ["apply_head", "apply_translator"]


def apply_head(
    plan: HeadPlan,
    weights: Weights,
    patches: Float[Array, "images entries dim"],
    selection: Selection | None = None,
    /,
    *,
    grid: tuple[int, int],
    training: bool = False,
) -> tuple[HeadOutput, dict[str, Array] | None]:
    """Output of a head for patches.

    Args:
        plan: Which kind of head.
        weights: Its weights.
        patches: The patches.
        selection: Their receipt; all patches of a batch if left out.
        grid: Height and width of the patch grid.
        training: Whether batch norm takes its statistics from these patches.

    Returns:
        The output, and what batch norm has learned; None where nothing learns.
    """
    valid = jnp.ones(patches.shape[:2], dtype=bool) if selection is None else selection.valid
    if isinstance(plan, ATM):
        found = read_masks(plan, weights, patches, valid)
        masks, of_images = (part.astype(jnp.promote_types(part.dtype, jnp.float32)) for part in found)
        presence = of_images[:, None]
        constant = lax.stop_gradient((masks, jax.nn.sigmoid(presence)))
        return HeadOutput(log_scores(masks, presence), scores.mask_scores(*constant), masks, of_images), None
    if isinstance(plan, Neighbourhood):
        around = {"grid": grid, "radius": plan.radius}
        if selection is None:
            patches = surroundings.beside_all(patches, **around)
        else:
            patches = surroundings.beside_running(patches, selection, **around)
    if training:
        logits, statistics = read_in_training(plan, weights, patches, valid)
        return HeadOutput(logits), statistics
    return HeadOutput(read(plan, weights, patches)), None


def apply_translator(
    weights: Weights,
    patches: Float[Array, "images entries dim"],
    final: Callable[[Float[Array, "images entries dim"]], HeadOutput],
    /,
) -> HeadOutput:
    """Output of a translator for patches, class scores that the final head gives of what it makes of them among it.

    Args:
        weights: Its weights.
        patches: The patches.
        final: Output of the final head for patches as the last block would leave them.

    Returns:
        The output.
    """
    translated, log_error = translate(weights, patches)
    # What is foretold decides, and decisions have no gradient.
    return replace(final(translated), features=translated, error=jnp.exp(lax.stop_gradient(log_error)))
