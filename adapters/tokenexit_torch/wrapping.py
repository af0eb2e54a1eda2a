"""`wrap`: exits for a vision transformer of yours, and the self-check that they change nothing else."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tokenexit import TokenExitError
from tokenexit.errors import require
from tokenexit.heads import MLP, HeadPlan
from tokenexit.schedule import Schedule
from tokenexit_torch._modules import evaluating
from tokenexit_torch.attention import attending_per_image
from tokenexit_torch.heads import build
from tokenexit_torch.hosts import Host, host_of
from tokenexit_torch.running import ExitingModel

__all__ = ["wrap"]


def wrap(
    model: Any,
    schedule: Schedule,
    /,
    *,
    head: nn.Module | None = None,
    num_classes: int | None = None,
    exit_heads: HeadPlan | Mapping[int, nn.Module] = MLP(),
) -> ExitingModel:
    """Let the tokens of a vision transformer leave early.

    The model itself is not changed: its weights are shared, its forward is never replaced. New heads start with
    random weights; train them, or fit them to the final head with `fit_exits`.

    Args:
        model: A timm `VisionTransformer`, or an object that follows `Host`.
        schedule: After which blocks tokens leave, and by which policy. Each of its exits gets a head, so that
            `schedule.dense(after=...)` declares heads for schedules to come.
        head: Your final head: from finished tokens `(tokens, width)` to `(tokens, classes)`, each token by itself.
        num_classes: Builds a final head for so many classes, instead of `head`.
        exit_heads: A plan for the exit heads, or the heads themselves by the block they follow.

    Returns:
        The model with exits, in the training mode of `model`.

    Raises:
        TokenExitError: If the model is not supported or already wrapped, an exit lies outside of it, a head does not
            work on each token by itself, or the self-check finds that running all tokens packed is not the dense model.
    """
    require(isinstance(schedule, Schedule), "schedule", "be a tokenexit.schedule.Schedule", repr(schedule))
    host = _unwrapped_host(model)
    require(
        (head is None) != (num_classes is None),
        "head",
        "be given, or `num_classes`, and not both",
        f"head={'None' if head is None else type(head).__name__} and num_classes={num_classes}",
    )
    like = next(host.module.parameters())
    if isinstance(exit_heads, Mapping):
        plan, given = None, dict(exit_heads)
    else:
        plan, given = exit_heads, {}
    if head is None:
        require(
            isinstance(num_classes, int) and num_classes >= 1, "num_classes", "be a whole number from 1 up", num_classes
        )
        assert num_classes is not None
        final = build(plan or MLP(), width=host.width, classes=num_classes).to(like)
    else:
        final = head
    classes = _classes_of(final, host.width, like, "head")
    if plan is not None:
        given = {after: build(plan, width=host.width, classes=classes).to(like) for after in schedule.after}
    for after, exit_head in given.items():
        found = _classes_of(exit_head, host.width, like, f"exit_heads[{after}]")
        require(found == classes, f"exit_heads[{after}]", f"give {classes} classes, as the final head", found)
    wrapped = ExitingModel(host, schedule, final, given, classes, plan, own_head=head is None)
    wrapped.train(host.module.training)
    _check(host, like)
    return wrapped


def _unwrapped_host(model: object) -> Host:
    module = model if isinstance(model, nn.Module) else getattr(model, "module", None)
    if isinstance(module, nn.Module) and any(isinstance(part, ExitingModel) for part in module.modules()):
        raise TokenExitError("`model` must not be wrapped already, got an ExitingModel: use its `retune`")
    return host_of(model)


@torch.no_grad()
def _classes_of(head: nn.Module, width: int, like: Tensor, argument: str) -> int:
    """Class count of a head, after a check that it treats each token by itself."""
    with evaluating(head):
        probe = _drawn(3, width, like=like)
        try:
            together, alone = head(probe), head(probe[1:2])
        except (RuntimeError, ValueError, TypeError) as error:
            raise TokenExitError(
                f"`{argument}` must take tokens of shape (tokens, {width}), got the error: {error}"
            ) from error
    require(
        isinstance(together, Tensor) and together.ndim == 2 and together.shape[0] == 3,
        argument,
        "turn tokens (3, width) into logits (3, classes)",
        getattr(together, "shape", type(together).__name__),
    )
    require(_close(together[1:2], alone), argument, "treat each token by itself", "logits that depend on other tokens")
    return together.shape[1]


@torch.no_grad()
def _check(host: Host, like: Tensor) -> None:
    """Run two random images packed and compare with the host's own dense forward."""
    images = _drawn(2, *host.image_shape, like=like)
    with evaluating(host.module):
        dense = host.dense(images)
        embedded = host.embed(images)
        count, slots, width = embedded.tokens.shape
        height, across = embedded.grid
        require(width == host.width, "model.width", f"be the {width} channels of its tokens", host.width)
        require(
            slots == embedded.prefix + height * across,
            "model.embed",
            f"give {embedded.prefix} prefix tokens and a grid of {height} x {across}",
            f"{slots} tokens",
        )
        require(
            tuple(dense.shape) == (count, slots, width),
            "model.dense",
            f"give tokens of shape {(count, slots, width)}",
            f"shape {tuple(dense.shape)}",
        )
        row = rearrange(embedded.tokens, "images slots width -> 1 (images slots) width")
        positions = embedded.positions
        if positions is not None:
            positions = positions.repeat(count, *[1] * (positions.ndim - 1))
        for index in range(len(host.blocks)):
            with attending_per_image([slots] * count) as attention:
                row = host.run(index, row, positions)
            require(
                attention.calls == 1,
                f"model.blocks[{index}]",
                "call torch.nn.functional.scaled_dot_product_attention once",
                f"{attention.calls} calls",
            )
        packed = rearrange(host.finish(row), "1 (images slots) width -> images slots width", images=count)
        gap = (packed.float() - dense.float()).abs().max().item()
        require(
            _close(packed, dense),
            "model",
            "give the same tokens packed as in its own dense forward",
            f"a difference of {gap:.3g}",
        )


def _drawn(*shape: int, like: Tensor) -> Tensor:
    """Normal numbers, always the same ones; the global random state is left alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(like)


def _close(a: Tensor, b: Tensor) -> bool:
    scale = 1e-3 if a.dtype == torch.float32 or a.dtype == torch.float64 else 5e-2
    return bool((a.float() - b.float()).abs().max() <= scale * (1 + b.float().abs().max()))
