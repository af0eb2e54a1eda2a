"""Trains dense decoders on frozen features of CamVid, and measures what merging of tokens costs under them.

    python -m examples.camvid.decoders train --data CAMVID --init camvid_vit_tiny_p8.npz --out RUN
    python -m examples.camvid.decoders evaluate --data CAMVID --init camvid_vit_tiny_p8.npz --run RUN --decoder conv \
        --json conv.json

The network stays as it is: its features of a few augmented views of every image are kept on disk meanwhile, and labels
teach the decoders alone, side by side. Exit heads are then fitted to each of them without labels, for plans that ask
for agreement. Stop it at any time: the same command goes on.
"""

import argparse
import copy
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tokenexit_torch as tet
from examples import checkpoints, metrics, shell
from examples.camvid import common, data, decoding, train, under_decoders
from examples.camvid.decoding import DECODERS
from tokenexit import schedule
from tokenexit.heads import MLP

CHECKPOINT, FEATURES = "checkpoint.safetensors", "features"
_COUNTS = ("epochs", "views", "batch", "fit_images", "fit_steps")
_SUMMARY = (__doc__ or "").partition("\n")[0]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides data and network; a run resumes only under its own recipe.

    Attributes:
        epochs: Passes over all images, in one of their views each.
        views: Augmented views of every image.
        rate: Of AdamW; falls to zero along a cosine.
        decay: Weight decay of matrices and kernels.
        average: Decay of the average of the weights over the steps.
        fit_images: Train images, spread evenly, to which exit heads are fitted without labels.
    """

    epochs: int = 12
    views: int = 3
    batch: int = 2
    seed: int = 0
    limit: int | None = None
    precision: str = "bf16"
    rate: float = 1e-3
    decay: float = 0.05
    warmup: float = 0.05
    clip: float = 1.0
    average: float = 0.99
    fit_images: int = 120
    fit_steps: int = 1200


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.camvid.decoders", description=_SUMMARY)
    does = parser.add_subparsers(dest="does", required=True)
    training = does.add_parser("train", description="Trains the decoders, and fits exit heads to each of them.")
    training.add_argument("--out", type=Path, required=True, help="run folder; an unfinished run in it is resumed")
    for name in _COUNTS:
        training.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Recipe, name))
    training.add_argument("--seed", type=int, default=Recipe.seed)
    training.add_argument("--limit", type=int, help="use only this many train and val images")
    training.add_argument("--precision", choices=("bf16", "fp32"), default=Recipe.precision, help="of the steps")
    training.add_argument("--workers", type=int, default=0, help="processes that prepare training data")
    measuring = does.add_parser("evaluate", description="Measures plans that merge under one of the decoders.")
    under_decoders.add_arguments(measuring)
    for one in (training, measuring):
        one.add_argument("--data", type=Path, required=True, help="CamVid folder: train.txt, train/, trainannot/, ...")
        one.add_argument("--init", type=Path, required=True, help="ready model, a .npz file with timm key names")
        one.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
        one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    shell.require_counts(threads=given.threads)
    if given.does == "train":
        shell.require_counts(**{name: getattr(given, name) for name in _COUNTS})
    else:
        under_decoders.check(given)
    return given


def new_optimizer(decoders: nn.ModuleDict, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with decay for matrices and kernels only."""
    parameters = list(decoders.parameters())
    groups = [
        {"params": [one for one in parameters if (one.ndim > 1) == decays], "weight_decay": recipe.decay * decays}
        for decays in (True, False)
    ]
    return torch.optim.AdamW(groups, lr=recipe.rate)


def rate_at(step: int, steps: int, warmup: float) -> float:
    """A factor: linear warm-up, then half a cosine down to zero."""
    first = max(1, round(warmup * steps))
    return (
        (step + 1) / first if step < first else 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))
    )


@torch.no_grad()
def keep_features(
    vit: nn.Module,
    chosen: Sequence[data.Frame],
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    workers: int,
) -> list[list[Path]]:
    """Maps of a frozen network and labels of all views, in bfloat16: a file for each batch that is not there yet.

    Returns:
        The files of each view.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taps = decoding.all_taps()
    found: list[list[Path]] = []
    for view in range(recipe.views):
        files = [folder / f"{view}-{number}.safetensors" for number in range(math.ceil(len(chosen) / recipe.batch))]
        found.append(files)
        if all(file.is_file() for file in files):
            continue
        loader = data.training_batches(chosen, batch=recipe.batch, seed=recipe.seed, epoch=view, workers=workers)
        bar = shell.progress(loader, desc=f"features, view {view + 1}/{recipe.views}")
        for file, (images, labels) in zip(files, bar, strict=True):
            if file.is_file():
                continue
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
                maps = decoding.maps_of(vit, images.to(device), taps)
            content = {str(tap): map.to(torch.bfloat16).contiguous() for tap, map in zip(taps, maps, strict=True)}
            with shell.replacing(file) as opened:
                opened.write(to_bytes({**content, "labels": labels.to(torch.uint8)}))
    return found


def run_epoch(
    decoders: nn.ModuleDict,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
    files: Iterable[Path],
    recipe: Recipe,
    *,
    first: int,
    steps: int,
    device: torch.device,
) -> dict[str, float]:
    """Pass over batches of features once; return the mean loss of each decoder.

    Args:
        decoders: What is trained, by name.
        average: Their average over the steps.
        optimizer: Theirs.
        files: As `keep_features` wrote them.
        recipe: How.
        first: Steps that have been done.
        steps: Steps of the whole run.
        device: Where to.
    """
    decoders.train()
    losses = []
    for step, file in enumerate(files, start=first):
        content = {name: tensor.to(device) for name, tensor in load_file(file).items()}
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * rate_at(step, steps, recipe.warmup)
        optimizer.zero_grad(set_to_none=True)
        values = {}
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
            aim = train.criterion(content["labels"].long(), None, train.Recipe())
            for name, decoder in decoders.items():
                maps = [content[str(tap)].float() for tap in DECODERS[name].taps]
                values[name] = aim(decoder(decoding.given(maps)).float())
        for name, decoder in decoders.items():  # nothing is shared: as if each were trained by itself
            values[name].backward()
            nn.utils.clip_grad_norm_(decoder.parameters(), recipe.clip)
        optimizer.step()
        average.update_parameters(decoders)
        losses.append(torch.stack([value.detach() for value in values.values()]))
    return dict(zip(decoders, torch.stack(losses).mean(0).tolist(), strict=True))


@torch.inference_mode()
def validated(
    decoders: Mapping[str, nn.Module], vit: nn.Module, batches: data.Batches, device: torch.device
) -> dict[str, float]:
    """Data-set mIoU of each decoder on the dense network, in float32, as a fraction."""
    classes = len(data.CLASSES)
    confusion = {name: torch.zeros(classes, classes, dtype=torch.int64) for name in decoders}
    taps = decoding.all_taps()
    for images, labels in shell.progress(batches, desc="val"):
        maps = dict(zip(taps, decoding.maps_of(vit, images.to(device), taps), strict=True))
        for name, decoder in decoders.items():
            scores = decoder(decoding.given([maps[tap] for tap in DECODERS[name].taps]))
            found = decoding.of_pixels(scores).argmax(1).cpu()
            confusion[name] += metrics.confusion_matrix(found, labels, classes=classes, ignore=data.IGNORE)
    return {name: metrics.mean_iou(counts) for name, counts in confusion.items()}


def identity_of(recipe: Recipe, source: Path, chosen: Sequence[data.Frame]) -> dict[str, Any]:
    """What a resumed run must share with the one that it goes on from."""
    names = "\n".join(frame.image.stem for frame in chosen)
    digest = hashlib.sha256(names.encode()).hexdigest()[:16]
    return {**asdict(recipe), "weights": common.digest(source), "frames": digest}


def fit(
    vit: nn.Module, name: str, decoder: nn.Module, recipe: Recipe, chosen: Sequence[data.Frame], device: torch.device
) -> tuple[tet.DecodingModel, dict[int, float]]:
    """Exit heads that are fitted to a decoder's own predictions, without labels, and their agreement with it."""
    torch.manual_seed(recipe.seed)
    model = tet.wrap(
        vit, schedule.dense(after=under_decoders.AFTER), decoder=decoder, taps=DECODERS[name].taps,
        num_classes=len(data.CLASSES), exit_heads=MLP(under_decoders.HIDDEN),
    ).to(device).eval()  # fmt: skip
    step = max(1, len(chosen) // recipe.fit_images)
    images = data.Images(data.Batches(chosen[::step][: recipe.fit_images], recipe.batch), device)
    report = tet.fit_exits(
        model, images, targets=lambda scores: scores, steps=recipe.fit_steps, progress=shell.progress
    )
    return model, dict(report.agreement)


def run(
    recipe: Recipe, *, folder: Path, source: Path, out: Path, device: torch.device, workers: int
) -> dict[str, float]:
    """Train, resuming what `out` holds; save the run and return the dense val mIoU of each decoder.

    Raises:
        UsageError: If data or network are missing or do not fit, or `out` holds another run.
    """
    chosen, held_out = (data.frames(folder, split, recipe.limit) for split in ("train", "val"))
    vit = common.ready_model(source, data.SIZE)[0].eval().requires_grad_(False).to(device)
    torch.manual_seed(recipe.seed)
    decoders = decoding.new_decoders(vit).to(device)
    average = AveragedModel(decoders, multi_avg_fn=get_ema_multi_avg_fn(recipe.average))
    optimizer = new_optimizer(decoders, recipe)
    out.mkdir(parents=True, exist_ok=True)
    identity = identity_of(recipe, source, chosen)
    parts = {"decoders": decoders, "average": average, "optimizer": optimizer}
    done = checkpoints.resume(out / CHECKPOINT, identity, parts)
    if done:
        print(f"resuming {out} after epoch {done} of {recipe.epochs}", flush=True)
    views = [] if done == recipe.epochs else keep_features(vit, chosen, recipe, out / FEATURES, device, workers)
    for epoch in range(done, recipe.epochs):
        started = time.perf_counter()
        files = views[epoch % recipe.views]
        order = np.random.default_rng((recipe.seed, epoch)).permutation(len(files))
        bar = shell.progress([files[at] for at in order], desc=f"epoch {epoch + 1}/{recipe.epochs}")
        losses = run_epoch(
            decoders, average, optimizer, bar, recipe,
            first=epoch * len(files), steps=recipe.epochs * len(files), device=device,
        )  # fmt: skip
        checkpoints.keep(out / CHECKPOINT, identity, parts, done=epoch + 1)
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        print(f"epoch {epoch + 1}/{recipe.epochs}  loss {shown}  {time.perf_counter() - started:.0f} s", flush=True)
    shutil.rmtree(out / FEATURES, ignore_errors=True)
    trained = dict(cast(nn.ModuleDict, copy.deepcopy(average.module)).eval().items())
    found = validated(trained, vit, data.Batches(held_out, recipe.batch), device)
    print("dense val mIoU: " + ", ".join(f"{name} {100 * value:.2f}" for name, value in found.items()), flush=True)
    agreement = {}
    for name, decoder in trained.items():
        weights = {key: value.contiguous() for key, value in decoder.state_dict().items()}
        with shell.replacing(out / f"{name}.safetensors") as file:
            file.write(to_bytes(weights))
        model, agreement[name] = fit(vit, name, decoder, recipe, chosen, device)
        tet.save(model, out / name)
    history = {"recipe": identity, "val_miou": found, "agreement_of_exit_heads": agreement}
    (out / "history.json").write_text(json.dumps(history, indent=1) + "\n")
    print(f"run saved in {out}")
    return found


def main() -> None:
    """Run from the command line."""
    given = arguments()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if given.does == "evaluate":
        under_decoders.show(given)
        return
    recipe = Recipe(
        epochs=given.epochs, views=given.views, batch=given.batch, seed=given.seed, limit=given.limit,
        precision=given.precision, fit_images=given.fit_images, fit_steps=given.fit_steps,
    )  # fmt: skip
    device = torch.device(given.device)
    run(recipe, folder=given.data, source=given.init, out=given.out, device=device, workers=given.workers)


if __name__ == "__main__":
    shell.exit_with(main)
