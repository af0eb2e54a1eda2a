"""What the two demos share, whichever framework runs the network: pictures, figures, what is printed and drawn."""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from examples import shell, show, timing
from examples.about import About
from examples.scenes.draw import draw
from tokenexit import cost
from tokenexit.schedule import Schedule

SHIPPED = Path(__file__).parent / "scenes" / "model"
AT_ONCE = 8  # pictures may be many
_TIMES = "(ms: medians of rounds; x: dense / tokenexit in each, median [quartiles])"
_UNSEEN = 3  # a stream of scenes that examples.scenes.train never draws from


def parser(program: str, summary: str, out: Path) -> argparse.ArgumentParser:
    """The options of a demo.

    Args:
        program: How it is called.
        summary: What it does.
        out: Folder of the results, unless another is given.
    """
    options = argparse.ArgumentParser(prog=program, description=summary)
    options.add_argument("--model", type=Path, default=SHIPPED, help="run folder; the shipped model by default")
    options.add_argument("--image", type=Path, nargs="+", help="pictures; by default, scenes are drawn")
    options.add_argument("--scenes", type=int, default=4, help="how many scenes to draw (default %(default)s)")
    options.add_argument("--threshold", type=float, help="confidence at which tokens leave; the model's own by default")
    options.add_argument("--rounds", type=int, default=15, help="timing rounds (default %(default)s)")
    options.add_argument("--out", type=Path, default=out, help="folder for demo.png and demo.json")
    return options


def check(given: argparse.Namespace) -> None:
    """See that the options make sense.

    Raises:
        UsageError: If one does not.
    """
    for name in ("scenes", "rounds"):
        if getattr(given, name) < 1:
            raise shell.UsageError(f"`--{name}` must be at least 1, got {getattr(given, name)}")


def pictures(given: argparse.Namespace, size: tuple[int, int]) -> UInt8[np.ndarray, "images height width 3"]:
    """The pictures to segment: files, each scaled and cropped in the middle to `size`, or unseen scenes.

    Raises:
        UsageError: If a file is missing or no picture.
    """
    if not given.image:
        return np.stack([draw(np.random.default_rng((0, _UNSEEN, i)), size=size).image for i in range(given.scenes)])
    read = []
    for file in given.image:
        try:
            with Image.open(file) as picture:
                read.append(np.asarray(fitted(picture.convert("RGB"), size)))
        except OSError as error:
            raise shell.UsageError(f"`--image` must be a picture, got {str(file)!r}: {error}") from error
    return np.stack(read)


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture, scaled to cover `size`, height and width, and cropped in the middle."""
    height, width = size
    scale = max(width / picture.width, height / picture.height)
    large = picture.resize((max(width, round(picture.width * scale)), max(height, round(picture.height * scale))))
    left, top = (large.width - width) // 2, (large.height - height) // 2
    return large.crop((left, top, left + width, top + height))


@dataclass(frozen=True)
class Result:
    """What one way of running the network gave.

    Attributes:
        classes: Class of each pixel.
        depth: Blocks that each patch ran through.
        size: Patches that ran on as one with each patch; 1 where nothing merged.
        ran: Tokens that ran through each block.
        multiply_adds: Work for each picture.
    """

    classes: Int[np.ndarray, "images height width"]
    depth: Int[np.ndarray, "images grid_height grid_width"]
    size: Int[np.ndarray, "images grid_height grid_width"]
    ran: Int[np.ndarray, "images blocks"]
    multiply_adds: Int[np.ndarray, "images"]


def joined(parts: Sequence[Result]) -> Result:
    """The results of several batches as one."""
    return Result(*(np.concatenate(fields) for fields in zip(*(vars(part).values() for part in parts), strict=True)))


def figures(dense: Result, exiting: Result, plan: Schedule) -> dict[str, Any]:
    """What merging and exits changed and saved."""
    same = dense.classes == exiting.classes
    blocks = exiting.ran.shape[1]
    return {
        "agreement": same.mean().item(),
        "agreement_by_picture": same.mean(axis=(1, 2)).tolist(),
        "token_blocks": cost.token_blocks(exiting.ran, slots=int(dense.ran[0, 0])),
        "multiply_adds": {"dense": dense.multiply_adds.mean().item(), "exits": exiting.multiply_adds.mean().item()},
        "patches": exiting.depth.size,
        "patches_by_depth": {str(after): int((exiting.depth == after).sum()) for after in (*plan.after, blocks)},
        "patches_by_size": {str(size): int((exiting.size == size).sum()) for size in np.unique(exiting.size).tolist()},
    }


def measure(
    candidates: Mapping[str, Callable[[Any], object]],
    images: Any,
    rounds: int,
    wait: Callable[[], None] = lambda: None,
) -> dict[int, dict[str, Any]]:
    """Milliseconds per picture, and the speed-up, at batch 1 and a larger one: lower quartile, median, upper quartile.

    Upsampling the logits to pixels is the same for both and left out.

    Args:
        candidates: What to time; `dense` is what the others are compared with.
        images: The pictures as the candidates take them.
        rounds: How often each runs all of them.
        wait: Returns when the device has done what it was given.

    Returns:
        For each batch size and each candidate, `milliseconds` and `speedup`.
    """
    timed = {}
    for batch in sorted({1, min(len(images), AT_ONCE)}):
        batches = [images[start : start + batch] for start in range(0, len(images) - batch + 1, batch)]
        seconds = timing.interleaved(candidates, batches, rounds=rounds, wait=wait)
        found = timing.summary(seconds, images=batch * len(batches), baseline="dense")
        timed[batch] = {
            name: {
                "milliseconds": [1e3 / speed for speed in reversed(entry["images_per_second"])],
                "speedup": entry["speedup"],
            }
            for name, entry in found.items()
        }  # fmt: skip
    return timed


def report(
    given: argparse.Namespace,
    about: About,
    pixels: UInt8[np.ndarray, "images height width 3"],
    results: tuple[Result, Result],
    plan: Schedule,
    timed: dict[int, dict[str, Any]],
    environment: Mapping[str, Any],
) -> None:
    """Print, draw and write down what the demo found.

    Args:
        given: The options.
        about: What the network was trained for.
        pixels: The pictures.
        results: Dense, and as planned.
        plan: When tokens merge and leave.
        timed: What `measure` returned.
        environment: What wall clock depends on.
    """
    dense, exiting = results
    found = figures(dense, exiting, plan)
    maps = show.Maps(dense.classes, exiting.classes, exiting.depth, exiting.size if plan.merges else None)
    blocks = exiting.ran.shape[1]
    given.out.mkdir(parents=True, exist_ok=True)
    drawn = show.draw(pixels, maps, about, blocks, _headline(found, timed))
    drawn.savefig(given.out / "demo.png", dpi=110)
    record = found | {
        "time": timed,
        "schedule": plan.to_dict(),
        "pictures": [str(file) for file in given.image] if given.image else f"{len(pixels)} drawn scenes",
        "environment": {"arguments": sys.argv[1:], "python": platform.python_version(), "rounds": given.rounds}
        | dict(environment),
    }
    (given.out / "demo.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(_table(found, timed, blocks))
    print(f"\nlook at {given.out / 'demo.png'}; all numbers are in {given.out / 'demo.json'}")


def _table(found: dict[str, Any], timed: dict[int, dict[str, Any]], blocks: int) -> str:
    """The numbers, for a person."""
    lines = [f"{'':<24}{'dense':>12}{'tokenexit':>12}"]
    for batch, entry in timed.items():
        dense, exits = (entry[name]["milliseconds"][1] for name in ("dense", "exits"))
        low, middle, high = entry["exits"]["speedup"]
        speedup = f"x {middle:.2f} [{low:.2f}, {high:.2f}]"
        lines.append(f"{f'ms a picture, batch {batch}':<24}{dense:>12.1f}{exits:>12.1f}{speedup:>24}")
    work = found["multiply_adds"]
    lines += [
        f"{'multiply-adds, 10^9':<24}{work['dense'] / 1e9:>12.2f}{work['exits'] / 1e9:>12.2f}",
        f"{'token-blocks':<24}{1:>12.3f}{found['token_blocks']:>12.3f}",
        f"{'pixels as in dense':<24}{'100 %':>12}{100 * found['agreement']:>10.2f} %",
        _TIMES,
    ]
    merged = {int(size): count for size, count in found["patches_by_size"].items() if int(size) > 1}
    if merged:
        lines += ["", "patches that merged"]
    lines += [_line(f"into tokens of {size}", count, found["patches"]) for size, count in merged.items()]
    lines += ["", "patches that left"]
    for after, count in found["patches_by_depth"].items():
        where = f"after block {after}" if int(after) < blocks else f"never (all {blocks} blocks)"
        lines.append(_line(where, count, found["patches"]))
    return "\n".join(lines)


def _line(what: str, count: int, patches: int) -> str:
    return f"  {what:<22}{count:>12}{100 * count / patches:>10.1f} %"


def _headline(found: dict[str, Any], timed: dict[int, dict[str, Any]]) -> str:
    """One line above the picture."""
    batch, entry = max(timed.items())
    speed = entry["exits"]["speedup"][1]
    agreement = 100 * found["agreement"]
    times = f"{speed:.2f} times faster than dense (batch {batch}, median of paired rounds)"
    return f"{times}, {agreement:.2f} % of the pixels the same"
