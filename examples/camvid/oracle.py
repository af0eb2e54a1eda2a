"""What exits could do at best: a token leaves at the first head that predicts the final head's class.

    python -m examples.camvid.oracle --data CAMVID --run RUN --exits 4 6 8

The same label is not the same prediction, because a segmentation is read off upsampled logits. So besides the real
run there are replays, in which no token is missing, with something else frozen in place of the leavers' logits.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

import tokenexit_torch as tet
from examples import metrics, shell
from examples.camvid import common, data
from tokenexit import cost
from tokenexit.policies import Evidence, Policy
from tokenexit.schedule import Exit, Schedule

_SUMMARY = (__doc__ or "").partition("\n")[0]


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.camvid.oracle", description=_SUMMARY)
    parser.add_argument("--data", type=Path, required=True, help="CamVid folder: train.txt, train/, trainannot/, ...")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", type=Path, help="run folder written by examples.camvid.train")
    model.add_argument("--init", type=Path, help="ready model, a .npz file with timm key names and heads.B.*")
    parser.add_argument("--exits", type=int, nargs="+", required=True, metavar="BLOCK", help="blocks with an exit")
    parser.add_argument("--split", choices=data.SPLITS, default="val")
    parser.add_argument("--limit", type=int, help="use only this many images, spread evenly over the split")
    parser.add_argument("--train-limit", type=int, help="train images that the lines are fitted on; all by default")
    parser.add_argument("--batch", type=int, default=4, help="batch size (default %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    if given.batch < 1:
        raise shell.UsageError(f"`--batch` must be at least 1, got {given.batch}")
    return given


@dataclass(frozen=True)
class Agrees(Policy):
    """A token leaves if it has the label that it is known to end with.

    Attributes:
        final: The labels that the dense network gives.
    """

    final: Int[Tensor, "images positions"]

    def leaves(self, evidence: Evidence, /) -> Bool[Tensor, "tokens"]:
        """See `Policy.leaves`."""
        assert evidence.image is not None
        assert evidence.position is not None
        # A prefix token has no place; its decision does not count.
        return evidence.label == self.final[evidence.image, evidence.position.clamp(min=0)]


Maps = Float[Tensor, "images classes grid_height grid_width"]


@dataclass(frozen=True)
class Seen:
    """What the heads predict for a batch if nothing leaves, and where its tokens leave.

    Attributes:
        logits: By head, those after the exits first, the final head's last.
        left: At which of the heads every token leaves.
        slope: Of the line, for every exit, that leads from its logits to the final ones with the least error.
        level: Where that line begins.
    """

    logits: Float[Tensor, "heads images classes grid_height grid_width"]
    left: Int[Tensor, "images grid_height grid_width"]
    slope: Float[Tensor, "heads"]
    level: Float[Tensor, "heads classes"]

    def frozen(self, logits: Float[Tensor, "heads images classes grid_height grid_width"]) -> Maps:
        """The logits of each token at the head where it leaves."""
        where = self.left[None, :, None].expand(1, *logits.shape[1:])
        return logits.gather(0, where)[0]


def _as_it_is(seen: Seen) -> Maps:
    return seen.frozen(seen.logits)


def _label_alone(seen: Seen) -> Maps:
    label = _as_it_is(seen).argmax(1)
    return rearrange(functional.one_hot(label, seen.logits.shape[2]), "n h w c -> n c h w").to(seen.logits.dtype)


def _of_one_length(seen: Seen) -> Maps:
    return functional.normalize(seen.frozen(seen.logits.log_softmax(2)), dim=1)


def _on_a_line(seen: Seen) -> Maps:
    return seen.frozen(seen.logits * seen.slope[:, None, None, None, None] + seen.level[:, None, :, None, None])


def _with_the_next_head(seen: Seen) -> Maps:
    later = Seen(seen.logits, (seen.left + 1).clamp(max=len(seen.logits) - 1), seen.slope, seen.level)
    return torch.where(_seam(seen), (_as_it_is(seen) + _as_it_is(later)) / 2, _as_it_is(seen))


def _smoothed(seen: Seen) -> Maps:
    own = _as_it_is(seen)
    mean = functional.avg_pool2d(own, 3, stride=1, padding=1, count_include_pad=False)
    return torch.where(_seam(seen), mean, own)


def _seam(seen: Seen) -> Bool[Tensor, "images 1 grid_height grid_width"]:
    """Which tokens have neighbours that left at another head."""
    left = seen.left[:, None].float()
    deepest, first = (sign * functional.max_pool2d(sign * left, 3, stride=1, padding=1) for sign in (1, -1))
    return deepest != first


FROZEN: Mapping[str, Callable[[Seen], Maps]] = {
    "its logits": _as_it_is,
    "logits on a line to the final ones": _on_a_line,
    "logits of one length": _of_one_length,
    "its label": _label_alone,
    "logits, at seams the mean of 3 x 3": _smoothed,
    "logits, at seams the mean with the next head's": _with_the_next_head,
}
"""What a token may leave behind in a replay of the oracle."""


def lines(trace: tet.Trace, after: Sequence[int]) -> tuple[Float[Tensor, "heads"], Float[Tensor, "heads classes"]]:
    """For every exit, the slope and the level, by class, from its logits to the final head's, by least squares."""
    chosen = [trace.after.index(block) for block in (*after, trace.after[-1])]
    logits = rearrange(trace.logits[:, chosen], "n heads c h w -> heads (n h w) c").double()
    mean = logits.mean(1, keepdim=True)
    centred, final = logits - mean, logits[-1:] - mean[-1:]
    slope = (centred * final).sum((1, 2)) / centred.square().sum((1, 2))
    level = mean[-1] - slope[:, None] * mean[:, 0]
    return slope.to(trace.logits.dtype), level.to(trace.logits.dtype)


class Row(NamedTuple):
    """What came of one way to run.

    Attributes:
        miou: Data-set mIoU as a fraction.
        token_blocks: Executed token-blocks, relative to dense.
    """

    miou: float
    token_blocks: float


@torch.inference_mode()
def oracle(
    model: tet.ExitingModel, after: Sequence[int], batches: data.Batches, train: tet.Trace, device: torch.device
) -> dict[str, Row]:
    """The oracle beside dense: really run, and replayed with something else frozen.

    Args:
        model: The network with its exit heads.
        after: The exits.
        batches: The split.
        train: What the heads say of train images: the lines are fitted on them.
        device: Where the model is.
    """
    slope, level = (part.to(device) for part in lines(train, after))
    names = ["dense", "really run", *(f"replayed, a leaver leaves {what}" for what in FROZEN)]
    confusion = {name: torch.zeros(len(data.CLASSES), len(data.CLASSES), dtype=torch.int64) for name in names}
    executed, depth = [], []
    for images, labels in shell.progress(batches, desc="oracle"):
        images = images.to(device)
        heads = model.every_exit(images)
        logits = torch.stack([heads[block] for block in (*after, model.depth)])
        final = logits[-1].argmax(1)
        seen = Seen(logits, (logits.argmax(2) == final).int().argmax(0), slope, level)
        out = model(images, schedule=knowing(rearrange(final, "images h w -> images (h w)"), after))
        executed.append(out.tokens_per_block.cpu())
        depth.append(torch.tensor([*after, model.depth], device=device)[seen.left].double().mean((1, 2)))
        outcomes = [logits[-1], out.logits, *(freeze(seen) for freeze in FROZEN.values())]
        for name, outcome in zip(names, outcomes, strict=True):
            _count(confusion[name], outcome, labels)
    tokens = torch.cat(executed)
    work = dict.fromkeys(names, torch.cat(depth).mean().item() / model.depth)
    work |= {"dense": 1.0, "really run": cost.token_blocks(tokens, slots=int(tokens[0, 0]))}
    return {name: Row(metrics.mean_iou(confusion[name]), work[name]) for name in names}


def knowing(final: Int[Tensor, "images positions"], after: Sequence[int]) -> Schedule:
    """The oracle as a plan for one batch, from its final labels."""
    return Schedule(tuple(Exit(block, Agrees(final)) for block in after))


def _count(confusion: Int[Tensor, "classes classes"], logits: Maps, labels: UInt8[Tensor, "images 352 480"]) -> None:
    full = functional.interpolate(logits, data.SIZE, mode="bilinear", align_corners=False)
    confusion += metrics.confusion_matrix(full.argmax(1).cpu(), labels, classes=len(data.CLASSES), ignore=data.IGNORE)


def main() -> None:
    """Run from the command line."""
    given = arguments()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    frames, train = (
        data.frames(given.data, split, limit)
        for split, limit in ((given.split, given.limit), ("train", given.train_limit))
    )
    model = common.saved_model(given.run or given.init, data.SIZE).eval().to(device)
    after, heads = sorted(set(given.exits)), [int(block) for block in model.exit_heads]
    if not set(after) <= set(heads):
        raise shell.UsageError(f"`--exits` must be among the blocks with a head, {heads}, got {after}")
    seen = tet.trace(model, data.Images(data.Batches(train, given.batch), device), progress=shell.progress)
    rows = oracle(model, after, data.Batches(frames, given.batch), seen, device)
    for name, row in rows.items():
        print(f"{name:<62}  mIoU {100 * row.miou:.2f}  token-blocks {row.token_blocks:.3f}")


if __name__ == "__main__":
    shell.exit_with(main)
