"""Times retention beside the loop over images and classes that it replaces.

    python -m tests.benchmarks.retention --library numpy torch jax --out retention.json

For every size, the k = 5 most confident candidates of each class of each image are marked. The loop takes every image
and class in turn, and the top k of its candidates, in the way that is fastest in its library: `argpartition` in NumPy,
`topk` in PyTorch, and in JAX `lax.top_k` in one compiled loop. NumPy and PyTorch work on one ragged row of all
images' tokens, JAX on rows of fixed length, under `jit`. Both are run in turn, in one process.
"""

import argparse
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.clock import interleaved
from tokenexit import retention

K = 5
SIZES = [(images, tokens) for images in (1, 64) for tokens in (256, 4096, 16384)]
CLASSES = (19, 150, 1000)
LOOP_LIMIT = 64 * 1000 * 256  # JAX's loop for more work than this takes seconds a call: fewer repetitions


def numpy_loop(candidate, score, label, *, classes):
    keep = np.zeros_like(candidate)
    for able, value, predicted, kept in zip(candidate, score, label, keep, strict=True):
        for one in range(classes):
            rows = np.flatnonzero(able & (predicted == one))
            if len(rows) > K:
                rows = rows[np.argpartition(-value[rows], K - 1)[:K]]
            kept[rows] = True
    return keep


def torch_loop(candidate, score, label, *, classes):
    import torch

    keep = torch.zeros_like(candidate)
    for able, value, predicted, kept in zip(candidate, score, label, keep, strict=True):
        for one in range(classes):
            rows = (able & (predicted == one)).nonzero()[:, 0]
            if len(rows) > K:
                rows = rows[value[rows].topk(K).indices]
            kept[rows] = True
    return keep


def jax_loop(candidate, score, label, *, classes):
    import jax
    from jax import lax
    from jax import numpy as jnp

    def image(arrays):
        able, value, predicted = arrays

        def one(kept, label):
            best, rows = lax.top_k(jnp.where(able & (predicted == label), value, -jnp.inf), min(K, len(value)))
            return kept.at[rows].max(best > -jnp.inf), None

        return lax.scan(one, jnp.zeros_like(able), jnp.arange(classes))[0]

    return jax.lax.map(image, (candidate, score, label))


def drawn(images: int, tokens: int, classes: int, saturated: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candidates (half of the tokens), scores of which a share is exactly 1, and predicted classes."""
    draw = np.random.default_rng(0)
    shape = (images, tokens)
    score = draw.random(shape, dtype=np.float32)
    score[draw.random(shape) < saturated] = 1
    return draw.random(shape) < 0.5, score, draw.integers(0, classes, shape)


def contenders(library: str, arrays: tuple[np.ndarray, ...], classes: int) -> Mapping[str, Callable[[], Any]]:
    """What is timed: the loop and ours, as calls without arguments."""
    candidate, score, label = arrays
    images = candidate.shape[0]
    group = np.arange(images)[:, None] * classes + label
    if library == "jax":
        import jax

        on_device = tuple(map(jax.numpy.asarray, (candidate, score, label.astype(np.int32))))
        loop = jax.jit(lambda *x: jax_loop(*x, classes=classes))
        ours = jax.jit(lambda *x: retention.top_k_per_group(*x, k=K, groups=classes))
        return {
            "loop": lambda: jax.block_until_ready(loop(*on_device)),
            "ours": lambda: jax.block_until_ready(ours(*on_device)),
        }
    row = candidate.reshape(-1), score.reshape(-1), group.reshape(-1)
    if library == "torch":
        import torch

        batch = tuple(map(torch.from_numpy, (candidate, score, label)))
        flat = tuple(map(torch.from_numpy, row))
        return {
            "loop": lambda: torch_loop(*batch, classes=classes),
            "ours": lambda: retention.top_k_per_group(*flat, k=K, groups=images * classes),
        }
    return {
        "loop": lambda: numpy_loop(candidate, score, label, classes=classes),
        "ours": lambda: retention.top_k_per_group(*row, k=K, groups=images * classes),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", dest="libraries", nargs="+", choices=["numpy", "torch", "jax"], default=["numpy"])
    parser.add_argument("--sizes", nargs="+", type=int, help="tokens of an image; all by default")
    parser.add_argument("--images", nargs="+", type=int, help="images; all by default")
    parser.add_argument("--classes", nargs="+", type=int, default=list(CLASSES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--saturated", type=float, default=0.0, help="share of scores that are exactly 1")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    found = []
    print("| library | images | tokens | classes | loop, ms | ours, ms | ours / loop |\n|---|---|---|---|---|---|---|")
    for library in options.libraries:
        for images, tokens in SIZES:
            if (options.sizes and tokens not in options.sizes) or (options.images and images not in options.images):
                continue
            for classes in options.classes:
                arrays = drawn(images, tokens, classes, options.saturated)
                calls = contenders(library, arrays, classes)
                agree = np.asarray(calls["loop"]()).reshape(-1) == np.asarray(calls["ours"]()).reshape(-1)
                slow = images * tokens * classes > LOOP_LIMIT
                times = interleaved(calls, rounds=3 if slow else options.rounds, at_least=0.005)
                loop, ours = (1e3 * float(np.median(times[name])) for name in ("loop", "ours"))
                print(
                    f"| {library} | {images} | {tokens} | {classes} | {loop:.3f} | {ours:.3f} | {ours / loop:.2f} |",
                    flush=True,
                )
                found.append(
                    {"library": library, "images": images, "tokens": tokens, "classes": classes,
                     "seconds": {name: list(times[name]) for name in times}, "equal": float(agree.mean())}
                )  # fmt: skip
    if options.out:
        versions = {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}
        options.out.write_text(json.dumps({"k": K, **versions, "results": found}, indent=2))


if __name__ == "__main__":
    main()
