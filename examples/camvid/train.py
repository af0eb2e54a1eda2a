"""Trains a ViT-Tiny on CamVid, from ImageNet or for fewer tokens from a dense checkpoint, and saves a run folder.

    python -m examples.camvid.train --data CAMVID --weights deit_tiny_patch16_224.npz --out RUN
    python -m examples.camvid.train --data CAMVID --init camvid_vit_tiny_p16.npz --method neighbours --out RUN

From `--weights`, the whole network is fine-tuned with auxiliary heads, and the exit heads are fitted to the final head
at the end. From `--init`, they are fitted at the beginning, and then trained with the network, under the exits of
`--method`: labels and the checkpoint's own predictions teach every head, and the averaged weights are saved.

Stop it at any time: the same command goes on after the last finished epoch, to the bit as if it had not been stopped.
"""

import argparse
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import tokenexit_torch as tet
from examples import checkpoints, metrics, runs, shell
from examples.camvid import common, data, gated, methods, shrunk
from tokenexit import schedule
from tokenexit.heads import MLP

CHECKPOINT = "checkpoint.safetensors"
_AFTER = (4, 6, 8, 10)
_HEADS = MLP(hidden=384)
_PLAN = schedule.neighbours(radius={4: 1, 6: 1, 8: 0}, threshold=0.9)
_PATCH = 16
_SUMMARY = (__doc__ or "").partition("\n")[0]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, besides data and weights; a run resumes only under its own recipe.

    Attributes:
        start: What the weights are: an ImageNet backbone, or a dense checkpoint that is the teacher as well.
        method: Exits to train with.
        auxiliary: Weight of the loss of an exit head; 0 for a network that knows nothing of exits.
        labels: Weight of the labels; 0 to look at none.
        teacher: Weight of the divergence from the teacher.
        average: Decay of the average of the weights over the steps; 0 for none.
    """

    start: Literal["weights", "init"] = "weights"
    method: str = "dense"
    epochs: int = 24
    batch: int = 8
    seed: int = 0
    limit: int | None = None
    precision: str = "bf16"
    fit_steps: int = 1200
    body_rate: float = 2e-4
    head_rate: float = 1e-3
    decay: float = 0.05
    auxiliary: float = 0.4
    labels: float = 1.0
    teacher: float = 0.0
    average: float = 0.0
    warmup: float = 0.05
    clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "fit_steps"):
            if getattr(self, name) < 1:
                raise shell.UsageError(f"`--{name.replace('_', '-')}` must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.auxiliary < math.inf or (self.auxiliary == 0 and self.start == "init"):
            rule = "be a number from 0 up" if self.start == "weights" else "be positive with --init"
            raise shell.UsageError(f"`--auxiliary` must {rule}, got {self.auxiliary:g}")
        if not 0 <= self.labels < math.inf or (self.labels == 0 and self.teacher == 0):
            rule = "be a number from 0 up, and positive without a teacher"
            raise shell.UsageError(f"`--labels` must {rule}, got {self.labels:g}")


WITH_EXITS = Recipe(start="init", epochs=8, body_rate=1e-4, head_rate=3e-4, auxiliary=0.5, teacher=1.0, average=0.99)
"""What `--init` starts from: a checkpoint that needs small steps, and knows what it wants to say."""

SHRUNK = replace(WITH_EXITS, epochs=12, body_rate=2e-4, head_rate=1e-3)
"""For semantic tokens: its blocks have to learn to do without most of the tokens."""


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.camvid.train", description=_SUMMARY)
    parser.add_argument("--data", type=Path, required=True, help="CamVid folder: train.txt, train/, trainannot/, ...")
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--weights", type=Path, help="DeiT-Tiny, a .npz file with timm key names")
    start.add_argument("--init", type=Path, help="dense checkpoint: a .npz file with timm key names, or a run folder")
    parser.add_argument(
        "--method",
        choices=[*methods.METHODS, *gated.VARIANTS, *shrunk.VARIANTS],
        default="dense",
        help="exits, gates or semantic tokens to train with, from --init",
    )
    parser.add_argument("--out", type=Path, required=True, help="run folder; an unfinished run in it is resumed")
    parser.add_argument("--epochs", type=int, help="as the recipe says by default: 24, or from --init 8 or 12")
    parser.add_argument("--batch", type=int, default=Recipe.batch)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--limit", type=int, help="use only this many train and val images")
    parser.add_argument("--labels", type=float, default=Recipe.labels, help="their weight; 0 for the teacher alone")
    parser.add_argument("--auxiliary", type=float, help="weight of an exit head's loss: 0.4, or from --init 0.5")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default=Recipe.precision, help="of the training steps")
    parser.add_argument("--fit-steps", type=int, default=Recipe.fit_steps, help="steps to fit exit heads")
    parser.add_argument("--validate-every", type=int, default=4, help="epochs between two looks at val")
    parser.add_argument("--workers", type=int, default=0, help="processes that prepare training data")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


Model = tet.ExitingModel | tet.GatedModel | runs.Segmenter


def new_model(source: Path, recipe: Recipe) -> Model:
    """The network with fresh exit heads, of which nothing leaves, with fresh gates, or on semantic tokens.

    Raises:
        UsageError: If the file does not hold what the recipe starts from.
    """
    torch.manual_seed(recipe.seed)
    if recipe.start == "weights":
        vit = common.pretrained_vit(source, _PATCH, data.SIZE)
        return tet.wrap(vit, schedule.dense(after=_AFTER), num_classes=len(data.CLASSES), exit_heads=_HEADS)
    vit, final, _ = common.ready_model(source, data.SIZE)
    hidden, width = final.get_parameter("1.weight").shape
    classes = len(final.get_parameter("3.weight"))
    if classes != len(data.CLASSES):
        raise shell.UsageError(f"`--init` must have {len(data.CLASSES)} classes, got {classes} in {str(source)!r}")
    if recipe.method in gated.VARIANTS or recipe.method in shrunk.VARIANTS:
        rule = f"have a final head as wide as its tokens for {recipe.method}"
        if hidden != width:
            raise shell.UsageError(f"`--init` must {rule}, {width}, got {hidden} in {str(source)!r}")
    if recipe.method in gated.VARIANTS:
        return gated.new_model(vit, final, gated.VARIANTS[recipe.method])
    if recipe.method in shrunk.VARIANTS:
        return shrunk.new_model(vit, final, shrunk.VARIANTS[recipe.method])
    plan = schedule.dense(after=methods.METHODS[recipe.method].after)
    # All heads of one plan, which the checkpoint's final head has as well, so that the run folder holds it.
    model = tet.wrap(vit, plan, num_classes=len(data.CLASSES), exit_heads=MLP(hidden))
    model.head.load_state_dict(final.state_dict())
    return model


def criterion(
    label: Int64[Tensor, "batch height width"],
    teacher: Float[Tensor, "batch classes grid_h grid_w"] | None,
    recipe: Recipe,
) -> Callable[[Float[Tensor, "batch classes grid_h grid_w"]], Float[Tensor, ""]]:
    """The loss of one head, on logits upsampled to the labels: cross-entropy, and divergence from the teacher if any.

    Every second label pixel and row counts: that is eight samples a side of a token, at a tenth of the time.
    """
    label = label[:, 1::2, 1::2]
    size = (label.shape[1], label.shape[2])
    wish = None if teacher is None else functional.interpolate(teacher.float(), size, mode="bilinear")

    def loss(logits: Tensor) -> Tensor:
        value = recipe.labels * tet.pixel_cross_entropy(logits, label, ignore=data.IGNORE)
        return value if wish is None else value + recipe.teacher * tet.distillation(logits, wish)

    return loss


def new_optimizer(model: Model, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with a higher rate for the heads and gates, and decay for matrices and kernels only."""
    body = list(model.host.module.parameters())
    inside = {id(parameter) for parameter in body}
    readers = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    groups = [
        {"params": [parameter for parameter in chosen if _is_matrix(parameter) == decays], "lr": rate,
         "weight_decay": recipe.decay if decays else 0.0}
        for chosen, rate in ((body, recipe.body_rate), (readers, recipe.head_rate))
        for decays in (True, False)
    ]  # fmt: skip
    return torch.optim.AdamW(groups)


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Whether a parameter mixes features; biases, norms and the (1, tokens, width) embeddings do not."""
    return parameter.ndim >= 2 and parameter.shape[0] != 1


def new_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then half a cosine down to zero after `steps`."""
    warmup = max(1, round(recipe.warmup * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@dataclass(frozen=True)
class Training:
    """What changes during training, saved and restored together."""

    model: Model
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR

    def state(self) -> dict[str, Any]:
        """Everything needed to go on as if nothing had happened."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a saved state."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])

    @property
    def result(self) -> Model:
        """The network to evaluate and to save: the average of the weights."""
        return cast(Model, self.average.module)


def run_epoch(
    training: Training,
    teacher: Model | None,
    batches: Iterable[Sequence[Tensor]],
    recipe: Recipe,
    *,
    first: int,
    steps: int,
    device: torch.device,
) -> float:
    """Pass over the batches once; return the mean loss.

    Args:
        training: What is trained.
        teacher: The network that it must not forget, if any.
        batches: Images and labels.
        recipe: How.
        first: Steps that have been done.
        steps: Steps of the whole run.
        device: Where to.
    """
    model = training.model.train()
    losses = []
    for step, (images, labels) in enumerate(batches, start=first):
        images, labels = images.to(device), labels.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
            value = step_loss(model, teacher, images, labels, recipe, step=step, steps=steps)
        training.optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        training.optimizer.step()
        training.scheduler.step()
        training.average.update_parameters(model)
        losses.append(value.detach())
    return torch.stack(losses).mean().item()


def step_loss(
    model: Model,
    teacher: Model | None,
    images: Float[Tensor, "batch 3 height width"],
    labels: Int64[Tensor, "batch height width"],
    recipe: Recipe,
    *,
    step: int,
    steps: int,
) -> Float[Tensor, ""]:
    """The loss of one step, under the exits, gates or semantic tokens of the method."""
    if isinstance(model, runs.Segmenter):
        assert teacher is None or isinstance(teacher, runs.Segmenter)
        return shrunk.loss(model, teacher, images, lambda wish: criterion(labels, wish, recipe))
    with torch.no_grad():
        wish = None if teacher is None else scores(teacher, images)
    aim = criterion(labels, wish, recipe)
    if isinstance(model, tet.GatedModel):
        return gated.loss(model, images, aim, gated.VARIANTS[recipe.method], step=step, seed=recipe.seed)
    training = methods.METHODS[recipe.method].training(step, steps, recipe.seed)
    plan = schedule.dense() if recipe.auxiliary == 0 else training  # without exits no exit head runs
    return tet.Staged(model)(images, schedule=plan).loss(aim, auxiliary=recipe.auxiliary)


def scores(model: Model, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch classes grid_h grid_w"]:
    """Class scores of a network that nothing leaves, or that is on semantic tokens."""
    found = model(images) if isinstance(model, runs.Segmenter) else model(images, schedule=schedule.dense()).logits
    assert found is not None  # they have heads
    return found


@torch.inference_mode()
def validated(model: Model, batches: data.Batches, device: torch.device) -> float:
    """Data-set mIoU in float32, as a fraction, logits upsampled to the labels: dense, or on semantic tokens."""
    model.eval()
    confusion = torch.zeros(len(data.CLASSES), len(data.CLASSES), dtype=torch.int64)
    for images, labels in shell.progress(batches, desc="val"):
        full = functional.interpolate(
            scores(model, images.to(device)), size=labels.shape[-2:], mode="bilinear", align_corners=False
        )
        confusion += metrics.confusion_matrix(
            full.argmax(1).cpu(), labels, classes=len(data.CLASSES), ignore=data.IGNORE
        )
    return metrics.mean_iou(confusion)


def load_checkpoint(path: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the checkpoint of the same recipe, data and weights, if there is one.

    Raises:
        UsageError: If the folder holds a run of another recipe, other data or other weights.
    """
    if not path.is_file():
        return None
    content = checkpoints.load(path)
    found = content["identity"]
    different = [f"{name} {found.get(name)!r}, not {now!r}" for name, now in identity.items() if found.get(name) != now]
    if different:
        raise shell.UsageError(
            f"`--out` must be a new folder or a run with the same settings, got {str(path.parent)!r}, which has "
            + "; ".join(different)
        )
    return content


def identity_of(recipe: Recipe, source: Path, chosen: tuple[data.Frame, ...]) -> dict[str, Any]:
    """What a resumed run must share with the one that it goes on from."""
    names = "\n".join(frame.image.stem for frame in chosen)
    return {
        **asdict(recipe),
        "weights": common.digest(source),
        "frames": hashlib.sha256(names.encode()).hexdigest()[:16],
    }


def train(
    recipe: Recipe, *, folder: Path, source: Path, out: Path, device: torch.device, workers: int, validate_every: int
) -> float:
    """Train, resuming what `out` holds; save the run and return the dense val mIoU.

    Raises:
        UsageError: If data or weights are missing or do not fit, or `out` holds another run.
    """
    chosen, held_out = (data.frames(folder, split, recipe.limit) for split in ("train", "val"))
    model = new_model(source, recipe).to(device)
    teacher = copy.deepcopy(model).eval().requires_grad_(False) if recipe.teacher > 0 else None
    optimizer = new_optimizer(model, recipe)
    batches = math.ceil(len(chosen) / recipe.batch)
    steps = recipe.epochs * batches
    identity, validation = identity_of(recipe, source, chosen), data.Batches(held_out, recipe.batch)
    saved = load_checkpoint(out / CHECKPOINT, identity)
    if saved is None and recipe.start == "init" and isinstance(model, tet.ExitingModel):
        fit(model, recipe, chosen, device)
    seen = saved["fitted"] if saved is not None else model.fitted if isinstance(model, tet.ExitingModel) else ()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.average))
    training = Training(model, average, optimizer, new_scheduler(optimizer, recipe, steps))
    history: list[dict[str, float]] = []
    if saved is not None:
        training.restore(saved["training"])
        history = saved["history"]
        print(f"resuming {out} after epoch {len(history)} of {recipe.epochs}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    for epoch in range(len(history), recipe.epochs):
        started = time.perf_counter()
        loader = data.training_batches(chosen, batch=recipe.batch, seed=recipe.seed, epoch=epoch, workers=workers)
        bar = shell.progress(loader, desc=f"epoch {epoch + 1}/{recipe.epochs}")
        loss = run_epoch(training, teacher, bar, recipe, first=epoch * batches, steps=steps, device=device)
        entry = {"loss": loss, "seconds": time.perf_counter() - started}
        if (epoch + 1) % validate_every == 0 or epoch + 1 == recipe.epochs:
            entry["val_miou"] = validated(training.result, validation, device)
        history.append(entry)
        checkpoints.save(
            out / CHECKPOINT,
            {"identity": identity, "history": history, "fitted": seen, "training": training.state()},
        )
        print(_line(len(history), recipe.epochs, entry), flush=True)
    if isinstance(training.result, tet.ExitingModel):
        training.result.fitted = seen  # no state dict has it
    if recipe.start == "weights" and isinstance(training.result, tet.ExitingModel):
        fit(training.result, recipe, chosen, device)
    finish(training.result, recipe, chosen, out=out, history=history, device=device)
    return history[-1]["val_miou"]


def fit(model: tet.ExitingModel, recipe: Recipe, chosen: tuple[data.Frame, ...], device: torch.device) -> None:
    """Fit the exit heads to the final head on the train images, without labels."""
    images = data.Images(data.Batches(chosen, recipe.batch), device)
    report = tet.fit_exits(model.eval(), images, steps=recipe.fit_steps, progress=shell.progress)
    agreement = ", ".join(f"{block}: {100 * value:.1f} %" for block, value in report.agreement.items())
    print(f"exit heads agree with the final head, by block: {agreement}", flush=True)


def finish(
    model: Model,
    recipe: Recipe,
    chosen: tuple[data.Frame, ...],
    *,
    out: Path,
    history: list[dict[str, float]],
    device: torch.device,
) -> None:
    """Save the run; gates are calibrated before."""
    patch = int(model.host.module.get_parameter("patch_embed.proj.weight").shape[-1])
    config = {"model_name": common.VIT, **common.vit_config(patch, data.SIZE)}
    about = runs.About(
        host="timm", config=config, classes=data.CLASSES, palette=data.PALETTE, mean=data.MEAN, std=data.STD,
        size=data.SIZE,
    )  # fmt: skip
    model.eval()
    if isinstance(model, tet.GatedModel):
        plans = gated.budget_plans(model, gated.VARIANTS[recipe.method], chosen, device)
        gated.write_plans(out, plans)
        model.retune(plans[gated.TRAINED])
        runs.save_gated(out, model, about)
    elif isinstance(model, runs.Segmenter):
        runs.save_semantic(out, model, about)
    else:
        model.retune(_PLAN if recipe.start == "weights" else methods.METHODS[recipe.method].saved)
        runs.save(out, model, about)
    (out / "history.json").write_text(json.dumps({"recipe": asdict(recipe), "epochs": history}, indent=1) + "\n")
    print(f"val mIoU {100 * history[-1]['val_miou']:.2f}; run saved in {out}", flush=True)


def _line(epoch: int, epochs: int, entry: Mapping[str, float]) -> str:
    parts = [f"epoch {epoch}/{epochs}", f"loss {entry['loss']:.4f}", f"{entry['seconds']:.0f} s"]
    if "val_miou" in entry:
        parts.append(f"val mIoU {100 * entry['val_miou']:.2f}")
    return "  ".join(parts)


def main() -> None:
    """Run from the command line."""
    given = arguments()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if given.validate_every < 1:
        raise shell.UsageError(f"`--validate-every` must be at least 1, got {given.validate_every}")
    base = Recipe() if given.init is None else SHRUNK if given.method in shrunk.VARIANTS else WITH_EXITS
    source = given.weights if given.init is None else given.init
    if base.start == "weights" and given.method != "dense":
        raise shell.UsageError(f"`--method` must be dense with --weights, got {given.method!r}: exits need --init")
    if given.auxiliary is not None and given.method not in methods.METHODS:
        raise shell.UsageError(f"`--auxiliary` must be left out for {given.method}, got {given.auxiliary:g}")
    recipe = replace(
        base, method=given.method, epochs=base.epochs if given.epochs is None else given.epochs, batch=given.batch,
        seed=given.seed, limit=given.limit, precision=given.precision, fit_steps=given.fit_steps,
        auxiliary=base.auxiliary if given.auxiliary is None else given.auxiliary, labels=given.labels,
    )  # fmt: skip
    train(
        recipe, folder=given.data, source=source, out=given.out,
        device=torch.device(given.device), workers=given.workers, validate_every=given.validate_every,
    )  # fmt: skip


if __name__ == "__main__":
    shell.exit_with(main)
