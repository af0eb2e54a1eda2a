"""Multiply-adds of layers of any kind: those of the same network with plain layers, or PyTorch's own count."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import tokenexit_torch as tet
from tests.torch import decoders, models
from tests.torch.hosts import FOREIGN
from tokenexit import TokenExitError, policies, schedule
from tokenexit.carries import Feature, Preserved
from tokenexit.cost import HeadCost
from tokenexit.heads import ATM
from tokenexit.schedule import Exit, Schedule

PLAN = Schedule((Exit(2, policies.Budget(0.5)),))
GATED = Schedule((Exit(2, policies.Budget(0.5, by="gate")),), Preserved())


@models.once
def exiting():
    return tet.wrap(models.timm_vit(depth=3), PLAN, num_classes=5).eval()


def counted(model, images=None):
    with torch.no_grad():
        return model.multiply_adds(model(models.images(2) if images is None else images)).tolist()


def by_pytorch(call):
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


class Linear4(nn.Linear):
    """Two numbers in a byte, in a kernel that PyTorch's counter does not know."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        packed = torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.out_features)


class Broken4(Linear4):
    """The same without a kernel for where it is counted."""

    def forward(self, x):
        return functional.linear(x, self.weight)


class Sharded(nn.Linear):
    """A share of the weights, in one axis."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.weight = nn.Parameter(torch.zeros(layer.weight.numel() // 2))


class Adapted(nn.Module):
    """As an adapter goes around a layer: it has the layer's numbers, and holds it."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.in_features, self.out_features, self.base = layer.in_features, layer.out_features, layer
        self.a = nn.Linear(layer.in_features, rank, bias=False)
        self.b = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class Bare(nn.Linear):
    """The same adapter by bare parameters."""

    def __init__(self, layer, rank=2):
        super().__init__(layer.in_features, layer.out_features)
        self.a = nn.Parameter(torch.zeros(rank, layer.in_features))
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x):
        return super().forward(x) + x @ self.a.T @ self.b.T


def exchanged(model, kind):
    for block in model.model.blocks:
        block.mlp.fc1, block.mlp.fc2 = kind(block.mlp.fc1), kind(block.mlp.fc2)
    return model


def normed(layer):
    return parametrizations.weight_norm(layer)


@pytest.mark.parametrize("kind", [Linear4, Broken4, Sharded, normed])
def test_weights_that_are_packed_sharded_or_computed_change_nothing(kind):
    model = exiting()
    with torch.no_grad():
        out = model(models.images(2))
    right = model.multiply_adds(out)
    assert int(right.sum()) == pytest.approx(by_pytorch(lambda: model(models.images(2))), rel=0.01)
    assert torch.equal(exchanged(model, kind).multiply_adds(out), right)


def test_dynamic_quantisation_changes_nothing():
    model = exiting()
    with torch.no_grad():
        out = model(models.images(2))
    right = model.multiply_adds(out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert type(quantised.model.blocks[0].mlp.fc1) is not nn.Linear
    assert torch.equal(quantised.multiply_adds(out), right)
    gated = tet.wrap_gates(models.timm_vit(depth=3), GATED).eval()
    with torch.no_grad():
        out = gated(models.images(2))
    right = gated.multiply_adds(out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(gated, {nn.Linear}, dtype=torch.qint8)
    assert torch.equal(quantised.multiply_adds(out), right)


@pytest.mark.parametrize("kind", [Adapted, Bare])
def test_adapters_count_beside_the_layers_that_they_are_around(kind):
    model = exiting()
    with torch.no_grad():
        out = model(models.images(2))
    before = model.multiply_adds(out)
    ran = out.tokens_per_block.sum(dim=1)
    more = 2 * 2 * (48 + 192)  # two layers, and two projections each
    found = exchanged(model, kind).multiply_adds(out)  # the question is asked anew
    assert torch.equal(found - before, more * ran)


class Raw(nn.Module):
    """A block of bare parameters."""

    def __init__(self, width, keys=None, rounds=1):
        super().__init__()
        self.qkv = nn.Parameter(0.2 * torch.randn(3 * (keys or width), width))
        self.out = nn.Parameter(0.2 * torch.randn(width, keys or width))
        self.rounds = rounds

    def forward(self, tokens):
        for _ in range(self.rounds):
            q, k, v = functional.linear(tokens, self.qkv)[:, None].chunk(3, dim=-1)
            mixed = functional.scaled_dot_product_attention(q, k, v)[:, 0]
            tokens = tokens + functional.linear(mixed, self.out)
        return tokens


class Own(nn.Module):
    """A network whose patches are embedded as `stem` says."""

    def __init__(self, stem, blocks, width=16):
        super().__init__()
        self.stem, self.blocks, self.width = stem, nn.ModuleList(blocks), width
        self.unused = nn.Conv2d(3, 64, 3)  # a part that is no embedding

    def patches(self, images):
        return self.stem(images).flatten(2).mT


class Host:
    def __init__(self, module):
        self.module, self.blocks, self.width, self.image_shape = module, module.blocks, module.width, (3, 16, 24)

    def embed(self, images):
        return tet.Embedded(self.module.patches(images), 0, (images.shape[2] // 8, images.shape[3] // 8))

    def run(self, index, tokens, _positions):
        return self.blocks[index](tokens)

    def finish(self, tokens):
        return tokens

    def dense(self, images):
        tokens = self.embed(images).tokens
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


class Cut(nn.Module):
    """Patches by a linear layer."""

    def __init__(self, width=16):
        super().__init__()
        self.linear = nn.Linear(3 * 64, width)

    def forward(self, images):
        patches = functional.pixel_unshuffle(images, 8)
        return self.linear(patches.movedim(1, -1)).movedim(-1, 1)


STEMS = {
    "linear": Cut,
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4),
        nn.GELU(),
        nn.Conv2d(8, 16, 3, padding=1, groups=4),
        nn.Conv2d(16, 16, 2, stride=2),
    ),
    "one convolution": lambda: nn.Conv2d(3, 16, 8, stride=8),
}


@pytest.mark.parametrize("stem", list(STEMS))
@pytest.mark.parametrize("blocks", ["bare", "narrow", "twice"])
def test_what_no_layer_explains_is_seen_by_the_counter(stem, blocks):
    torch.manual_seed(0)
    options = {"bare": {}, "narrow": {"keys": 8}, "twice": {"rounds": 2}}[blocks]
    host = Host(Own(STEMS[stem](), [Raw(16, **options) for _ in range(3)]))
    model = tet.wrap(host, schedule.dense(after=(1, 2)), num_classes=5).eval()
    images = torch.randn(2, 3, 16, 24)
    assert sum(counted(model, images)) == by_pytorch(lambda: model(images))


def test_an_exchanged_block_is_counted_anew_whatever_it_is_made_of():
    host, images = Host(Own(Cut(), [Raw(16), Raw(16)])), torch.randn(1, 3, 16, 24)
    model = tet.wrap(host, schedule.dense(after=(1,)), num_classes=5).eval()
    before = counted(model, images)
    host.module.blocks[0], host.module.blocks[1] = Raw(16, rounds=2), Raw(16, rounds=2)
    assert counted(model, images)[0] - before[0] == 2 * (6 * 4 * 16 * 16 + 2 * 6 * 6 * 16)


def test_blocks_that_attend_over_other_channels_than_the_first_are_named():
    host = Host(Own(Cut(), [Raw(16), Raw(16, keys=8)]))
    model = tet.wrap(host, schedule.dense(after=(1,)), num_classes=5).eval()
    with pytest.raises(TokenExitError, match=r"`model.blocks\[1\]` must attend over as many channels as the first"):
        counted(model, torch.randn(1, 3, 16, 24))


class Uncountable(Raw):
    """Does not run on two tokens, as it would to be counted."""

    def forward(self, tokens):
        if tokens.shape[1] < 3:
            raise RuntimeError("too few")
        return super().forward(tokens)


class Steps(Raw):
    """Work that grows by leaps."""

    def forward(self, tokens):
        for _ in range(tokens.shape[1] // 4):
            functional.linear(tokens, self.out)
        return super().forward(tokens)


@pytest.mark.parametrize(("block", "message"), [
    (Uncountable, r"`model.blocks\[1\]` must run by itself, or have all its matrices in layers .*'qkv', 'out'.*too few"),
    (Steps, r"`model.blocks\[1\]` must have work that grows with tokens, and with pairs of them.*2, 4 and 8 tokens"),
])  # fmt: skip
def test_a_block_of_which_nothing_is_known_is_refused_by_name(block, message):
    model = tet.wrap(Host(Own(Cut(), [Raw(16), block(16)])), schedule.dense(after=(1,)), num_classes=5).eval()
    images = torch.randn(1, 3, 16, 24)
    with pytest.raises(TokenExitError, match=message):
        counted(model, images)


def test_heads_and_gates_of_bare_parameters_count():
    class Head(nn.Module):
        def __init__(self, out):
            super().__init__()
            self.weight = nn.Parameter(0.1 * torch.randn(out, 48))

        def forward(self, tokens):
            return functional.linear(tokens, self.weight)

    images = models.images(2)
    vit = models.timm_vit(depth=3, prefix=0)
    model = tet.wrap(vit, schedule.dense(after=(1,)), head=Head(5), exit_heads={1: Head(5)}).eval()
    out = model(images, schedule=Schedule((Exit(1, policies.Budget(0.5)),)))
    plain = tet.wrap(vit, schedule.dense(after=(1,)), head=nn.Linear(48, 5), exit_heads={1: nn.Linear(48, 5)}).eval()
    assert torch.equal(model.multiply_adds(out), plain.multiply_adds(out))
    gated = tet.wrap_gates(vit, GATED, gates={2: Head(2)}, head=Head(5)).eval()
    same = tet.wrap_gates(vit, GATED, gates={2: nn.Linear(48, 2)}, head=nn.Linear(48, 5)).eval()
    out = gated(images)
    assert torch.equal(gated.multiply_adds(out), same.multiply_adds(out))


def test_a_mask_head_that_says_too_little_counts_by_what_it_does():
    model = tet.wrap(models.timm_vit(depth=3), schedule.dense(), num_classes=4, exit_heads=ATM(layers=1)).eval()
    with torch.no_grad():
        out = model(models.images(1))
    right = model.multiply_adds(out)
    model.head._cost = HeadCost(1)
    model.counted.clear()
    assert torch.equal(model.multiply_adds(out), right)


@pytest.mark.parametrize("name", list(FOREIGN))
def test_ordinary_models_count_as_their_weights_say(name):
    model = tet.wrap(FOREIGN[name].make(), schedule.dense(after=(1,)), num_classes=5).eval()
    with torch.no_grad():
        out = model(models.images(1, (32, 32)))
    host, tokens = model.host, int(out.tokens_per_block[0, 0])
    inside = {part for block in host.blocks for part in block.modules()}
    embed = sum(p.weight.numel() for p in host.module.modules() if isinstance(p, nn.Conv2d) and p not in inside)
    blocks = sum(one.numel() for block in host.blocks for one in block.parameters() if one.ndim == 2)
    attention = len(host.blocks) * 2 * tokens * host.width
    heads = sum(one.numel() for one in model.head.parameters() if one.ndim == 2)
    assert model.multiply_adds(out).item() == 16 * (embed + heads) + tokens * (blocks + attention)


def test_a_decoder_of_quantised_layers_counts_as_the_same_of_plain_ones():
    plan = Schedule((), Feature())
    model = tet.wrap_decoder(decoders.DECODERS["EoMT"].make(), plan).eval()
    with torch.no_grad():
        out = model(models.images(1, (32, 32)))
    right = model.multiply_adds(out), model.decoder_multiply_adds()
    layer = model.model.layers[4].mlp
    layer.fc1 = Linear4(layer.fc1)
    model.model.layers[0].mlp.fc1 = Linear4(model.model.layers[0].mlp.fc1)
    assert (model.multiply_adds(out), model.decoder_multiply_adds()) == right


def test_semantic_layers_with_adapters_are_refused_by_name():
    model = tet.wrap_semantic(models.timm_vit(), after=1, until=4)
    right = model.multiply_adds((4, 6), prefix=1)
    model.tokens.first.q = Linear4(model.tokens.first.q)
    assert model.multiply_adds((4, 6), prefix=1) == right
    model.tokens.second.q = Adapted(model.tokens.second.q)
    with pytest.raises(TokenExitError, match=r"`layers.tokens.second` must have the 27648 multiply-adds for a token"):
        model.multiply_adds((4, 6), prefix=1)


def test_what_was_counted_goes_along_with_copies_and_counts_once(monkeypatch):
    model = exiting()
    right = counted(model)
    monkeypatch.setattr("tokenexit_torch._counting.executed", lambda *_: pytest.fail("counted again"))
    assert counted(model) == right
    monkeypatch.undo()
    assert counted(copy.deepcopy(model)) == right
    assert set(model.state_dict()) == set(exiting().state_dict())
