"""Attention within each image of a packed row, for blocks that know nothing of it.

A packed row looks to a block like a batch of one long image. All its layers are token-wise but attention, which must
not cross from one image to the next. Every block that calls `torch.nn.functional.scaled_dot_product_attention` can be
run unmodified: within `attending_per_image` that call works image by image.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, groupby
from typing import Any, NoReturn

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch._ops import OpOverloadPacket
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tokenexit import TokenExitError
from tokenexit_torch._modules import NEW

if NEW:
    from torch.nn.attention.varlen import varlen_attn
else:  # images of a row attend by `scaled_dot_product_attention`, length by length
    varlen_attn = None

__all__ = ["attending_per_image"]

ATTENTION = "torch.nn.functional.scaled_dot_product_attention"
"""What a block must call. It is no part of the public API, nor are the next."""

CALL = (
    f"call PyTorch's own {ATTENTION}, for otherwise images would attend to each other"
    ' (timm: attn.fused_attn = True, transformers: set_attn_implementation("sdpa"))'
)
"""Why: the rule of errors."""

UNQUANTISED = (
    "have no dynamically quantised layers: their scale is that of the whole batch, so that images depend on each other"
    " (torchao's weight-only and per-token layers are taken)"
)
"""Why layers are refused."""

_SIZE_CHANNELS = 8
_WIDEST = 256

_BUILT_IN: Any = torch._C
attend = _BUILT_IN._nn.scaled_dot_product_attention
"""PyTorch's own attention. A function put in its place in `torch.nn.functional` is another, and may ignore masks."""


@contextmanager
def attending_per_image(
    lengths: Sequence[int], *, token_size: Float[Tensor, "tokens"] | None = None
) -> Iterator["PerImage"]:
    """Within this context, attention over a packed row stays within each image.

    Args:
        lengths: How many tokens of the row belong to each image, in order.
        token_size: How many tokens each of the row stands for: as a key it counts as often (`tokenexit.cells`). Once
            each if left out.

    Yields:
        An object whose `calls` counts the attention calls that were taken over.

    Raises:
        TokenExitError: From the attention call, if it carries a mask, is causal, or is not over that row.
    """
    mode = PerImage(lengths, token_size=token_size)
    with mode:
        yield mode


class Attending(TorchFunctionMode):
    """Takes over the attention calls of whatever runs within it, and counts them. It is no part of the public API.

    Attributes:
        calls: How many there were.
        needed: Whether results would be wrong without it. A row that holds one image alone needs no help.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.needed = True
        self._grads = torch.is_grad_enabled()
        self._saving = _saving()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not attend:
            if isinstance(func, OpOverloadPacket) and self.needed:
                _require_no_dynamic(func)
            return func(*args, **(kwargs or {}))
        self._require_no_checkpoint()
        self.calls += 1
        return self._attend(*args, **(kwargs or {}))

    def _attend(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError

    def _require_no_checkpoint(self) -> None:
        # What is computed again in the backward pass is computed without this mode. A compiled program holds what it
        # took over.
        if not self._grads or torch.compiler.is_compiling():
            return
        saving = _saving()
        within = saving is not self._saving and getattr(saving, "__module__", None) == "torch.utils.checkpoint"
        if within or not torch.is_grad_enabled():
            rule = "not checkpoint gradients inside of it or its blocks: checkpoint the call of what wraps it instead"
            got = "torch.utils.checkpoint around attention" if within else "attention run without gradients, as by"
            raise TokenExitError(f"`model` must {rule}, got {got if within else got + ' a reentrant checkpoint'}")


def _require_no_dynamic(operator: OpOverloadPacket) -> None:
    """Raise for an operator that quantises activations by the scale of the whole row, of all its images."""
    name = operator._qualified_op_name
    if name.startswith("quantized::") and "dynamic" in name:
        raise TokenExitError(f"`model` must {UNQUANTISED}, got {name}")


def _saving() -> Callable[..., Any] | None:
    """What packs the tensors that autograd saves now: a checkpoint that is not reentrant puts in its own."""
    if torch.compiler.is_compiling():
        return None
    hooks = _BUILT_IN._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


class _OverRow(Attending):
    """Attention over a packed row, image by image."""

    def __init__(self, total: int, token_size: Tensor | None) -> None:
        super().__init__()
        self._total = total
        # A key that counts n times has n times the weight: log n more in the exponent.
        self._bias = None if token_size is None else token_size.log()

    def _attend(
        self,
        query: Float[Tensor, "1 heads tokens width"],
        key: Float[Tensor, "1 heads tokens width"],
        value: Float[Tensor, "1 heads tokens value_width"],
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Float[Tensor, "1 heads tokens value_width"]:
        if attn_mask is not None or is_causal:
            raise TokenExitError("`attn_mask` must be absent in a packed row, got a mask or is_causal=True")
        options["dropout_p"] = dropout_p
        if torch.compiler.is_compiling():
            return self._compiled(query, key, value, options)
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.ndim != 4 or tensor.shape[0] != 1 or tensor.shape[2] != self._total:
                rule = f"have shape (1, heads, {self._total}, width) in a packed row"
                raise TokenExitError(f"`{name}` must {rule}, got {tuple(tensor.shape)}")
        return self.over(query, key, value, options)

    def over(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        """Attention within each image, by the kernel that suits."""
        room = self._bias is None or query.shape[3] + _SIZE_CHANNELS <= _WIDEST
        if room and has_varlen(query, key, value, options):
            return self._varlen(query, key, value)
        return self._each(query, key, value, options)

    def _compiled(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        """As a part of a program that `torch.compile` makes."""
        return self.over(query, key, value, options)

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """By one kernel for images of all lengths."""
        raise NotImplementedError

    def _each(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        """By the kernels that plain batches have."""
        raise NotImplementedError


class PerImage(_OverRow):
    """Attention over a packed row of images that have any number of tokens each. It is no part of the public API.

    Args:
        lengths: How many tokens of the row belong to each image, in order.
        offsets: Where each image begins in the row, and where the last one ends, on the device of the row; computed
            of the lengths if left out, for which an accelerator is waited for.
        token_size: How many tokens each of the row stands for; once each if left out.
    """

    def __init__(self, lengths: Sequence[int], offsets: Tensor | None = None, token_size: Tensor | None = None) -> None:
        super().__init__(sum(lengths), token_size)
        self._token_size = token_size
        self._offsets = offsets
        self._lengths = list(lengths)
        self.needed = token_size is not None or sum(length > 0 for length in self._lengths) > 1
        # On the host, so that reading it back is no wait.
        self._counts = torch.tensor(self._lengths, dtype=torch.int64, device="cpu")
        # Neighbouring images with equally many tokens share one call: (images, tokens of each).
        runs = [(length, len(list(run))) for length, run in groupby(lengths)]
        self._runs = [(images, length) for length, images in runs if length]

    def _compiled(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        # One operator, whose shapes are those of the row: otherwise each batch would be a program of its own.
        known = options.get("dropout_p", 0.0) == 0.0 and set(options) <= {"dropout_p", "scale"}
        if not known:
            raise TokenExitError(f"`options` must be a scale alone where attention is compiled, got {options}")
        mixed = per_image(query, key, value, self._counts, self._offsets, self._token_size, options.get("scale"))
        return rearrange(mixed, "1 tokens heads width -> 1 heads tokens width")

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._offsets is None:
            self._offsets = torch.tensor([0, *accumulate(self._lengths)], device=query.device)
        return varlen(query, key, value, self._offsets, longest=max(self._lengths), bias=self._bias)

    def _each(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        if self._bias is None and len(self._runs) == 1 and self._runs[0][0] == 1:
            return attend(query, key, value, **options)
        results = []
        start = 0
        for images, length in self._runs:
            stop = start + images * length
            q, k, v = (_apart(tensor[:, :, start:stop], images) for tensor in (query, key, value))
            if self._bias is not None:
                # Of keys alone, left to the kernel to broadcast: expanded over queries it took longer.
                options["attn_mask"] = self._bias[start:stop].to(query.dtype).view(images, 1, 1, length)
            attended = attend(q, k, v, **options)
            # Token by token, as fused attention leaves it in memory and as blocks read it next: no copy here or there.
            results.append(rearrange(attended, "images heads tokens width -> 1 (images tokens) heads width"))
            start = stop
        return rearrange(torch.cat(results, dim=1), "1 tokens heads width -> 1 heads tokens width")


class Padded(_OverRow):
    """Attention over a row with as many entries for each image, of which some hold no token. Not public.

    All shapes are known beforehand, and nothing waits for an accelerator.

    Args:
        valid: Which entries hold a token; in every image they come first. Those that do not are attended to by none
            that do; of an image without any, all are, for a softmax must be over something.
        token_size: How many tokens each entry stands for, in one row; once each if left out.
    """

    def __init__(self, valid: Bool[Tensor, "images capacity"], token_size: Tensor | None = None) -> None:
        super().__init__(valid.numel(), token_size)
        self._valid = valid

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # What holds no token is an image of its own: so each entry is written, and finite.
        images, capacity = self._valid.shape
        starts = torch.arange(images, device=query.device) * capacity
        both = torch.stack([starts, starts + self._valid.sum(dim=1)], dim=1).flatten()
        offsets = functional.pad(both, (0, 1), value=images * capacity)
        return varlen(query, key, value, offsets, longest=capacity, bias=self._bias)

    def _each(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        images, capacity = self._valid.shape
        q, k, v = (_apart(tensor, images) for tensor in (query, key, value))
        keys = (self._valid | ~self._valid.any(dim=1, keepdim=True))[:, None, None, :]
        mask = keys
        if self._bias is not None:
            weight = self._bias.to(query.dtype).view(images, 1, 1, capacity)
            mask = torch.where(keys, weight, -torch.inf)
        attended = attend(q, k, v, attn_mask=mask, **options)
        return rearrange(attended, "images heads entries width -> 1 heads (images entries) width")


def has_varlen(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether the kernel for images of all lengths takes this call. It is no part of the public API."""
    width = query.shape[3]
    fits = width == value.shape[3] and width % 8 == 0 and width <= _WIDEST and key.shape[1] == query.shape[1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    plain = options.get("dropout_p", 0.0) == 0.0 and options.get("scale") in (None, width**-0.5)
    # What is exported is to run where there is no such kernel.
    there = varlen_attn is not None
    return there and query.is_cuda and half and fits and plain and not torch.compiler.is_exporting()


def varlen(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, *, longest: int, bias: Tensor | None = None
) -> Tensor:
    """Attention between offsets, by PyTorch's kernel for images of all lengths. It is no part of the public API.

    Args:
        query: Of the row, `(1, heads, tokens, width)`; `key` and `value` likewise.
        key: Keys.
        value: Values.
        offsets: Where the images begin, and the end of the last.
        longest: No image has more tokens.
        bias: What is added to the exponent of each key; nothing if None.

    Returns:
        What they attended to, of the same shape.
    """
    width = query.shape[3]
    scale = width**-0.5
    if bias is not None:
        query, key, value = biased(query, key, value, bias / scale)
    q, k, v = (rearrange(tensor, "1 heads tokens width -> tokens heads width") for tensor in (query, key, value))
    bounds = offsets.to(torch.int32)
    assert varlen_attn is not None, "has_varlen"
    mixed = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale)
    assert isinstance(mixed, Tensor)
    return rearrange(mixed[..., :width], "tokens heads width -> 1 heads tokens width")


def biased(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with more channels, by which the kernel adds a bias of keys that it does not take.

    Args:
        query: Of the row, `(1, heads, tokens, width)`; `key` and `value` likewise.
        key: Keys.
        value: Values.
        bias: What is added to the products of each key with all queries, `(tokens,)`.

    Returns:
        The same, with eight channels more: kernels take widths in eights.
    """
    # In two parts, for half precision: what the first rounds off, the second has.
    high = bias.to(key.dtype)
    low = (bias - high).to(key.dtype)
    parts = functional.pad(torch.stack([high, low], dim=1), (0, _SIZE_CHANNELS - 2))
    more = parts.expand(*key.shape[:2], *parts.shape)
    ones = torch.ones_like(more)
    nothing = torch.zeros_like(more)
    return torch.cat([query, ones], dim=-1), torch.cat([key, more], dim=-1), torch.cat([value, nothing], dim=-1)


@torch.library.custom_op("tokenexit::per_image", mutates_args=())
def per_image(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    offsets: Tensor | None,
    token_size: Tensor | None,
    scale: float | None,
) -> Tensor:
    """`PerImage` as one operator of a compiled program. It is no part of the public API.

    Args:
        query: Of the row, `(1, heads, tokens, width)`; `key` and `value` likewise.
        key: Keys.
        value: Values.
        lengths: How many tokens of the row belong to each image, in the memory of the host.
        offsets: As for `PerImage`.
        token_size: As for `PerImage`.
        scale: Of the products; one over the root of the width if None.

    Returns:
        What they attended to, `(1, tokens, heads, width)`.
    """
    attention = PerImage(lengths.tolist(), offsets, token_size)
    mixed = attention.over(query, key, value, {} if scale is None else {"scale": scale})
    return rearrange(mixed, "1 heads tokens width -> 1 tokens heads width").clone(memory_format=torch.contiguous_format)


@per_image.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    del key
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


@torch.library.custom_op("tokenexit::per_image_backward", mutates_args=())
def per_image_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    offsets: Tensor | None,
    token_size: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `per_image`, by the products that they are made of: weights are computed again, image by image."""
    del offsets  # autograd is not there inside an operator, and no kernel's gradients are needed
    factor = query.shape[3] ** -0.5 if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    found = tuple(torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value))
    bias = None if token_size is None else token_size.log().to(wide)
    start = 0
    for length in lengths.tolist():
        own = slice(start, start + length)
        q, k, v = (tensor[:, :, own].to(wide) for tensor in (query, key, value))
        wished = rearrange(gradient[:, own].to(wide), "1 tokens heads width -> 1 heads tokens width")
        product = q @ k.mT * factor
        weight = (product if bias is None else product + bias[own]).softmax(dim=-1)
        of_weight = wished @ v.mT
        of_product = weight * (of_weight - (of_weight * weight).sum(dim=-1, keepdim=True)) * factor
        for result, one in zip(found, (of_product @ k, of_product.mT @ q, weight.mT @ wished), strict=True):
            result[:, :, own] = one.to(result.dtype)
        start += length
    return found[0], found[1], found[2]


@per_image_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    del gradient
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    query, key, value, lengths, offsets, token_size, scale = inputs
    ctx.save_for_backward(query, key, value, lengths, offsets, token_size)
    ctx.scale = scale


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return (*per_image_backward(gradient, *ctx.saved_tensors, ctx.scale), None, None, None, None)


per_image.register_autograd(_backward, setup_context=_keep)


@contextmanager
def attending_to(keys: Bool[Tensor, "images tokens"]) -> Iterator[Attending]:
    """Within this context, the tokens of a plain batch attend to some of their image alone.

    Args:
        keys: Which tokens are attended to. Of an image without any, all are: its softmax must be over something.

    Yields:
        An object whose `calls` counts the attention calls that were taken over.

    Raises:
        TokenExitError: From the attention call, if it carries a mask, is causal, or is not over that batch.
    """
    with _Keys(keys | ~keys.any(dim=1, keepdim=True)) as mode:
        yield mode


class _Keys(Attending):
    def __init__(self, keys: Tensor) -> None:
        super().__init__()
        self._mask = keys[:, None, None, :]

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **options: Any,
    ) -> Tensor:  # fmt: skip
        _require_no_mask(attn_mask, is_causal)
        images, _, _, tokens = self._mask.shape
        fits = key.ndim == 4 and (key.shape[0], key.shape[2]) == (images, tokens)
        if not fits:
            rule = f"have shape ({images}, heads, {tokens}, dim) where tokens are skipped"
            raise TokenExitError(f"`key` must {rule}, got {tuple(key.shape)}")
        return attend(query, key, value, attn_mask=self._mask, dropout_p=dropout_p, **options)


def keys_and_values(block: Callable[[], Tensor], /, *, name: str) -> tuple[Tensor, Tensor]:
    """Intercept the keys and values of a block, and abort it at its attention.

    Args:
        block: Runs the block on some tokens.
        name: What the block is called in an error.

    Returns:
        Keys and values, `(1, heads, tokens, dim)` each.

    Raises:
        TokenExitError: If the block calls no attention.
    """
    try:
        with _Offering():
            block()
    except _Offer as offer:
        return offer.key, offer.value
    raise TokenExitError(f"`{name}` must {CALL}, got no call")


class _Offer(Exception):
    """Not an error: it carries keys and values out of a block, past all that the block would still compute."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.key, self.value = key, value


class _Offering(Attending):
    def _attend(self, query: Tensor, key: Tensor, value: Tensor, **_options: Any) -> NoReturn:  # noqa: ARG002
        raise _Offer(key, value)


@contextmanager
def attending_beside(
    lengths: Sequence[int], skipped: Sequence[int], key: Tensor, value: Tensor, /
) -> Iterator[Attending]:
    """As `attending_per_image`, with the skipped tokens of each image as keys as well.

    Args:
        lengths: How many tokens of the row belong to each image, in order.
        skipped: How many skipped tokens belong to each image.
        key: The keys of the skipped tokens, `(1, heads, skipped, dim)`.
        value: Their values.

    Yields:
        An object whose `calls` counts the attention calls that were taken over.

    Raises:
        TokenExitError: From the attention call, if it carries a mask, is causal, or is not the only one of the block.
    """
    with _Beside(lengths, key.split(list(skipped), dim=2), value.split(list(skipped), dim=2)) as mode:
        yield mode


class _Beside(Attending):
    def __init__(self, lengths: Sequence[int], keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        super().__init__()
        self._lengths, self._keys, self._values = list(lengths), keys, values

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **options: Any,
    ) -> Tensor:  # fmt: skip
        _require_no_mask(attn_mask, is_causal)
        if self.calls > 1:  # the keys of skipped tokens are those of the first call
            raise TokenExitError("`block` must call attention once where all tokens are keys, got a second call")
        options["dropout_p"] = dropout_p
        own = (tensor.split(self._lengths, dim=2) for tensor in (query, key, value))
        results = [
            attend(q, torch.cat([k, ks], dim=2), torch.cat([v, vs], dim=2), **options)
            for q, k, v, ks, vs in zip(*own, self._keys, self._values, strict=True)
            if q.shape[2]
        ]
        return torch.cat(results, dim=2)


@contextmanager
def turning(turn: Callable[[Tensor], Tensor], /) -> Iterator["_Turned"]:
    """Within this context, queries and keys are turned before attention, by rotary positions that are not the block's.

    What takes attention over around it finds them turned.

    Args:
        turn: Turns queries or keys, `(images, heads, tokens, width)`.

    Yields:
        An object whose `calls` counts the attention calls.
    """
    mode = _Turned(turn)
    with mode:
        yield mode


class _Turned(Attending):
    def __init__(self, turn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._turn = turn

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        query, key = self._turn(query).type_as(value), self._turn(key).type_as(value)
        return attend(query, key, value, *args, **options)


def _require_no_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise TokenExitError("`attn_mask` must be absent where tokens have left, got a mask or is_causal=True")


def _apart(row: Tensor, images: int) -> Tensor:
    """Images of equal length, cut out of a row."""
    return (
        row
        if images == 1
        else rearrange(row, "1 heads (images tokens) width -> images heads tokens width", images=images)
    )
