"""What must hold of blocks at every call, and not only when a model is wrapped: attention, shapes, gradients, parts."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import tokenexit_torch as tet
from tests.torch import models
from tests.torch.decoders import DECODERS
from tests.torch.hosts import FOREIGN, SIZE, transformers_model
from tokenexit import TokenExitError, policies, schedule
from tokenexit.carries import Preserved
from tokenexit.schedule import Exit, Schedule
from tokenexit.semantic import SemanticPlan

PLAN = Schedule((Exit(2, policies.Budget(0.5)),))
NO_CALL = r"`model\.blocks\[\d\]` must call PyTorch's own .*scaled_dot_product_attention, .*fused_attn.*, got no call"
OWN = functional.scaled_dot_product_attention


def exiting(vit):
    return models.wrapped(vit, PLAN, after=(2,))


def gated(vit, keys="running"):
    torch.manual_seed(3)
    gates = {after: nn.Linear(48, 2) for after in (1, 3)}
    plan = schedule.svit(after=(1, 3), threshold=0.5, carry=Preserved(keys=keys))
    return tet.wrap_gates(vit, plan, head=nn.Linear(48, 5), gates=gates).eval()


def drawing(vit, images):
    sampled = tet.Sampled(gated(vit), rates=0.5)
    return sampled(images, generator=torch.Generator().manual_seed(0)).output.logits


def semantic(vit, images):
    torch.manual_seed(3)
    plan = SemanticPlan((3, 3), (3, 3), (3, 3))  # windows hang over the edge: some tokens stand for nothing
    return tet.wrap_semantic(vit, plan, after=0, until=5).eval()(images).tokens


NEEDY = {
    "packed": lambda vit, images: exiting(vit)(images).logits,
    "mixed": lambda vit, images: torch.cat([out.logits for out in exiting(vit).mixed([*images])]),
    "static": lambda vit, images: tet.StaticModel(exiting(vit), capacities=0.7)(images).logits,
    "staged": lambda vit, images: tet.Staged(exiting(vit))(images, schedule=PLAN).output.logits,
    "gated": lambda vit, images: gated(vit)(images).logits,
    "gated, all are keys": lambda vit, images: gated(vit, "all")(images).logits,
    "masked": lambda vit, images: gated(vit).masked(images).logits,
    "sampled": drawing,
    "semantic": semantic,
}
"""Ways to run in which attention must be taken over; each wraps a model, then runs it."""


class Later:
    """A model whose attention changes between the wrapping and the call."""

    def __init__(self, monkeypatch, change):
        self.monkeypatch, self.change = monkeypatch, change

    def __call__(self, run):
        vit = models.timm_vit()
        for name in ("wrap", "wrap_gates", "wrap_semantic"):
            self.monkeypatch.setattr(tet, name, self._then(getattr(tet, name), vit))
        return run(vit, models.images())

    def _then(self, wrap, vit):
        def wrapped(*given, **options):
            model = wrap(*given, **options)
            self.change(vit, self.monkeypatch)
            return model

        return wrapped


def plain(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **_):
    """Attention that knows of no mask, as faster kernels do."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def switched(vit, _):
    for block in vit.blocks:
        block.attn.fused_attn = False


def patched(vit, monkeypatch):
    def forward(attention, tokens, **_):
        q, k, v = attention.qkv(tokens).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return attention.proj(plain(q, k, v).transpose(1, 2).flatten(2))

    monkeypatch.setattr(type(vit.blocks[0].attn), "forward", forward)


def exchanged(vit, _):
    other = copy.deepcopy(vit.blocks[3])
    other.attn.fused_attn = False
    vit.blocks[3] = vit.blocks[2] = other


def replaced(_, monkeypatch):
    monkeypatch.setattr(functional, "scaled_dot_product_attention", plain)


CHANGES = {"switched": switched, "patched": patched, "exchanged": exchanged, "replaced": replaced}


@torch.no_grad()
@pytest.mark.parametrize("run", NEEDY.values(), ids=NEEDY.keys())
@pytest.mark.parametrize("change", [switched, replaced])
def test_attention_that_changes_later_is_refused_wherever_it_must_be_taken_over(run, change, monkeypatch):
    with pytest.raises(TokenExitError, match=NO_CALL):
        Later(monkeypatch, change)(run)


@torch.no_grad()
@pytest.mark.parametrize("change", [patched, exchanged])
@pytest.mark.parametrize("run", [NEEDY["packed"], NEEDY["static"], NEEDY["masked"]])
def test_so_are_other_ways_to_change_it(run, change, monkeypatch):
    with pytest.raises(TokenExitError, match=NO_CALL):
        Later(monkeypatch, change)(run)


@torch.no_grad()
@pytest.mark.parametrize("run", NEEDY.values(), ids=NEEDY.keys())
def test_a_function_around_attention_that_calls_it_is_right(run, monkeypatch):
    wanted, calls = run(models.timm_vit(), models.images()), []

    def counted(*given, **options):
        calls.append(len(given))
        return OWN(*given, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", counted)
    assert torch.equal(run(models.timm_vit(), models.images()), wanted)
    assert calls


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_where_images_need_not_be_kept_apart_any_attention_is_right(change, monkeypatch):
    vit, images = models.timm_vit(), models.images()
    model, gates = exiting(vit), gated(vit)
    runs = [
        lambda: model(images, schedule=schedule.dense()).logits,
        lambda: model(images[:1]).logits,
        lambda: model.mixed([images[0]])[0].logits,
        lambda: model.every_exit(images)[2],
        lambda: gates(images[:1]).logits,
    ]
    if change is exchanged:
        vit.blocks[3] = vit.blocks[2] = copy.deepcopy(vit.blocks[3])
    wanted = [run() for run in runs]
    change(vit, monkeypatch)
    for run, one in zip(runs, wanted, strict=True):
        torch.testing.assert_close(run(), one, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_another_attention_under_the_name_of_sdpa_is_refused(monkeypatch):
    dino = transformers_model("dinov2", "Dinov2Model")
    model, images = tet.wrap(dino, schedule.paumer(keep={1: 0.5}), num_classes=5).eval(), models.images(2, SIZE)
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def other(_module, q, k, v, _mask, **_):
        return plain(q, k, v).transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", other)
    with pytest.raises(TokenExitError, match=NO_CALL):
        model(images)


class Merging(nn.Module):
    """A block that merges tokens, as patches of ToMe do."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, tokens):
        return self.block(tokens)[:, ::2]


@torch.no_grad()
@pytest.mark.parametrize(("index", "shape"), [(0, r"\(3, 25, 48\)"), (3, r"\(1, 39, 48\)")])
def test_blocks_that_merge_tokens_later_are_refused_before_and_after_an_exit(index, shape):
    model = exiting(models.timm_vit())
    model.model.blocks[index] = Merging(model.model.blocks[index])
    rule = f"give back as many tokens as it is given, in a tensor of shape {shape}, got shape"
    with pytest.raises(TokenExitError, match=rf"`model\.blocks\[{index}\]` must {rule}"):
        model(models.images())


# Checkpoints.

KINDS = pytest.mark.parametrize("impl", list(CheckpointImpl), ids=lambda impl: impl.name)


def around_blocks(vit, impl):
    for index in range(len(vit.blocks)):
        vit.blocks[index] = checkpoint_wrapper(vit.blocks[index], checkpoint_impl=impl)


def around_attention(vit, impl):
    for block in vit.blocks:
        block.attn = checkpoint_wrapper(block.attn, checkpoint_impl=impl)


def checkpointed(run, impl):
    def call(tokens, **options):
        return checkpoint(lambda x: run(x, **options), tokens, use_reentrant=impl == CheckpointImpl.REENTRANT)

    return call


def inside(vit, impl):
    for block in vit.blocks:
        block.attn.forward = checkpointed(block.attn.forward, impl)


def around_mlps(vit, impl):
    for block in vit.blocks:
        block.mlp = checkpoint_wrapper(block.mlp, checkpoint_impl=impl)


CHECKPOINTED = "`model` must not checkpoint gradients inside .*: checkpoint the call of what wraps it instead, got "


@KINDS
@pytest.mark.parametrize("put", [around_blocks, around_attention, inside])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_checkpoints_around_attention_are_refused_when_wrapped_and_later_in_the_forward_pass(put, impl):
    vit = models.timm_vit()
    put(vit, impl)
    with pytest.raises(TokenExitError, match=CHECKPOINTED):
        exiting(vit)
    vit, images = models.timm_vit(), models.images()
    model, gates = exiting(vit), gated(vit, "all")
    runs = [model, tet.StaticModel(model, capacities=0.5), gates, lambda images: model.mixed([*images])]
    put(vit, impl)
    for run in runs:
        with pytest.raises(TokenExitError, match=CHECKPOINTED):
            run(images)
    with torch.no_grad():  # nothing will be computed again
        assert torch.equal(model(images).logits, exiting(models.timm_vit())(images).logits)


@KINDS
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_so_are_they_for_rotary_positions_and_under_a_decoder(impl):
    eva, eomt, images = FOREIGN["timm EVA-02"].make(), DECODERS["EoMT"].make(), models.images(2, SIZE)
    turned = tet.wrap(eva, schedule.dense(after=(1,)), num_classes=5)
    decoding = tet.wrap_decoder(eomt, schedule.paumer(keep={1: 0.5}))
    around_blocks(eva, impl)
    for index in range(3):
        eomt.layers[index] = checkpoint_wrapper(eomt.layers[index], checkpoint_impl=impl)
    for run in (turned, decoding):
        with pytest.raises(TokenExitError, match=CHECKPOINTED):
            run(images)


def gradients(run, vit):
    vit.zero_grad()
    run(models.images().requires_grad_()).square().mean().backward()
    return {
        name.replace("_checkpoint_wrapped_module.", ""): one.grad.clone()
        for name, one in vit.named_parameters()
        if one.grad is not None
    }


@KINDS
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_checkpoints_of_a_whole_call_and_of_layers_without_attention_give_the_same_gradients(impl):
    vit = models.timm_vit()
    model = exiting(vit)

    def run(images):
        return model(images).logits

    wanted, whole = gradients(run, vit), gradients(checkpointed(run, impl), vit)
    around_mlps(vit, impl)
    again = exiting(vit)
    for found in (whole, gradients(run, vit), gradients(lambda images: again(images).logits, vit)):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], one) for name, one in wanted.items())


# Parts that are exchanged.


def made(kind):
    vit = models.timm_vit()
    match kind:
        case "exits":
            return exiting(vit)
        case "gates":
            return gated(vit)
        case "semantic tokens":
            return tet.wrap_semantic(vit, after=1, until=5)
    return tet.wrap_decoder(DECODERS[kind].make(), schedule.paumer(keep={1: 0.5}), num_classes=3)


WRAPPED = ("exits", "gates", "semantic tokens", "EoMT", "DPT, depth", "Depth Anything")


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_is_wrapped_cannot_be_assigned(kind):
    model = made(kind)
    for name, other in (("model", copy.deepcopy(model.model)), ("host", copy.deepcopy(model.host))):
        with pytest.raises(TokenExitError, match=f"`{name}` must stay as it was wrapped, .*: wrap the other model"):
            setattr(model, name, other)
    model.model, model.host = model.model, model.host
    images = torch.randn(1, *model.host.image_shape)
    copies = [copy.deepcopy(model)]
    copies += [pickle.loads(pickle.dumps(model))] if kind in WRAPPED[:3] else []
    for copied in copies:
        assert copied.host.module is copied.model
        copied.eval()(images)
    model.register_module("model", copy.deepcopy(model.model))
    with pytest.raises(TokenExitError, match="`model` must be that of its host, .*: wrap the other model"):
        model(images)


@pytest.mark.parametrize("kind", WRAPPED)
def test_another_number_of_blocks_is_refused_by_name(kind):
    model = made(kind)
    images = torch.randn(1, *model.host.image_shape)
    path = {"EoMT": "layers", "DPT, depth": "dpt.encoder.layer", "Depth Anything": "backbone.encoder.layer"}
    owner, _, name = path.get(kind, "blocks").rpartition(".")
    owner, depth = model.model.get_submodule(owner), model.depth
    blocks = getattr(owner, name)
    setattr(owner, name, blocks[:-1] if kind == "EoMT" else blocks[: depth - 1])
    with pytest.raises(TokenExitError, match=f"`model` must have {depth} blocks, .*: wrap it again, got {depth - 1}"):
        model(images)
    setattr(owner, name, blocks)
    model(images)


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm DINOv3", "torchvision", "transformers ViT", "transformers CLIP"])
def test_a_block_and_a_norm_that_are_exchanged_run(name):
    foreign, images = FOREIGN[name], models.images(2, SIZE)
    model = foreign.make()
    wrapped = tet.wrap(model, schedule.dense(after=(1,)), head=nn.Identity(), exit_heads={1: nn.Identity()})
    blocks = foreign.blocks(model)
    blocks[1] = copy.deepcopy(blocks[3])
    if hasattr(model, "norm"):
        model.norm = nn.LayerNorm(model.norm.normalized_shape, elementwise_affine=False)
    own = foreign.dense(model, images)[:, foreign.prefix :]
    torch.testing.assert_close(wrapped(images).logits, own.mT.unflatten(2, (4, 4)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["EoMT", "EoMT-DINOv3", "DPT, segmentation", "Depth Anything"])
def test_a_block_that_is_exchanged_runs_under_a_decoder(name):
    decoder = DECODERS[name]
    model = decoder.make()
    wrapped = tet.wrap_decoder(model, schedule.paumer(keep={1: 0.5}), num_classes=3).eval()
    blocks, image = decoder.blocks(model), models.images(1, SIZE)
    blocks[1] = copy.deepcopy(blocks[2])
    torch.manual_seed(0)
    own = dict(model(image))
    torch.manual_seed(0)
    found = dict(wrapped(image, schedule=schedule.dense()).decoded)
    for key, value in own.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5)
