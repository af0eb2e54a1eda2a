import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

import tokenexit_torch as tet
from tests.saved import edit, put, weights_in
from tests.torch import models
from tokenexit import TokenExitError, heads, policies, schedule, semantic
from tokenexit.sealed import BY_HAND

PLAN = schedule.neighbours(radius={2: 1, 4: 0}, threshold=0.4)


@pytest.fixture
def saved(tmp_path):
    tet.save(models.wrapped(models.timm_vit(), PLAN), tmp_path)
    return tmp_path


@torch.no_grad()
def test_what_was_saved_comes_back(tmp_path):
    vit = models.timm_vit()
    model = models.wrapped(vit, PLAN)
    tet.save(model, tmp_path / "new" / "folder")
    loaded = tet.load(vit, tmp_path / "new" / "folder").eval()
    assert loaded.schedule == PLAN
    assert [*loaded.exit_heads] == ["2", "3", "4"]
    images = models.images()
    ours, theirs = loaded(images), model(images)
    torch.testing.assert_close(ours[:3], theirs[:3], rtol=0, atol=0)
    assert ours[3:] == theirs[3:]


@torch.no_grad()
def test_heads_of_ones_own_come_back(tmp_path):
    vit, head = models.timm_vit(), nn.Linear(48, 5)
    model = tet.wrap(vit, PLAN, head=head, exit_heads={2: nn.Linear(48, 5), 4: nn.Linear(48, 5)})
    tet.save(model, tmp_path)
    loaded = tet.load(vit, tmp_path, head=head, exit_heads={2: nn.Linear(48, 5), 4: nn.Linear(48, 5)})
    assert torch.equal(model(models.images()).logits, loaded(models.images()).logits)
    with pytest.raises(TokenExitError, match="`exit_heads` must be given"):
        tet.load(vit, tmp_path, head=head)
    with pytest.raises(TokenExitError, match=r"`exit_heads` must follow the blocks \(2, 4\), got \[2\]"):
        tet.load(vit, tmp_path, head=head, exit_heads={2: nn.Linear(48, 5)})
    with pytest.raises(TokenExitError, match="`head` must be given exactly if"):
        tet.load(vit, tmp_path, exit_heads={2: nn.Linear(48, 5), 4: nn.Linear(48, 5)})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        TokenExitError, match="`folder` must hold the file exits.json or gates.json or semantic.json, got "
    ):
        tet.load(models.timm_vit(), tmp_path)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "`schema` must be 2, got 99"),
        ({"more": 1}, "`manifest` must have exactly the keys"),
        ({"classes": -5}, "`classes` must be a whole number from 1 to 1000000, got -5"),
        ({"after": [2, 2, 4]}, r"`after` must ascend, got \[2, 2, 4\]"),
        ({"after": ["../../x"]}, "`after` must be a list of blocks from 1 to 5"),
        ({"after": [2]}, r"`schedule` must have exits only after blocks with a head, \[2\], got \[4\]"),
        ({"built_head": "yes"}, "`built_head` must be true or false, got 'yes'"),
        (
            {"plan": {"kind": "os.system"}},
            "`kind` must be one of linear, mlp, fcn, neighbourhood, atm, translator, got 'os.system'",
        ),
        ({"plan": {"kind": "mlp", "hidden": "9"}}, "`hidden` must be a whole number from 1 to 1,000,000, got '9'"),
        (
            {"schedule": {"schema": 3, "exits": [{"after": 2}], "carry": {"kind": "prediction"}, "cell": None}},
            r"`exits` must have exactly the keys \['after', 'policy'\]",
        ),
        ({"schedule": {"schema": 1, "exits": []}}, "`schema` must be 3, got 1"),
        (
            {"schedule": {"schema": 3, "exits": [], "carry": {"kind": "os.system"}, "cell": None}},
            "`kind` must be one of prediction, feature, preserved, mask_prediction, translated, got 'os.system'",
        ),
        ({"classes": 10**30}, "`classes` must be a whole number from 1 to 1000000"),
        ({"classes": 10**6}, "`folder` must hold the weights that exits.json describes"),
        (
            {"plan": {"kind": "mlp", "hidden": 10**6}, "width": 48},
            "`folder` must hold the weights that exits.json describes",
        ),
        ({"width": 47}, "`model` must have width 47, as the saved exits, got 48"),
        ({"depth": 12}, "`model` must have depth 12, as the saved exits, got 6"),
        (
            {"plan": {"kind": "mlp", "hidden": 9}},
            r"`folder` must hold the weights that exits.json describes, .*instead of \(9, 48\)",
        ),
    ],
)
def test_a_bad_plan_is_a_clear_error(saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(TokenExitError, match=message):
        tet.load(models.timm_vit(), saved)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00", "[" * 100_000, "9" * 5000])
def test_what_is_no_plan_is_a_clear_error(saved, text):
    (saved / "exits.json").write_text(text)
    with pytest.raises(TokenExitError, match="`folder` must hold a valid exits.json, got .*exits.json"):
        tet.load(models.timm_vit(), saved)


def test_a_policy_nested_too_deeply_is_a_clear_error(saved):
    policy = {"kind": "never"}
    text = (saved / "exits.json").read_text()
    inner = '{"kind": "retaining", "per_class": 1, "policy": ' * 900 + json.dumps(policy) + "}" * 900
    data = json.loads(text)
    data["schedule"] = data["schedule"] | {"exits": [{"after": 2, "policy": "HERE"}]}
    data["checksum"] = BY_HAND
    (saved / "exits.json").write_text(json.dumps(data).replace('"HERE"', inner))
    with pytest.raises(TokenExitError, match="`folder` must hold a valid exits.json"):
        tet.load(models.timm_vit(), saved)


def test_a_pickle_is_not_executed(saved, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    put(saved, pickle.dumps(Evil()))
    with pytest.raises(TokenExitError, match="`folder` must hold valid weights, got "):
        tet.load(models.timm_vit(), saved)
    assert not (tmp_path / "ran").exists()


def test_other_weights_are_named(saved):
    put(saved, to_bytes({"a.weight": torch.zeros(3)}))
    with pytest.raises(TokenExitError, match=r"a.weight: \(3,\) instead of None, .*: None instead of \(48,\)"):
        tet.load(models.timm_vit(), saved)


def test_a_policy_of_ones_own_cannot_be_saved_and_nothing_is_written(tmp_path):
    class Mine(policies.Policy):
        def leaves(self, evidence):
            return evidence.label == 0

    model = models.wrapped(models.timm_vit(), schedule.Schedule((schedule.Exit(2, Mine()),)))
    with pytest.raises(TokenExitError, match="`policy` must be one of"):
        tet.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_threshold_out_of_range_in_a_tensor_cannot_be_saved(tmp_path):
    model = models.wrapped(models.timm_vit(), PLAN)
    model.retune(threshold=torch.tensor(2.0))
    with pytest.raises(TokenExitError, match=r"`threshold` must be in \[0, 1\], got 2.0"):
        tet.save(model, tmp_path)


def test_every_head_plan_is_read_back():
    for plan in (
        heads.Linear(),
        heads.MLP(),
        heads.MLP(hidden=3),
        heads.FCN(hidden=4),
        heads.ATM(2, 3),
        heads.Neighbourhood(5, 2),
    ):
        assert heads.from_dict(json.loads(json.dumps(heads.to_dict(plan)))) == plan


def semantic_model(host, **options) -> tet.SemanticModel:
    own = {} if isinstance(host, nn.Module) else {"heads": 2, "names": {"norm1": "norm1", "qkv": "attention.qkv"}}
    plan = semantic.SemanticPlan(None, (2, 3), None, learned=(2, 2), layer_scale=0.1)
    return tet.wrap_semantic(host, plan, **{"after": 1, "until": 5} | own | options)


@pytest.mark.parametrize("host", [models.timm_vit, models.plain_host], ids=["timm", "plain"])
@pytest.mark.parametrize("until", [5, None])
@torch.no_grad()
def test_semantic_tokens_come_back(tmp_path, host, until):
    vit, images = host(), models.images(2)
    model = semantic_model(vit, until=until)
    for weight in model.layers.parameters():
        weight.normal_(std=0.1)
    tet.save(model, tmp_path / "new" / "folder")
    loaded = tet.load(vit, tmp_path / "new" / "folder")
    assert (loaded.plan, loaded.replaced) == (model.plan, model.replaced)
    assert (loaded.kept, loaded.new, loaded.left) == ({}, (), ())
    assert torch.equal(loaded(images).tokens, model(images).tokens)
    assert loaded.layers is not model.layers
    assert loaded.training == model.training == loaded.tokens.training


def test_norms_that_were_saved_are_as_they_were(tmp_path):
    vit = models.timm_vit()
    for layer in vit.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.eps = 0.25
    model = semantic_model(vit)
    tet.save(model, tmp_path)
    for one in (model, tet.load(vit, tmp_path)):
        assert {norm.eps for norm in one.layers.modules() if isinstance(norm, nn.LayerNorm)} == {0.25}


@pytest.mark.usefixtures("unchecked")
def test_semantic_tokens_of_something_else_are_refused(tmp_path):
    vit = models.timm_vit()
    model = semantic_model(vit)
    with pytest.raises(TokenExitError, match="`folder` must hold the file semantic.json"):
        tet.load(vit, tmp_path, kind="semantic")
    tet.save(model, tmp_path)
    with pytest.raises(TokenExitError, match="`model` must have depth 6, as the saved layers, got 5"):
        tet.load(models.timm_vit(depth=5), tmp_path)
    with pytest.raises(TokenExitError, match="`model` must not be wrapped"):
        tet.load(model, tmp_path)
    plan = json.loads((tmp_path / "semantic.json").read_text())["plan"]
    for changes, message in (
        ({"hidden": 999_999}, "hold the weights that semantic.json describes, got recovery.block.mlp.0"),
        (
            {"hidden": model.tokens.first.hidden, "plan": plan | {"learned": [999, 999]}},
            r"got tokens.learned: \(1, 2, 2, 48\) instead of \(1, 999, 999, 48\)",
        ),
        ({"plan": plan, "after": -1}, "must hold a valid semantic.json, got .*: `after` must be a block from 0"),
    ):
        edit(tmp_path, "semantic", **changes)
        with pytest.raises(TokenExitError, match=message):
            tet.load(vit, tmp_path)


def test_a_threshold_is_edited_knowingly_or_not_at_all(saved):
    file, vit = saved / "exits.json", models.timm_vit()
    text = file.read_text()
    file.write_text(text.replace('"threshold": 0.4', '"threshold": 0.3'))
    with pytest.raises(TokenExitError, match='`checksum` must be .*: "edited by hand" in its place says'):
        tet.load(vit, saved)
    edit(saved)
    assert tet.load(vit, saved).schedule == PLAN.with_threshold(0.3)
    edit(saved, schedule=PLAN.with_threshold(0.3).to_dict() | {"cell": -1})
    with pytest.raises(TokenExitError, match="`cell` must be"):
        tet.load(vit, saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value * torch.nan, "describes, all of them finite, got NaN or infinity in exit_heads.2.0.bias"),
        (lambda value: value / 0, "describes, all of them finite, got NaN or infinity in "),
        (lambda value: value.long(), "in float16, bfloat16, float32, float64, got .* in int64"),
        (lambda value: value > 0, "in float16, bfloat16, float32, float64, got .* in BOOL"),
        (lambda value: value.to(torch.uint8), "in float16, bfloat16, float32, float64, got .* in U8"),
        (lambda value: value.to(torch.complex64), "in float16, bfloat16, float32, float64, got .* in C64"),
        (lambda value: value.to(torch.float8_e4m3fn), "in float16, bfloat16, float32, float64, got .* in F8_E4M3"),
    ],
)
def test_weights_of_another_kind_are_refused(saved, change, message):
    file = weights_in(saved)
    put(saved, to_bytes({name: change(value) for name, value in load_file(file).items()}))
    with pytest.raises(TokenExitError, match=f"`folder` must hold the weights that exits.json .*{message}"):
        tet.load(models.timm_vit(), saved)


def test_weights_of_another_save_are_refused(saved, tmp_path):
    other = models.wrapped(models.timm_vit(), PLAN)
    with torch.no_grad():
        other.exit_heads["2"][1].weight.add_(1)
    tet.save(other, tmp_path / "other")
    theirs = weights_in(tmp_path / "other").read_bytes()
    weights_in(saved).write_bytes(theirs)
    with pytest.raises(TokenExitError, match="hold the weights that exits.json names, .* SHA-256"):
        tet.load(models.timm_vit(), saved)


def test_exits_gates_and_semantic_tokens_lie_side_by_side_and_kind_chooses(saved):
    vit, svit = models.timm_vit(), schedule.svit(after=(2, 3))
    tet.save(tet.wrap_gates(vit, svit), saved)
    tet.save(semantic_model(vit), saved)
    loaded = {kind: tet.load(vit, saved, kind=kind) for kind in ("exits", "gates", "semantic")}
    assert (loaded["exits"].schedule, loaded["gates"].schedule) == (PLAN, svit)
    assert [type(one) for one in loaded.values()] == [tet.ExitingModel, tet.GatedModel, tet.SemanticModel]
    with pytest.raises(TokenExitError, match="`kind` must be given for a folder that .* exits and gates and semantic"):
        tet.load(vit, saved)
    with pytest.raises(
        TokenExitError, match="`taps` must be left out for kind='exits': it is for kind='decoder' or 'gates', got tu"
    ):
        tet.load(vit, saved, kind="exits", taps=(2,))


@pytest.mark.usefixtures("unchecked")
def test_what_is_not_wrapped_and_a_kind_that_is_not_there_are_named(saved):
    with pytest.raises(TokenExitError, match="`model` must be wrapped by `wrap`, .* or `wrap_semantic`, got Linear"):
        tet.save(nn.Linear(2, 2), saved)
    with pytest.raises(
        TokenExitError, match="hold the file gates.json for kind='gates', .*: load it with kind='exits'"
    ):
        tet.load(models.timm_vit(), saved, kind="gates")
    with pytest.raises(
        TokenExitError, match="hold exits of a model with a decoder .*, got a final head .* kind='exits'"
    ):
        tet.load(models.timm_vit(), saved, kind="decoder")
    with pytest.raises(
        TokenExitError, match="`kind` must be one of exits, decoder, gates, semantic, or None, got 'head'"
    ):
        tet.load(models.timm_vit(), saved, kind="head")
    with pytest.raises(TokenExitError, match="`folder` must be a path, got VisionTransformer"):
        tet.load(saved, models.timm_vit())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other, self.out = nn.Linear(48, 48), nn.Linear(48, 48), nn.Linear(48, 5)
        self.other.weight = self.one.weight

    def forward(self, tokens):
        return self.out(self.other(self.one(tokens).relu()))


def test_tied_layers_of_a_head_of_ones_own_come_back(tmp_path):
    vit, head = models.timm_vit(), nn.Linear(48, 5)
    model = tet.wrap(vit, schedule.dense(after=(2,)), head=head, exit_heads={2: Tied()}).eval()
    tet.save(model, tmp_path)
    loaded = tet.load(vit, tmp_path, head=head, exit_heads={2: Tied()}).eval()
    assert loaded.exit_heads["2"].one.weight is loaded.exit_heads["2"].other.weight
    for one, other in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def normed(model):
    nn.utils.parametrizations.weight_norm(model.exit_heads["2"][1])


def compiled(model):
    model.exit_heads["2"] = torch.compile(model.exit_heads["2"], backend="eager")


def quantised(model):
    model.exit_heads["2"] = torch.ao.quantization.quantize_dynamic(model.exit_heads["2"], {nn.Linear}, inplace=True)


def diverged(model):
    model.exit_heads["2"][1].weight.data[0, 0] = torch.nan


def on_meta(model):
    model.exit_heads["2"].to("meta")


@pytest.mark.filterwarnings("ignore")  # of the way in which PyTorch quantises, which it will give up
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (normed, "their plan describes to be saved .*exit_heads.2.1.parametrizations.weight"),
        (compiled, "their plan describes to be saved .*exit_heads.2._orig_mod"),
        (quantised, "be saved, not quantised, and gathered if they are sharded, got .* for exit_heads.2.1"),
        (diverged, "all of them finite, got NaN or infinity in exit_heads.2.1.weight"),
        (on_meta, "plain tensors to be saved.*got .* for exit_heads.2"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(saved, change, message):
    model = models.wrapped(models.timm_vit(), PLAN)
    change(model)
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(TokenExitError, match=f"`model` must have heads .*{message}"):
        tet.save(model, saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_images_that_heads_were_fitted_to_are_kept_with_them(tmp_path):
    vit = models.timm_vit()
    model = models.wrapped(vit, PLAN)
    images = models.images(3)
    tet.fit_exits(model, images, steps=1, progress=iter)
    assert len(model.fitted) == 3
    assert list(model.fitted) == sorted(model.fitted)
    tet.fit_exits(model, [images[:1], models.images(4, seed=9)[3:]], steps=1, progress=iter)
    assert len(model.fitted) == 4
    tet.save(model, tmp_path)
    assert tet.load(vit, tmp_path).fitted == model.fitted
