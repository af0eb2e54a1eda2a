"""Early exit for a frozen network, from images without labels: fit exit heads, and certify the fastest safe setting.

    python -m examples.frozen --images PHOTOS --out frozen            the shipped model on pictures of yours
    python -m examples.frozen --init camvid_vit_tiny_p16.npz --data CAMVID       a network on CamVid

Some images fit the exit heads, others calibrate, and no label is looked at. Prints the report and writes it, the exits,
the certificate if there is one, a sample for drift, and the curve. Stop it at any time: the same command goes on.
"""

import argparse
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

import tokenexit_torch as tet
from examples import demo, runs, shell
from examples.about import About
from examples.camvid import common, data
from tokenexit.guarantees.bounds import images_needed
from tokenexit.guarantees.calibrate import Calibrated
from tokenexit.heads import MLP, Neighbourhood
from tokenexit_torch.hosts.registry import host_of

_SUMMARY = (__doc__ or "").partition("\n")[0]
_KINDS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
_AT_ONCE = 8
_HEADS = {"mlp": MLP(), "neighbourhood": Neighbourhood()}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.frozen", description=_SUMMARY)
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--model", type=Path, default=demo.SHIPPED, help="run folder; the shipped model by default")
    network.add_argument("--init", type=Path, help="ready model, a .npz file with timm key names and heads.B.*")
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--images", type=Path, help="folder of pictures: a part fits the heads, the others calibrate")
    images.add_argument("--data", type=Path, help="CamVid folder: train fits the heads, --split calibrates")
    parser.add_argument("--split", choices=data.SPLITS, default="test", help="of CamVid (default %(default)s)")
    parser.add_argument("--sequence", help="calibrate on this video of CamVid alone, as Seq05VD")
    parser.add_argument("--every", type=int, default=1, help="calibrate on every so-manyth frame of CamVid")
    parser.add_argument("--fit-images", type=int, help="images that fit the heads; a third of a folder, all of train")
    parser.add_argument("--alpha", type=float, default=0.02, help="pixels that may change (default %(default)s)")
    parser.add_argument("--confidence", type=float, default=0.95, help="that it is no more (default %(default)s)")
    parser.add_argument("--after", type=int, nargs="+", help="blocks with an exit; a third, half, two thirds")
    parser.add_argument(
        "--heads", choices=_HEADS, default="mlp", help="what they see: tokens, or what is around as well"
    )
    parser.add_argument("--steps", type=int, default=1200, help="of fitting (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("frozen"), help="folder of all that is written")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    shell.require_counts(every=given.every, fit_images=given.fit_images, threads=given.threads)
    return given


@dataclass(frozen=True)
class Network:
    """A frozen network.

    Attributes:
        source: Where its weights are.
        host: The network without a head.
        head: Its final head.
        about: Its classes, normalisation and image size.
    """

    source: Path
    host: Any
    head: nn.Module
    about: About


def network(given: argparse.Namespace) -> Network:
    """The network, whatever exits it may have had.

    Raises:
        UsageError: If a ready model's file is not what it should be.
        TokenExitError: If a run folder is not.
    """
    if given.init is None:
        model, about = runs.load(given.model)
        return Network(given.model, model.host, model.head, about)
    vit, head, _ = common.ready_model(given.init, data.SIZE)
    about = About("timm", {}, data.CLASSES, data.PALETTE, data.MEAN, data.STD, data.SIZE)
    return Network(given.init, vit.eval(), head.eval(), about)


@dataclass(frozen=True)
class Pictures:
    """Pictures from files in batches, as a network takes them; may be gone through any number of times."""

    files: Sequence[Path]
    about: About
    device: torch.device

    def __len__(self) -> int:
        return -(-len(self.files) // _AT_ONCE)

    def __iter__(self) -> Iterator[Float[Tensor, "batch 3 height width"]]:
        for start in range(0, len(self.files), _AT_ONCE):
            pixels = np.stack([self._read(file) for file in self.files[start : start + _AT_ONCE]])
            yield runs.normalised(self.about, torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device) / 255)

    def _read(self, file: Path) -> np.ndarray:
        try:
            with Image.open(file) as picture:
                return np.asarray(demo.fitted(picture.convert("RGB"), self.about.size))
        except OSError as error:
            raise shell.UsageError(f"`--images` must hold pictures, got {str(file)!r}: {error}") from error


@dataclass(frozen=True)
class Images:
    """Images without labels, none of them in both parts.

    Attributes:
        fit: Those that fit the exit heads.
        calibrate: Those that calibrate.
        fitted_on: Names of the first.
        count: How many the second are.
        preprocessing: What is done to them, in words.
    """

    fit: Iterable[Tensor]
    calibrate: Iterable[Tensor]
    fitted_on: tuple[str, ...]
    count: int
    preprocessing: str


def images(given: argparse.Namespace, about: About) -> Images:
    """The images, read when they are needed.

    Raises:
        UsageError: If a folder is not what it should be, or there are too few images for any certificate.
    """
    found = frames(given, about) if given.images is None else pictures(given, about)
    needed = images_needed(at_most=given.alpha, delta=(1 - given.confidence) / 2, test="betting")
    if found.count < needed:
        rule = f"leave at least {needed} images to calibrate on, for any certificate at --alpha {given.alpha:g}"
        raise shell.UsageError(f"`--{'data' if given.images is None else 'images'}` must {rule}, got {found.count}")
    return found


def pictures(given: argparse.Namespace, about: About) -> Images:
    """A folder's pictures, dealt out by chance."""
    folder: Path = given.images
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in _KINDS)
    if not files:
        raise shell.UsageError(f"`--images` must be a folder of pictures ({', '.join(_KINDS)}), got {str(folder)!r}")
    random.Random(given.seed).shuffle(files)
    first = given.fit_images or -(-len(files) // 3)
    fit, others = files[:first], files[first:]
    device, (height, width) = torch.device(given.device), about.size
    words = f"RGB, scaled to cover {height} x {width} and cropped in the middle, {_normalisation(about)}"
    names = tuple(file.name for file in fit)
    return Images(Pictures(fit, about, device), Pictures(others, about, device), names, len(others), words)


def frames(given: argparse.Namespace, about: About) -> Images:
    """CamVid's frames; neighbours of a video are much alike, of which the report's first assumption speaks."""
    if about.size != data.SIZE:
        raise shell.UsageError(f"`--data` must come with a network for {data.SIZE} pixels, got one for {about.size}")
    fit = data.frames(given.data, "train", given.fit_images)
    split = data.frames(given.data, given.split)
    others = [frame for frame in split if given.sequence in (None, frame.sequence)][:: given.every]
    names = sorted({frame.sequence for frame in split})
    if not others or given.split == "train":
        raise shell.UsageError(
            f"`--split` must be val or test, with a --sequence of {names}, got {given.split} and {given.sequence!r}"
        )
    device = torch.device(given.device)
    first, second = (data.Images(data.Batches(part, _AT_ONCE), device) for part in (fit, others))
    words = f"CamVid, rows {data.ROWS.start} to {data.ROWS.stop}, {_normalisation(about)}"
    return Images(first, second, tuple(frame.image.name for frame in fit), len(others), words)


def _normalisation(about: About) -> str:
    return f"0 to 1, mean {about.mean}, standard deviation {about.std}"


def exiting(given: argparse.Namespace, frozen: Network, seen: Images) -> tuple[tet.ExitingModel, dict[str, float]]:
    """The network with exit heads fitted to its final head, now or by a run before, and their agreement with it.

    Raises:
        UsageError: If the output folder has exits that were fitted to something else.
    """
    depth = len(host_of(frozen.host).blocks)
    after = sorted(set(given.after or (depth // 3, depth // 2, 2 * depth // 3)))
    identity = {
        "model": common.digest(frozen.source), "after": after, "heads": given.heads, "steps": given.steps,
        "seed": given.seed,
        "images": hashlib.sha256("\n".join(seen.fitted_on).encode()).hexdigest(),
    }  # fmt: skip
    folder, note = given.out / "exits", given.out / "fit.json"
    if note.is_file():
        kept = _read(note)
        if kept.get("fitted") != identity:
            raise shell.UsageError(f"`--out` must be new or of the same exits, got {str(note)!r} with {kept}")
        model = tet.load(frozen.host, folder, kind="exits", head=frozen.head)
        return model.eval().to(given.device), kept["agreement"]
    torch.manual_seed(given.seed)
    plan, heads = common.wide_then_narrow(after), _HEADS[given.heads]
    model = tet.wrap(frozen.host, plan, head=frozen.head, exit_heads=heads).eval().to(given.device)
    fit = tet.fit_exits(model, seen.fit, steps=given.steps, progress=shell.progress)
    agreement = {str(block): share for block, share in fit.agreement.items()}
    tet.save(model, folder)
    _write(note, {"fitted": identity, "agreement": agreement})
    return model, agreement


def keep(out: Path, found: Calibrated, agreement: Mapping[str, float]) -> list[str]:
    """Write what was found, and say which files there are now."""
    _write(out / "report.json", found.report.to_dict() | {"agreement_of_exit_heads": dict(agreement)})
    _write(out / "drift.json", found.before.to_dict())
    found.plot(out / "curve.png")
    names = ["exits/", "report.json", "drift.json", "curve.png"]
    if found.certificate is None:
        return names
    tet.save_certificate(found.certificate, out)
    return [*names, "certificate.json"]


def _write(file: Path, content: Mapping[str, Any]) -> None:
    with shell.replacing(file) as opened:
        opened.write((json.dumps(content, indent=1) + "\n").encode())


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise shell.UsageError(f"`--out` must be new or a folder of this script, got {str(file)!r}: {error}") from error
    return found if isinstance(found, dict) else {}


def main() -> None:
    """Run from the command line."""
    given = arguments()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    frozen = network(given)
    seen = images(given, frozen.about)
    given.out.mkdir(parents=True, exist_ok=True)
    model, agreement = exiting(given, frozen, seen)
    parts = ", ".join(f"after block {block} {100 * share:.1f} %" for block, share in agreement.items())
    print(f"Exit heads agree with the final head, on {len(seen.fitted_on)} images: {parts}.")
    found = tet.calibrate(
        model, seen.calibrate, at_most=given.alpha, confidence=given.confidence, preprocessing=seen.preprocessing,
        seed=given.seed, resume=given.out / "measured", progress=shell.progress,
    )  # fmt: skip
    print(found)
    print(f"Written to {given.out}: {', '.join(keep(given.out, found, agreement))}")


if __name__ == "__main__":
    shell.exit_with(main)
