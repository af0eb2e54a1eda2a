"""Segments pictures with a vision transformer, dense and with tokens that leave early, side by side.

    python -m examples.segment                                     street scenes that the shipped model has not seen
    python -m examples.segment --model RUN --image street.jpg      a run of yours on pictures of yours

Prints what it cost and what it changed, and writes a picture, demo.png, and all the numbers, demo.json.
"""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

import tokenexit_torch as tet
from examples import runs, shell, show, timing
from examples.scenes.draw import draw
from tokenexit import cost, schedule

SHIPPED = Path(__file__).parent / "scenes" / "model"
_AT_ONCE = 8
_UNSEEN = 3  # a stream of scenes that examples.scenes.train never draws from
_SUMMARY = (__doc__ or "").partition("\n")[0]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.segment", description=_SUMMARY)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="run folder; the shipped model by default")
    parser.add_argument("--image", type=Path, nargs="+", help="pictures; by default, scenes are drawn")
    parser.add_argument("--scenes", type=int, default=4, help="how many scenes to draw (default %(default)s)")
    parser.add_argument("--threshold", type=float, help="confidence at which tokens leave; the model's own by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=15, help="timing rounds (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for demo.png and demo.json")
    given = parser.parse_args()
    for name in ("scenes", "rounds"):
        if getattr(given, name) < 1:
            raise shell.UsageError(f"`--{name}` must be at least 1, got {getattr(given, name)}")
    return given


def pictures(files: Sequence[Path], size: tuple[int, int]) -> list[Image.Image]:
    """Read pictures, each scaled and cropped in the middle to `size` (height, width).

    Raises:
        UsageError: If a file is missing or no picture.
    """
    read = []
    for file in files:
        try:
            with Image.open(file) as picture:
                read.append(_fitted(picture.convert("RGB"), size))
        except OSError as error:
            raise shell.UsageError(f"`--image` must be a picture, got {str(file)!r}: {error}") from error
    return read


def _fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    scale = max(width / picture.width, height / picture.height)
    large = picture.resize((max(width, round(picture.width * scale)), max(height, round(picture.height * scale))))
    left, top = (large.width - width) // 2, (large.height - height) // 2
    return large.crop((left, top, left + width, top + height))


def unseen_scenes(count: int, size: tuple[int, int]) -> list[Image.Image]:
    """Street scenes that the shipped model was not trained on."""
    return [Image.fromarray(draw(np.random.default_rng((0, _UNSEEN, i)), size=size).image) for i in range(count)]


@torch.inference_mode()
def measure(
    model: tet.ExitingModel, images: Float[Tensor, "images 3 height width"], batch: int, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds per picture, and the speed-up, at one batch size: lower quartile, median, upper quartile.

    Upsampling the logits to pixels is the same for both and left out.
    """
    batches = [part for part in images.split(batch) if len(part) == batch]
    candidates = {"dense": timing.bare_dense(model, images[:1]), "exits": model}
    seconds = timing.interleaved(candidates, batches, rounds=rounds)
    found = timing.summary(seconds, images=batch * len(batches), baseline="dense")
    return {
        name: {
            "milliseconds": [1e3 / speed for speed in reversed(entry["images_per_second"])],
            "speedup": entry["speedup"],
        }
        for name, entry in found.items()
    }  # fmt: skip


@torch.inference_mode()
def compare(
    model: tet.ExitingModel, images: Float[Tensor, "images 3 height width"]
) -> tuple[dict[str, Any], show.Maps]:
    """What the exits changed and saved on the pictures, and the maps to show."""
    size = (images.shape[-2], images.shape[-1])
    # A few at a time: pictures may be many.
    parts = images.split(_AT_ONCE)
    dense, exiting = [model(part, schedule=schedule.dense()) for part in parts], [model(part) for part in parts]
    classes, with_exits = (torch.cat([out.upsample(size).argmax(1) for out in outs]) for outs in (dense, exiting))
    dense_work, work = (
        torch.cat([model.multiply_adds(out) for out in outs]).double().mean().item() for outs in (dense, exiting)
    )
    depth, ran = torch.cat([out.exit_depth for out in exiting]), torch.cat([out.tokens_per_block for out in exiting])
    slots = int(dense[0].tokens_per_block[0, 0])
    left = {str(after): int((depth == after).sum()) for after in (*model.schedule.after, model.depth)}
    figures = {
        "agreement": (classes == with_exits).double().mean().item(),
        "agreement_by_picture": (classes == with_exits).double().mean(dim=(1, 2)).tolist(),
        "token_blocks": cost.token_blocks(ran, slots=slots),
        "multiply_adds": {"dense": dense_work, "exits": work},
        "patches": depth.numel(),
        "patches_by_depth": left,
    }
    return figures, show.Maps(classes.cpu(), with_exits.cpu(), depth.cpu())


def table(figures: dict[str, Any], timed: dict[int, dict[str, dict[str, Any]]], depth: int) -> str:
    """The numbers, for a person."""
    lines = [f"{'':<24}{'dense':>12}{'with exits':>12}"]
    for batch, found in timed.items():
        dense, exits = (found[name]["milliseconds"][1] for name in ("dense", "exits"))
        lines.append(f"{f'ms a picture, batch {batch}':<24}{dense:>12.1f}{exits:>12.1f}{speedup(found):>24}")
    work = figures["multiply_adds"]
    lines += [
        f"{'multiply-adds, 10^9':<24}{work['dense'] / 1e9:>12.2f}{work['exits'] / 1e9:>12.2f}",
        f"{'token-blocks':<24}{1:>12.3f}{figures['token_blocks']:>12.3f}",
        f"{'pixels as in dense':<24}{'100 %':>12}{100 * figures['agreement']:>10.2f} %",
        "",
        "patches that left",
    ]
    for after, count in figures["patches_by_depth"].items():
        where = f"after block {after}" if int(after) < depth else f"never (all {depth} blocks)"
        lines.append(f"  {where:<22}{count:>12}{100 * count / figures['patches']:>10.1f} %")
    return "\n".join(lines)


def speedup(found: dict[str, dict[str, Any]]) -> str:
    """The median speed-up and its quartiles, for a person."""
    low, middle, high = found["exits"]["speedup"]
    return f"x {middle:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Run from the command line."""
    given = arguments()
    model, about = runs.load(given.model)
    if given.threshold is not None:
        model.retune(threshold=given.threshold)
    shown = pictures(given.image, about.size) if given.image else unseen_scenes(given.scenes, about.size)
    pixels = torch.stack([torch.from_numpy(np.asarray(picture).copy()) for picture in shown])
    try:
        device = torch.device(given.device)
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise shell.UsageError(
            f"`--device` must be one that PyTorch has here, got {given.device!r}: {error}"
        ) from error
    images = about.normalised(pixels.permute(0, 3, 1, 2).to(device) / 255)
    figures, maps = compare(model, images)
    timed = {batch: measure(model, images, batch, given.rounds) for batch in sorted({1, min(len(images), _AT_ONCE)})}
    given.out.mkdir(parents=True, exist_ok=True)
    show.draw(pixels, maps, about, model.depth, headline(figures, timed)).savefig(given.out / "demo.png", dpi=110)
    record = figures | {
        "time": timed,
        "schedule": model.schedule.to_dict(),
        "pictures": [str(file) for file in given.image] if given.image else f"{len(shown)} drawn scenes",
        "environment": {
            "arguments": sys.argv[1:], "python": platform.python_version(), "torch": torch.__version__,
            "device": str(device), "threads": torch.get_num_threads(), "dtype": "float32", "rounds": given.rounds,
        },
    }  # fmt: skip
    (given.out / "demo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(figures, timed, model.depth))
    print(f"\nlook at {given.out / 'demo.png'}; all numbers are in {given.out / 'demo.json'}")


def headline(figures: dict[str, Any], timed: dict[int, dict[str, dict[str, Any]]]) -> str:
    """One line above the picture."""
    batch, found = max(timed.items())
    speed = found["exits"]["speedup"][1]
    agreement = 100 * figures["agreement"]
    return f"{speed:.2f} times faster than dense (batch {batch}), {agreement:.2f} % of the pixels the same"


if __name__ == "__main__":
    shell.exit_with(main)
