"""Self-check of wrapping: packed rows give what the dense model does, heads read each token or image by itself."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenexit import TokenExitError
from tokenexit.adapting import ONE, is_whole
from tokenexit.errors import require
from tokenexit_torch._blocks import run_block
from tokenexit_torch._modules import evaluating
from tokenexit_torch.attention import attending_per_image
from tokenexit_torch.heads.masks import MaskHead, Masks
from tokenexit_torch.heads.reading import dim_in
from tokenexit_torch.hosts.decoding import DecodingHost
from tokenexit_torch.hosts.given import GivenDecoder
from tokenexit_torch.hosts.protocol import Embedded, Host, embedded_anywhere, patch_of
from tokenexit_torch.hosts.registry import require_loaded, require_not_quantised

__all__ = ["check_decoder", "check_host", "classes_of", "drawn"]


@torch.no_grad()
def classes_of(head: nn.Module, width: int, like: Tensor, argument: str, *, least: int) -> int:
    """Class count of a head, after a check that it treats each token by itself, or each image if it gives masks."""
    require_loaded(head, argument)
    require_not_quantised(head, argument)
    if isinstance(head, MaskHead):
        return _mask_classes_of(head, width, like, argument)
    width = dim_in(head, width)
    with evaluating(head):
        probe = drawn(3, width, like=like)
        try:
            together, alone = head(probe), head(probe[1:2])
        except TokenExitError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            rule = f"take tokens of shape (tokens, {width})"
            if any(isinstance(part, nn.Conv2d) for part in head.modules()):
                rule += " (a head that convolves a map is a decoder: `wrap(vit, decoder=head)`)"
            rule += _beside(head, like)
            raise TokenExitError(f"`{argument}` must {rule}, got the error: {error}") from error
    require(
        isinstance(together, Tensor) and together.ndim == 2 and together.shape[0] == 3,
        argument,
        "turn tokens (3, width) into logits (3, classes)",
        getattr(together, "shape", type(together).__name__),
    )
    classes = together.shape[1]
    hint = f" ({ONE})" if classes == 1 else ""
    require(classes >= least, argument, f"give at least {least} classes{hint}", classes)
    close = _is_close(together[1:2], alone)
    require(close, argument, "treat each token by itself", "logits that depend on other tokens")
    return classes


def _mask_classes_of(head: MaskHead, width: int, like: Tensor, argument: str) -> int:
    with evaluating(head):
        probe = drawn(5, width, like=like)
        try:
            together, alone = head(probe, [2, 0, 3]), head(probe[2:], [3])
        except TokenExitError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            rule = f"take patches of shape (patches, {width}), and how many of each image{_beside(head, like)}"
            raise TokenExitError(f"`{argument}` must {rule}, got the error: {error}") from error
    require(isinstance(together, Masks), argument, "give Masks", type(together).__name__)
    shapes = tuple(together.mask_logits.shape), tuple(together.presence_logits.shape)
    classes = shapes[0][-1]
    wanted = (5, classes), (3, classes)
    require(classes >= 1, argument, "give at least 1 class", classes)
    require(shapes == wanted, argument, f"give masks and presence of shapes {wanted} for 5 patches, 3 images", shapes)
    close = _is_close(together.mask_logits[2:], alone.mask_logits)
    close = close and _is_close(together.presence_logits[2:], alone.presence_logits)
    require(close, argument, "treat each image by itself", "masks or presence that depend on other images")
    return classes


def _beside(module: nn.Module, like: Tensor) -> str:
    """A hint at a module that is not where the model is, or computes in another dtype."""
    weights = [weight for weight in module.parameters() if weight.is_floating_point()]
    alike = all((weight.device, weight.dtype) == (like.device, like.dtype) for weight in weights)
    return "" if alike else f", on {like.device} in {like.dtype} (`.to({str(like.device)!r}, {like.dtype})`)"


def _is_close(together: Tensor, alone: Tensor) -> bool:
    gap = (together - alone).abs().max()
    return bool(gap <= _tolerance(alone.dtype) * (1 + alone.abs().max()))


@torch.no_grad()
def check_host(host: Host, like: Tensor) -> tuple[int, int] | None:
    """Run a whole image and half of another as one packed row, and compare with each of them alone.

    Returns:
        Pixels of a patch, if the host does not say what its grid covers.
    """
    images = drawn(2, *host.image_shape, like=like)
    with evaluating(host.module):
        embedded = embedded_anywhere(host, images)
        tokens, prefix, grid = embedded.tokens, embedded.prefix, tuple(embedded.grid)
        got = getattr(tokens, "shape", type(tokens).__name__)
        rule = f"give tokens of shape ({len(images)}, slots, width)"
        several = isinstance(tokens, Tensor) and tokens.ndim == 3 and len(tokens) == len(images)
        require(several, "model.embed", rule, str(tuple(got) if isinstance(tokens, Tensor) else got))
        whole = len(grid) == 2 and all(is_whole(one, least=0) for one in (prefix, *grid))
        rule = "give a count of prefix tokens, and height and width of the grid"
        require(whole, "model.embed", rule, f"prefix={prefix!r}, grid={grid!r}")
        _, slots, width = tokens.shape
        height, across = grid
        require(width == host.width, "model.width", f"be the {width} channels of its tokens", host.width)
        require(
            slots == embedded.prefix + height * across,
            "model.embed",
            f"give {embedded.prefix} prefix tokens and a grid of {height} x {across}",
            f"{slots} tokens",
        )
        _check_places(host, embedded, images[:1])
        dense = host.dense(images[:1])
        _require_shape(dense, (1, slots, width), "model.dense")
        half = torch.arange(0, slots, 2, device=dense.device)
        alone, positions = embedded.tokens[1:, half], embedded.positions
        row = torch.cat([embedded.tokens[:1], alone], dim=1)
        own = None if positions is None else positions[half]
        both = None if positions is None or own is None else torch.cat([positions, own])
        for index in range(len(host.blocks)):
            # With gradients, so that a block that checkpoints them is noticed here.
            with torch.enable_grad(), attending_per_image([slots, len(half)]) as attention:
                row = run_block(host, index, row, both, attention).detach()
            alone = run_block(host, index, alone, own)
        packed, alone = host.finish(row), host.finish(alone)
        _require_shape(packed, tuple(row.shape), "model.finish")
        _require_close(packed[:, :slots], dense, "give the same tokens packed as in its own dense forward")
        _require_close(packed[:, slots:], alone, "give the same tokens packed as alone")
    return patch_of(embedded, images)


def _require_shape(found: Any, wanted: tuple[int, ...], argument: str) -> None:
    got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
    fits = isinstance(found, Tensor) and tuple(found.shape) == wanted
    require(fits, argument, f"give tokens of shape {wanted}", got)


@torch.no_grad()
def check_decoder(host: DecodingHost, like: Tensor) -> None:
    """Decode the tokens of an image that has lost none, and compare with the model's own output."""
    taps, last = tuple(host.taps), len(host.blocks)
    fits = all(map(is_whole, taps)) and list(taps) == sorted(set(taps)) and min(taps, default=0) >= 1
    fits = fits and taps[-1] == last
    require(fits, "model.taps", f"be ascending numbers of blocks, from 1 up, the last {last}", repr(taps))
    image = drawn(1, *host.image_shape, like=like)
    with evaluating(host.module):
        embedded = host.embed(image)
        row, taken = embedded.tokens, {}
        for index in range(last):
            row = run_block(host, index, row, embedded.positions)
            taken[index + 1] = row
        with _drawing_alike(like.device):
            own = _own(host, image, embedded.grid)
        with _drawing_alike(like.device):
            decoded = host.decode({after: taken[after] for after in taps}, embedded, image)
    found, wanted = _tensors(decoded), _tensors(own)
    kind = {name: tuple(value.shape) for name, value in wanted.items()}
    require(bool(kind), "model.own", "give tensors", type(own).__name__)
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    require(shapes == kind, "model.decode", f"give what the model itself gives, {kind}", repr(shapes))
    for name, value in wanted.items():
        if value.is_floating_point():
            same = _is_close(found[name], value)
            rule = "give what the model itself gives if no token leaves"
            require(same, "model.decode", rule, f"a difference of {(found[name] - value).abs().max():.3g} in `{name}`")


def _own(host: DecodingHost, image: Tensor, grid: tuple[int, int]) -> Any:
    """The model's own output; a decoder that was given is named where it fails."""
    if not isinstance(host, GivenDecoder):
        return host.own(image)
    try:
        return host.own(image)
    except TokenExitError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        shape, maps = f"(images, {host.width}, {grid[0]}, {grid[1]})", len(host.taps)
        rule = f"take a feature map of shape {shape}" if maps == 1 else f"take a list of {maps} feature maps {shape}"
        rule += ", and as many of prefix tokens" if host.reads == "patches and prefix" else ""
        rule += f", as `taps={host.taps}` says{_beside(host.decoder, image)}"
        raise TokenExitError(f"`decoder` must {rule}, got the error: {error}") from error


@contextmanager
def _drawing_alike(device: torch.device) -> Iterator[None]:
    """A decoder may draw random numbers, also in evaluation: the same ones in the next such context."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _tensors(output: Any, name: str = "output") -> dict[str, Tensor]:
    """All tensors in what a model gives, by where they are."""
    if isinstance(output, Tensor):
        return {name: output}
    if isinstance(output, Mapping):
        inside = {f"{name}.{key}": value for key, value in output.items()}
    elif isinstance(output, tuple | list):
        inside = {f"{name}[{index}]": value for index, value in enumerate(output)}
    else:
        return {}
    return {place: value for path, part in inside.items() for place, value in _tensors(part, path).items()}


def _check_places(host: Host, embedded: Embedded, image: Tensor) -> None:
    """Change the top right cell of an image: its token must change most, or one beside it where patches overlap."""
    height, across = embedded.grid
    changed = image.clone()
    rows, columns = (max(1, side // cells) for side, cells in zip(image.shape[2:], embedded.grid, strict=True))
    changed[..., :rows, -columns:].neg_()
    gap = (host.embed(changed).tokens - embedded.tokens[:1]).double().square().sum(dim=(0, 2))
    slot = int(gap.argmax())
    row, column = divmod(slot - embedded.prefix, across)
    there = slot >= embedded.prefix and row <= 1 and column >= across - 2
    count = f"{embedded.prefix} prefix tokens, then a grid of {height} x {across}, row by row"
    require(there, "model.embed", f"give {count}", f"token {slot} for the patch in the top right corner")


def _require_close(packed: Tensor, reference: Tensor, rule: str) -> None:
    """Compare channel by channel, as some channels of a ViT are hundreds of times larger than the others."""
    tolerance = _tolerance(packed.dtype)
    packed, reference = packed.double(), reference.double()
    size = reference.square().mean(dim=(0, 1)).sqrt()
    gap = (packed - reference).square().mean(dim=(0, 1)).sqrt() / (size + 0.01 * size.median())
    worst = gap.nan_to_num(torch.inf).max().item() if size.median() > 0 else (packed - reference).abs().max().item()
    require(worst <= tolerance, "model", rule, f"a difference of {worst:.3g} of a channel's size")


def drawn(*shape: int, like: Tensor) -> Tensor:
    """Normal numbers, always the same ones; the global random state is left alone."""
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(like)


def _tolerance(dtype: torch.dtype) -> float:
    """Rounding, relative to the size of what is rounded."""
    return 5e-3 if dtype in (torch.float32, torch.float64) else 1e-1
