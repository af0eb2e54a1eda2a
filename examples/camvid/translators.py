"""Fits translators to a frozen network on CamVid, without labels: for its head, or for a decoder that was trained.

    python -m examples.camvid.translators --data CAMVID --init camvid_vit_tiny_p8.npz --out FOLDER
    python -m examples.camvid.translators --data CAMVID --init camvid_vit_tiny_p8.npz --run RUN --decoder dpt \
        --out FOLDER

`examples.camvid.evaluate --fitted FOLDER --leaving` measures the first, and `examples.camvid.decoders evaluate
--fitted FOLDER` the second. Stop it at any time: the same command goes on.
"""

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import tokenexit_torch as tet
from examples import shell
from examples.camvid import common, data, decoding, evaluate, leaving, under_decoders
from examples.camvid.decoding import DECODERS
from tokenexit import schedule
from tokenexit.fitting import FitReport
from tokenexit.heads import Translator
from tokenexit.schedule import Schedule

_SUMMARY = (__doc__ or "").partition("\n")[0]
_BATCH = 4


def arguments(given: Sequence[str] | None = None, /) -> argparse.Namespace:
    """Parse the command line.

    Args:
        given: Its words; those of the process if left out.
    """
    parser = argparse.ArgumentParser(prog="python -m examples.camvid.translators", description=_SUMMARY)
    parser.add_argument("--data", type=Path, required=True, help="CamVid folder: train.txt, train/, trainannot/, ...")
    parser.add_argument("--init", type=Path, required=True, help="ready model, a .npz file with timm key names")
    parser.add_argument("--run", type=Path, help="run folder of examples.camvid.decoders")
    parser.add_argument("--decoder", choices=DECODERS, help="which of its decoders")
    parser.add_argument("--out", type=Path, required=True, help="folder for the translators")
    parser.add_argument("--after", type=int, nargs="+", help="blocks with a translator (default: those that plans ask)")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="fit them to tokens as this schedule merges them")
    parser.add_argument("--images", type=int, default=62, help="train images (default %(default)s)")
    parser.add_argument("--steps", type=int, default=800, help="default %(default)s")
    parser.add_argument("--decoder-steps", type=int, default=0, help="steps through the decoder, with exits by --plan")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found = parser.parse_args(given)
    if (found.run is None) != (found.decoder is None):
        raise shell.UsageError(f"`--decoder` must come with --run, got {found.decoder!r}")
    if found.decoder_steps and (found.decoder is None or found.plan is None):
        raise shell.UsageError(f"`--decoder-steps` must come with --decoder and --plan, got {found.decoder_steps}")
    shell.require_counts(images=found.images, steps=found.steps)
    return found


def unfitted(given: argparse.Namespace, plan: Schedule) -> tet.ExitingModel | tet.DecodingModel:
    """The network, with new translators after the blocks that are asked for.

    Raises:
        UsageError: If network or decoder are missing, or do not fit.
    """
    device = torch.device(given.device)
    after = leaving.AFTER if given.after is None else given.after
    heads = schedule.dense(after=sorted({*after, *plan.read_after}))
    if given.run is None:
        vit, head, _ = common.ready_model(given.init, data.SIZE)
        model = tet.wrap(vit, heads, head=head, exit_heads=Translator())
    else:
        trained = under_decoders.read_model(given.init, given.run, given.decoder, device)
        vit, decoder, taps = decoding.parts_of(trained)
        model = tet.wrap(vit, heads, decoder=decoder, taps=taps, exit_heads=Translator())
    model.retune(plan if plan.exits or plan.merges else heads)
    return model.eval().to(device)


def fit(given: argparse.Namespace) -> FitReport:
    """Fit translators, and save them.

    Raises:
        UsageError: If data, network or decoder are missing, or do not fit.
    """
    plan = Schedule() if given.plan is None else evaluate.read_plan(given.plan).plan
    model = unfitted(given, plan)
    frames = data.frames(given.data, "train")
    step = max(1, len(frames) // given.images)
    batches = data.Batches(frames[::step][: given.images], _BATCH)
    options = {"steps": given.steps, "held_out": 0.1, "check_every": 100, "decoder_steps": given.decoder_steps}
    images = data.Images(batches, torch.device(given.device))
    report = tet.fit_exits(model, images, resume=given.out, progress=shell.progress, **options)
    model.retune(dataclasses.replace(schedule.dense(after=[*map(int, model.exit_heads)]), carry=model.schedule.carry))
    tet.save(model, given.out)
    return report


def main() -> None:
    """Run from the command line."""
    given = arguments()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    started = time.perf_counter()
    print(fit(given))
    print(f"{time.perf_counter() - started:.0f} s; written to {given.out}")


if __name__ == "__main__":
    shell.exit_with(main)
