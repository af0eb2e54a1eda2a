"""Is it worth it for a model: from a bare network and some images to a verdict, a fitted model and a page."""

import json
import warnings

import pytest
import torch
from torch import nn

import tokenexit_torch as tet
from tests.torch import models
from tests.torch.decoders import DECODERS
from tokenexit import TokenExitError, schedule
from tokenexit.assessment import OURS, Assessment
from tokenexit.carries import Translated
from tokenexit.errors import UnfittedWarning
from tokenexit.guarantees.calibrate import Risk
from tokenexit.heads import ATM
from tokenexit_torch.assessing import workflow
from tokenexit_torch.training import fitting

SIZE = (64, 96)
QUICK = {"minutes": 1e-4, "progress": iter}


def vit(**options):
    return models.timm_vit(size=SIZE, **options)


def head(classes=3, width=48):
    torch.manual_seed(5)
    return nn.Linear(width, classes)


def images(count=8):
    return models.pictures(count, SIZE)


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Few steps and rounds: what is fitted, and how fast it is, is not what is tested here."""
    monkeypatch.setattr(workflow, "_LEAST_STEPS", 10)
    monkeypatch.setattr(workflow, "_ROUNDS", 2)


class Map(nn.Module):
    """A decoder of one convolution."""

    def __init__(self, channels, maps=1):
        super().__init__()
        torch.manual_seed(6)
        self.each = nn.ModuleList(nn.Conv2d(48, channels, 3, padding=1) for _ in range(maps))

    def forward(self, given):
        maps = given if isinstance(given, list) else [given]
        found = sum(each(map) for each, map in zip(self.each, maps, strict=True))
        return found[:, 0] if found.shape[1] == 1 else found


def test_a_bare_network_is_wrapped_fitted_assessed_and_set_to_the_plan(tmp_path):
    pytest.importorskip("matplotlib")
    network, given = vit(), images()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = tet.assess(network, given, head=head(), out=tmp_path, at_most=0.3, **QUICK)
    rows = found.assessment.rows
    assert {row.kind for row in rows} == {"dense", *OURS, "truncation", "smaller input"}
    assert found.assessment.images <= 4
    assert (found.assessment.fitted, found.assessment.grid, found.assessment.blocks) == (4, (8, 12), 6)
    assert all(row.speedup is not None for row in rows[:1])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert isinstance(found.model, tet.ExitingModel)
    assert found.model.schedule == (found.assessment.plan or schedule.dense())
    assert not found.model.unfitted(map(int, found.model.exit_heads))
    assert found.model.assessed == found.assessment.options
    assert str(found).startswith(found.assessment.verdict())
    kept = Assessment.from_dict(json.loads((tmp_path / "assessment.json").read_text()))
    assert kept == found.assessment
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page
    assert page.count("data:image/png") == 3
    again = tet.load(network, tmp_path / "exits", kind="exits", head=head())
    assert again.assessed == found.model.assessed
    if again.assessed:
        again.retune(saving=again.assessed[0].saving)
        assert again.schedule == again.assessed[0].plan


def test_losses_and_costs_are_those_of_the_model_and_of_images_that_nothing_was_fitted_to(monkeypatch):
    monkeypatch.setattr(workflow, "_SCALES", (0.75,))
    given = images()
    found = tet.assess(vit(), given, head=head(), batch=4, at_most=0.3, minutes=5.0, progress=iter)
    assert found.assessment.images == 4
    model, run = found.model.eval(), given[::2]
    assert set(model.fitted) == {fitting._files.digest(one) for one in given[1::2]}
    with torch.no_grad():
        whole = model(run, schedule=schedule.dense())
        for row in found.assessment.rows:
            if row.plan is None:
                continue
            out = model(run, schedule=row.plan)
            changed = out.upsample(SIZE).argmax(1) != whole.upsample(SIZE).argmax(1)
            assert row.loss == pytest.approx(float(changed.float().mean()), abs=1e-6)
            cost = model.multiply_adds(out).double().mean() / model.multiply_adds(whole).double().mean()
            assert row.cost == pytest.approx(float(cost), rel=1e-9)
    (small,) = (row for row in found.assessment.rows if row.kind == "smaller input")
    assert small.name == "smaller input, 0.75 of each side"
    assert 0.5 < small.cost < 0.6  # six rows of eight, nine columns of twelve


def test_an_interrupted_assessment_goes_on_without_fitting_again(tmp_path, monkeypatch):
    given = images()

    def stopped(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(workflow, "run_contenders", stopped)
        with pytest.raises(KeyboardInterrupt):
            tet.assess(vit(), given, head=head(), out=tmp_path, **QUICK)
    fitted = {
        name: value.clone() for name, value in tet.load(vit(), tmp_path / "exits", head=head()).state_dict().items()
    }
    monkeypatch.setattr(workflow, "fit_exits", stopped)
    found = tet.assess(vit(), given, head=head(), out=tmp_path, **QUICK)
    assert all(torch.equal(value, fitted[name]) for name, value in found.model.state_dict().items())
    with pytest.raises(TokenExitError, match="`out` must be a new folder, or of the same model, images and options"):
        tet.assess(vit(), images(9), head=head(), out=tmp_path, **QUICK)
    with pytest.raises(TokenExitError, match="`out` must be a new folder"):
        tet.assess(vit(heads=2), given, head=head(), out=tmp_path, **QUICK)


@pytest.mark.parametrize(("channels", "taps"), [(1, None), (3, None), (3, (3, 6))])
def test_under_a_decoder_translators_are_fitted_and_what_it_gives_is_compared(channels, taps):
    decoder = Map(channels, 1 if taps is None else len(taps))
    found = tet.assess(vit(), images(), decoder=decoder, taps=taps, at_most=0.3, **QUICK)
    assert isinstance(found.model, tet.DecodingModel)
    assert found.model.translated_after == tuple(map(int, found.model.exit_heads))
    assert {row.kind for row in found.assessment.rows} == {"dense", *OURS, "truncation", "smaller input"}
    words = "pixels that get another class" if channels > 1 else "change of the output, relative to its spread"
    assert found.assessment.loss == words
    assert all(isinstance(row.plan.carry, Translated) for row in found.assessment.rows if row.plan and row.plan.exits)


@pytest.mark.parametrize("kind", ["DPT, segmentation", "EoMT", "Depth Anything"])
def test_a_model_with_a_decoder_of_its_own_is_taken(kind):
    given = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    classes = DECODERS[kind].classes
    risk = None if classes else Risk("change", lambda out, _: torch.full((len(out.exit_depth),), 0.25))
    found = tet.assess(DECODERS[kind].make(), given, at_most=0.3, risk=risk, **QUICK)
    assert isinstance(found.model, tet.DecodingModel)
    assert found.assessment.loss == ("pixels that get another class" if classes else "change")
    assert classes or found.assessment.rows[1].loss == 0.25
    if not classes:
        with pytest.raises(TokenExitError, match="`risk` must be given for a decoder that does not give one tensor"):
            tet.assess(DECODERS[kind].make(), given, **QUICK)


def test_a_wrapped_model_keeps_its_heads_and_its_plan_which_is_a_contender(monkeypatch):
    plan = schedule.neighbours(radius={2: 1, 4: 0}, threshold=0.5)
    model = models.wrapped(vit(), plan)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(workflow, "fit_exits", lambda *args, **options: pytest.fail("nothing is to be fitted"))
    more = {"mine": schedule.truncated(after=3)}
    found = tet.assess(model, images(), settings=more, **QUICK)
    assert found.model is model
    assert model.schedule == plan
    names = [row.name for row in found.assessment.rows]
    assert {"the model's own plan", "mine"} <= set(names)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.assessed == found.assessment.options


def test_labels_give_mean_iou():
    given = images()
    model = models.wrapped(vit(), schedule.dense(after=(2, 3, 4)))
    labels = torch.randint(0, 3, (8, *SIZE), generator=torch.Generator().manual_seed(1))
    labels[:, :5] = 255
    found = tet.assess(model, given, labels=labels, ignore=255, minutes=5.0, baselines=(), progress=iter)
    with torch.no_grad():
        maps = model(given[::2], schedule=schedule.dense()).upsample(SIZE).argmax(1)[:, 5:]
    truth = labels[::2, 5:]
    each = [((maps == one) & (truth == one)).sum() / ((maps == one) | (truth == one)).sum() for one in range(3)]
    assert found.assessment.dense.quality == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)
    pairs = [(given[:4], labels[:4]), (given[4:], labels[4:])]
    again = tet.assess(model, pairs, ignore=255, batch=4, minutes=5.0, baselines=(), progress=iter)
    assert again.assessment.images == 4  # the same ones, for the others have been fitted to
    assert again.assessment.dense.quality == pytest.approx(found.assessment.dense.quality)


def test_the_compiled_network_is_timed_where_asked(monkeypatch):
    compiled = []

    def stand_in(call, **options):  # the type checker cannot be compiled
        compiled.append(options)
        return call

    monkeypatch.setattr(torch, "compile", stand_in)
    found = tet.assess(vit(), images(), head=head(), baselines=("compiled dense",), **QUICK)
    (row,) = (row for row in found.assessment.rows if row.kind == "compiled dense")
    assert (row.loss, row.cost, compiled) == (0.0, None, [{"dynamic": False}])
    assert row.speedup is not None


def test_where_images_have_one_size_that_is_said(monkeypatch):
    found = tet.assess(models.plain_host(), models.pictures(6), head=head(width=32), **QUICK)
    assert any(row.kind == "smaller input" for row in found.assessment.rows)

    def refused(*args):
        raise TokenExitError("`model` must take others, got none")

    monkeypatch.setattr(workflow, "smaller", refused)
    found = tet.assess(models.plain_host(), models.pictures(6), head=head(width=32), **QUICK)
    assert "A smaller input was not tried: `model` must take others, got none" in found.assessment.notes


def test_one_call_wraps_fits_and_sets_a_target():
    model = tet.speed_up(vit(), images(), head=head(), saving=0.05, **QUICK)
    assert isinstance(model, tet.ExitingModel)
    (option,) = (one for one in model.assessed if one.plan == model.schedule)
    assert option.saving >= 0.05
    with pytest.raises(TokenExitError, match="`saving` must be given, or `changed`, and not both, got None and None"):
        tet.speed_up(vit(), images(), head=head())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": None}, "`head` must be given, or `decoder`: `assess\\(vit, images, head=...\\)`"),
        ({"images": models.pictures(3, SIZE)}, "`images` must be at least 4 .*, and better some dozens, got 3 of 3"),
        ({"at_most": 1}, "`at_most` must lie between 0 and 1"),
        ({"batch": 0}, "`batch` must be a whole number from 1 up, got 0"),
        ({"batch": 5}, "`batch` must be at most 4, got 5"),
        ({"minutes": 0}, "`minutes` must be a number above 0, got 0"),
        ({"baselines": ("dense",)}, "`baselines` must be some of truncation, smaller input, compiled dense"),
        ({"risk": Risk()}, "`risk` must be a loss of your own: Risk\\(words, function\\); labels are `labels`"),
        ({"labels": torch.zeros(3, *SIZE).long()}, "`labels` must be of all 8 images, got 3"),
        ({"images": [models.pictures(4, SIZE), models.pictures(4)]}, "`images` must be of one size"),
        ({"settings": {"mine": schedule.truncated(after=9)}}, "`schedule` must have exits after blocks 1 to 5 only"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    given = {"images": images(), "head": head()} | change
    with pytest.raises(TokenExitError, match=message):
        tet.assess(vit(), given.pop("images"), **QUICK | given)


def test_models_that_cannot_be_assessed_are_refused():
    model = models.wrapped(vit(), schedule.dense(after=(2, 3, 4)))
    with pytest.raises(TokenExitError, match="`head` must be left out for a model that is wrapped, got Linear"):
        tet.assess(model, images(), head=head())
    masks = tet.wrap(vit(), schedule.dtop(after=(2, 4)), num_classes=3, exit_heads=ATM())
    with pytest.raises(TokenExitError, match="`model` must have heads that read each token by itself, got mask heads"):
        tet.assess(masks, images())
    model.fitted = tuple(sorted(fitting._files.digest(one) for one in images()[:5]))
    with pytest.raises(TokenExitError, match="`images` must be at least 4 that nothing was fitted to, .* got 3 of 8"):
        tet.assess(model, images())


def test_a_target_needs_an_assessment_and_stands_alone():
    model = models.wrapped(vit(), schedule.dense(after=(2, 3, 4)))
    with pytest.raises(TokenExitError, match="`saving` must come after an assessment"):
        model.retune(saving=0.4)
    with pytest.raises(TokenExitError, match="`threshold` must be left out beside a target, `saving` or `changed`"):
        model.retune(threshold=0.5, changed=0.1)


def fresh(mode=False):
    return tet.wrap(vit(), schedule.neighbours(radius={2: 1, 4: 0}), num_classes=3).train(mode)


def test_heads_that_nobody_has_fitted_are_named_once():
    model, given = fresh(), images(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfittedWarning)
        model(given, schedule=schedule.dense())
        with pytest.raises(UnfittedWarning, match=r"exit heads after the blocks \[2, 4\] have the random weights"):
            model(given)
        model(given)  # once
        fresh(mode=True)(given)  # a training loop starts from them
    with pytest.warns(UnfittedWarning, match=r"\[4\]"):
        fresh()(given, schedule=schedule.truncated(after=4))
    with pytest.warns(UnfittedWarning, match="fit_exits"):
        tet.StaticModel(fresh(), capacities=1.0)(given)
    merging = tet.wrap(vit(), schedule.merged(alike={1: 0.9}), decoder=Map(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfittedWarning)
        merging.eval()(given)  # nothing is asked


@pytest.mark.parametrize("how", ["fit", "step", "load", "given", "saved"])
def test_heads_that_were_fitted_loaded_or_trained_are_not(how, tmp_path):
    model, given = fresh(), images(2)
    if how == "fit":
        tet.fit_exits(model, given, steps=2, progress=iter)
    elif how == "step":
        model.train()
        optimizer = torch.optim.SGD(model.exit_heads.parameters(), lr=0.1)
        sum(one.sum() for one in model.every_exit(given).values()).backward()
        optimizer.step()
        model.eval()
    elif how == "load":
        model.load_state_dict(fresh().state_dict())
    elif how == "saved":
        tet.save(model, tmp_path)
        model = tet.load(vit(), tmp_path).eval()
    else:
        model = tet.wrap(vit(), model.schedule, head=head(), exit_heads={2: head(), 4: head()}).eval()
    assert model.unfitted((2, 4)) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfittedWarning)
        model(given)
