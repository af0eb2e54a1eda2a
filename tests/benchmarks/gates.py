"""What gates cost, and what repacking at every gate costs, beside the blocks that they leave to run.

    python -m tests.benchmarks.gates --images 8 --budget 0.65 --rounds 9

A plain ViT-Tiny with random weights runs drawn images: dense; with gates, whose thresholds are calibrated so that the
rates leave a share of the multiply-adds; the same with the decisions known beforehand, so that no gate is evaluated;
and its blocks by themselves, each on as many tokens of each image as ran, with nothing gathered and nothing decided.
The difference of the second and third is the gates' price, that of the third and fourth is the price of repacking and
policies. Everything is timed in turn, in a new order every round; the figures are medians, and dense is 1.
"""

import argparse
import json
import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

import tokenexit_torch as tet
from examples.camvid import common, gated
from tests.benchmarks.clock import interleaved
from tokenexit import schedule
from tokenexit.schedule import Exit, Schedule
from tokenexit_torch.attention import attending_per_image
from tokenexit_torch.gates import forward

SIZE = (352, 480)
CANDIDATES = {"nine gates": gated.VARIANTS["svit"], "three gates": gated.VARIANTS["svit-few"]}


def known(model: tet.GatedModel, images: Tensor, plan: Schedule, decisions: Mapping[int, Tensor]) -> tet.GatedOutput:
    """A pass whose decisions are known: no gate is evaluated, and no policy."""

    def decide(state: forward.State, exit: Exit) -> forward.Decision:
        keep = decisions[exit.after]
        return forward.decided(keep, keep, prefix=state.embedded.prefix)

    state = forward.start(model.host, images, plan, patch=model.patch)
    state = forward.run(model.host, state, plan.stages(model.depth), layout=forward.PACKED, decide=decide)
    return forward.output(model.host, model.head, state)


def blocks_alone(model: tet.GatedModel, found: tet.GatedOutput, images: Tensor) -> None:
    """Embedding, and every block on as many tokens as ran."""
    tokens = model.host.embed(images).tokens
    row = tokens.flatten(0, 1)[None]
    for block, counts in enumerate(found.tokens_per_block.T.tolist()):
        if counts == [tokens.shape[1]] * len(images):
            tokens = model.host.run(block, tokens, None)
        else:
            with attending_per_image(counts):
                model.host.run(block, row[:, : sum(counts)], None)
    model.host.finish(tokens)


@torch.inference_mode()
def measure(name: str, given: argparse.Namespace) -> dict[str, float | str]:
    """One candidate, its parts as shares of the dense time."""
    torch.manual_seed(0)
    variant = CANDIDATES[name]
    vit = common.build_vit(16, SIZE)
    model = tet.wrap_gates(vit, schedule.svit(after=variant.after)).eval()
    for gate in model.gates.values():
        gate.get_parameter("3.weight").mul_(12)
    images = torch.randn(given.images, 3, *SIZE)
    patches = (SIZE[0] // 16) * (SIZE[1] // 16)
    rates = gated.rates_for(model, variant, given.budget, patches=patches)
    plan = tet.gate_thresholds(model, images, rates=rates, progress=iter)
    model.retune(plan)
    found = model(images)
    decisions = {after: found.keep[:, index].flatten(1) for index, after in enumerate(found.gates)}
    calls = {
        "dense": lambda: model.host.dense(images),
        "gated": lambda: model(images),
        "known": lambda: known(model, images, plan, decisions),
        "blocks": lambda: blocks_alone(model, found, images),
    }
    seconds = {
        key: statistics.median(values) for key, values in interleaved(calls, rounds=given.rounds, at_least=0.5).items()
    }
    dense = seconds["dense"]
    whole = model.multiply_adds(model(images, schedule=schedule.dense())).sum()
    return {
        "gates": name, "images": given.images, "multiply_adds": (model.multiply_adds(found).sum() / whole).item(),
        "dense_ms": 1000 * dense, "gated": seconds["gated"] / dense, "blocks": seconds["blocks"] / dense,
        "price_of_gates": (seconds["gated"] - seconds["known"]) / dense,
        "price_of_repacking": (seconds["known"] - seconds["blocks"]) / dense,
    }  # fmt: skip


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.gates", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--images", type=int, default=8, help="batch size (default %(default)s)")
    parser.add_argument("--budget", type=float, default=0.65, help="multiply-adds, dense = 1 (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(default %(default)s)")
    given = parser.parse_args()
    for name in CANDIDATES:
        print(json.dumps(measure(name, given)), flush=True)


if __name__ == "__main__":
    main()
