"""A vision transformer with tokens that leave early, with shapes that are known beforehand.

The tokens run as a plain batch until the first exit point. From then on what lies between two exit points has the shape
of the whole batch, and each stage of blocks gathers the tokens that still run into as many entries as the smallest
bucket that holds those of every image. Which tokens leave, and what they leave behind, is decided by the core.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp
from jax.core import Tracer
from jaxtyping import Float, Int

from tokenexit import TokenExitError
from tokenexit.adapting import require_fits
from tokenexit.cost import Cost
from tokenexit.errors import require
from tokenexit.policies import Threshold
from tokenexit.schedule import Schedule
from tokenexit_jax._counting import head_cost, network_cost
from tokenexit_jax._given import new_keys, require_images
from tokenexit_jax.exits.forward import (
    ExitSpec,
    Given,
    State,
    entries_needed,
    finish,
    first_stage,
    on_grid,
    patches_after,
    read_all,
    run_pass,
    run_stage,
)
from tokenexit_jax.exits.outputs import Output
from tokenexit_jax.heads import build as building
from tokenexit_jax.heads.masks import MaskMaps
from tokenexit_jax.networks.checks import require_covered
from tokenexit_jax.networks.protocol import Heads, Params
from tokenexit_jax.pytrees import of_pytrees, on_host

__all__ = ["ExitingModel"]


@dataclass(frozen=True)
class ExitingModel(ExitSpec):
    """A vision transformer with tokens that leave early; made by `wrap`. It holds no weights, and nothing changes it.

    Attributes:
        network: The wrapped network.
        schedule: The plan in use; `retuned` gives a model with another.
        classes: Class count.
        after: The blocks that have an exit head.
        head_plan: How the exit heads are built.
        head: The final head, `head(params, tokens)`, if it was given; None if it is built from the plan as well, or
            beside translators from the plan `head_plan.final`.
        capacities: For each block with an exit head the buckets after it, ascending, as fractions of an image's slots.
        fitted: Digests of the images that the heads were fitted to, as they were saved with them.
    """

    schedule: Schedule
    fitted: tuple[str, ...] = field(default=(), compare=False)  # no program depends on it

    def __call__(self, params: Params, heads: Heads, images: Array, schedule: Schedule | None = None) -> Output:
        """Segment images, with buckets that are chosen on the host.

        It compiles its stages itself, each for the buckets that it meets. For every exit with several buckets one
        integer is fetched; with a single one nothing is, and nothing waits.

        Args:
            params: Parameters of the network.
            heads: Weights of the heads.
            images: The images, as the network takes them.
            schedule: A plan for this call only; the model's own if left out.

        Returns:
            Class scores, exit depth, executed tokens.

        Raises:
            TokenExitError: If the plan or the weights do not fit the model, or the network's parts not each other.
        """
        require_images(images)
        plan = as_arrays(checked(self, self.schedule if schedule is None else schedule))
        heads = validated_heads(self, heads)
        # Programs do not differ by the plan, whose numbers are data, nor by buckets that they do not work on.
        greatest = tuple(fractions[-1:] for fractions in self.capacities)
        model = dataclasses.replace(self, schedule=Schedule(), capacities=greatest)
        state, wanted = _first_stage(model, params, heads, images, plan)
        given = Given(self, params, heads, plan)
        for at in range(1, len(given.stages)):
            sizes = given.sizes(at, state)
            if len(sizes) > 1 and isinstance(wanted, Tracer):
                raise TokenExitError("`model` must be transformed as `model.compiled`, got the model itself")
            entries = sizes[0] if len(sizes) == 1 else int(wanted)
            if entries == 0:
                break
            capacity = next(size for size in sizes if size >= entries)
            state, wanted = _run_stage(model, params, heads, state, plan, at=at, capacity=capacity)
        return _finish(model, params, heads, state, plan)

    def compiled(self, params: Params, heads: Heads, images: Array, schedule: Schedule | None = None) -> Output:
        """Segment images in one program: the function for `jax.jit`, `jax.grad`, `jax.shard_map` and `jax.export`.

        `lax.switch` chooses the bucket of each stage. Never `jax.vmap` it: all branches would run.

        Args:
            params: Parameters of the network.
            heads: Weights of the heads.
            images: The images, as the network takes them.
            schedule: A plan for this call only; the model's own if left out. As an argument of the compiled function
                its thresholds are data.

        Returns:
            Class scores, exit depth, executed tokens.

        Raises:
            TokenExitError: If the plan or the weights do not fit the model, or the network's parts not each other.
        """
        plan = checked(self, self.schedule if schedule is None else schedule)
        given = Given(self, params, validated_heads(self, heads), plan)
        return finish(given, run_pass(given, images))

    def init(self, key: Array) -> Heads:
        """Random weights for the heads.

        Args:
            key: Random key.

        Returns:
            The weights.
        """
        keys = new_keys(key, len(self.after) + 1)
        new = partial(building.init, width=self.network.width, classes=self.classes)
        exit_heads = {str(after): new(self.head_plan, one) for after, one in zip(self.after, keys[1:], strict=True)}
        return {"exit_heads": exit_heads} | ({"head": new(self.head_plan.final, keys[0])} if self.head is None else {})

    def retuned(
        self,
        schedule: Schedule | None = None,
        /,
        *,
        threshold: Threshold | Mapping[int, Threshold] | None = None,
        alike: float | Mapping[int, float] | None = None,
    ) -> "ExitingModel":
        """The same model with another plan, other thresholds, for which nothing is compiled again, or similarities.

        Thresholds that are arrays without axes become Python's numbers, unless they are traced: they are waited for.

        Args:
            schedule: A new plan, with exits only after blocks that have an exit head; the present one if left out.
            threshold: New thresholds for that plan: one for all exits, or one for each of some blocks.
            alike: New similarities for its merges: one for all that ask for any, or one for each of some blocks.

        Returns:
            A model.

        Raises:
            TokenExitError: If none is given, an exit has no head, or a threshold or similarity does not fit.
        """
        plan = None if schedule is None else checked(self, schedule)
        plan = self.schedule.retuned(plan, threshold=threshold, alike=alike)
        return dataclasses.replace(self, schedule=on_host(checked(self, plan)))

    def every_exit(
        self, params: Params, heads: Heads, images: Array
    ) -> dict[int, Float[Array, "images grid_height grid_width classes"]]:
        """Class scores of every head on all tokens, in one dense run: for auxiliary losses.

        Args:
            params: Parameters of the network.
            heads: Weights of the heads.
            images: The images, as the network takes them.

        Returns:
            Logits by blocks run; the last entry is the final head's.

        Raises:
            TokenExitError: If the weights do not fit the model, the network's parts not each other, or patches do not
                cover the images exactly, which losses on the logits of patches take for granted.
        """
        outputs, embedded = read_all(Given(self, params, validated_heads(self, heads), Schedule()), images)
        require_covered(embedded.area)
        return {after: on_grid(one.logits, embedded.grid) for after, one in outputs.items()}

    def every_mask(self, params: Params, heads: Heads, images: Array) -> dict[int, MaskMaps]:
        """Masks and presence of every head on all tokens, in one dense run.

        Args:
            params: Parameters of the network.
            heads: Weights of the heads.
            images: The images, as the network takes them.

        Returns:
            Masks and presence by blocks run; the last entry is the final head's.

        Raises:
            TokenExitError: If the heads are no mask heads, their weights do not fit the model, the network's parts not
                each other, or patches do not cover the images exactly.
        """
        require(self.gives_masks, "model", "have mask heads", repr(self.head_plan))
        outputs, embedded = read_all(Given(self, params, validated_heads(self, heads), Schedule()), images)
        require_covered(embedded.area)
        return {
            after: MaskMaps(on_grid(one.mask_logits, embedded.grid), one.presence_logits)
            for after, one in outputs.items()
            if one.mask_logits is not None and one.presence_logits is not None
        }

    def patches_after(
        self, params: Params, images: Array
    ) -> dict[int, Float[Array, "images grid_height grid_width width"]]:
        """Patches as every head would read them, in one dense run.

        Args:
            params: Parameters of the network.
            images: The images, as the network takes them.

        Returns:
            Patches by blocks run: as the block leaves them for the exit heads, finished for the final head, which is
            the last entry. A head of the plan `heads.Neighbourhood` reads them by `surroundings.beside_all`.

        Raises:
            TokenExitError: If the network's parts do not fit each other.
        """
        patches, embedded = patches_after(Given(self, params, {}, Schedule()), images)
        return {after: on_grid(rows, embedded.grid) for after, rows in patches.items()}

    def cost(self, params: Params, images: Any) -> Cost:
        """What the parts of the network cost, read off the products and convolutions in its programs; nothing is run.

        Args:
            params: Parameters of the network, or `jax.ShapeDtypeStruct` in their place.
            images: Images of the size in question, or a `jax.ShapeDtypeStruct`.

        Returns:
            The cost of the parts.

        Raises:
            TokenExitError: If the attention of a block is not over `width` channels, which `Cost` takes for granted, or
                a block has other work that does not grow with the tokens.
        """
        plan, width = self.head_plan, self.network.width
        found = network_cost(self.network, params, images)
        token = jax.ShapeDtypeStruct((1, 1, width), jax.eval_shape(self.network.embed, params, images).tokens.dtype)
        priced = partial(building.cost, width=width, classes=self.classes)
        last = priced(plan.final) if self.head is None else head_cost(self.head, params, token)
        one = priced(plan, final=last if plan.translates else None)
        return dataclasses.replace(found, exit_heads=dict.fromkeys(self.after, one), head=last)


@partial(jax.jit, static_argnames="model")
def _first_stage(
    model: ExitingModel, params: Params, heads: Heads, images: Array, plan: Schedule
) -> tuple[State, Int[Array, ""]]:
    state = first_stage(Given(model, params, heads, plan), images)
    return state, entries_needed(state)


@partial(jax.jit, static_argnames=("model", "at", "capacity"))
def _run_stage(
    model: ExitingModel, params: Params, heads: Heads, state: State, plan: Schedule, *, at: int, capacity: int
) -> tuple[State, Int[Array, ""]]:
    state = run_stage(Given(model, params, heads, plan), state, at=at, capacity=capacity)
    return state, entries_needed(state)


@partial(jax.jit, static_argnames="model")
def _finish(model: ExitingModel, params: Params, heads: Heads, state: State, plan: Schedule) -> Output:
    return finish(Given(model, params, heads, plan), state)


def checked(model: ExitingModel, schedule: Schedule) -> Schedule:
    """The plan, if the model can follow it.

    Raises:
        TokenExitError: If it cannot.
    """
    translates = model.after if model.head_plan.translates else ()
    options = {"gives_masks": model.gives_masks, "translates": translates, "classes": model.classes}
    require_fits(schedule, depth=model.depth, after=model.after, **options)
    return of_pytrees(schedule)


def validated_heads(model: ExitingModel, heads: Heads) -> Heads:
    """The weights of the heads, if they have the names and shapes of the model's.

    Raises:
        TokenExitError: If they do not.
    """
    return building.require_same_structure(heads, shapes_of(model), argument="heads")


def shapes_of(model: ExitingModel) -> Heads:
    """The weights of the heads as `jax.ShapeDtypeStruct`."""
    width, classes, built = model.network.width, model.classes, model.head is None
    return building.shapes(model.head_plan, width=width, classes=classes, after=model.after, final=built)


def as_arrays(plan: Schedule) -> Schedule:
    """Thresholds as arrays, so that programs do not differ by how they are given: an array of JAX is not a number."""

    def as_array(leaf: Any) -> Any:
        if isinstance(leaf, int | float):
            return jnp.asarray(leaf, dtype=jnp.int32 if isinstance(leaf, int) else jnp.float32)
        return leaf

    return jax.tree.map(as_array, plan)
