"""Multiply-adds of any PyTorch module, counted while it runs."""

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def multiply_adds(call: Callable[[], object], /) -> int:
    """Multiply-adds of a call: linear layers, convolutions and the two products of attention.

    Args:
        call: What to count, of one image, say. It is run once; modules and inputs on the `meta` device cost nothing.

    Returns:
        Multiply-adds.
    """
    # PyTorch's counter sees the products only where attention is not fused.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() // 2
