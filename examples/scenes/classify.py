"""Trains a network from scratch to say of drawn street scenes what they show much of, with or without semantic tokens.

    python -m examples.scenes.classify --network vit --out RUN
    python -m examples.scenes.classify --table RUN RUN ...

Five questions a scene, each of which about half of the scenes answer with yes: do buildings, trees, cars, people or
poles cover more than so much of it? There are two pairs of networks, a small ViT and a small Swin, each dense and on
semantic tokens (STViT and STViT-R, CVPR 2023): within a pair all but these is the same. Scenes, their order and the
weights follow from the seed, so that the same command goes on after an interruption as if there had been none.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import reduce
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import tokenexit_torch as tet
from examples import checkpoints, shell
from examples.counting import multiply_adds
from examples.scenes.canvas import BUILDING, CAR, CLASSES, PERSON, POLE, TREE
from examples.scenes.draw import draw
from examples.scenes.train import share_of_rate
from examples.scenes.vit import Config, PlainHost, ViT
from tokenexit import semantic

ASKED = {BUILDING: 0.34, TREE: 0.065, CAR: 0.09, PERSON: 0.012, POLE: 0.033}
"""The classes asked for, and the share of the picture that is much of each: about the median."""

VIT = Config(width=64, depth=6, heads=2)
WINDOW = (6, 6)
CHECKPOINT, RESULT = "checkpoint.safetensors", "result.json"
_SUMMARY = "Trains a network to say what drawn street scenes show much of, with or without semantic tokens."
_TRAIN, _TEST, _ORDER = 7, 8, 9  # streams that never meet, nor those of the other trainings
_WEIGHTS_OF_BLOCK = {"qkv": "attention.qkv", "proj": "attention.out"} | {
    name: name for name in ("norm1", "norm2", "mlp.0", "mlp.2")
}


def plain(*, classes: int) -> nn.Module:
    """A ViT, and a linear layer on the mean of its tokens."""
    vit = stemmed_vit()
    return MeanOfTokens(vit, width=vit.config.width, classes=classes)


def plain_on_semantic_tokens(*, classes: int) -> nn.Module:
    """The same; after a third of its blocks 16 semantic tokens stand for all."""
    vit = stemmed_vit()
    dense = MeanOfTokens(vit, width=vit.config.width, classes=classes)  # so that both heads start alike
    dense.body = tet.wrap_semantic(
        PlainHost(vit), semantic.stvit(), after=VIT.depth // 3, until=None, heads=VIT.heads, names=_WEIGHTS_OF_BLOCK
    )
    return dense


def stemmed_vit() -> ViT:
    """A ViT on patches from a few convolutions (Xiao et al., 2021): from so few scenes it learns far sooner."""
    vit, wide = ViT(VIT), VIT.width
    sides = ((3, wide // 4), (wide // 4, wide // 2), (wide // 2, wide))  # each halves the map: patches of 8
    steps = [layer for side in sides for layer in _halving(*side)]
    vit.register_module("patches", nn.Sequential(*steps[:-1]))  # without the last rectifier
    return vit


def _halving(take: int, give: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(take, give, 3, stride=2, padding=1, bias=False)
    return conv, nn.BatchNorm2d(give), nn.ReLU()


def swin(*, classes: int, plan: semantic.SemanticPlan | None) -> nn.Module:
    """A narrow Swin with a third stage of six blocks: one unit, if there are semantic tokens."""
    body = tet.models.Swin(width=32, depths=(2, 2, 6, 2), heads=(1, 2, 4, 8), window=WINDOW, plan=plan)
    return tet.models.SwinClassifier(body, classes=classes)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "vit": plain,
    "vit-stvit": plain_on_semantic_tokens,
    "swin": partial(swin, plan=None),
    "swin-stvit": partial(swin, plan=semantic.stvit_r(WINDOW)),
    "swin-stvit-unscaled": partial(swin, plan=replace(semantic.stvit_r(WINDOW), layer_scale=None)),
}
"""Dense networks, each before the same on semantic tokens.

STViT-R's layer-scale of 1e-5 is made for hundreds of epochs; the last has none, as the dense Swin.
"""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result; a run resumes only under its own recipe.

    Attributes:
        network: Which of `NETWORKS`.
        steps: Optimiser steps.
        size: Height and width of a scene, in pixels.
        batch: Scenes in a step.
        seed: Of weights, scenes and their order.
        scenes: Scenes to learn from; mirrored half of the time.
        test_scenes: Held-out scenes.
        rate: Highest learning rate of the matrices; everything else learns at half of it.
        decay: Weight decay.
        warmup: Share of the steps until the highest rate.
        clip: Largest norm of a gradient.
    """

    network: str = "vit"
    steps: int = 600
    size: tuple[int, int] = (96, 192)
    batch: int = 16
    seed: int = 0
    scenes: int = 2048
    test_scenes: int = 1024
    rate: float = 4e-3
    decay: float = 0.05
    warmup: float = 0.05
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise shell.UsageError(f"`--network` must be one of {', '.join(NETWORKS)}, got {self.network}")
        for name in ("steps", "batch", "test_scenes"):
            if getattr(self, name) < 1:
                raise shell.UsageError(f"`--{name.replace('_', '-')}` must be at least 1, got {getattr(self, name)}")
        if self.scenes < self.batch:
            raise shell.UsageError(f"`--scenes` must be at least a batch, {self.batch}, got {self.scenes}")
        if any(side < 64 or side % 16 for side in self.size):
            raise shell.UsageError(f"`--size` must be multiples of 16 from 64 up, got {self.size}")


class Scenes(NamedTuple):
    """Scenes and the answers.

    Attributes:
        images: RGB.
        shown: Whether each of the asked classes covers more than its share.
    """

    images: UInt8[Tensor, "scenes 3 height width"]
    shown: Bool[Tensor, "scenes asked"]

    @property
    def normalised(self) -> Float[Tensor, "scenes 3 height width"]:
        """The images as networks take them."""
        return (self.images / 255 - 0.45) / 0.25


class MeanOfTokens(nn.Module):
    """Classifies images by the mean of their tokens, whether these are of patches or semantic."""

    def __init__(self, body: nn.Module, *, width: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, classes)

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images classes"]:
        found = self.body(images)
        tokens = found.tokens if isinstance(found, tet.SemanticOutput) else found
        return self.head(reduce(tokens, "images tokens width -> images width", "mean"))


def new_model(recipe: Recipe) -> nn.Module:
    """The network with random weights; those before semantic tokens begin are the same for both of a pair."""
    torch.manual_seed(recipe.seed)
    return NETWORKS[recipe.network](classes=len(ASKED))


def drawn(recipe: Recipe, stream: int, count: int) -> Scenes:
    """Scenes of a stream."""
    images, shown = [], []
    for number in shell.progress(range(count), desc="draw"):
        scene = draw(np.random.default_rng((recipe.seed, stream, number)), size=recipe.size)
        images.append(scene.image)
        shown.append([(scene.label == kind).mean() > much for kind, much in ASKED.items()])
    return Scenes(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(shown))


def of_step(scenes: Scenes, recipe: Recipe, step: int) -> Scenes:
    """The scenes of a training step, mirrored half of the time."""
    generator = np.random.default_rng((recipe.seed, _ORDER, step))
    chosen = torch.from_numpy(generator.choice(len(scenes.images), recipe.batch, replace=False))
    mirrored = torch.from_numpy(generator.random(recipe.batch) < 0.5)
    images = scenes.images[chosen]
    return Scenes(torch.where(mirrored[:, None, None, None], images.flip(3), images), scenes.shown[chosen])


def new_optimizers(model: nn.Module, recipe: Recipe) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices of linear layers but the last, as where scenes are segmented; AdamW for the rest."""
    linear = [layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != "head"]
    matrices = [layer.weight for layer in linear]
    taken = {id(weight) for weight in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in taken]
    return (
        torch.optim.Muon(matrices, lr=recipe.rate, weight_decay=recipe.decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.rate / 2, weight_decay=recipe.decay, betas=(0.9, 0.98)),
    )


def train(model: nn.Module, scenes: Scenes, recipe: Recipe, out: Path, every: int) -> None:
    """Trains the model in place, from the checkpoint in `out` if there is one, leaving one every so many steps.

    Raises:
        UsageError: If the folder holds a run of another recipe.
    """
    optimizers = new_optimizers(model, recipe)
    share = partial(share_of_rate, steps=recipe.steps, warmup=recipe.warmup)
    rates = [torch.optim.lr_scheduler.LambdaLR(each, share) for each in optimizers]
    parts = {"model": model, **{f"optimizer{i}": each for i, each in enumerate(optimizers)}}
    parts |= {f"rate{i}": each for i, each in enumerate(rates)}
    done, losses = checkpoints.resume(out / CHECKPOINT, asdict(recipe), parts), []
    bar = tqdm(range(done, recipe.steps), initial=done, total=recipe.steps, desc="train", disable=None)
    model.train()
    for step in bar:
        batch = of_step(scenes, recipe, step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch.normalised)
        value = functional.binary_cross_entropy_with_logits(logits.float(), batch.shown.float())
        model.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for each in (*optimizers, *rates):
            each.step()
        losses.append(value.item())
        if (step + 1) % every == 0 or step + 1 == recipe.steps:
            checkpoints.keep(out / CHECKPOINT, asdict(recipe), parts, done=step + 1)
            tqdm.write(f"step {step + 1}: loss {np.mean(losses):.3f}")
            losses.clear()


@torch.inference_mode()
def test(model: nn.Module, scenes: Scenes, recipe: Recipe) -> dict[str, Any]:
    """How often the network is right about held-out scenes, in float32, and what an image takes."""
    model.eval()
    batches = shell.progress(scenes.images.split(recipe.batch), desc="test")
    scores = torch.cat([model(Scenes(images, scenes.shown).normalised) for images in batches])
    one = torch.zeros(1, 3, *recipe.size)
    return marks(scores, scenes.shown) | {"multiply_adds": multiply_adds(lambda: model(one))}


def marks(
    scores: Float[Tensor, "scenes asked"], shown: Bool[Tensor, "scenes asked"]
) -> dict[str, float | dict[str, float]]:
    """Average precision of each question, their mean, and the share of right answers."""
    each = {CLASSES[kind]: average_precision(*both) for kind, *both in zip(ASKED, scores.T, shown.T, strict=True)}
    right = ((scores > 0) == shown).float().mean().item()
    return {"map": float(np.mean(list(each.values()))), "accuracy": right, "ap": each}


def average_precision(scores: Float[Tensor, " scenes"], shown: Bool[Tensor, " scenes"]) -> float:
    """Mean, over the scenes with yes for an answer, of the share of such scenes among those of no lesser score."""
    right = shown[scores.argsort(descending=True, stable=True)].double()
    precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
    return (precision * right).sum().item() / max(1.0, right.sum().item())


def without_a_network(train: Scenes, test: Scenes) -> dict[str, Any]:
    """What is right by chance, and by the colours of a thumbnail: how hard the questions are.

    Returns:
        Marks of always giving the more frequent answer, where the order of scenes is random and so its average
        precision the share of yes; and marks of a ridge regression on thumbnails of 8 x 8 pixels.
    """
    share = test.shown.double().mean(dim=0)
    usual = torch.where(train.shown.double().mean(dim=0) > 0.5, share, 1 - share).mean().item()
    each = {CLASSES[kind]: value for kind, value in zip(ASKED, share.tolist(), strict=True)}
    known, asked = (_thumbnails(scenes) for scenes in (train, test))
    damped = known.T @ known + len(known) * 1e-3 * torch.eye(known.shape[1])
    weights = torch.linalg.solve(damped, known.T @ (2 * train.shown.float() - 1))
    return {
        "chance": {"map": share.mean().item(), "accuracy": usual, "ap": each},
        "thumbnail": marks(asked @ weights, test.shown),
    }


def _thumbnails(scenes: Scenes) -> Float[Tensor, "scenes colours"]:
    small = torch.cat([functional.adaptive_avg_pool2d(part / 255 - 0.45, 8) for part in scenes.images.split(256)])
    return torch.cat([small.flatten(1), torch.ones(len(small), 1)], dim=1)


def run(recipe: Recipe, out: Path, *, every: int = 100) -> dict[str, Any]:
    """Trains and tests one network, from where it was; returns what the run folder's result holds.

    Args:
        recipe: How.
        out: The run folder.
        every: Steps between two checkpoints.
    """
    out.mkdir(parents=True, exist_ok=True)
    learned_from, held_out = drawn(recipe, _TRAIN, recipe.scenes), drawn(recipe, _TEST, recipe.test_scenes)
    model = new_model(recipe)
    train(model, learned_from, recipe, out, every)
    result = {
        "recipe": asdict(recipe),
        "network": test(model, held_out, recipe),
        **without_a_network(learned_from, held_out),
    }
    (out / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def results(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What finished runs have found.

    Raises:
        UsageError: If a folder holds none.
    """
    found = []
    for folder in folders:
        try:
            found.append(json.loads((folder / RESULT).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise shell.UsageError(f"`--table` must be folders of finished runs, got {folder}: {error}") from error
    return found


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Results for a person to read: means over the seeds of each network, and between what they lie."""
    names = [CLASSES[kind] for kind in ASKED]
    lines = [
        f"| | mAP | {' | '.join(names)} | right answers | multiply-adds, 10⁶ | of dense |",
        f"|---|{'---|' * (len(names) + 4)}",
    ]
    rows = {name: [one[name] for one in found] for name in ("chance", "thumbnail")}
    rows |= {name: [one["network"] for one in found if one["recipe"]["network"] == name] for name in NETWORKS}
    for name, row in rows.items():
        if not row:
            continue
        each = " | ".join(f"{100 * np.mean([one['ap'][kind] for one in row]):.1f}" for kind in names)
        cells = [name, _spread([one["map"] for one in row]), each, _spread([one["accuracy"] for one in row])]
        dense = rows.get(name.partition("-")[0])
        count = row[0].get("multiply_adds")
        cells += ["", ""] if count is None else [f"{count / 1e6:.0f}", ""]
        if count is not None and dense:
            cells[-1] = f"{count / dense[0]['multiply_adds']:.2f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    mean, low, high = (f"{100 * value:.1f}" for value in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.scenes.classify", description=_SUMMARY)
    own = Recipe()
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="run folder; an unfinished run in it is resumed")
    what.add_argument("--table", type=Path, nargs="+", metavar="RUN", help="print the results of finished runs instead")
    parser.add_argument("--network", default=own.network, help=f"{', '.join(NETWORKS)} (default %(default)s)")
    parser.add_argument("--steps", type=int, default=own.steps, help="optimiser steps (default %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=own.size, metavar=("H", "W"), help="of a scene")
    parser.add_argument("--batch", type=int, default=own.batch, help="scenes in a step (default %(default)s)")
    parser.add_argument("--seed", type=int, default=own.seed, help="of everything (default %(default)s)")
    parser.add_argument("--scenes", type=int, default=own.scenes, help="to learn from (default %(default)s)")
    parser.add_argument("--test-scenes", type=int, default=own.test_scenes, help="held out (default %(default)s)")
    parser.add_argument("--rate", type=float, default=own.rate, help="highest learning rate (default %(default)s)")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps between two (default %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    return parser.parse_args()


def main() -> None:
    """The command line."""
    given = arguments()
    if given.table is not None:
        print(table(results(given.table)))
        return
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    recipe = Recipe(
        network=given.network, steps=given.steps, size=tuple(given.size), batch=given.batch, seed=given.seed,
        scenes=given.scenes, test_scenes=given.test_scenes, rate=given.rate,
    )  # fmt: skip
    print(table([run(recipe, given.out, every=given.checkpoint_every)]))
    print(f"run saved in {given.out}")


if __name__ == "__main__":
    shell.exit_with(main)
