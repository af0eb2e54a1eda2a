import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

import tokenexit_torch as tet
from tests.torch import models
from tokenexit import TokenExitError, heads, schedule

PLAN = schedule.neighbours(radius={2: 1, 4: 0})


def test_wrapping_shares_the_weights_and_changes_nothing_in_the_model():
    vit = models.timm_vit().train()
    vit.blocks[0].eval()
    before, modes = copy.deepcopy(vit.state_dict()), [part.training for part in vit.modules()]
    names = [name for name, _ in vit.named_modules()]
    head = nn.Linear(48, 5).eval()
    model = tet.wrap(vit, PLAN, head=head, exit_heads={2: nn.Linear(48, 5), 4: nn.Linear(48, 5)})
    assert model.model is vit
    assert model.head is head
    assert {id(p) for p in vit.parameters()} <= {id(p) for p in model.parameters()}
    after = vit.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [part.training for part in vit.modules()] == modes
    assert [name for name, _ in vit.named_modules()] == names
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in vit.modules())
    assert model.training
    assert not head.training


def test_the_default_schedule_is_neighbours():
    for depth, after in ((12, ["3", "6", "8"]), (4, ["1", "2", "3"])):
        vit = models.timm_vit(depth=depth)
        model = tet.wrap(vit, num_classes=5)
        assert model.schedule == schedule.neighbours(depth=depth)
        assert [*model.exit_heads] == after
    assert tet.wrap(models.timm_vit(depth=4), decoder=nn.Identity()).schedule == schedule.merged(depth=4)


def test_the_self_check_leaves_the_random_state_alone():
    vit, given = models.timm_vit(), {2: nn.Linear(48, 5), 4: nn.Linear(48, 5)}
    head, random = nn.Linear(48, 5), torch.get_rng_state()
    tet.wrap(vit, PLAN, head=head, exit_heads=given)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("plan", [heads.Linear(), heads.MLP(), heads.MLP(hidden=7), heads.FCN(hidden=9)], ids=str)
def test_head_plans_are_built_for_every_exit(plan):
    model = tet.wrap(models.timm_vit(), PLAN, num_classes=5, exit_heads=plan).eval()
    assert list(model.exit_heads) == ["2", "4"]
    assert model(models.images(2)).logits.shape == (2, 5, 4, 6)
    for head in [*model.exit_heads.values(), model.head]:
        assert head(torch.zeros(2, 3, 48)).shape == (2, 3, 5)


class TwoLooks(nn.Module):
    """A block of one's own whose attention does, or does not, go through the function that is taken over."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, x):
        q = x[:, None]
        for _ in range(self.calls):
            q = functional.scaled_dot_product_attention(q, x[:, None], x[:, None])
        return x + (q[:, 0] if self.calls else x.softmax(dim=1))


class Crooked:
    """A host that can be wrong in one way at a time."""

    def __init__(self, *, calls=1, prefix=1, width=8, grid=(2, 3), shift=0.0):
        self.module = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), TwoLooks(calls))
        self.blocks = [self.module[1]]
        self.width, self.image_shape = width, (3, 16, 24)
        self.prefix, self.grid, self.shift = prefix, grid, shift

    def embed(self, images):
        tokens = self.module[0](images).flatten(2).transpose(1, 2)
        return tet.Embedded(functional.pad(tokens, (0, 0, 1, 0)), prefix=self.prefix, grid=self.grid)

    def run(self, index, tokens, positions):
        return self.blocks[index](tokens)

    def finish(self, tokens):
        return tokens

    def dense(self, images):
        return self.blocks[0](self.embed(images).tokens) + self.shift


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"calls": 0}, r"`model.blocks\[0\]` must call .*scaled_dot_product_attention, .*, got no call"),
        ({"prefix": 2}, "`model.embed` must give 2 prefix tokens and a grid of 2 x 3, got 7 tokens"),
        ({"grid": (3, 3)}, "grid of 3 x 3, got 7 tokens"),
        ({"width": 9}, "`model.width` must be the 8 channels of its tokens, got 9"),
        (
            {"shift": 0.1},
            "`model` must give the same tokens packed as in its own dense forward, got a difference of 0.",
        ),
    ],
)
def test_the_self_check_finds_what_is_wrong_with_a_host(wrong, message):
    with pytest.raises(TokenExitError, match=message):
        tet.wrap(Crooked(**wrong), schedule.dense(), num_classes=2)


class Misdeclared:
    """A ViT with a class token and 4 x 6 patches, under another name for its slots."""

    def __init__(self, prefix, grid, order="row by row"):
        self.model = tet.hosts.TimmViT(models.timm_vit())
        self.module, self.blocks, self.width = self.model.module, self.model.blocks, self.model.width
        self.image_shape, self.run, self.finish = self.model.image_shape, self.model.run, self.model.finish
        self.prefix, self.grid = prefix, grid
        by_column = [0, *(1 + torch.arange(24).reshape(4, 6).T.flatten()).tolist()]
        self.order = list(range(25)) if order == "row by row" else by_column

    def embed(self, images):
        return tet.Embedded(self.model.embed(images).tokens[:, self.order], self.prefix, self.grid)

    def dense(self, images):
        return self.model.dense(images)[:, self.order]


@pytest.mark.parametrize(
    ("declared", "slot"),
    [((0, (5, 5)), 6), ((1, (6, 4)), 6), ((1, (3, 8)), 6), ((3, (2, 11)), 6), ((1, (4, 6), "column by column"), 21)],
)
def test_the_self_check_finds_patches_that_are_not_where_they_are_declared(declared, slot):
    prefix, (height, width), *_ = declared
    message = f"`model.embed` must give {prefix} prefix tokens, then a grid of {height} x {width}, row by row, got token {slot}"
    with pytest.raises(TokenExitError, match=message):
        tet.wrap(Misdeclared(*declared), PLAN, num_classes=5)
    assert tet.wrap(Misdeclared(1, (4, 6)), PLAN, num_classes=5).depth == 6


@pytest.mark.parametrize("calls", [1, 2])
def test_the_self_check_accepts_the_same_host_put_right(calls):
    model = tet.wrap(Crooked(calls=calls), schedule.dense(), num_classes=2)
    assert model(torch.zeros(1, 3, 16, 24)).logits.shape == (1, 2, 2, 3)


class Leaking(nn.Module):
    """A block that also adds the mean over all its tokens: in a packed row, over other images' tokens."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x) + x.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("loud", [1.0, 500.0])
def test_tokens_that_mix_outside_of_attention_are_found_also_beside_a_loud_channel(loud):
    host = models.plain_host()
    with torch.no_grad():
        host.module.patches.bias[0] += loud
    host.blocks[2] = Leaking(host.blocks[2])
    with pytest.raises(TokenExitError, match="`model` must give the same tokens packed"):
        tet.wrap(host, PLAN, num_classes=5)


def test_a_block_that_counts_its_tokens_is_found():
    class Counting(Leaking):
        def forward(self, x):
            return self.block(x) + (x if x.shape[1] % 25 else 0.0)

    vit = models.timm_vit()
    vit.blocks[1] = Counting(vit.blocks[1])
    with pytest.raises(TokenExitError, match="`model` must give the same tokens packed"):
        tet.wrap(vit, PLAN, num_classes=5)


def test_attention_that_is_not_fused_is_found():
    vit = models.timm_vit()
    vit.blocks[3].attn.fused_attn = False
    with pytest.raises(TokenExitError, match=r"`model.blocks\[3\]` must call .*, got no call"):
        tet.wrap(vit, PLAN, num_classes=5)


class Mixing(nn.Module):
    def forward(self, x):
        return (x - x.mean(dim=0))[:, :5]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: tet.wrap(nn.Linear(3, 3), PLAN, num_classes=5), "`model` must be a timm .*got torch.nn.*Linear"),
        (lambda v: tet.wrap("vit", PLAN, num_classes=5), "`model` must be a timm .*got builtins.str"),
        (lambda v: tet.wrap(tet.wrap(v, PLAN, num_classes=5), PLAN, num_classes=5), "must not be wrapped already"),
        (lambda v: tet.wrap(v, PLAN), "`head` must be given, or `num_classes`.*got head=None and num_classes=None"),
        (lambda v: tet.wrap(v, PLAN, head=nn.Linear(48, 5), num_classes=5), "head=Linear and num_classes=5"),
        (lambda v: tet.wrap(v, PLAN, num_classes=0), "`num_classes` must be a whole number from 2 to 1000000, got 0"),
        (lambda v: tet.wrap(v, "dtop", num_classes=5), "`schedule` must be a tokenexit.schedule.Schedule, got 'dtop'"),
        (
            lambda v: tet.wrap(v, schedule.dtop(after=(6,)), num_classes=5),
            r"blocks 1 to 5 only, for 6 blocks, got \[6\]",
        ),
        (lambda v: tet.wrap(v, PLAN, head=nn.Linear(47, 5)), r"`head` must take tokens of shape \(tokens, 48\)"),
        (lambda v: tet.wrap(v, PLAN, head=Mixing()), "`head` must treat each token by itself"),
        (lambda v: tet.wrap(v, PLAN, head=nn.Flatten(0)), r"`head` must turn tokens .* got .*144"),
        (
            lambda v: tet.wrap(v, PLAN, head=nn.Linear(48, 5), exit_heads={2: nn.Linear(48, 4), 4: nn.Linear(48, 5)}),
            r"`exit_heads\[2\]` must give 5 classes, as the final head, got 4",
        ),
        (
            lambda v: tet.wrap(v, PLAN, head=nn.Linear(48, 5), exit_heads={2: nn.Linear(48, 5)}),
            r"exit head, \[2\], got \[4\]",
        ),
        (
            lambda v: tet.wrap(v, PLAN, head=nn.Linear(48, 5), exit_heads={2: nn.Linear(48, 5), 9: nn.Linear(48, 5)}),
            r"`exit_heads` must have blocks from 1 to 5 as keys, for 6 blocks, got \[2, 9\]",
        ),
        (
            lambda v: tet.wrap(v, PLAN, num_classes=5, exit_heads={"2": nn.Linear(48, 5)}),
            r"`exit_heads` .* got \['2'\]",
        ),
        (
            lambda v: tet.wrap(v, PLAN, num_classes=5, exit_heads={2: "x"}),
            r"`exit_heads\[2\]` must be a torch.nn.Module",
        ),
        (lambda v: tet.wrap(v, PLAN, num_classes=5, exit_heads="mlp"), "`exit_heads` must be a plan .* got 'mlp'"),
        (
            lambda v: tet.wrap(v, PLAN, num_classes=True),
            "`num_classes` must be a whole number from 2 to 1000000, got True",
        ),
        (lambda v: tet.wrap(v, PLAN, head=len), "`head` must be a torch.nn.Module, got <built-in function len>"),
        (
            lambda v: tet.wrap(v, PLAN, head=(h := nn.Linear(48, 5)), exit_heads={2: h, 4: nn.Linear(48, 5)}),
            r"`exit_heads\[2\]` must have parameters of its own, got some that it shares with head",
        ),
        (
            lambda v: tet.wrap(models.timm_vit(patch_drop_rate=0.5), PLAN, num_classes=5),
            "`model` must keep all its patches, got one with patch_drop_rate > 0",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(TokenExitError, match=message):
        make(models.timm_vit())


def test_another_vision_transformer_of_timm_is_refused_by_name():
    swin = models.import_timm().create_model(
        "swin_tiny_patch4_window7_224", img_size=224, num_classes=0, depths=(1, 1, 1, 1)
    )
    with pytest.raises(TokenExitError, match=r"got timm\.models\.swin_transformer\.SwinTransformer"):
        tet.wrap(swin, PLAN, num_classes=5)


class First(nn.Module):
    """Hands the first channels out."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, tokens):
        return tokens[..., : self.channels]


ONE = r"\(the softmax of one is always 1, .*use two logits\)"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_classes": 1}, f"`num_classes` must be a whole number from 2 to 1000000 {ONE}, got 1"),
        ({"num_classes": 0}, "`num_classes` must be a whole number from 2 to 1000000, got 0"),
        ({"num_classes": 10**9}, "`num_classes` must be a whole number from 2 to 1000000, got 1000000000"),
        ({"head": nn.Linear(48, 1)}, f"`head` must give at least 2 classes {ONE}, got 1"),
        ({"head": First(0)}, "`head` must give at least 2 classes, got 0"),
        ({"num_classes": 2, "exit_heads": {2: nn.Linear(48, 1)}}, "must give 2 classes, as the final head, got 1"),
        ({"head": nn.Conv2d(48, 5, 3)}, r"`head` must .*convolves a map is a decoder: `wrap\(vit, decoder=head\)`"),
    ],
)
def test_class_counts_that_leave_no_doubt_or_no_room(given, message):
    with pytest.raises(TokenExitError, match=message):
        tet.wrap(models.timm_vit(), schedule.dense(after=(2,)), **given)


def test_mask_heads_may_have_one_class_and_gated_models_one_logit():
    masks = tet.wrap(models.timm_vit(), schedule.dense(after=(2,)), num_classes=1, exit_heads=heads.ATM(layers=1))
    assert masks.eval()(models.images(1), schedule=schedule.dtop(after=(2,), threshold=0.5)).logits.shape[1] == 1
    gates = tet.wrap_gates(models.timm_vit(), schedule.svit(after=(2,)), head=nn.Linear(48, 1))
    assert gates.eval()(models.images(1)).logits.shape[1] == 1


class Partial:
    """Some of what a host must have."""

    def __init__(self, module):
        self.module, self.blocks = module, []

    def embed(self, images):
        return images


class Whole(nn.Module):
    """A host that is a module as well."""


def module_of_a_host():
    made, host = Whole(), Crooked()
    for name in ("width", "image_shape", "embed", "run", "finish", "dense", "module", "blocks"):
        setattr(made, name, getattr(host, name))
    return made


def derived():
    model = models.timm_vit()
    model.__class__ = type("Derived", (type(model),), {})
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Partial(nn.Linear(2, 2)),
            r"follows Host \(docs/howto/model.md\), got .*Partial, which lacks width, image_shape, run, finish, dense",
        ),
        (lambda: Crooked, "got builtins.type, the class Crooked: give an instance of it"),
        (
            lambda: nn.Linear(2, 2),
            "got .*Linear: if it is a vision transformer, write a Host for it, some thirty lines",
        ),
        (module_of_a_host, "got .*Whole, a torch.nn.Module: let the host be a plain object that holds the network as"),
        (derived, "got .*Derived, which derives from timm.*VisionTransformer and may run otherwise: load its weights"),
        (lambda: wrong_host(width="48"), "`model.width` must be a whole number from 1 up, got '48'"),
        (lambda: wrong_host(image_shape=(16, 24)), r"`model.image_shape` must be .*height, width\), .*got \(16, 24\)"),
        (lambda: wrong_host(blocks=[]), "`model.blocks` must be at least one block, got none"),
        (
            lambda: wrong_host(run=lambda index, tokens: tokens),
            r"`model.run` must take \(index, tokens, positions\), got \(index, tokens\)",
        ),
        (
            lambda: wrong_host(embed=lambda images: tet.Embedded(images, 0, (2, 3))),
            r"`model.embed` must give tokens of shape \(2, slots, width\), got \(2, 3, 16, 24\)",
        ),
        (
            lambda: wrong_host(embed=lambda images: tet.Embedded([images], 0, (2, 3))),
            r"`model.embed` must give tokens of shape \(2, slots, width\), got list",
        ),
        (
            lambda: wrong_host(embed=lambda images: tet.Embedded(torch.zeros(2, 6, 4), 0, (6,))),
            r"`model.embed` must give a count of prefix tokens, and height and width .*, got prefix=0, grid=\(6,\)",
        ),
        (
            lambda: wrong_host(dense=lambda images: (images,)),
            r"`model.dense` must give tokens of shape \(1, .*\), got tuple",
        ),
        (
            lambda: wrong_host(finish=lambda tokens: (tokens,)),
            r"`model.finish` must give tokens of shape \(1, .*\), got tuple",
        ),
        (lambda: wrong_host(module=len), "`model.module` must be a torch.nn.Module, got builtins.builtin_function"),
        (lambda: wrong_host(module=nn.Identity()), "`model.module` must have parameters, got none"),
        (lambda: wrong_host(blocks=[len]), r"`model.blocks\[0\]` must be a torch.nn.Module, got builtins.builtin_f"),
        (
            lambda: wrong_host(embed=lambda images: images),
            r"`model.embed` must give an Embedded: .*Embedded\(tokens, prefix=.*, grid=.*, got torch.Tensor",
        ),
        (
            lambda: models.timm_vit().to("meta"),
            "`model` must have its weights on a device: .*, got .* on meta, as `cls_token",
        ),
        (
            lambda: torch.ao.quantization.quantize_dynamic(models.timm_vit(), {nn.Linear}),
            "`model` must have no dynamically quantised layers: .*images depend on each other .*, got `blocks.0.attn.qkv`",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_models_and_hosts_that_cannot_be_wrapped_are_told_why(make, message):
    with pytest.raises(TokenExitError, match=message):
        tet.wrap(make(), schedule.dense(), num_classes=5)


def wrong_host(**wrong):
    host = Crooked()
    vars(host).update(wrong)
    return host


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_layers_that_are_quantised_by_the_batch_later_are_noticed_where_images_meet():
    model = models.wrapped(models.timm_vit, schedule.paumer(keep={2: 0.5}), after=(2,))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(
        TokenExitError, match="`model` must have no dynamically quantised layers: .*quantized::linear_dyn"
    ):
        quantised(models.images())


@pytest.mark.parametrize("device", ["meta"])
def test_the_default_device_is_not_that_of_the_model(device):
    vit, plan, images = models.timm_vit(), schedule.paumer(keep={2: 0.5}), models.images()
    gates = schedule.svit(after=(2,))
    with torch.device(device), torch.no_grad():
        model = tet.wrap(vit, plan, num_classes=5).eval()
        runs = [
            model,
            tet.StaticModel(model, capacities=0.7),
            tet.wrap_gates(vit, gates, head=nn.Linear(48, 5, device="cpu")),
        ]
        for run in runs:
            assert run(images).logits.isfinite().all()
        assert model.mixed([*images])[0].logits.isfinite().all()
        assert tet.wrap_semantic(vit, after=1, until=5)(images).tokens.isfinite().all()
    torch.manual_seed(0)
    one = tet.wrap(vit, plan, num_classes=5)
    torch.manual_seed(0)
    with torch.device(device):
        other = tet.wrap(vit, plan, num_classes=5)
    assert torch.equal(one.head[1].weight, other.head[1].weight)


def test_an_error_that_is_not_about_the_size_is_not_called_one():
    host = Crooked()
    model = tet.wrap(host, schedule.dense(), num_classes=2)

    def embed(images):
        raise ValueError("no licence")

    host.embed = embed
    with pytest.raises(ValueError, match="^no licence$"):
        model(torch.zeros(1, 3, 16, 24))

    def refuse(images):
        raise TokenExitError("`me` must be asked otherwise, got this")

    host.embed = refuse
    with pytest.raises(TokenExitError, match="^`me` must be asked otherwise, got this$"):
        model(torch.zeros(1, 3, 16, 24))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 32, 48).to_sparse(), "`images` must be dense, got torch.sparse_coo"),
        (torch.zeros(1, 3, 32, 48, device="meta"), "`images` must be on the device of the model, cpu, got meta"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_images_that_hold_no_rows_of_numbers(images, message):
    model = tet.wrap(models.timm_vit(), schedule.dense(after=(2,)), num_classes=5)
    with pytest.raises(TokenExitError, match=message):
        model(images)


def test_weights_that_are_offloaded_are_named():
    model = tet.wrap(models.timm_vit(), schedule.dense(after=(2,)), num_classes=5)
    model.model.to("meta")
    for device in ("cpu", "meta"):
        with pytest.raises(
            TokenExitError, match="`model` must have its weights on a device: offloading .*, got .* on meta"
        ):
            model(models.images(1).to(device))


@pytest.mark.usefixtures("unchecked")
def test_heads_that_are_not_loaded_or_in_another_dtype_are_named():
    vit, gates = models.timm_vit(), schedule.svit(after=(2,))
    away = nn.Linear(48, 5, device="meta")
    for argument, wrap in {
        "head": lambda: tet.wrap(vit, head=away),
        r"exit_heads\[2\]": lambda: tet.wrap(vit, schedule.dense(), num_classes=5, exit_heads={2: away}),
        r"gates\[2\]": lambda: tet.wrap_gates(vit, gates, gates={2: away}),
        "decoder": lambda: tet.wrap(vit, decoder=away),
    }.items():
        with pytest.raises(TokenExitError, match=f"`{argument}` must have its weights on a device: .*got 2 on meta"):
            wrap()
    message = (
        r"`head` must take tokens of shape \(tokens, 48\), on cpu in torch.float32 \(`.to\('cpu', torch.float32\)`\)"
    )
    with pytest.raises(TokenExitError, match=message):
        tet.wrap(vit, head=nn.Linear(48, 5).double())


class Fixed(Crooked):
    """A host of images of one size."""

    def __init__(self):
        super().__init__()
        self.own, self.error = self.embed, RuntimeError("the size of a tensor must match the size of another")
        self.embed = self.of_one_size

    def of_one_size(self, images):
        if images.shape[1:] != self.image_shape:
            raise self.error
        return self.own(images)


def test_images_that_a_host_of_ones_own_does_not_take_are_named_and_memory_is_not_a_size():
    host = Fixed()
    wide = torch.zeros(1, host.image_shape[0], host.image_shape[1], 40)
    model = tet.wrap(host, schedule.dense(), num_classes=2)
    runs = [model, model.every_exit]
    own = "{} x {}".format(*host.image_shape[1:])
    for run, error in itertools.product(runs, (host.error, IndexError("out of range"), AssertionError("no"))):
        host.error = error
        with pytest.raises(
            TokenExitError, match=f"`images` must have a size .*, as {own}: .*, got .*40.*: {error}"
        ) as caught:
            run(wide)
        assert caught.value.__cause__ is error
    host.error = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError, match="^no memory$"):
        runs[0](wide)


def test_a_patch_embedding_inside_of_an_adapter():
    class Adapted(nn.Module):  # as LoRA of peft has it
        def __init__(self, conv):
            super().__init__()
            self.base_layer = conv

        @property
        def weight(self):
            return self.base_layer.weight

        def forward(self, images):
            return self.base_layer(images)

    vit = models.timm_vit()
    vit.patch_embed.proj = Adapted(vit.patch_embed.proj)
    assert tet.wrap(vit, schedule.dense(after=(2,)), num_classes=5)(models.images(1)).logits.shape == (1, 5, 4, 6)
