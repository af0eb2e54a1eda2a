"""What moving a token costs on this machine, and whether the prediction of `Cost.repacking` holds on it.

    python -m tests.benchmarks.repacking --device cuda --dtype bfloat16 --images 8 --tokens 1024

First it measures `per_moved_element`: the time in which a gather of rows moves one number, over the time of one
multiply-add of a linear layer. Then it runs blocks of a plain ViT on all tokens, and with an exit before them (exit
head, gather, the same blocks on the tokens that stay), and sets the time that this saves beside the predicted one.
Who leaves is drawn beforehand: the policy and the notes about leavers are not part of the prediction, nor of the time.
Everything is timed in turn, in a new order every round; the figures are medians.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.clock import interleaved
from tokenexit import cost, heads
from tokenexit_torch.heads import build


class Block(nn.Module):
    """A plain pre-norm block on a packed row of images that are equally long."""

    def __init__(self, width: int, attention_heads: int):
        super().__init__()
        self.attention_heads = attention_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, row: Tensor, images: int) -> Tensor:
        shape = (images, row.shape[0] // images, 3, self.attention_heads, -1)
        q, k, v = self.qkv(self.norm1(row)).reshape(shape).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v)
        row = row + self.out(attended.transpose(1, 2).reshape(row.shape))
        return row + self.mlp(self.norm2(row))


class Tail(nn.Module):
    """The blocks after an exit, the final head, and the head of the exit."""

    def __init__(self, width: int, attention_heads: int, blocks: int, classes: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, attention_heads) for _ in range(blocks))
        self.final, self.exit = (build(heads.MLP(), width=width, classes=classes) for _ in range(2))

    def forward(self, row: Tensor, images: int, stay: Tensor | None = None) -> Tensor:
        if stay is not None:
            self.exit(row)
            row = row.index_select(0, stay)
        for block in self.blocks:
            row = block(row, images)
        return self.final(row)


def waiting(device: torch.device) -> Callable[[], object]:
    return lambda: torch.cuda.synchronize(device) if device.type == "cuda" else None


def drawn_stayers(images: int, tokens: int, leaving: int, generator: torch.Generator) -> Tensor:
    """Rows that stay when as many tokens of every image leave, in the order of the row."""
    stay = [
        image * tokens + torch.randperm(tokens, generator=generator)[leaving:].sort().values for image in range(images)
    ]
    return torch.cat(stay)


def per_moved_element(args: argparse.Namespace, generator: torch.Generator) -> dict[str, float]:
    """The property of the machine that `Cost.repacking` asks for, and the two times behind it."""
    like = {"device": args.device, "dtype": args.dtype}
    rows = args.images * args.tokens
    row = torch.randn(rows, args.width, generator=generator).to(**like)
    stay = drawn_stayers(args.images, args.tokens, args.tokens // 2, generator).to(args.device)
    layer = nn.Linear(args.width, 4 * args.width).to(**like)
    measured = interleaved(
        {"gather": lambda: row.index_select(0, stay), "linear": lambda: layer(row)},
        rounds=args.rounds, at_least=args.at_least, wait=waiting(args.device),
    )  # fmt: skip
    moved = statistics.median(measured["gather"]) / (len(stay) * args.width)
    multiply_add = statistics.median(measured["linear"]) / (rows * args.width * 4 * args.width)
    return {
        "seconds_per_moved_element": moved,
        "seconds_per_multiply_add": multiply_add,
        "per_moved_element": moved / multiply_add,
    }


def compared(args: argparse.Namespace, machine: Mapping[str, float], generator: torch.Generator) -> list[dict]:
    """For every share of leavers: time saved as predicted and as measured."""
    tail = Tail(args.width, args.heads, args.blocks, args.classes).to(device=args.device, dtype=args.dtype).eval()
    row = torch.randn(args.images * args.tokens, args.width, generator=generator)
    row = row.to(device=args.device, dtype=args.dtype)
    leaving = [int(share * args.tokens) for share in args.leaving]
    stays = [drawn_stayers(args.images, args.tokens, count, generator).to(args.device) for count in leaving]
    pairs = zip(leaving, stays, strict=True)
    candidates: dict[str, Callable[[], object]] = {"dense": lambda: tail(row, args.images)}
    candidates |= {f"{count}": lambda stay=stay: tail(row, args.images, stay) for count, stay in pairs}
    measured = interleaved(candidates, rounds=args.rounds, at_least=args.at_least, wait=waiting(args.device))
    head = cost.of_head(heads.MLP(), width=args.width, classes=args.classes)
    # Block 1 stands for all before the exit.
    parts = cost.plain_vit(width=args.width, depth=1 + args.blocks, patch=16, exit_heads={1: head}, head=head)
    running = torch.full((args.images,), args.tokens)
    found = []
    for count in leaving:
        balance = parts.repacking(running, count, after=1, per_moved_element=machine["per_moved_element"])
        net = int((balance.saved - balance.spent).sum())
        differences = [dense - exiting for dense, exiting in zip(measured["dense"], measured[str(count)], strict=True)]
        found.append({
            "leaving": count / args.tokens,
            "dense_seconds": statistics.median(measured["dense"]),
            "exiting_seconds": statistics.median(measured[str(count)]),
            "predicted_seconds_saved": net * machine["seconds_per_multiply_add"],
            "measured_seconds_saved": statistics.median(differences),
            "predicted_to_pay": bool(balance.batch_pays),
        })  # fmt: skip
    return found


def table(rows: Sequence[Mapping]) -> str:
    lines = [
        "| leaving | dense, ms | with the exit, ms | saved, predicted, ms | saved, measured, ms | pays, predicted | pays, measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = [
            1000 * row[name]
            for name in ("dense_seconds", "exiting_seconds", "predicted_seconds_saved", "measured_seconds_saved")
        ]
        pays = [row["predicted_to_pay"], row["measured_seconds_saved"] > 0]
        lines.append(" | ".join([
            f"| {100 * row['leaving']:.0f} %", *(f"{figure:.3f}" for figure in figures),
            *("yes" if one else "no" for one in pays),
        ]) + " |")  # fmt: skip
    return "\n".join(lines)


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to less than 1, got {text}")
    return value


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (default: cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--images", type=int, default=4, help="batch size (default: 4)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of an image (default: 1024)")
    parser.add_argument("--width", type=int, default=384, help="channels (default: 384)")
    parser.add_argument("--heads", type=int, default=6, help="attention heads (default: 6)")
    parser.add_argument("--blocks", type=int, default=4, help="blocks after the exit (default: 4)")
    parser.add_argument("--classes", type=int, default=19, help="classes of the heads (default: 19)")
    parser.add_argument("--leaving", type=share, nargs="+", default=[0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75],
                        help="shares of tokens that leave (default: 0 0.02 0.05 0.1 0.25 0.5 0.75)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, help="how often each is timed (default: 15)")
    parser.add_argument("--at-least", type=float, default=0.05, metavar="SECONDS",
                        help="short calls are repeated for this long in each round (default: 0.05)")  # fmt: skip
    parser.add_argument("--threads", type=int, help="CPU threads (default: as PyTorch has it)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(given)


@torch.inference_mode()
def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    settings = {name: str(value) if name == "device" else value for name, value in vars(args).items()}
    args.dtype = getattr(torch, args.dtype)
    if args.threads:
        torch.set_num_threads(args.threads)
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    machine = per_moved_element(args, generator)
    rows = compared(args, machine, generator)
    settings |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if args.device.type == "cuda":
        settings["gpu"] = torch.cuda.get_device_name(args.device)
    print(f"per_moved_element: {machine['per_moved_element']:.1f}\n\n{table(rows)}\n")
    print(json.dumps({"settings": settings, "machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
