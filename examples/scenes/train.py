"""Trains a plain ViT on drawn street scenes with auxiliary heads, fits its exits and saves a run folder.

    python -m examples.scenes.train --out RUN

Most steps see scenes of half the size, which are cheap; the last ones see them in full. Every step's scenes follow from
the seed and the step alone, so that the same command goes on after an interruption as if there had been none.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import tokenexit_torch as tet
from examples import checkpoints, metrics, runs, shell
from examples.scenes.draw import CLASSES, PALETTE, draw
from examples.scenes.vit import Config, PlainHost, ViT
from tokenexit import schedule
from tokenexit.policies import NeighboursAgree
from tokenexit.schedule import Exit, Merge, Schedule

NETWORK = Config()
AFTER = (3, 4, 6, 8)
_AGREE = NeighboursAgree(0.8, radius=1)
PLAN = Schedule((Exit(6, _AGREE.retaining(per_class=5)),), merges=(Merge(1, 2, alike=0.95), Merge(3, 8, agreed=_AGREE)))
CHECKPOINT = "checkpoint.safetensors"
_SUMMARY = "Trains a plain ViT on drawn street scenes, fits its exits and saves a run folder."
_MEAN, _STD = (0.45, 0.45, 0.45), (0.25, 0.25, 0.25)
_TRAIN, _FIT, _TEST = range(3)  # streams of scenes that never meet


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result; a run resumes only under its own recipe.

    Attributes:
        steps: Optimiser steps.
        size: Height and width of a scene, in pixels.
        batch: Small scenes in a step; a step on scenes in full has half as many, twice the number of pixels.
        seed: Of weights and scenes.
        full: Share of the steps, the last ones, that see scenes in full; the others see half the height and width.
        rate: Highest learning rate of the blocks' matrices; everything else learns at half of it.
        decay: Weight decay.
        auxiliary: Weight of each auxiliary head's loss.
        warmup: Share of the steps until the highest rate.
        clip: Largest norm of a gradient.
        fit_scenes: Scenes to which the exits are fitted.
        fit_steps: Steps of that fit.
        test_scenes: Held-out scenes.
    """

    steps: int = 2400
    size: tuple[int, int] = (256, 384)
    batch: int = 8
    seed: int = 0
    full: float = 0.2
    rate: float = 4e-3
    decay: float = 0.05
    auxiliary: float = 0.4
    warmup: float = 0.05
    clip: float = 1.0
    fit_scenes: int = 64
    fit_steps: int = 600
    test_scenes: int = 64

    def __post_init__(self) -> None:
        for name in ("steps", "fit_scenes", "fit_steps", "test_scenes"):
            if getattr(self, name) < 1:
                raise shell.UsageError(f"`--{name.replace('_', '-')}` must be at least 1, got {getattr(self, name)}")
        if self.batch < 2:
            raise shell.UsageError(f"`--batch` must be at least 2, got {self.batch}")
        if any(side < 64 or side % 16 for side in self.size):
            raise shell.UsageError(f"`--size` must be multiples of 16 from 64 up, got {self.size}")


class Scenes(Dataset[tuple[Tensor, Tensor]]):
    """The images and labels of each training step, drawn when asked for."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(
        self, step: int
    ) -> tuple[UInt8[Tensor, "batch 3 height width"], UInt8[Tensor, "batch height width"]]:
        recipe = self.recipe
        generator = np.random.default_rng((recipe.seed, _TRAIN, step))
        if step >= (1 - recipe.full) * recipe.steps:
            return scenes(generator, recipe.batch // 2, recipe.size)
        height, width = recipe.size
        return scenes(generator, recipe.batch, (height // 2, width // 2))


def scenes(
    generator: np.random.Generator, count: int, size: tuple[int, int]
) -> tuple[UInt8[Tensor, "count 3 height width"], UInt8[Tensor, "count height width"]]:
    """Freshly drawn scenes and the class of each of their pixels."""
    drawn = [draw(generator, size=size) for _ in range(count)]
    images = torch.from_numpy(np.stack([scene.image for scene in drawn]))
    return images.permute(0, 3, 1, 2), torch.from_numpy(np.stack([scene.label for scene in drawn]))


def about(recipe: Recipe) -> runs.About:
    """What the run folder says of the network."""
    return runs.About(
        host="plain", config=asdict(NETWORK), classes=CLASSES, palette=PALETTE, mean=_MEAN, std=_STD, size=recipe.size
    )


def new_model(recipe: Recipe) -> tet.ExitingModel:
    """A network with random weights; nothing leaves while it trains."""
    torch.manual_seed(recipe.seed)
    return tet.wrap(PlainHost(ViT(NETWORK)), schedule.dense(after=AFTER), num_classes=len(CLASSES))


def loss(
    exits: Mapping[int, Float[Tensor, "batch classes grid_h grid_w"]],
    label: UInt8[Tensor, "batch height width"],
    auxiliary: float,
) -> Float[Tensor, ""]:
    """Cross-entropy of the last head, plus `auxiliary` times that of each other, on logits upsampled to the labels.

    Every second label pixel and row counts: four samples a side of a patch, at a quarter of the time.
    """
    target = label[:, 1::2, 1::2].long()
    last = max(exits)
    return torch.stack([
        (1.0 if block == last else auxiliary) * functional.cross_entropy(_upsampled(logits, target), target)
        for block, logits in exits.items()
    ]).sum()  # fmt: skip


def _upsampled(logits: Float[Tensor, "batch classes grid_h grid_w"], label: Tensor) -> Tensor:
    return functional.interpolate(logits.float(), size=label.shape[-2:], mode="bilinear", align_corners=False)


def new_optimizers(model: tet.ExitingModel, recipe: Recipe) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the blocks' matrices, which learns a ViT in markedly fewer steps than AdamW does; AdamW for the rest."""
    matrices = [weight for block in model.host.blocks for weight in block.parameters() if weight.ndim == 2]
    taken = {id(weight) for weight in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    return (
        torch.optim.Muon(matrices, lr=recipe.rate, weight_decay=recipe.decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.rate / 2, weight_decay=recipe.decay, betas=(0.9, 0.98)),
    )


def share_of_rate(step: int, *, steps: int, warmup: float = 0.05) -> float:
    """Linear warm-up over a share of the steps to 1, then half a cosine down to zero."""
    first = max(1, round(warmup * steps))
    if step < first:
        return (step + 1) / first
    return 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def train(model: tet.ExitingModel, recipe: Recipe, out: Path, every: int) -> None:
    """Trains the model in place, from the checkpoint in `out` if there is one, leaving one every so many steps."""
    optimizers = new_optimizers(model, recipe)
    share = partial(share_of_rate, steps=recipe.steps, warmup=recipe.warmup)
    rates = [torch.optim.lr_scheduler.LambdaLR(each, share) for each in optimizers]
    parts = {"model": model, **{f"optimizer{i}": each for i, each in enumerate(optimizers)}}
    parts |= {f"rate{i}": each for i, each in enumerate(rates)}
    start = checkpoints.resume(out / CHECKPOINT, asdict(recipe), parts)
    normalised = partial(runs.normalised, about(recipe))
    # One worker draws the next scenes while this process trains; a step's scenes do not depend on the process.
    left = range(start, recipe.steps)
    steps = DataLoader(Scenes(recipe), batch_size=None, sampler=left, num_workers=1, prefetch_factor=4)
    bar = tqdm(steps, initial=start, total=recipe.steps, desc="train", disable=None)
    model.train()
    for step, (images, label) in enumerate(bar, start + 1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            exits = model.every_exit(normalised(images / 255))
        value = loss(exits, label, recipe.auxiliary)
        model.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for each in (*optimizers, *rates):
            each.step()
        if step % 20 == 0:
            bar.set_postfix_str(progress(value, exits, label))
        if step % every == 0 or step == recipe.steps:
            # Nothing in a step is random but its scenes, so no generator is kept.
            checkpoints.keep(out / CHECKPOINT, asdict(recipe), parts, done=step)
            tqdm.write(f"step {step}: {progress(value, exits, label)}")


def progress(value: Tensor, exits: Mapping[int, Tensor], label: UInt8[Tensor, "batch height width"]) -> str:
    """Loss, and pixel accuracy of the first and of the last head on the step's own scenes."""
    first, last = (
        100 * (_upsampled(exits[block], label).argmax(1) == label).float().mean().item()
        for block in (min(exits), max(exits))
    )
    return f"loss {value.item():.3f}, pixel accuracy {first:.1f} % (first head), {last:.1f} % (last)"


def fit(model: tet.ExitingModel, recipe: Recipe) -> tet.training.FitReport:
    """Fits the exits to the final head on scenes not seen before."""
    images = [images for images, _ in _fresh(recipe, _FIT, recipe.fit_scenes)]
    return tet.fit_exits(model, images, steps=recipe.fit_steps)


@torch.inference_mode()
def test(model: tet.ExitingModel, recipe: Recipe) -> dict[str, dict[str, float]]:
    """Pixel accuracy and mean IoU of every head on held-out scenes, by the blocks that run before it."""
    model.eval()
    confusion: dict[int, Tensor] = {}
    for images, label in tqdm(_fresh(recipe, _TEST, recipe.test_scenes), desc="test", disable=None):
        for block, logits in model.every_exit(images).items():
            found = metrics.confusion_matrix(_upsampled(logits, label).argmax(1), label, classes=len(CLASSES))
            confusion[block] = confusion.get(block, 0) + found
    return {
        str(block): {
            "pixel_accuracy": (counts.diagonal().sum() / counts.sum()).item(),
            "mean_iou": metrics.mean_iou(counts),
            **dict(zip(CLASSES, metrics.iou_per_class(counts).tolist(), strict=True)),
        }
        for block, counts in confusion.items()
    }


def _fresh(recipe: Recipe, stream: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images and labels of scenes from a stream of their own, two at a time."""
    normalised = partial(runs.normalised, about(recipe))
    for first in range(0, count, 2):
        generator = np.random.default_rng((recipe.seed, stream, first))
        images, labels = scenes(generator, min(2, count - first), recipe.size)
        yield normalised(images / 255), labels


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.scenes.train", description=_SUMMARY)
    parser.add_argument("--out", type=Path, required=True, help="run folder; an unfinished run in it is resumed")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimiser steps (default %(default)s)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=Recipe.size, metavar=("H", "W"), help="of a scene (default 256 384)"
    )
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="small scenes in a step (default %(default)s)")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of weights and scenes (default %(default)s)")
    parser.add_argument("--rate", type=float, default=Recipe.rate, help="highest learning rate (default %(default)s)")
    parser.add_argument(
        "--fit-scenes", type=int, default=Recipe.fit_scenes, help="scenes to fit the exits to (default %(default)s)"
    )
    parser.add_argument("--fit-steps", type=int, default=Recipe.fit_steps, help="of that fit (default %(default)s)")
    parser.add_argument("--test-scenes", type=int, default=Recipe.test_scenes, help="held out (default %(default)s)")
    parser.add_argument("--checkpoint-every", type=int, default=200, help="steps between two (default %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    return parser.parse_args()


def main() -> None:
    """The command line."""
    given = arguments()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    recipe = Recipe(
        steps=given.steps, size=tuple(given.size), batch=given.batch, seed=given.seed, rate=given.rate,
        fit_scenes=given.fit_scenes, fit_steps=given.fit_steps, test_scenes=given.test_scenes,
    )  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    model = new_model(recipe)
    train(model, recipe, given.out, given.checkpoint_every)
    report = fit(model, recipe)
    results = test(model, recipe)
    model.retune(PLAN)
    # Half precision on disk: the weights fit into a repository.
    runs.save(given.out, model, about(recipe), dtype=torch.float16)
    summary = {"recipe": asdict(recipe), "agreement": report.agreement, "test": results}
    (given.out / "result.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    for block, scores in results.items():
        agreement = report.agreement.get(int(block), 1.0)
        print(
            f"after block {block:>2}: pixel accuracy {100 * scores['pixel_accuracy']:.1f} %, "
            f"mIoU {100 * scores['mean_iou']:.1f} %, agrees with the final head on {100 * agreement:.1f} %"
        )
    print(f"run saved in {given.out}")


if __name__ == "__main__":
    shell.exit_with(main)
