import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tokenexit_torch as tet
from tests.torch import models
from tokenexit import TokenExitError, heads, policies, schedule, semantic

PLAN = schedule.neighbours(radius={2: 1, 4: 0}, threshold=0.4)


@pytest.fixture
def saved(tmp_path):
    tet.save(models.wrapped(models.timm_vit(), PLAN), tmp_path)
    return tmp_path


def edit(folder, **changes):
    data = json.loads((folder / "exits.json").read_text())
    (folder / "exits.json").write_text(json.dumps(data | changes))


@torch.no_grad()
def test_what_was_saved_comes_back(tmp_path):
    vit = models.timm_vit()
    model = models.wrapped(vit, PLAN)
    tet.save(model, tmp_path / "new" / "folder")
    loaded = tet.load(tmp_path / "new" / "folder", vit).eval()
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
    loaded = tet.load(tmp_path, vit, head=head, exit_heads={2: nn.Linear(48, 5), 4: nn.Linear(48, 5)})
    assert torch.equal(model(models.images()).logits, loaded(models.images()).logits)
    with pytest.raises(TokenExitError, match="`exit_heads` must be given"):
        tet.load(tmp_path, vit, head=head)
    with pytest.raises(TokenExitError, match=r"`exit_heads` must follow the blocks \(2, 4\), got \[2\]"):
        tet.load(tmp_path, vit, head=head, exit_heads={2: nn.Linear(48, 5)})
    with pytest.raises(TokenExitError, match="`head` must be given exactly if"):
        tet.load(tmp_path, vit, exit_heads={2: nn.Linear(48, 5), 4: nn.Linear(48, 5)})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(TokenExitError, match="`folder` must hold the files exits.json and exits.safetensors, got "):
        tet.load(tmp_path, models.timm_vit())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "`schema` must be 1, got 99"),
        ({"more": 1}, "`text` must be an object with the keys"),
        ({"classes": -5}, "`classes` must be a whole number from 1 to 1000000, got -5"),
        ({"after": [2, 2, 4]}, r"`after` must ascend, got \[2, 2, 4\]"),
        ({"after": ["../../x"]}, "`after` must be a list of blocks from 1 to 5"),
        ({"after": [2]}, r"`schedule` must have exits only after blocks with a head, \[2\], got \[4\]"),
        ({"built_head": "yes"}, "`built_head` must be true or false, got 'yes'"),
        (
            {"plan": {"kind": "os.system"}},
            "`kind` must be one of linear, mlp, fcn, neighbourhood, atm, got 'os.system'",
        ),
        ({"plan": {"kind": "mlp", "hidden": "9"}}, "`hidden` must be a whole number from 1 to 1,000,000, got '9'"),
        (
            {"schedule": {"schema": 3, "exits": [{"after": 2}], "carry": {"kind": "prediction"}, "cell": None}},
            r"`exits` must have exactly the keys \['after', 'policy'\]",
        ),
        ({"schedule": {"schema": 1, "exits": []}}, "`schema` must be 3, got 1"),
        (
            {"schedule": {"schema": 3, "exits": [], "carry": {"kind": "os.system"}, "cell": None}},
            "`kind` must be one of prediction, feature, preserved, mask_prediction, got 'os.system'",
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
        tet.load(saved, models.timm_vit())


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00", "[" * 100_000, "9" * 5000])
def test_what_is_no_plan_is_a_clear_error(saved, text):
    (saved / "exits.json").write_text(text)
    with pytest.raises(TokenExitError, match="`folder` must hold a valid exits.json, got .*exits.json"):
        tet.load(saved, models.timm_vit())


def test_a_policy_nested_too_deeply_is_a_clear_error(saved):
    policy = {"kind": "never"}
    text = (saved / "exits.json").read_text()
    inner = '{"kind": "retaining", "per_class": 1, "policy": ' * 900 + json.dumps(policy) + "}" * 900
    data = json.loads(text)
    data["schedule"] = data["schedule"] | {"exits": [{"after": 2, "policy": "HERE"}]}
    (saved / "exits.json").write_text(json.dumps(data).replace('"HERE"', inner))
    with pytest.raises(TokenExitError, match="`folder` must hold a valid exits.json"):
        tet.load(saved, models.timm_vit())


def test_a_pickle_is_not_executed(saved, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (saved / "exits.safetensors").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(TokenExitError, match="`folder` must hold a valid exits.safetensors"):
        tet.load(saved, models.timm_vit())
    assert not (tmp_path / "ran").exists()


def test_other_weights_are_named(saved):
    save_file({"a.weight": torch.zeros(3)}, saved / "exits.safetensors")
    with pytest.raises(TokenExitError, match=r"a.weight: \(3,\) instead of None, .*: None instead of \(48,\)"):
        tet.load(saved, models.timm_vit())


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
    tet.save_semantic(model, tmp_path / "new" / "folder")
    loaded = tet.load_semantic(tmp_path / "new" / "folder", vit)
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
    tet.save_semantic(model, tmp_path)
    for one in (model, tet.load_semantic(tmp_path, vit)):
        assert {norm.eps for norm in one.layers.modules() if isinstance(norm, nn.LayerNorm)} == {0.25}


@pytest.mark.usefixtures("unchecked")
def test_semantic_tokens_of_something_else_are_refused(tmp_path):
    vit = models.timm_vit()
    with pytest.raises(TokenExitError, match="`model` must be on semantic tokens, as `wrap_semantic` gives, got "):
        tet.save_semantic(models.wrapped(vit, PLAN), tmp_path)
    model = semantic_model(vit)
    with pytest.raises(TokenExitError, match="must hold the files semantic.json and semantic.safetensors"):
        tet.load_semantic(tmp_path, vit)
    tet.save_semantic(model, tmp_path)
    with pytest.raises(TokenExitError, match="`model` must have depth 6, as the saved layers, got 5"):
        tet.load_semantic(tmp_path, models.timm_vit(depth=5))
    with pytest.raises(TokenExitError, match="`model` must not be wrapped"):
        tet.load_semantic(tmp_path, model)
    file = tmp_path / "semantic.json"
    data = json.loads(file.read_text())
    huge = json.dumps(data | {"plan": data["plan"] | {"learned": [99999, 99999]}})
    for text, message in (
        (
            json.dumps(data | {"hidden": 999_999}),
            "hold the weights that semantic.json describes, got recovery.block.mlp.0",
        ),
        (huge, r"got tokens.learned: \(1, 2, 2, 48\) instead of \(1, 99999, 99999, 48\)"),
        (json.dumps(data | {"after": -1}), "must hold a valid semantic.json, got .*: `after` must be a block from 0"),
    ):
        file.write_text(text)
        with pytest.raises(TokenExitError, match=message):
            tet.load_semantic(tmp_path, vit)
