"""Merging under a decoder that nobody here trained: a public saliency model on pictures, with nothing fitted.

    python -m examples.saliency --weights vit_s_focus.npz --images PICTURES --limit 17 --json saliency.json

The model is a DINOv2-S under a decoder of transposed convolutions, as `.npz` with timm's names and `decoder.*`. Each
plan is compared with the dense network: mean absolute change of the map, and how much its brightest fifth has in common
with the dense one (intersection over union). Beside them are the network cut short, whose raw features the decoder is
given, and smaller pictures. Wall clock is of whole calls, all in turn.

With `--calibrate 0.02` the fastest of a ladder of merges is certified instead: mean change of the map, over pictures,
at most 0.02. It takes some 160 pictures, no two of one scene.
"""

import argparse
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

import tokenexit_torch as tet
from examples import shell, timing
from examples.camvid.common import read_npz
from examples.timm_import import import_timm
from tokenexit import schedule
from tokenexit.guarantees.calibrate import Calibrated, Risk
from tokenexit.schedule import Merge, Schedule

PATCH, BRIGHTEST = 14, 0.2
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_KINDS = (".jpeg", ".jpg", ".png")
_SUMMARY = (__doc__ or "").partition("\n")[0]

PLANS: Mapping[str, Schedule] = {
    "merge after 2 > 0.9": Schedule(merges=(Merge(2, 2, 0.9),)),
    "merge after 1 > 0.9": Schedule(merges=(Merge(1, 2, 0.9),)),
    "merge after 1 > 0.9, 3 > 0.8 up to 4 x 4": schedule.merged(),
    "the same, keys once": Schedule(merges=schedule.merged().merges, keys="entries"),
    "merge after 2 > 0.9, 4 > 0.8 up to 8 x 8": Schedule(merges=(Merge(2, 2, 0.9), Merge(4, 8, 0.8))),
    "merge after 1 > 0.8": Schedule(merges=(Merge(1, 2, 0.8),)),
    "merge after 1 > 0.85, 3 > 0.7 up to 8 x 8": Schedule(merges=(Merge(1, 2, 0.85), Merge(3, 8, 0.7))),
}

CHANGE = Risk(
    "mean absolute change of the map", lambda out, dense: (out.decoded - dense.decoded).abs().mean(dim=(1, 2))
)


class Decoder(nn.Module):
    """Three transposed convolutions with batch norm, and a last one of a single pixel."""

    def __init__(self) -> None:
        super().__init__()
        for number, (before, after) in enumerate(((384, 256), (256, 128), (128, 64)), 1):
            self.add_module(f"upconv{number}", nn.ConvTranspose2d(before, after, 4, 2, 1))
            self.add_module(f"bn{number}", nn.BatchNorm2d(after))
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, features: Float[Tensor, "images 384 rows columns"]) -> Float[Tensor, "images height width"]:
        """Saliency in [0, 1], a value for every pixel."""
        rows, columns = features.shape[2:]
        for number in (1, 2, 3):
            features = self.get_submodule(f"upconv{number}")(features)
            features = self.get_submodule(f"bn{number}")(features).relu()
        size = (rows * PATCH, columns * PATCH)
        map = functional.interpolate(self.final_conv(features), size, mode="bilinear", align_corners=False)
        return map.sigmoid()[:, 0]


def networks(weights: Mapping[str, Tensor], size: int, depth: int | None = None) -> tuple[Any, Decoder]:
    """The vision transformer, for pictures of a size, and its decoder.

    Args:
        weights: The weights of both.
        size: Side of the pictures.
        depth: Blocks of the network; all if None.
    """
    blocks = {} if depth is None else {"depth": depth}
    vit = import_timm().create_model("vit_small_patch14_dinov2", img_size=size, num_classes=0, **blocks)
    own = {name: value for name, value in weights.items() if not name.startswith("decoder.")}
    resample = importlib.import_module("timm.layers").resample_abs_pos_embed
    own["pos_embed"] = resample(own["pos_embed"], [size // PATCH] * 2, num_prefix_tokens=1)
    if depth is not None:
        own = {name: value for name, value in own.items() if _block(name) < depth}
    vit.load_state_dict(own)
    decoder = Decoder()
    parts = {name.removeprefix("decoder."): value for name, value in weights.items() if name.startswith("decoder.")}
    decoder.load_state_dict(parts, strict=False)  # counters of batch norm are not part of the file
    return vit.eval(), decoder.eval()


def _block(name: str) -> int:
    """The block of a weight; -1 if it is of none."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else -1


def read_pictures(folder: Path, size: int, limit: int | None) -> Float[Tensor, "images 3 height width"]:
    """Pictures, the longer side scaled to `size`, the rest zero after normalisation; spread evenly if limited.

    Raises:
        UsageError: If there are none.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _KINDS) if folder.is_dir() else []
    if not files:
        raise shell.UsageError(f"`--images` must be a folder of pictures, got {str(folder)!r}")
    if limit is not None and limit < len(files):
        files = [files[round(at)] for at in np.linspace(0, len(files) - 1, limit)]
    found = []
    for file in files:
        picture = Image.open(file).convert("RGB")
        scale = size / max(picture.size)
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BILINEAR
        )
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255
        pixels = (pixels - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_DEVIATION)[:, None, None]
        found.append(functional.pad(pixels, (0, size - pixels.shape[2], 0, size - pixels.shape[1])))
    return torch.stack(found)


def compared(
    map: Float[Tensor, "images height width"], dense: Float[Tensor, "images height width"]
) -> dict[str, float]:
    """How far maps are from the dense ones."""
    bright = [one.flatten(1) >= one.flatten(1).quantile(1 - BRIGHTEST, dim=1, keepdim=True) for one in (map, dense)]
    both, either = (bright[0] & bright[1]).sum(1), (bright[0] | bright[1]).sum(1)
    return {"change": float((map - dense).abs().mean()), "brightest_iou": float((both / either).mean())}


@torch.inference_mode()
def evaluate(given: argparse.Namespace) -> dict[str, Any]:
    """Run all candidates on all pictures, and time them."""
    weights = read_npz(given.weights, argument="--weights")
    images = read_pictures(given.images, given.size, given.limit)
    vit, decoder = networks(weights, given.size)
    model = tet.wrap(vit, schedule.dense(), decoder=decoder)
    work, calls = {}, {"dense": lambda x: decoder(_map(vit.forward_features(x)))}
    for name, plan in PLANS.items():
        calls[name] = lambda x, plan=plan: model(x, schedule=plan).decoded
    for depth in (10, 8):
        short, _ = networks(weights, given.size, depth)
        calls[f"cut after {depth}, raw"] = lambda x, short=short: decoder(_map(short.forward_features(x)))
        work[f"cut after {depth}, raw"] = depth / 12
    for scale in (0.875, 0.75):
        side = round(given.size * scale / PATCH) * PATCH
        small, _ = networks(weights, side)
        calls[f"smaller, {side} px"] = lambda x, small=small, side=side: _smaller(small, decoder, x, side)
    whole = int(model.multiply_adds(model(images[:1], schedule=schedule.dense()))[0])
    dense = torch.cat([calls["dense"](one) for one in images.split(given.batch)])
    rows = {}
    for name, call in shell.progress(calls.items(), desc="maps"):
        rows[name] = compared(torch.cat([call(one) for one in images.split(given.batch)]), dense)
        if name in PLANS:
            counts = [model.multiply_adds(model(one, schedule=PLANS[name])) for one in images.split(given.batch)]
            rows[name]["multiply_adds"] = float(torch.cat(counts).double().mean()) / whole
    batches = [part for part in images.split(given.batch) if len(part) == given.batch]
    seconds = timing.interleaved(calls, batches, rounds=given.rounds)
    speed = timing.summary(seconds, images=given.batch * len(batches), baseline="dense")
    return {name: {**row, "timing": speed[name]} for name, row in rows.items()}


def certified(given: argparse.Namespace) -> Calibrated:
    """The fastest merges whose mean change of the map is certified, of a ladder around those of `schedule.merged()`."""
    vit, decoder = networks(read_npz(given.weights, argument="--weights"), given.size)
    images = read_pictures(given.images, given.size, given.limit)
    return tet.calibrate(
        tet.wrap(vit, schedule.merged(), decoder=decoder),
        images.split(given.batch),
        at_most=given.calibrate,
        preprocessing=f"RGB, longer side {given.size} px, mean and deviation of ImageNet, zeros to a square",
        risk=CHANGE,
        progress=shell.progress,
    )


def _map(tokens: Float[Tensor, "images slots 384"]) -> Float[Tensor, "images 384 rows columns"]:
    side = round((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def _smaller(vit: Any, decoder: Callable[[Tensor], Tensor], images: Tensor, side: int) -> Tensor:
    shrunk = functional.interpolate(images, (side, side), mode="bilinear", antialias=True, align_corners=False)
    found = decoder(_map(vit.forward_features(shrunk)))[:, None]
    return functional.interpolate(found, images.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def main() -> None:
    """Print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m examples.saliency", description=_SUMMARY)
    parser.add_argument("--weights", type=Path, required=True, help="network and decoder, as .npz")
    parser.add_argument("--images", type=Path, required=True, help="folder of pictures")
    parser.add_argument("--size", type=int, default=448, help="side of the pictures, of whole patches of 14 px")
    parser.add_argument("--limit", type=int, help="use only this many pictures, spread evenly")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="timing rounds")
    parser.add_argument("--calibrate", type=float, help="certify that the map changes by no more on average, as 0.02")
    parser.add_argument("--json", type=Path, help="where results are written")
    given = parser.parse_args()
    shell.require_counts(batch=given.batch, rounds=given.rounds, size=given.size)
    if given.size % PATCH:
        raise shell.UsageError(f"`--size` must be of whole patches of {PATCH} px, got {given.size}")
    if given.calibrate is not None:
        found = certified(given)
        print(found)
        if given.json is not None:
            _write(given.json, found.report.to_dict())
        return
    rows = evaluate(given)
    print(f"{'':44} change  brightest fifth  multiply-adds  speed-up, batch {given.batch}")
    for name, row in rows.items():
        work = "" if "multiply_adds" not in row else f"{row['multiply_adds']:.3f}"
        low, middle, high = row["timing"]["speedup"]
        times = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
        print(f"{name:44} {row['change']:.4f}  {row['brightest_iou']:15.3f}  {work:>13}  {times}")
    if given.json is not None:
        _write(given.json, rows)


def _write(path: Path, found: Mapping[str, Any]) -> None:
    with shell.replacing(path) as file:
        file.write((json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    shell.exit_with(main)
