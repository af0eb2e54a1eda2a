"""Multiply-adds of the parts of a model: read off its layers, and off a run on a few tokens by PyTorch's own counter.

Neither knows all. What a layer says of itself leaves out products of bare parameters; the counter knows no kernels of
quantised layers. So each part is run once on a few tokens, layers whose kernels the counter does not know are taken by
what they say, and the greater of the two sums counts. Weights themselves are not looked at: they may be packed, sharded
or computed. It is no part of the public API.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenexit.adapting import is_whole
from tokenexit.cost import Cost, HeadCost
from tokenexit.errors import require
from tokenexit_torch._modules import evaluating
from tokenexit_torch.heads.masks import MaskHead
from tokenexit_torch.heads.reading import dim_in
from tokenexit_torch.hosts.decoding import DecodingHost
from tokenexit_torch.hosts.protocol import Embedded, Host, full_name

__all__ = ["Known", "executed", "head_cost", "layer_work", "network_cost", "weight_of"]

Known = dict[tuple[Any, ...], Any]
"""What has been counted, by what the part is made of: other layers, or layers of another kind, are counted anew."""

_TOKENS = (2, 4, 8)  # on which a part is run, to tell what grows with tokens from what grows with pairs of them


_SHARDED = {
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
    "torch.distributed.fsdp._fully_shard._fully_shard.FSDPModule",
}
_COMPILED = {"torch._dynamo.eval_frame.OptimizedModule", "torch.jit._script.ScriptModule"}


class _Work(NamedTuple):
    """Multiply-adds of a block.

    Attributes:
        per_token: For each token.
        per_pair: For each pair of tokens, in both products of attention; None if they were not seen.
    """

    per_token: int
    per_pair: int | None


def network_cost(host: Host, known: Known, /) -> Cost:
    """Multiply-adds of the parts of a network; it has no heads, and its prefix is left 0.

    Args:
        host: The network.
        known: What has been counted before; it is added to.

    Returns:
        The cost of the parts. Its `decoder` is what embedding an image takes that is not for each patch alike.

    Raises:
        TokenExitError: If there is no telling what a part costs.
    """
    whole = ("embed", *host.image_shape, *_made_of(host.module))
    blocks = [("block", *_made_of(block)) for block in host.blocks]
    missing = {index: key for index, key in enumerate(blocks) if key not in known}
    if whole not in known or missing:
        embedded, known[whole] = _embedding_work(host)
        known |= {key: _block_work(host, index, embedded) for index, key in missing.items()}
    works: list[_Work] = [known[key] for key in blocks]
    pairs = {index: work.per_pair for index, work in enumerate(works) if work.per_pair is not None}
    first = next(iter(pairs.values()), 2 * host.width)
    for index, per_pair in pairs.items():
        rule = "attend over as many channels as the first, for its multiply-adds to be counted"
        got = f"{per_pair} multiply-adds for a pair of tokens, and {first} in the first"
        require(per_pair == first and first % 2 == 0, f"model.blocks[{index}]", rule, got)
    embed, rest = known[whole]
    each = tuple(work.per_token for work in works)
    return Cost(embed, each, width=first // 2, prefix=0, exit_heads={}, head=HeadCost(0), decoder=rest)


def weight_of(module: nn.Module, /) -> Tensor | None:
    """A tensor of the device and dtype of a module; None if all its weights are elsewhere, as under FSDP."""
    return next(module.parameters(), None)


def head_cost(head: nn.Module, known: Known, argument: str, /, *, width: int, like: Tensor | None) -> HeadCost:
    """Multiply-adds of a head, or of a gate.

    Args:
        head: The head.
        known: What has been counted before; it is added to.
        argument: What the head is called in messages.
        width: Channels of the tokens.
        like: A tensor of the device and dtype of the tokens; None if there is none.

    Returns:
        Its cost. A mask head declares its own cost; if it is seen to compute more, that counts.

    Raises:
        TokenExitError: If there is no telling what it costs.
    """
    key = ("head", width, *_made_of(head))
    if key not in known:
        known[key] = _head_work(head, argument, width, like)
    return known[key]


def layer_work(module: nn.Module, /) -> int:
    """Multiply-adds of the layers inside for one token each, as they say themselves.

    A layer is what has whole numbers as `in_features` and `out_features`, or as a convolution has them, and holds no
    other: what goes around a layer, as an adapter does, counts by what it is made of.
    """
    return sum(work for _, work in _layers(module))


@torch.no_grad()
def executed(call: Callable[[], object], modules: Sequence[nn.Module], /) -> int:
    """Multiply-adds of a call, by PyTorch's counter; layers that it does not know count by what they say.

    Args:
        call: What to count.
        modules: What it runs; they are in evaluation mode meanwhile.

    Returns:
        Multiply-adds, of linear layers, convolutions and the two products of attention.
    """
    unseen: list[int] = []
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(evaluating(module))
        # The counter knows the products of attention only where they are written out.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        counter = stack.enter_context(FlopCounterMode(display=False))
        for layer, work in {layer: work for module in modules for layer, work in _layers(module)}.items():
            stack.enter_context(_watching(layer, work, counter, unseen))
        call()
    return counter.get_total_flops() // 2 + sum(unseen)


@contextmanager
def _watching(layer: nn.Module, work: int, counter: FlopCounterMode, unseen: list[int]) -> Iterator[None]:
    """Write down what a call of a layer takes by what it says, beyond what the counter sees of it."""
    before: list[int] = []
    channels = _whole(layer, "out_features") or _whole(layer, "out_channels")

    def start(*_: Any) -> None:
        before.append(counter.get_total_flops())

    def stop(_layer: nn.Module, _given: Any, made: Any) -> None:
        seen = (counter.get_total_flops() - before.pop()) // 2
        if isinstance(made, Tensor) and channels:
            unseen.append(max(made.numel() // channels * work - seen, 0))

    handles = [layer.register_forward_pre_hook(start), layer.register_forward_hook(stop)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _embedding_work(host: Host) -> tuple[Embedded | None, tuple[int, int]]:
    """An image as tokens; and what that takes, for each patch and beyond."""
    like = weight_of(host.module)
    made: list[Embedded] = []
    total, reason = None, "weights that are elsewhere"
    if like is not None:
        image = like.new_zeros(1, *host.image_shape)
        total, reason = _tried(lambda: made.append(host.embed(image)), [host.module])
    if total is not None:
        return made[0], divmod(total, made[0].grid[0] * made[0].grid[1])
    if isinstance(host, DecodingHost):
        declared = layer_work(host.embedding)
    else:
        inside = {layer for block in host.blocks for layer in block.modules()}
        outside = ((layer, work) for layer, work in _layers(host.module) if layer not in inside)
        declared = sum(work for layer, work in outside if _whole(layer, "out_channels"))
    rule = "run by itself, or have a convolution outside of its blocks, for its multiply-adds to be counted"
    require(declared > 0, "model.embed", rule, reason)
    return None, (declared, 0)


def _block_work(host: Host, index: int, embedded: Embedded | None) -> _Work:
    block, declared, reason = host.blocks[index], layer_work(host.blocks[index]), "images that cannot be embedded"
    seen: list[int] = []
    for count in _TOKENS:
        total = None
        if embedded is not None:
            total, reason = _tried(partial(_run, host, index, embedded, count), [block])
        if total is None:
            break
        seen.append(total)
    if len(seen) < len(_TOKENS):
        _require_explained(block, f"model.blocks[{index}]", reason)
        return _Work(declared, None)
    two, four, eight = seen
    per_pair, odd = divmod(eight - 3 * four + 2 * two, 24)
    per_token, half = divmod(four - two - 12 * per_pair, 2)
    plain = odd == half == 0 and per_pair >= 0 and per_token >= 0
    rule = "have work that grows with tokens, and with pairs of them in attention, for its multiply-adds to be counted"
    require(plain, f"model.blocks[{index}]", rule, f"{two}, {four} and {eight} multiply-adds for 2, 4 and 8 tokens")
    return _Work(max(per_token, declared), per_pair or None)


def _run(host: Host, index: int, embedded: Embedded, count: int) -> None:
    """One block on so many tokens of an image."""
    tokens, positions = embedded.tokens, embedded.positions
    slots = torch.arange(count, device=tokens.device) % tokens.shape[1]
    host.run(index, tokens.index_select(1, slots), None if positions is None else positions.index_select(0, slots))


def _head_work(head: nn.Module, argument: str, width: int, like: Tensor | None) -> HeadCost:
    masks = isinstance(head, MaskHead)
    declared = head.cost if masks else HeadCost(layer_work(head))
    wide = dim_in(head, width)
    seen: list[int] = []
    for count in (2, 4):
        total, reason = None, "weights that are elsewhere"
        if like is not None:
            tokens = like.new_zeros(count, wide)
            total, reason = _tried(partial(head, tokens, [count]) if masks else partial(head, tokens), [head])
        if total is None:
            if not masks:
                _require_explained(head, argument, reason)
            return declared
        seen.append(total)
    two, four = seen
    per_token = (four - two) // 2
    # What a head of tokens computes of its weights alone is not of an image.
    fixed = two - 2 * per_token if masks else 0
    return HeadCost(max(declared.per_token, per_token), max(declared.fixed, fixed))


def _tried(call: Callable[[], object], modules: Sequence[nn.Module]) -> tuple[int | None, str]:
    """Multiply-adds of a call, if it can be run here, and else why not."""
    for part in (part for module in modules for part in module.modules()):
        reason = _bound(part)
        if reason is not None:
            return None, f"{full_name(part)}, {reason}"
    try:
        return executed(call, modules), ""
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        return None, f"the error: {error}"


def _bound(part: nn.Module) -> str | None:
    """Why a part must not be run by itself: other processes would have to take part, or its weights are away."""
    ancestors = {f"{ancestor.__module__}.{ancestor.__qualname__}" for ancestor in type(part).__mro__}
    if ancestors & _SHARDED:
        return "which other processes take part in"
    if part._compiled_call_impl is not None or ancestors & _COMPILED:
        return "which is compiled"
    for tensor in (*part._parameters.values(), *vars(part).values()):
        if isinstance(tensor, Tensor):
            if type(tensor).__name__ == "DTensor":
                return "which other processes take part in"
            plain = type(tensor) in (Tensor, nn.Parameter)
            if plain and tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0:
                return "whose weights are elsewhere"
    return None


def _require_explained(module: nn.Module, argument: str, reason: str) -> None:
    """Raise if a part that cannot be run has matrices that belong to no layer."""
    known = {id(one) for layer, _ in _layers(module) for one in layer.parameters()}
    bare = [
        name
        for name, one in module.named_parameters()
        if id(one) not in known and sum(side > 1 for side in one.shape) > 1
    ]
    rule = "run by itself, or have all its matrices in layers with `in_features` and `out_features`, for its"
    require(not bare, argument, f"{rule} multiply-adds to be counted", f"{bare[:4]} in no layer, and {reason}")


def _layers(module: nn.Module) -> list[tuple[nn.Module, int]]:
    """The layers inside, and what each says that a token takes."""
    found: list[tuple[nn.Module, int]] = []
    for child in module.children():
        found += _layers(child)
    if isinstance(module, nn.MultiheadAttention):  # its projections in are bare parameters; that out is a layer
        return [*found, (module, module.embed_dim * (module.embed_dim + module.kdim + module.vdim))]
    work = _declared(module)
    return [(module, work)] if work and not found else found


def _declared(layer: nn.Module) -> int:
    take, give = _whole(layer, "in_features"), _whole(layer, "out_features")
    if take and give:
        return take * give
    take, give, kernel = (
        _whole(layer, "in_channels"),
        _whole(layer, "out_channels"),
        getattr(layer, "kernel_size", None),
    )
    # A transposed convolution makes several pixels of one: only the counter sees how many.
    if take and give and isinstance(kernel, tuple) and not getattr(layer, "transposed", False):
        return take // (_whole(layer, "groups") or 1) * give * math.prod(kernel)
    return 0


def _whole(layer: nn.Module, name: str) -> int:
    value: Any = getattr(layer, name, None)
    return value if is_whole(value) else 0


def _made_of(module: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (name, id(part), type(part), *(one.shape for one in part._parameters.values() if one is not None))
        for name, part in module.named_modules()
    )
