"""Is it worth it for a network on CamVid? `assess` on some train images, with labels: a verdict, a page, a plan.

    python -m examples.camvid.assess --data CAMVID --init camvid_vit_tiny_p8.npz --out ASSESSED
    python -m examples.camvid.evaluate --data CAMVID --init camvid_vit_tiny_p8.npz --fitted ASSESSED/exits \
        --plans ASSESSED/plan.json --only plan truncated --batches 4 --json full.json

The second measures the plan that was chosen on all validation images, as everything else is. Stop either at any time:
the same command goes on.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

import tokenexit_torch as tet
from examples import shell
from examples.camvid import common, data

_SUMMARY = (__doc__ or "").partition("\n")[0]


def arguments(given: Sequence[str] | None = None, /) -> argparse.Namespace:
    """Parse the command line.

    Args:
        given: Its words; those of the process if left out.
    """
    parser = argparse.ArgumentParser(prog="python -m examples.camvid.assess", description=_SUMMARY)
    parser.add_argument("--data", type=Path, required=True, help="CamVid folder: train.txt, train/, trainannot/, ...")
    parser.add_argument("--init", type=Path, required=True, help="ready model, a .npz file with timm key names")
    parser.add_argument("--out", type=Path, required=True, help="folder of all that is written")
    parser.add_argument("--images", type=int, default=60, help="train images, spread evenly (default %(default)s)")
    parser.add_argument("--at-most", type=float, default=0.01, help="pixels that may change (default %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="of the wall clock (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="default %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    found = parser.parse_args(given)
    shell.require_counts(images=found.images, batch=found.batch, threads=found.threads)
    return found


def assess(given: argparse.Namespace) -> tet.Assessed:
    """Assess the network, and write down the plan that was chosen.

    Raises:
        UsageError: If data or network are not what they should be.
        TokenExitError: If there are too few images, or the folder is of another assessment.
    """
    vit, head, _ = common.ready_model(given.init, data.SIZE)
    frames = data.frames(given.data, "train", given.images)
    found = tet.assess(
        vit.eval(), list(data.Batches(frames, given.batch)), head=head.eval(), ignore=data.IGNORE,
        at_most=given.at_most, batch=given.batch, minutes=given.minutes, out=given.out, progress=shell.progress,
    )  # fmt: skip
    if found.assessment.plan is not None:
        with shell.replacing(given.out / "plan.json") as file:
            file.write((json.dumps(found.assessment.plan.to_dict(), indent=1) + "\n").encode())
    return found


def main() -> None:
    """Run from the command line."""
    given = arguments()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    print(assess(given))
    print(f"\nWritten to {given.out}: page.html, assessment.json, exits/ and the plan")


if __name__ == "__main__":
    shell.exit_with(main)
