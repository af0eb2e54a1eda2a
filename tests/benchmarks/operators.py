"""Operators that an exit dispatches in eager PyTorch, and kernels that `torch.compile` makes of its decision.

    python -m tests.benchmarks.operators
    python -m tests.benchmarks.operators --compile

On a GPU every operator is a launch of some microseconds, whatever it computes. Counted is what a ViT-Tiny at 660
tokens dispatches with three exits beyond what it does without, by exit, views aside; thresholds are such that about a
third of the tokens leaves at each. `--compile` counts kernels, generated and external, of the decision alone, from the
class scores to which tokens stay, retention included: those that inductor makes for the CPU, a proxy for those that it
would make for a GPU.
"""

import argparse
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tokenexit_torch as tet
from tests.timm_import import import_timm
from tokenexit import exits, schedule, tokens
from tokenexit.exits import HeadOutput
from tokenexit.schedule import Schedule

SIZE, GRID, CLASSES = (352, 480), (22, 30), 11
LAUNCHES = re.compile(r"^\s+(?:\w+ = )?(?:cpp_fused_\w+\(|extern_kernels\.|torch\.ops\.|aten\.)")


class Dispatched(TorchDispatchMode):
    """Counts operators, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def plans(thresholds: Mapping[str, tuple[float, float, float]]) -> dict[str, Schedule]:
    """Default radii, and five tokens of each class retained."""
    after, radius = (3, 6, 8), {3: 2, 6: 1, 8: 0}
    made = {
        "neighbours": lambda one, block: schedule.neighbours(radius={block: radius[block]}, threshold=one, per_class=5),
        "dtop": lambda one, block: schedule.dtop(after=(block,), threshold=one, per_class=5),
    }
    return {
        name: Schedule(tuple(made[name](one, block).exits[0] for one, block in zip(of_rule, after, strict=True)))
        for name, of_rule in thresholds.items()
    }


def counts(images: int = 1, *, size: tuple[int, int] = SIZE) -> dict[str, tuple[float, list[float]]]:
    """Operators by exit of each rule, and the shares of the tokens that run on after each exit."""
    torch.manual_seed(0)
    vit = import_timm().create_model("vit_tiny_patch16_224", img_size=size, num_classes=0).eval()
    batch = torch.randn(images, 3, *size)
    model = tet.wrap(vit, schedule.dense(after=(3, 6, 8)), num_classes=CLASSES).eval()
    # Neighbours seldom agree by random heads: these lean to one class.
    for number, after in enumerate((3, 6, 8)):
        last: Any = [one for one in model.exit_heads[str(after)].modules() if isinstance(one, torch.nn.Linear)][-1]
        torch.nn.init.normal_(last.weight, std=0.02)
        torch.nn.init.zeros_(last.bias)
        last.bias.data[number] = 3
    dense, _ = dispatched(model, batch, schedule.dense())
    found = {}
    for name, plan in plans(thirds(model, batch)).items():
        used, output = dispatched(model, batch, plan)
        ran = output.tokens_per_block.double().mean(dim=0)
        found[name] = ((used.total() - dense.total()) / 3, (ran[[3, 6, 8]] / ran[0]).tolist())
    return found


@torch.inference_mode()
def thirds(model: tet.ExitingModel, images: Tensor) -> dict[str, tuple[float, float, float]]:
    """Thresholds at which about a third of the tokens leaves at each exit, found one after the other."""
    found: dict[str, tuple[float, float, float]] = {}
    for name in ("neighbours", "dtop"):
        chosen: list[float] = []
        for after in (3, 6, 8):
            low, high = 0.0, 1.0
            for _ in range(9):
                middle = (low + high) / 2
                tried = (*chosen, middle, *[1.0] * (2 - len(chosen)))
                ran = model(images, schedule=plans({name: tried})[name]).tokens_per_block.double().mean(dim=0)
                low, high = (middle, high) if ran[after] < ran[after - 1] * 2 / 3 else (low, middle)
            chosen.append(high)
        found[name] = (chosen[0], chosen[1], chosen[2])
    return found


@torch.no_grad()
def dispatched(model: tet.ExitingModel, images: Tensor, plan: Schedule) -> tuple[Counter[str], tet.Output]:
    """Operators of a call."""
    with Dispatched() as seen:
        output = model(images, schedule=plan)
    return seen.counts, output


def kernels(rule: str) -> int:
    """Kernels of a decision, compiled as one graph: from the class scores to which tokens stay."""
    from torch._inductor.utils import run_and_get_code

    policy = plans({rule: (0.9, 0.9, 0.9)})[rule].exits[0].policy
    running = torch.ones(1, GRID[0] * GRID[1] + 1, dtype=torch.bool)
    receipt = tokens.pack(running)

    def stay(logits: Tensor) -> Tensor:
        output = HeadOutput(logits)
        book = exits.update(exits.begin(output, receipt), receipt, output)
        return exits.decide(policy, book, running, grid=GRID).stay

    logits = 4 * torch.randn(running.shape[1], CLASSES, generator=torch.Generator().manual_seed(0))
    found, codes = run_and_get_code(torch.compile(stay, fullgraph=True, dynamic=False), logits)
    if not torch.equal(found, stay(logits)):
        raise AssertionError("compiled, the decision is another")
    return sum(LAUNCHES.match(line) is not None for code in codes for line in code.splitlines())


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=1, help="images of the batch")
    parser.add_argument("--compile", action="store_true", help="count compiled kernels of the decision")
    given = parser.parse_args()
    if given.compile:
        for rule in ("neighbours", "dtop"):
            print(f"{rule}: {kernels(rule)} kernels from class scores to the stay mask")
        return
    for rule, (count, shares) in counts(given.images).items():
        print(
            f"{rule}: {count:.1f} operators an exit; {', '.join(f'{one:.2f}' for one in shares)} of the tokens run on"
        )


if __name__ == "__main__":
    main()
