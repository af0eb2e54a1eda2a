"""Times attention in which keys count several times: as a bias, as more channels of queries and keys, or not at all.

    python -m tests.benchmarks.sizes --tokens 250 500 1000 2640 --rounds 30

Each image of the batch has so many tokens; one line for each number, in milliseconds for the batch, medians of rounds
in which all three run in turn.
"""

import argparse
import time
from statistics import median

import torch
from torch.nn import functional

from tokenexit_torch.attention import biased

_HEADS, _WIDTH = 3, 64


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[250, 500, 1000, 2640])
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    print("| tokens | not at all | bias | channels |\n|---:|---:|---:|---:|")
    for tokens in given.tokens:
        row = " | ".join(f"{1e3 * seconds:.2f}" for seconds in timed(given.images, tokens, given.rounds))
        print(f"| {tokens} | {row} |", flush=True)


@torch.inference_mode()
def timed(images: int, tokens: int, rounds: int) -> list[float]:
    """Median seconds without sizes, with a bias of keys, and with more channels.

    Args:
        images: Images of the batch.
        tokens: Tokens of each.
        rounds: How often each is timed.
    """
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, _HEADS, images * tokens, _WIDTH, generator=random) for _ in range(3))
    bias = torch.randint(0, 3, (images * tokens,), generator=random).mul(2).exp2().log()

    def batch(row: torch.Tensor) -> torch.Tensor:
        return row.unflatten(2, (images, tokens)).transpose(1, 2)[0]

    def plain() -> torch.Tensor:
        return functional.scaled_dot_product_attention(*map(batch, (query, key, value)))

    def with_bias() -> torch.Tensor:
        mask = bias.view(images, 1, 1, tokens)
        return functional.scaled_dot_product_attention(*map(batch, (query, key, value)), attn_mask=mask)

    def with_channels() -> torch.Tensor:
        wide = map(batch, biased(query, key, value, bias * _WIDTH**0.5))
        return functional.scaled_dot_product_attention(*wide, scale=_WIDTH**-0.5)[..., :_WIDTH]

    torch.testing.assert_close(with_channels(), with_bias(), atol=1e-5, rtol=1e-5)
    calls = (plain, with_bias, with_channels)
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return [median(seconds) for seconds in times]


if __name__ == "__main__":
    main()
