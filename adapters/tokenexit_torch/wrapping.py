"""Wrapping of vision transformers: `wrap`, `wrap_decoder`, `wrap_gates` and `wrap_semantic`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn

from tokenexit import TokenExitError
from tokenexit.adapting import MOST, ONE, is_whole, require_places, require_room
from tokenexit.carries import Translated
from tokenexit.errors import require
from tokenexit.gates import FIRST_BIAS, published_gate, published_gates
from tokenexit.heads import MLP, HeadPlan
from tokenexit.schedule import Schedule, merged, neighbours
from tokenexit.semantic import SemanticPlan, stvit
from tokenexit_torch._modules import evaluating
from tokenexit_torch._selfcheck import check_decoder, check_host, classes_of, drawn
from tokenexit_torch.exits.decoder import DecodingModel
from tokenexit_torch.exits.model import ExitingModel
from tokenexit_torch.gates.model import GatedModel
from tokenexit_torch.heads import build
from tokenexit_torch.heads.reading import reads_of, translates
from tokenexit_torch.hosts.decoding import DecodingHost
from tokenexit_torch.hosts.given import Features, GivenDecoder, Reads
from tokenexit_torch.hosts.protocol import Host, embedded_by
from tokenexit_torch.hosts.registry import decoding_host_of, host_of
from tokenexit_torch.hosts.timm import TimmViT
from tokenexit_torch.semantic.model import TIMM_NAMES, SemanticModel, in_place_of_blocks, timm_names

__all__ = ["wrap", "wrap_decoder", "wrap_gates", "wrap_semantic"]


@overload
def wrap(
    model: Any,
    schedule: Schedule | None = None,
    /,
    *,
    head: nn.Module | None = None,
    num_classes: int | None = None,
    exit_heads: HeadPlan | Mapping[int, nn.Module] = MLP(),
    decoder: None = None,
) -> ExitingModel: ...


@overload
def wrap(
    model: Any,
    schedule: Schedule | None = None,
    /,
    *,
    num_classes: int | None = None,
    exit_heads: HeadPlan | Mapping[int, nn.Module] = MLP(),
    decoder: nn.Module,
    taps: Sequence[int] | None = None,
    features: Features = "normalised",
    reads: Reads = "patches",
) -> DecodingModel: ...


def wrap(
    model: Any,
    schedule: Schedule | None = None,
    /,
    *,
    head: nn.Module | None = None,
    num_classes: int | None = None,
    exit_heads: HeadPlan | Mapping[int, nn.Module] = MLP(),
    decoder: nn.Module | None = None,
    taps: Sequence[int] | None = None,
    features: Features = "normalised",
    reads: Reads = "patches",
) -> ExitingModel | DecodingModel:
    """Let the tokens of a vision transformer merge, and leave early.

    The model itself is not changed: its weights are shared, its forward is never replaced. New heads start with
    random weights; train them, or fit them to the final head with `fit_exits`. Merges by similarity need no heads, and
    nothing fitted.

    Args:
        model: A model that is taken as it is (`registry.host_of`), or an object that follows `Host`.
        schedule: After which blocks tokens merge or leave, and by which policy; if left out `schedule.neighbours()`,
            and `schedule.merged()` under a decoder, for as many blocks. Each of its exits gets a head, so that
            `schedule.dense(after=...)` declares heads for schedules to come.
        head: Your final head: from finished tokens `(tokens, width)` to `(tokens, classes)`, each token by itself; or a
            `MaskHead`; or a `heads.NeighbourhoodHead`, which is given twice the channels.
        num_classes: Builds a final head for so many classes, instead of `head`; under a decoder, how many classes exit
            heads tell apart, if there are any. Left out for translators under a decoder, which give none.
        exit_heads: A plan for the exit heads, or the heads themselves by the block they follow; some of these may be a
            `heads.TokenTranslator`, whose tokens the final head reads. Under a decoder all translate, or none; a plan
            `heads.Translator` then gives a token for each tap behind the exit, and no class scores.
        decoder: Instead of a head, a module that reads feature maps: from `(images, width, grid_height, grid_width)`,
            or a list of such for several `taps`, to whatever it likes. Merged tokens are spread to all their places,
            and tokens that have left are there with the features that they left with, or translations. The result is in
            `output.decoded`.
        taps: After how many blocks the decoder is given maps, ascending, the last after all; that alone if left out.
        features: Whether the decoder reads tokens behind the final norm, `normalised`, or as blocks leave them, `raw`.
        reads: Whether it is given prefix tokens too, `(images, prefix, width)` for each map, as a second argument:
            `patches and prefix`.

    Returns:
        The model with exits, in the training mode of `model`.

    Raises:
        TokenExitError: If the model is not supported or already wrapped, an exit lies outside of it, a head does not
            work on each token by itself, or a mask head on each image, some heads are mask heads and others not, or the
            self-check finds that running all tokens packed is not the dense model; if a head is given beside a
            decoder, or what belongs to a decoder without one; or if a head translates for a final head that does not
            treat each token by itself, or not where the plan carries translations.
    """
    if decoder is not None:
        require(head is None, "head", "be left out beside a decoder", type(head).__name__)
        host = unwrapped_host(model)
        require(taps is None or isinstance(taps, Iterable), "taps", "be several blocks, as (6, 12)", repr(taps))
        tapped = (len(host.blocks),) if taps is None else tuple(taps)
        made = GivenDecoder(host, decoder, taps=tapped, features=features, reads=reads)
        plan = merged(depth=max(len(host.blocks), 2)) if schedule is None else schedule
        return _with_decoder(made, plan, exit_heads=exit_heads, num_classes=num_classes)
    require(taps is None, "taps", "be given with `decoder` alone", repr(taps))
    host = unwrapped_host(model)
    schedule = neighbours(depth=max(len(host.blocks), 2)) if schedule is None else schedule
    require(isinstance(schedule, Schedule), "schedule", "be a tokenexit.schedule.Schedule", repr(schedule))
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
        _require_count(num_classes, least=2 if plan is None else plan.least_classes)
        final = _built((plan or MLP()).final, host.width, int(num_classes or 0), like, mode)
    else:
        require(isinstance(head, nn.Module), "head", "be a torch.nn.Module", repr(head))
        final = head
    classes = classes_of(final, host.width, like, "head", least=1 if reads_of(final) == "images" else 2)
    if plan is not None:
        chosen = {after: _built(plan, host.width, classes, like, mode) for after in schedule.read_after}
    else:
        alike = "classes, as the final head"
        chosen = _given_heads(exit_heads, "exit_heads", len(host.blocks), classes, alike, host.width, like)
    named = {"head": final, **{f"exit_heads[{after}]": one for after, one in chosen.items()}}
    for argument, one in named.items():
        alike = (reads_of(one) == "images") == (reads_of(final) == "images")
        rule = "be a mask head exactly if the final head is, for the scores of one image must compare"
        require(alike, argument, rule, f"{type(one).__name__} beside {type(final).__name__}")
        read = not translates(one) or (one is not final and reads_of(final) == "tokens")
        rule = "translate for a final head that treats each token by itself"
        require(read, argument, rule, f"{type(one).__name__} beside {type(final).__name__}")
    _require_apart(named, host.module)
    wrapped = ExitingModel(host, schedule, final, chosen, classes, plan, built_head=head is None)
    # Not `train(mode)`, which would reach into the model and the heads that were given.
    wrapped.training = wrapped.exit_heads.training = mode
    wrapped.patch = check_host(host, like)
    if plan is not None:
        wrapped.note_built_heads()
    return wrapped


def wrap_decoder(
    model: Any,
    schedule: Schedule | None = None,
    /,
    *,
    exit_heads: HeadPlan | Mapping[int, nn.Module] = MLP(),
    num_classes: int | None = None,
) -> DecodingModel:
    """Let tokens merge, and leave early, in a vision transformer under its own decoder: EoMT, DPT, Depth Anything.

    The decoder has all tokens, wherever it looks at them: leavers rejoin with the features that they left with. The
    model itself is not changed. Exit heads only decide which tokens leave. They start with random weights; fit them to
    the decoder's own output with `fit_exits`.

    Args:
        model: A model that is taken as it is (`registry.decoding_host_of`), or an object that follows `DecodingHost`.
        schedule: After which blocks tokens merge or leave, and by which policy; if left out `schedule.merged()`, for as
            many blocks. Where tokens leave it carries `carries.Feature`, as
            `schedule.dovit()` and `schedule.paumer()` do, or `carries.Translated`, as `schedule.foretold()` does. Each
            of its exits gets a head.
        exit_heads: A plan for the exit heads (all but `heads.ATM`), or the heads themselves by the block they follow,
            from `(tokens, width)` to `(tokens, classes)`, each token by itself; or all of them translators.
        num_classes: How many classes the exit heads tell apart; those of the model if left out. A model without
            classes, as of depth, needs it: bins of depth, for example.

    Returns:
        The model with exits, in the training mode of `model`.

    Raises:
        TokenExitError: If the model is not supported or already wrapped, leavers carry no features, an exit lies
            outside of its blocks, a head does not work on each token by itself, classes are missing, or the self-check
            finds that keeping all tokens is not the model's own output.
    """
    _require_unwrapped(model)
    host = decoding_host_of(model)
    plan = merged(depth=max(len(host.blocks), 2)) if schedule is None else schedule
    return _with_decoder(host, plan, exit_heads=exit_heads, num_classes=num_classes)


def _with_decoder(
    host: DecodingHost,
    schedule: Schedule,
    *,
    exit_heads: HeadPlan | Mapping[int, nn.Module],
    num_classes: int | None,
) -> DecodingModel:
    require(isinstance(schedule, Schedule), "schedule", "be a tokenexit.schedule.Schedule", repr(schedule))
    like, mode = next(host.module.parameters()), host.module.training
    asked: Any = host.classes if num_classes is None else num_classes
    given = exit_heads.values() if isinstance(exit_heads, Mapping) else ()
    translating = any(map(translates, given)) or (isinstance(exit_heads, HeadPlan) and exit_heads.translates)
    if translating:
        rule = "be left out for translators, which give no class scores under a decoder"
        require(num_classes is None, "num_classes", rule, repr(num_classes))
        asked = None
    elif asked is not None or schedule.read_after or isinstance(exit_heads, Mapping):
        errors = isinstance(schedule.carry, Translated) and asked is None
        rule = "translate for this schedule, which carries translations: exit_heads=tokenexit.heads.Translator()"
        require(not errors, "exit_heads", rule, repr(exit_heads) if isinstance(exit_heads, HeadPlan) else "modules")
        why = {None: ", for the model has no classes", 1: ", for the model has one class"}.get(host.classes, "")
        _require_count(asked, least=2, why=why)
    classes: int = asked or 0
    plan = None if isinstance(exit_heads, Mapping) else exit_heads
    if isinstance(exit_heads, Mapping):
        each = all(reads_of(head) != "images" for head in exit_heads.values())
        require(each, "exit_heads", "treat each token by itself", "a mask head")
        mixed = translating and not all(map(translates, exit_heads.values()))
        require(not mixed, "exit_heads", "all translate under a decoder, or none", "some of each")
        taps = host.taps
        chosen = _given_heads(exit_heads, "exit_heads", len(host.blocks), classes, "classes", host.width, like, taps)
    else:
        each = isinstance(exit_heads, HeadPlan) and not exit_heads.gives_masks
        require(each, "exit_heads", "be a plan of tokenexit.heads that gives no masks", repr(exit_heads))
        behind = {after: max(sum(tap > after for tap in host.taps), 1) for after in schedule.read_after}
        chosen = {
            after: _built(exit_heads, host.width, classes, like, mode, targets=targets)
            for after, targets in behind.items()
        }
    _require_apart({f"exit_heads[{after}]": one for after, one in chosen.items()}, host.module)
    wrapped = DecodingModel(host, schedule, chosen, classes, plan)
    # Not `train(mode)`, which would reach into the model and the heads that were given.
    wrapped.training = wrapped.exit_heads.training = mode
    wrapped.patch = check_host(host, like)
    check_decoder(host, like)
    if plan is not None:
        wrapped.note_built_heads()
    return wrapped


def wrap_gates(
    model: Any,
    schedule: Schedule | None = None,
    /,
    *,
    head: nn.Module | None = None,
    gates: HeadPlan | Mapping[int, nn.Module] | None = None,
    taps: Iterable[int] | None = None,
) -> GatedModel:
    """Skip tokens of a vision transformer, block by block, by learned gates (SViT, WACV 2024).

    The model itself is not changed. New gates start with random weights, and their draws let most tokens run; train
    them with `Sampled`, then find their thresholds with `gate_thresholds`.

    Args:
        model: A model that is taken as it is (`registry.host_of`), or an object that follows `Host`.
        schedule: After which blocks there is a gate, and which tokens it skips; if left out
            `gates.published_gates` for as many blocks, which is `schedule.svit()` for twelve. Any policy that looks at
            `gate` alone will do: `policies.Budget(0.5, by="gate")` lets half of every image run.
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
    host = unwrapped_host(model)
    like, mode, depth = next(host.module.parameters()), host.module.training, len(host.blocks)
    schedule = published_gates(max(depth, 2)) if schedule is None else schedule
    require(isinstance(schedule, Schedule), "schedule", "be a tokenexit.schedule.Schedule", repr(schedule))
    plan = published_gate(host.width) if gates is None else gates
    if isinstance(plan, Mapping):
        each = all(reads_of(gate) != "neighbourhoods" and not translates(gate) for gate in plan.values())
        require(each, "gates", "treat each token by itself", "a head that looks around tokens, or translates")
        chosen, plan = _given_heads(plan, "gates", depth, 2, "logits, keep and skip", host.width, like), None
    else:
        each = isinstance(plan, HeadPlan) and plan.reads == "tokens" and not plan.translates
        require(each, "gates", "be a plan of tokenexit.heads that treats each token by itself", repr(plan))
        chosen = {after: _new_gate(plan, host.width, like, mode) for after in schedule.after}
    if head is not None:
        require(isinstance(head, nn.Module), "head", "be a torch.nn.Module", repr(head))
        each = reads_of(head) == "tokens"
        require(each, "head", "treat each token by itself", type(head).__name__)
        classes_of(head, host.width, like, "head", least=1)
    require(taps is None or isinstance(taps, Iterable), "taps", "be several blocks, as (6, 12)", repr(taps))
    tapped = (depth,) if taps is None else tuple(taps)
    fits = list(tapped) == sorted(set(tapped)) and all(is_whole(tap, least=1) and tap <= depth for tap in tapped)
    require(fits, "taps", f"be ascending blocks from 1 to {depth}", tapped)
    named = {f"gates[{after}]": one for after, one in chosen.items()} | ({} if head is None else {"head": head})
    _require_apart(named, host.module)
    wrapped = GatedModel(host, schedule, chosen, head, tapped, plan)
    # Not `train(mode)`, which would reach into the model and the head that were given.
    wrapped.training = wrapped.gates.training = mode
    wrapped.patch = check_host(host, like)
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
    wrapped.patch = check_host(host, like)
    with torch.no_grad(), evaluating(wrapped):
        images = drawn(1, *host.image_shape, like=like)
        require_places(wrapped.plan, embedded_by(host, images).grid)
        wrapped(images)
    return wrapped


def _built(plan: HeadPlan, width: int, classes: int, like: Tensor, mode: bool, *, targets: int = 1) -> nn.Module:
    """A new head in a training mode, beside the weights of the model; its own are drawn where they always are."""
    with torch.device("cpu"):
        head = build(plan, width=width, classes=classes, targets=targets)
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


def _given_heads(
    heads: Any,
    argument: str,
    depth: int,
    classes: int,
    alike: str,
    width: int,
    like: Tensor,
    taps: Sequence[int] = (),
) -> dict[int, nn.Module]:
    blocks = all(is_whole(after, least=1) and after < depth for after in heads)
    require(blocks, argument, f"have blocks from 1 to {depth - 1} as keys, for {depth} blocks", list(heads))
    for after, head in heads.items():
        one = f"{argument}[{after}]"
        require(isinstance(head, nn.Module), one, "be a torch.nn.Module", repr(head))
        found, wanted, what = classes_of(head, width, like, one, least=1), classes, alike
        if translates(head):
            behind = max(sum(tap > after for tap in taps), 1)
            wanted, what = width * behind, "channels" if behind == 1 else f"channels, for the {behind} taps behind it"
        require(found == wanted, one, f"give {wanted} {what}", found)
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
