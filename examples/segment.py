"""Segments pictures with a vision transformer, dense and with tokens that merge and leave early, side by side.

    python -m examples.segment                                     street scenes that the shipped model has not seen
    python -m examples.segment --model RUN --image street.jpg      a run of yours on pictures of yours

Prints what it cost and what it changed, and writes a picture, demo.png, and all the numbers, demo.json. The same in
JAX is `examples.jax.segment`.
"""

import argparse
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

import tokenexit_torch as tet
from examples import demo, runs, shell
from tokenexit import schedule

_SUMMARY = (__doc__ or "").partition("\n")[0]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = demo.parser("python -m examples.segment", _SUMMARY, Path("demo"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    demo.check(given)
    return given


@torch.inference_mode()
def segment(
    model: tet.ExitingModel, images: Float[Tensor, "images 3 height width"], plan: schedule.Schedule
) -> demo.Result:
    """Run the pictures under a plan, a few at a time."""
    parts = []
    for some in images.split(demo.AT_ONCE):
        out = model(some, schedule=plan)
        classes = out.upsample((images.shape[-2], images.shape[-1])).argmax(1)
        size = torch.ones_like(out.exit_depth) if out.merged_size is None else out.merged_size
        found = classes, out.exit_depth, size, out.tokens_per_block, model.multiply_adds(out)
        parts.append(demo.Result(*(value.cpu().numpy() for value in found)))
    return demo.joined(parts)


def main() -> None:
    """Run from the command line."""
    given = arguments()
    model, about = runs.load(given.model)
    if given.threshold is not None:
        model.retune(threshold=given.threshold)
    pixels = demo.pictures(given, about.size)
    try:
        device = torch.device(given.device)
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise shell.UsageError(
            f"`--device` must be one that PyTorch has here, got {given.device!r}: {error}"
        ) from error
    images = runs.normalised(about, torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device) / 255)
    results = segment(model, images, schedule.dense()), segment(model, images, model.schedule)
    with torch.inference_mode():
        candidates = {"dense": runs.bare_dense(model, images[:1]), "exits": model}
        timed = demo.measure(candidates, images, given.rounds, runs.waiting_for(device))
    environment = {
        "torch": torch.__version__, "device": str(device), "threads": torch.get_num_threads(), "dtype": "float32",
    }  # fmt: skip
    demo.report(given, about, pixels, results, model.schedule, timed, environment)


if __name__ == "__main__":
    shell.exit_with(main)
