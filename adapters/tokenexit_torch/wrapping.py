"""`wrap`, `wrap_decoder`, `wrap_gates` and `wrap_semantic`: exits, gates or semantic tokens for a vision transformer of
yours, and the self-check that they change nothing else.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenexit import TokenExitError
from tokenexit.adapting import MOST, ONE, is_whole, require_places, require_room
from tokenexit.errors import require
from tokenexit.gates import FIRST_BIAS, published_gate
from tokenexit.heads import ATM, MLP, HeadPlan, Neighbourhood
from tokenexit.schedule import Schedule, neighbours, svit
from tokenexit.semantic import SemanticPlan, stvit
from tokenexit_torch._blocks import run_block
from tokenexit_torch._modules import evaluating
from tokenexit_torch.attention import attending_per_image
from tokenexit_torch.exits.decoder import DecodingModel
from tokenexit_torch.exits.model import ExitingModel
from tokenexit_torch.gates.model import GatedModel
from tokenexit_torch.heads import NeighbourhoodHead, build
from tokenexit_torch.heads.masks import MaskHead, Masks
from tokenexit_torch.hosts.decoding import DecodingHost
from tokenexit_torch.hosts.protocol import Embedded, Host, embedded_anywhere, embedded_by, patch_of
from tokenexit_torch.hosts.registry import decoding_host_of, host_of, require_not_quantised
from tokenexit_torch.hosts.timm import TimmViT
from tokenexit_torch.semantic.model import TIMM_NAMES, SemanticModel, in_place_of_blocks, timm_names

__all__ = ["wrap", "wrap_decoder", "wrap_gates", "wrap_semantic"]


def wrap(
    model: Any,
    schedule: Schedule = neighbours(),
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
        model: A model that is taken as it is (`registry.host_of`), or an object that follows `Host`.
        schedule: After which blocks tokens leave, and by which policy; `schedule.neighbours()` if left out. Each of its
            exits gets a head, so that `schedule.dense(after=...)` declares heads for schedules to come.
        head: Your final head: from finished tokens `(tokens, width)` to `(tokens, classes)`, each token by itself; or a
            `MaskHead`; or a `heads.NeighbourhoodHead`, which is given twice the channels.
        num_classes: Builds a final head for so many classes, instead of `head`.
        exit_heads: A plan for the exit heads, or the heads themselves by the block they follow.

    Returns:
        The model with exits, in the training mode of `model`.

    Raises:
        TokenExitError: If the model is not supported or already wrapped, an exit lies outside of it, a head does not
            work on each token by itself, or a mask head on each image, some heads are mask heads and others not, or the
            self-check finds that running all tokens packed is not the dense model.
    """
    require(isinstance(schedule, Schedule), "schedule", "be a tokenexit.schedule.Schedule", repr(schedule))
    host = unwrapped_host(model)
    require(
        (head is None) != (num_classes is None),
        "head",
        "be given, or `num_classes`, and not both",
        f"head={'None' if head is None else type(head).__name__} and num_classes={num_classes}",
    )
    like = next(host.module.parameters())
    mode = host.module.training
    plan = None if isinstance(exit_heads, Mapping) else exit_heads
    known = plan is None or isinstance(plan, HeadPlan)
    require(known, "exit_heads", "be a plan of tokenexit.heads, or modules by block", repr(plan))
    if head is None:
        _require_count(num_classes, least=1 if isinstance(plan, ATM) else 2)
        final = _built(plan or MLP(), host.width, int(num_classes or 0), like, mode)
    else:
        require(isinstance(head, nn.Module), "head", "be a torch.nn.Module", repr(head))
        final = head
    classes = _classes_of(final, host.width, like, "head", least=1 if isinstance(final, MaskHead) else 2)
    if plan is not None:
        chosen = {after: _built(plan, host.width, classes, like, mode) for after in schedule.after}
    else:
        alike = "classes, as the final head"
        chosen = _given_heads(exit_heads, "exit_heads", len(host.blocks), classes, alike, host.width, like)
    named = {"head": final, **{f"exit_heads[{after}]": one for after, one in chosen.items()}}
    for argument, one in named.items():
        alike = isinstance(one, MaskHead) == isinstance(final, MaskHead)
        rule = "be a mask head exactly if the final head is, for the scores of one image must compare"
        require(alike, argument, rule, f"{type(one).__name__} beside {type(final).__name__}")
    _require_apart(named, host.module)
    wrapped = ExitingModel(host, schedule, final, chosen, classes, plan, built_head=head is None)
    # Not `train(mode)`, which would reach into the model and the heads that were given.
    wrapped.training = wrapped.exit_heads.training = mode
    wrapped.patch = _check(host, like)
    return wrapped


def wrap_decoder(
    model: Any,
    schedule: Schedule,
    /,
    *,
    exit_heads: HeadPlan | Mapping[int, nn.Module] = MLP(),
    num_classes: int | None = None,
) -> DecodingModel:
    """Let tokens leave a vision transformer early that feeds a decoder of its own: EoMT, DPT, Depth Anything.

    The decoder has all tokens, wherever it looks at them: leavers rejoin with the features that they left with. The
    model itself is not changed. Exit heads only say who leaves. They start with random weights; fit them to the
    decoder's own output with `fit_exits`.

    Args:
        model: A model that is taken as it is (`registry.decoding_host_of`), or an object that follows `DecodingHost`.
        schedule: After which blocks tokens leave, and by which policy; it carries `carries.Feature`, as
            `schedule.dovit()` and `schedule.paumer()` do. Each of its exits gets a head.
        exit_heads: A plan for the exit heads (all but `heads.ATM`), or the heads themselves by the block they follow,
            from `(tokens, width)` to `(tokens, classes)`, each token by itself.
        num_classes: How many classes the exit heads tell apart; those of the model if left out. A model without
            classes, as of depth, needs it: bins of depth, for example.

    Returns:
        The model with exits, in the training mode of `model`.

    Raises:
        TokenExitError: If the model is not supported or already wrapped, leavers carry no features, an exit lies
            outside of its blocks, a head does not work on each token by itself, classes are missing, or the self-check
            finds that keeping all tokens is not the model's own output.
    """
    require(isinstance(schedule, Schedule), "schedule", "be a tokenexit.schedule.Schedule", repr(schedule))
    _require_unwrapped(model)
    host = decoding_host_of(model)
    like, mode = next(host.module.parameters()), host.module.training
    classes: Any = host.classes if num_classes is None else num_classes
    why = {None: ", for the model has no classes", 1: ", for the model has one class"}.get(host.classes, "")
    _require_count(classes, least=2, why=why)
    plan = None if isinstance(exit_heads, Mapping) else exit_heads
    if isinstance(exit_heads, Mapping):
        each = not any(isinstance(head, MaskHead) for head in exit_heads.values())
        require(each, "exit_heads", "treat each token by itself", "a mask head")
        chosen = _given_heads(exit_heads, "exit_heads", len(host.blocks), classes, "classes", host.width, like)
    else:
        each = isinstance(plan, HeadPlan) and not isinstance(plan, ATM)
        require(each, "exit_heads", "be a plan of tokenexit.heads that gives no masks", repr(plan))
        chosen = {after: _built(exit_heads, host.width, classes, like, mode) for after in schedule.after}
    _require_apart({f"exit_heads[{after}]": one for after, one in chosen.items()}, host.module)
    wrapped = DecodingModel(host, schedule, chosen, classes, plan)
    # Not `train(mode)`, which would reach into the model and the heads that were given.
    wrapped.training = wrapped.exit_heads.training = mode
    wrapped.patch = _check(host, like)
    _check_decoder(host, like)
    return wrapped


def wrap_gates(
    model: Any,
    schedule: Schedule = svit(),
    /,
    *,
    head: nn.Module | None = None,
    gates: HeadPlan | Mapping[int, nn.Module] | None = None,
    taps: Iterable[int] | None = None,
) -> GatedModel:
    """Let the tokens of a vision transformer wait, block by block, as learned gates say (SViT, WACV 2024).

    The model itself is not changed. New gates start with random weights, and their draws let most tokens run; train
    them with `Sampled`, then find their thresholds with `gate_thresholds`.

    Args:
        model: A model that is taken as it is (`registry.host_of`), or an object that follows `Host`.
        schedule: After which blocks there is a gate, and who waits; `schedule.svit()` if left out. Any policy that
            looks at `gate` alone will do: `policies.Budget(0.5, by="gate")` lets half of every image run.
        head: Your final head, from finished tokens `(..., width)` to `(..., classes)`, each token by itself. None: maps
            only, for a decoder of yours.
        gates: A plan for the gates, or the gates themselves by the blocks before them, from `(..., width)` to two
            logits, keep and skip. `heads.MLP` with a quarter of the channels between its layers if left out: published.
        taps: After how many blocks maps are handed out, ascending; the last if left out.

    Returns:
        The model with gates, in the training mode of `model`.

    Raises:
        TokenExitError: If the model is not supported or already wrapped, a gate or tap lies outside of it, a head or
            gate does not work on each token by itself, or the self-check finds that running all tokens packed is not
            the dense model.
    """
    require(isinstance(schedule, Schedule), "schedule", "be a tokenexit.schedule.Schedule", repr(schedule))
    host = unwrapped_host(model)
    like, mode, depth = next(host.module.parameters()), host.module.training, len(host.blocks)
    plan = published_gate(host.width) if gates is None else gates
    if isinstance(plan, Mapping):
        each = not any(isinstance(gate, NeighbourhoodHead) for gate in plan.values())
        require(each, "gates", "treat each token by itself", "a head that looks around tokens")
        chosen, plan = _given_heads(plan, "gates", depth, 2, "logits, keep and skip", host.width, like), None
    else:
        each = isinstance(plan, HeadPlan) and not isinstance(plan, ATM | Neighbourhood)
        require(each, "gates", "be a plan of tokenexit.heads that treats each token by itself", repr(plan))
        chosen = {after: _new_gate(plan, host.width, like, mode) for after in schedule.after}
    if head is not None:
        require(isinstance(head, nn.Module), "head", "be a torch.nn.Module", repr(head))
        each = not isinstance(head, MaskHead | NeighbourhoodHead)
        require(each, "head", "treat each token by itself", type(head).__name__)
        _classes_of(head, host.width, like, "head", least=1)
    tapped = (depth,) if taps is None else tuple(taps)
    fits = list(tapped) == sorted(set(tapped)) and all(_is_block(tap) and 1 <= tap <= depth for tap in tapped)
    require(fits, "taps", f"be ascending blocks from 1 to {depth}", tapped)
    named = {f"gates[{after}]": one for after, one in chosen.items()} | ({} if head is None else {"head": head})
    _require_apart(named, host.module)
    wrapped = GatedModel(host, schedule, chosen, head, tapped, plan)
    # Not `train(mode)`, which would reach into the model and the head that were given.
    wrapped.training = wrapped.gates.training = mode
    wrapped.patch = _check(host, like)
    return wrapped


def wrap_semantic(
    model: Any,
    plan: SemanticPlan = stvit(),
    /,
    *,
    after: int,
    until: int | None,
    heads: int | None = None,
    names: Mapping[str, str] | None = None,
) -> SemanticModel:
    """Let blocks of a vision transformer run on semantic tokens (STViT, CVPR 2023).

    The model itself is not changed. Two of its blocks, or three, give their place to layers that make semantic tokens
    and recover all tokens of them. These start from the weights of those blocks where the shapes allow; `kept`, `new`
    and `left` of the result say which. The result must be trained, also where no weight is new.

    Args:
        model: A model that is taken as it is (`registry.host_of`), or an object that follows `Host`.
        plan: How semantic tokens come about; `tokenexit.semantic.stvit()` if left out, 16 for an image.
        after: After how many blocks there are semantic tokens; the next two blocks are replaced.
        until: After how many blocks all tokens are there again; the block before is replaced. None: the network ends on
            semantic tokens, as for classification.
        heads: Attention heads of the new layers; those of the replaced blocks if left out, for a timm model.
        names: Where the blocks of a model of yours keep the weights of a `CrossBlock`, by its names: layers `norm1`,
            `qkv`, `proj`, `norm2`, `mlp.0` and `mlp.2`, and parameters `scale1` and `scale2`. The MLP must be two
            layers with an exact GELU between them, as the new layers have; otherwise leave it out. For a timm model all
            are known, and an MLP of another kind is left out; without any, all weights of the layers are new.

    Returns:
        The model on semantic tokens, in the training mode of `model`.

    Raises:
        TokenExitError: If the model is not supported or already wrapped, the blocks do not leave room for the layers,
            heads are missing or do not divide the width, `names` names what is not there, or the self-check fails.
    """
    require(isinstance(plan, SemanticPlan), "plan", "be a tokenexit.semantic.SemanticPlan", repr(plan))
    host = unwrapped_host(model)
    require_room(after, until, depth=len(host.blocks))
    block: Any = host.blocks[after]
    if isinstance(host, TimmViT):
        heads = block.attn.num_heads if heads is None else heads
    whole = isinstance(heads, int) and not isinstance(heads, bool)
    require(whole, "heads", "be given for a model that is not of timm", repr(heads))
    if names is None:
        names = timm_names(block) if isinstance(host, TimmViT) else {}
    known = isinstance(names, Mapping) and set(names) <= set(TIMM_NAMES)
    require(known, "names", f"have keys among {', '.join(TIMM_NAMES)}", repr(names))
    there = {name for name, _ in (*block.named_modules(), *block.named_parameters())}
    unknown = {own: name for own, name in names.items() if name not in there}
    require(not unknown, "names", f"name layers and parameters of block {after}", repr(unknown))
    sizes = {"heads": int(heads or 0), "names": names}
    with torch.device("cpu"):
        model = in_place_of_blocks(host, plan, after=after, until=until, **sizes)
    return ready(model)


def ready(wrapped: SemanticModel, /) -> SemanticModel:
    """A model on semantic tokens, its layers where those that it wraps are, after the self-check. Not public."""
    host = wrapped.host
    like, mode = next(host.module.parameters()), host.module.training
    wrapped.layers.to(like).train(mode)
    # Not `train(mode)`, which would reach into the model.
    wrapped.training = mode
    wrapped.patch = _check(host, like)
    with torch.no_grad(), evaluating(wrapped):
        images = _drawn(1, *host.image_shape, like=like)
        require_places(wrapped.plan, embedded_by(host, images).grid)
        wrapped(images)
    return wrapped


def _built(plan: HeadPlan, width: int, classes: int, like: Tensor, mode: bool) -> nn.Module:
    """A new head in a training mode, beside the weights of the model; its own are drawn where they always are."""
    with torch.device("cpu"):
        head = build(plan, width=width, classes=classes)
    return head.to(like).train(mode)


def _new_gate(plan: HeadPlan, width: int, like: Tensor, mode: bool) -> nn.Module:
    gate = _built(plan, width, 2, like, mode)
    *_, last = (layer for layer in gate.modules() if isinstance(layer, nn.Linear))
    with torch.no_grad():
        last.bias.copy_(torch.tensor(FIRST_BIAS, device="cpu"))
    return gate


def _require_count(classes: Any, *, least: int, why: str = "") -> None:
    """Raise unless there can be so many classes: a softmax of one leaves no doubt."""
    fits = is_whole(classes, least=least) and classes <= MOST
    hint = f" ({ONE})" if is_whole(classes) and classes == 1 else ""
    rule = f"be a whole number from {least} to {MOST}{why}{hint}"
    require(fits, "num_classes", rule, repr(classes))


def _is_block(value: object) -> bool:
    """Whether a value can count blocks."""
    return isinstance(value, int) and not isinstance(value, bool)


def _given_heads(
    heads: Any, argument: str, depth: int, classes: int, alike: str, width: int, like: Tensor
) -> dict[int, nn.Module]:
    blocks = all(_is_block(after) and 1 <= after < depth for after in heads)
    require(blocks, argument, f"have blocks from 1 to {depth - 1} as keys, for {depth} blocks", list(heads))
    for after, head in heads.items():
        one = f"{argument}[{after}]"
        require(isinstance(head, nn.Module), one, "be a torch.nn.Module", repr(head))
        found = _classes_of(head, width, like, one, least=1)
        require(found == classes, one, f"give {classes} {alike}", found)
    return dict(heads)


def _require_apart(heads: Mapping[str, nn.Module], model: nn.Module) -> None:
    """No parameter may belong to two heads, or to a head and the model: fitting the one would change the other."""
    owner = {id(parameter): "the model" for parameter in model.parameters()}
    for argument, head in heads.items():
        for parameter in head.parameters():
            shared = owner.setdefault(id(parameter), argument)
            require(shared == argument, argument, "have parameters of its own", f"some that it shares with {shared}")


_WRAPPED = (ExitingModel, DecodingModel, GatedModel, SemanticModel)


def unwrapped_host(model: object) -> Host:
    _require_unwrapped(model)
    return host_of(model)


def _require_unwrapped(model: object) -> None:
    module = model if isinstance(model, nn.Module) else getattr(model, "module", None)
    if isinstance(module, nn.Module) and any(isinstance(part, _WRAPPED) for part in module.modules()):
        raise TokenExitError("`model` must not be wrapped already, got one that is")


@torch.no_grad()
def _classes_of(head: nn.Module, width: int, like: Tensor, argument: str, *, least: int) -> int:
    """Class count of a head, after a check that it treats each token by itself, or each image if it gives masks."""
    require_not_quantised(head, argument)
    if isinstance(head, MaskHead):
        return _mask_classes_of(head, width, like, argument)
    width = 2 * width if isinstance(head, NeighbourhoodHead) else width
    with evaluating(head):
        probe = _drawn(3, width, like=like)
        try:
            together, alone = head(probe), head(probe[1:2])
        except TokenExitError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            rule = f"take tokens of shape (tokens, {width})"
            if any(isinstance(part, nn.Conv2d) for part in head.modules()):
                rule += " (a head that convolves a map is a decoder: see `wrap_decoder` and `DecodingHost`)"
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
        probe = _drawn(5, width, like=like)
        try:
            together, alone = head(probe, [2, 0, 3]), head(probe[2:], [3])
        except TokenExitError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            rule = f"take patches of shape (patches, {width}), and how many of each image"
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


def _is_close(together: Tensor, alone: Tensor) -> bool:
    gap = (together - alone).abs().max()
    return bool(gap <= _tolerance(alone.dtype) * (1 + alone.abs().max()))


@torch.no_grad()
def _check(host: Host, like: Tensor) -> tuple[int, int] | None:
    """Run a whole image and half of another as one packed row, and compare with each of them alone.

    Returns:
        Pixels of a patch, if the host does not say what its grid covers.
    """
    images = _drawn(2, *host.image_shape, like=like)
    with evaluating(host.module):
        embedded = embedded_anywhere(host, images)
        _, slots, width = embedded.tokens.shape
        height, across = embedded.grid
        require(width == host.width, "model.width", f"be the {width} channels of its tokens", host.width)
        require(
            slots == embedded.prefix + height * across,
            "model.embed",
            f"give {embedded.prefix} prefix tokens and a grid of {height} x {across}",
            f"{slots} tokens",
        )
        _check_places(host, embedded, images[:1])
        dense = host.dense(images[:1])
        shape = tuple(dense.shape)
        wanted = (1, slots, width)
        require(shape == wanted, "model.dense", f"give tokens of shape {wanted}", f"shape {shape}")
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
        _require_close(packed[:, :slots], dense, "give the same tokens packed as in its own dense forward")
        _require_close(packed[:, slots:], alone, "give the same tokens packed as alone")
    return patch_of(embedded, images)


@torch.no_grad()
def _check_decoder(host: DecodingHost, like: Tensor) -> None:
    """Decode the tokens of an image that has lost none, and compare with the model's own output."""
    taps, last = tuple(host.taps), len(host.blocks)
    fits = all(map(_is_block, taps)) and list(taps) == sorted(set(taps)) and min(taps, default=0) >= 1
    fits = fits and taps[-1] == last
    require(fits, "model.taps", f"be ascending numbers of blocks, from 1 up, the last {last}", repr(taps))
    image = _drawn(1, *host.image_shape, like=like)
    with evaluating(host.module):
        embedded = host.embed(image)
        row, taken = embedded.tokens, {}
        for index in range(last):
            row = run_block(host, index, row, embedded.positions)
            taken[index + 1] = row
        with _drawing_alike(like.device):
            own = host.own(image)
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


def _drawn(*shape: int, like: Tensor) -> Tensor:
    """Normal numbers, always the same ones; the global random state is left alone."""
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(like)


def _tolerance(dtype: torch.dtype) -> float:
    """Rounding, relative to the size of what is rounded."""
    return 5e-3 if dtype in (torch.float32, torch.float64) else 1e-1
