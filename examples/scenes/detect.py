"""Trains a detector of cars and people on drawn street scenes, then the same with gates, and compares the two.

    python -m examples.scenes.detect --out RUN

The network is the shipped one, which has learned to segment such scenes; over maps of four of its blocks lies a small
detector. It is trained densely first. From there the network goes on in two ways, for as many steps at the same rates:
with gates (SViT, WACV 2024), and densely as before, to separate what the gates cost from what the additional training
brings. Every step's scenes are new, and follow from the seed and the step alone, so that the same command goes on after
an interruption as if there had been none.
"""

import argparse
import copy
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

import tokenexit_torch as tet
from examples import checkpoints, runs, shell
from examples.counting import multiply_adds
from examples.precision import Precision, average_precision, require_coco
from examples.scenes.canvas import CAR, CLASSES, PERSON
from examples.scenes.detection import Boxes, Detector, Raw, Targets, decoded, detection_loss, targets
from examples.scenes.draw import Scene, draw
from examples.scenes.train import share_of_rate
from tokenexit import gates, schedule
from tokenexit.carries import Preserved
from tokenexit.schedule import Schedule

THINGS = (CAR, PERSON)
TAPS = (3, 6, 9, 12)
PARTS = 8  # of the held-out scenes, from which it is seen how far a difference can be trusted
WEIGHTS = Path(__file__).parent / "model"
_SUMMARY = "Trains a detector on drawn street scenes, densely and with gates, and compares the two."
# Streams of scenes that never meet, nor those that the network was trained on; see `examples.scenes.train`.
_STREAMS = {"dense": 3, "gated": 4, "dense, as long": 4, "calibration": 5, "test": 6}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result; a run resumes only under its own recipe.

    Attributes:
        epochs: Of the dense training, over `images` scenes each, never the same.
        tuning: Epochs with gates, and of the dense network that goes on beside it.
        images: Scenes of an epoch.
        size: Height and width of a scene, in pixels.
        batch: Scenes in a step.
        seed: Of weights, scenes and decisions.
        gates: After how many blocks there is a gate.
        rates: What share of the patches the gates are to keep, in stages.
        last: Whether the last block is `gated` as well, or `dense`: then all tokens meet once more before the end.
        random: Share of the decisions that a coin takes in training.
        ratio: Weight of the loss that holds the gates to their rates.
        smallest: Boxes of a smaller area, in pixels, are neither learned nor counted; that of one patch.
        rate: Highest learning rate of the dense training, of the detector; the network's is half of it.
        tuning_rate: Highest learning rate afterwards, of network and detector.
        gate_rate: Highest learning rate of the gates.
        decay: Weight decay.
        clip: Largest norm of a gradient.
        calibration: Scenes that the thresholds are calibrated on.
        test: Held-out scenes.
    """

    epochs: int = 10
    tuning: int = 5
    images: int = 640
    size: tuple[int, int] = (128, 192)
    batch: int = 8
    seed: int = 0
    gates: tuple[int, ...] = tuple(range(3, 12))
    rates: tuple[float, ...] = (0.75, 0.6, 0.42)
    last: str = "gated"
    random: float = 0.0
    ratio: float = 4.0
    smallest: float = 64.0
    rate: float = 2e-3
    tuning_rate: float = 2e-4
    gate_rate: float = 1e-3
    decay: float = 0.05
    clip: float = 1.0
    calibration: int = 128
    test: int = 512

    def __post_init__(self) -> None:
        for name, least in {"epochs": 1, "tuning": 1, "batch": 1, "calibration": 1, "test": PARTS}.items():
            if getattr(self, name) < least:
                raise shell.UsageError(f"`--{name}` must be at least {least}, got {getattr(self, name)}")
        if self.images < self.batch:
            raise shell.UsageError(f"`--images` must be at least a batch, {self.batch}, got {self.images}")
        if any(side < 64 or side % 16 for side in self.size):
            raise shell.UsageError(f"`--size` must be multiples of 16 from 64 up, got {self.size}")

    @property
    def plan(self) -> Schedule:
        """Gates before they are calibrated."""
        before = "last block" if self.last == "dense" else "decoder"
        return schedule.svit(after=self.gates, carry=Preserved(before=before))

    @property
    def rate_of_gate(self) -> dict[int, float]:
        """What share of the patches each gate is to keep."""
        return gates.staged_rates(self.gates, rates=self.rates)


class Network(nn.Module):
    """The network with gates and the detector over its maps."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        torch.manual_seed(recipe.seed)
        pretrained, self.about = runs.load(WEIGHTS)
        self.backbone = tet.wrap_gates(pretrained.host, recipe.plan, taps=TAPS)
        self.detector = Detector(pretrained.host.width, TAPS, len(THINGS))

    def normalised(self, scenes: list[Scene]) -> Float[Tensor, "images 3 height width"]:
        """Scenes as the network takes them."""
        stacked = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
        return runs.normalised(self.about, stacked / 255)


class Step(NamedTuple):
    """What a training step computes.

    Attributes:
        raw: What the detector says.
        penalty: What is added to its loss.
        kept: Share of the patches that run, of each gate.
    """

    raw: Raw
    penalty: Tensor
    kept: list[float]


def drawn_scenes(recipe: Recipe, stream: str, first: int, count: int) -> list[Scene]:
    """Scenes of a stream by their number."""
    each = range(first, first + count)
    return [draw(np.random.default_rng((recipe.seed, _STREAMS[stream], i)), size=recipe.size) for i in each]


def things(scene: Scene) -> Boxes:
    """Cars and people of a scene, as the detector's classes."""
    kind = torch.tensor([THINGS.index(kind) for kind in scene.boxes[:, 0].tolist()], dtype=torch.int64)
    return Boxes(torch.from_numpy(scene.boxes[:, 1:]).float(), kind, torch.ones(len(kind)))


def dense_step(network: Network, images: Tensor, _step: int) -> Step:
    """A step of the dense network: no token is skipped."""
    maps = network.backbone(images, schedule=schedule.dense()).maps
    return Step(network.detector(maps), torch.zeros(()), [])


def gated_step(network: Network, images: Tensor, step: int, *, sampled: tet.Sampled, seed: int) -> Step:
    """Decisions are drawn."""
    drawn = sampled(images, generator=torch.Generator().manual_seed(1_000_003 * seed + step))
    kept = drawn.keep.detach().mean(dim=(0, 2, 3)).tolist()
    return Step(network.detector(drawn.output.maps), drawn.ratio_loss(), kept)


def groups(network: Network, recipe: Recipe, phase: str) -> list[dict[str, Any]]:
    """Parameters and their rates."""
    parts = {
        "body": (network.backbone.model, recipe.rate / 2 if phase == "dense" else recipe.tuning_rate),
        "detector": (network.detector, recipe.rate if phase == "dense" else recipe.tuning_rate),
    } | ({"gates": (network.backbone.gates, recipe.gate_rate)} if phase == "gated" else {})
    # Weights decay; gains, biases and positions do not.
    return [
        {"params": chosen, "lr": rate, "weight_decay": decay}
        for part, rate in parts.values()
        for chosen, decay in (
            ([weight for weight in part.parameters() if weight.ndim > 1], recipe.decay),
            ([weight for weight in part.parameters() if weight.ndim <= 1], 0.0),
        )
    ]


def train(network: Network, recipe: Recipe, phase: str, out: Path) -> None:
    """Train in place, from the phase's checkpoint if there is one, leaving one after each epoch.

    Raises:
        UsageError: If the folder holds a run of another recipe.
    """
    epochs = recipe.epochs if phase == "dense" else recipe.tuning
    per_epoch = recipe.images // recipe.batch
    optimizer = torch.optim.AdamW(groups(network, recipe, phase), betas=(0.9, 0.98))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(share_of_rate, steps=epochs * per_epoch))
    parts = {"network": network, "optimizer": optimizer, "scheduler": scheduler}
    path = out / f"{phase.replace(', ', '_').replace(' ', '_')}.safetensors"
    identity = identity_of(recipe, phase)
    done = checkpoints.resume(path, identity, parts)
    forward = dense_step
    if phase == "gated":
        sampled = tet.Sampled(network.backbone, rates=recipe.rate_of_gate, random=recipe.random)
        forward = partial(gated_step, sampled=sampled, seed=recipe.seed)
    network.train()
    for epoch in range(done, epochs):
        steps, losses, kept = range(epoch * per_epoch, (epoch + 1) * per_epoch), [], []
        for step in (bar := shell.progress(steps, desc=f"{phase}, epoch {epoch + 1} of {epochs}")):
            scenes = drawn_scenes(recipe, phase, step * recipe.batch, recipe.batch)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                raw, penalty, kept = forward(network, network.normalised(scenes), step)
            value = detection_loss(raw, wanted_of(scenes, recipe))
            optimizer.zero_grad(set_to_none=True)
            (value + recipe.ratio * penalty).backward()
            nn.utils.clip_grad_norm_(network.parameters(), recipe.clip)
            optimizer.step()
            scheduler.step()
            losses.append(value.item())
            bar.set_postfix_str(_progress(losses, kept))
        checkpoints.keep(path, identity, parts, done=epoch + 1)
        tqdm.write(f"{phase}, epoch {epoch + 1} of {epochs}: {_progress(losses, kept)}")


def wanted_of(scenes: list[Scene], recipe: Recipe) -> Targets:
    """What the detector should say of scenes."""
    truth = [things(scene) for scene in scenes]
    return targets(truth, recipe.size, classes=len(THINGS), smallest=recipe.smallest)


def _progress(losses: list[float], kept: list[float]) -> str:
    shares = f", kept {' '.join(f'{share:.2f}' for share in kept)}" if kept else ""
    return f"loss {np.mean(losses):.3f}{shares}"


def identity_of(recipe: Recipe, phase: str) -> dict[str, Any]:
    """What decides the weights that a phase ends with: none but the gated one knows of the gates' options."""
    ignored = {"calibration", "test"}
    if phase != "gated":
        ignored |= {"rates", "last", "random", "ratio", "gate_rate"}
    if phase == "dense":
        ignored |= {"tuning", "tuning_rate"}
    return {name: value for name, value in asdict(recipe).items() if name not in ignored}


def batches(network: Network, recipe: Recipe, stream: str, count: int) -> Iterator[tuple[list[Scene], Tensor]]:
    """Scenes, and the same as the network takes them."""
    for first in range(0, count, recipe.batch):
        scenes = drawn_scenes(recipe, stream, first, min(recipe.batch, count - first))
        yield scenes, network.normalised(scenes)


@torch.inference_mode()
def calibrated(network: Network, recipe: Recipe) -> Schedule:
    """The plan under which each gate keeps its share of the calibration scenes."""
    images = [images for _, images in batches(network, recipe, "calibration", recipe.calibration)]
    return tet.gate_thresholds(network.backbone.eval(), images, rates=recipe.rate_of_gate, progress=shell.progress)


@torch.inference_mode()
def tested(network: Network, recipe: Recipe, plan: Schedule, *, name: str) -> dict[str, Any]:
    """Average precision on held-out scenes, in float32, and what it took.

    Args:
        network: What to test.
        recipe: How.
        plan: Which tokens run.
        name: What the progress bar says.
    """
    network.eval()
    found, truth, executed, kept = [], [], [], []
    steps = batches(network, recipe, "test", recipe.test)
    for scenes, images in shell.progress(steps, total=-(-recipe.test // recipe.batch), desc=f"test, {name}"):
        output = network.backbone(images, schedule=plan)
        found += decoded(network.detector(output.maps))
        truth += [things(scene) for scene in scenes]
        executed.append(network.backbone.multiply_adds(output))
        kept.append(output.keep.float().mean(dim=(2, 3)))
    precision = precision_of(found, truth, recipe)
    parts = [precision_of(found[part::PARTS], truth[part::PARTS], recipe).ap50 for part in range(PARTS)]
    return {
        "ap": 100 * precision.ap,
        "ap50": 100 * precision.ap50,
        **{
            f"ap50, {CLASSES[kind]}": 100 * value
            for kind, value in zip(THINGS, precision.ap50_of_class, strict=True)
        },
        "ap50_of_parts": [100 * value for value in parts],
        "multiply_adds": torch.cat(executed).double().mean().item(),
        "kept": torch.cat(kept).mean(dim=0).tolist(),
    }  # fmt: skip


def precision_of(found: list[Boxes], truth: list[Boxes], recipe: Recipe) -> Precision:
    """Average precision of cars and people."""
    return average_precision(found, truth, classes=len(THINGS), smallest=recipe.smallest)


@torch.inference_mode()
def detector_multiply_adds(network: Network, recipe: Recipe) -> float:
    """What neck and head execute for one image, whichever tokens the network has skipped."""
    height, width = (side // network.backbone.host.image_shape[-2] * 4 for side in recipe.size)
    maps = {tap: torch.zeros(1, network.backbone.host.width, height, width) for tap in TAPS}
    return multiply_adds(lambda: network.detector.eval()(maps))


def run(recipe: Recipe, out: Path) -> dict[str, Any]:
    """All phases, each from where it was; returns what `result.json` holds."""
    require_coco()
    out.mkdir(parents=True, exist_ok=True)
    network = Network(recipe)
    train(network, recipe, "dense", out)
    as_long, gated = copy.deepcopy(network), network
    dense = tested(as_long, recipe, schedule.dense(), name="dense")
    train(as_long, recipe, "dense, as long", out)
    train(gated, recipe, "gated", out)
    plan = calibrated(gated, recipe)
    gated.backbone.retune(plan)
    tet.save(gated.backbone, out / "gates")
    rows = {
        "dense": dense,
        "dense, trained as long": tested(as_long, recipe, schedule.dense(), name="dense, trained as long"),
        "gated": tested(gated, recipe, plan, name="gated"),
        "gated, all tokens running": tested(gated, recipe, schedule.dense(), name="gated, all tokens running"),
    }
    result = {
        "recipe": asdict(recipe),
        "rates": {str(after): rate for after, rate in recipe.rate_of_gate.items()},
        "detector_multiply_adds": detector_multiply_adds(gated, recipe),
        "rows": rows,
    }
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def table(result: Mapping[str, Any]) -> str:
    """The result for a person to read."""
    rows, neck = result["rows"], result["detector_multiply_adds"]
    reference = rows["dense, trained as long"]["multiply_adds"]
    names = [f"AP50 {CLASSES[kind]}" for kind in THINGS]
    lines = [
        f"| | AP | AP50 | {' | '.join(names)} | multiply-adds, 10^9 | of dense | with neck and head |",
        f"|---|{'---|' * (len(names) + 5)}",
    ]
    for name, row in rows.items():
        of_class = " | ".join(f"{row[f'ap50, {CLASSES[kind]}']:.1f}" for kind in THINGS)
        count = row["multiply_adds"]
        lines.append(
            f"| {name} | {row['ap']:.1f} | {row['ap50']:.1f} | {of_class} | {count / 1e9:.3f} "
            f"| {count / reference:.3f} | {(count + neck) / (reference + neck):.3f} |"
        )
    ours, theirs = (np.array(rows[name]["ap50_of_parts"]) for name in ("gated", "dense, trained as long"))
    error = (ours - theirs).std(ddof=1) / math.sqrt(PARTS)
    gap = rows["gated"]["ap50"] - rows["dense, trained as long"]["ap50"]
    shares = zip(result["rates"].items(), rows["gated"]["kept"], strict=True)
    kept = ", ".join(f"{share:.3f} after block {after} (asked: {rate})" for (after, rate), share in shares)
    difference = (
        f"AP50 with gates, less that of the dense network trained as long: {gap:+.2f} (standard error {error:.2f})."
    )
    return "\n".join([*lines, "", difference, f"Patches kept on the held-out scenes: {kept}."])


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.scenes.detect", description=_SUMMARY)
    own = Recipe()
    parser.add_argument("--out", type=Path, required=True, help="run folder; an unfinished run in it is resumed")
    parser.add_argument("--epochs", type=int, default=own.epochs, help="of dense training (default %(default)s)")
    parser.add_argument("--tuning", type=int, default=own.tuning, help="epochs with gates (default %(default)s)")
    parser.add_argument("--images", type=int, default=own.images, help="scenes of an epoch (default %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=own.size, metavar=("H", "W"), help="of a scene")
    parser.add_argument("--batch", type=int, default=own.batch, help="scenes in a step (default %(default)s)")
    parser.add_argument("--seed", type=int, default=own.seed, help="of everything (default %(default)s)")
    parser.add_argument("--gates", type=int, nargs="+", default=own.gates, metavar="BLOCK", help="blocks before a gate")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=own.rates, metavar="R", help="shares kept, in stages over the gates"
    )
    parser.add_argument("--last", choices=("gated", "dense"), default=own.last, help="last block (default %(default)s)")
    parser.add_argument("--random", type=float, default=own.random, help="share of decisions by a coin")
    parser.add_argument("--test", type=int, default=own.test, help="held-out scenes (default %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    return parser.parse_args()


def main() -> None:
    """The command line."""
    given = arguments()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    recipe = Recipe(
        epochs=given.epochs, tuning=given.tuning, images=given.images, size=tuple(given.size), batch=given.batch,
        seed=given.seed, gates=tuple(given.gates), rates=tuple(given.rates), last=given.last, random=given.random,
        test=given.test,
    )  # fmt: skip
    print(table(run(recipe, given.out)))
    print(f"run saved in {given.out}")


if __name__ == "__main__":
    shell.exit_with(main)
