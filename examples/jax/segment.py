"""Segments pictures in JAX, dense and with tokens that merge and leave early, side by side: as `examples.segment`.

    python -m examples.jax.segment                                     street scenes that the model has not seen
    python -m examples.jax.segment --model RUN --image street.jpg      a run of yours on pictures of yours

The network was trained in PyTorch; its weights and its exits are read as they are.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float

from examples import demo, shell
from examples.jax import runs
from tokenexit import schedule

_SUMMARY = (__doc__ or "").partition("\n")[0]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    given = demo.parser("python -m examples.jax.segment", _SUMMARY, Path("demo/jax")).parse_args()
    demo.check(given)
    return given


def segment(loaded: runs.Loaded, images: Float[Array, "images height width 3"], plan: schedule.Schedule) -> demo.Result:
    """Run the pictures under a plan, a few at a time."""
    cost = loaded.model.cost(loaded.params, images[:1])
    parts = []
    for start in range(0, len(images), demo.AT_ONCE):
        out = loaded(images[start : start + demo.AT_ONCE], plan)
        classes = out.upsample((images.shape[1], images.shape[2])).argmax(axis=-1)
        size = jnp.ones_like(out.exit_depth) if out.merged_size is None else out.merged_size
        found = classes, out.exit_depth, size, out.tokens_per_block, out.multiply_adds(cost)
        parts.append(demo.Result(*map(np.asarray, found)))
    return demo.joined(parts)


def main() -> None:
    """Run from the command line."""
    given = arguments()
    loaded, about = runs.load(given.model)
    if given.threshold is not None:
        loaded = replace(loaded, model=loaded.model.retuned(threshold=given.threshold))
    plan = loaded.model.schedule
    pixels = demo.pictures(given, about.size)
    images = (jnp.asarray(pixels) / 255 - jnp.asarray(about.mean)) / jnp.asarray(about.std)
    results = segment(loaded, images, schedule.dense()), segment(loaded, images, plan)
    bare = runs.bare_dense(loaded)
    candidates = {
        "dense": lambda some: bare(some).block_until_ready(),
        "exits": lambda some: loaded(some).logits.block_until_ready(),
    }
    # Every batch once before the clock runs: another bucket is another program.
    for batch in {1, min(len(images), demo.AT_ONCE)}:
        for start in range(0, len(images) - batch + 1, batch):
            candidates["exits"](images[start : start + batch])
    timed = demo.measure(candidates, images, given.rounds)
    environment = {"jax": jax.__version__, "device": str(jax.devices()[0]), "dtype": "float32"}
    demo.report(given, about, pixels, results, plan, timed, environment)


if __name__ == "__main__":
    shell.exit_with(main)
