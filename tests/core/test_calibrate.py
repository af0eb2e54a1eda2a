"""The calibration of a model that knows no framework: settings run in turn, resumed, and refused where they must be."""

import hashlib
import shutil
from dataclasses import replace
from functools import partial

import array_api_strict
import numpy as np
import pytest

from tests.core.files import Files
from tokenexit import TokenExitError, merging, policies, schedule
from tokenexit.carries import Feature
from tokenexit.guarantees import certificate, drift, ladders, risks
from tokenexit.guarantees.calibrate import AdaptedModel, Level, Outcome, Risk, calibrate, default_settings
from tokenexit.guarantees.calibration import certify
from tokenexit.guarantees.certificate import Fingerprints
from tokenexit.policies import BatchBudget, ConfidenceAbove, EntropyBelow, Evidence
from tokenexit.schedule import Exit, Merge, Schedule

GRID, SIZE, CLASSES, DEPTH = (4, 6), (8, 12), 4, 3
PATCHES = GRID[0] * GRID[1]
PLAN = schedule.neighbours(radius={1: 1, 2: 0}, threshold=0.9, per_class=1)
SETTINGS = (
    *ladders.by_threshold(PLAN, thresholds=(0.99, 0.7, 0.0)),
    schedule.truncated(after=2),
    schedule.truncated(after=1),
)
CHAINS = (range(3), (3, 4))
LEVEL = Level(at_most=0.3)
RISK = Risk("disagreement")
WORDS = "drawn numbers, as they are"
ARRAYS = ("label_maps", "scores", "exit_depth", "multiply_adds", "tokens_per_block")
STEP, NOISE = 0.8, 0.7
WEIGHTS = np.random.default_rng(0).normal(size=(DEPTH, CLASSES, CLASSES))


def drawn(count=24, seed=1, size=SIZE):
    """Images whose patches are of four colours, and noise."""
    draw = np.random.default_rng(seed)
    colour = np.eye(CLASSES)[draw.integers(0, CLASSES, (count, size[0] // 2, size[1] // 2))]
    image = colour.repeat(2, axis=1).repeat(2, axis=2) + draw.normal(0, NOISE, (count, *size, CLASSES))
    return np.moveaxis(image, -1, 1)


IMAGES = drawn()


class Toy:
    """A network of a few matrices: means of patches, blocks that turn them a little, and a head after each.

    What leaves is no longer seen by the mean of those that run.
    """

    def __init__(self, weights=WEIGHTS):
        self.weights, self.calls = weights, 0

    def __call__(self, images, plan, /, *, size):
        self.calls += 1
        count = len(images)
        state = 3 * images.reshape(count, CLASSES, GRID[0], 2, GRID[1], 2).mean(axis=(3, 5))
        state = np.moveaxis(state.reshape(count, CLASSES, PATCHES), 1, 2)
        running, work, ran = np.ones((count, PATCHES), bool), np.zeros(count, int), []
        logits, depth = np.zeros_like(state), np.zeros((count, PATCHES), int)
        exits = {exit.after: exit.policy for exit in plan.active}
        for block in range(1, DEPTH + 1):
            shown = running[..., None]
            around = (state * shown).sum(axis=1, keepdims=True) / np.maximum(shown.sum(axis=1, keepdims=True), 1)
            state = state + STEP * np.tanh((state + around) @ self.weights[block - 1])
            work += 100 * running.sum(axis=1)
            ran.append(running.sum(axis=1))
            leave = running.copy()
            if block < DEPTH:
                leave[running] = self.leaving(exits[block], state, running, logits, depth) if block in exits else False
            logits, depth = np.where(leave[..., None], state, logits), np.where(leave, block, depth)
            running = running & ~leave
        scores = np.moveaxis(logits, 1, 2).reshape(count, CLASSES, *GRID)
        rows, columns = (np.arange(side) * cells // side for side, cells in zip(size, GRID, strict=True))
        maps = scores.argmax(axis=1)[:, rows][:, :, columns]
        return Outcome(maps.astype(np.int16), scores, depth.reshape(count, *GRID), work, np.stack(ran, axis=1))

    @staticmethod
    def leaving(policy, state, running, logits, depth):
        image, place = np.nonzero(running)
        known = Evidence(logits.reshape(-1, CLASSES)).confidence.reshape(depth.shape)
        settled = np.where(depth > 0, logits.argmax(axis=2), -1)
        return policy(
            Evidence(
                state[running],
                image=image,
                images=len(state),
                grid=GRID,
                position=place,
                settled_label=settled,
                settled_score=np.where(depth > 0, known, 0),
            )
        )


def look(batch):
    digests = tuple(certificate.digest(one.tobytes(), dtype=str(one.dtype), shape=one.shape) for one in batch)
    return batch.shape[2:], digests


def adapted(toy=None, **changes):
    toy = Toy() if toy is None else toy
    weights = {"weights": hashlib.sha256(toy.weights.tobytes()).hexdigest()}
    model = AdaptedModel(
        run=toy,
        look=look,
        check=lambda plan: schedule.require_fits(plan, depth=DEPTH, after=(1, 2), gives_masks=False),
        settings=partial(default_settings, PLAN, after=(1, 2)),
        fingerprints=lambda size: Fingerprints(weights, "float64", size, WORDS, "numpy"),
        store=Files(),
        classes=CLASSES,
    )
    return replace(model, **changes)


def batches(images=IMAGES, size=8):
    return [images[start : start + size] for start in range(0, len(images), size)]


def calibrated(model=None, images=None, **options):
    given = {"level": LEVEL, "settings": SETTINGS, "chains": CHAINS}
    images = batches() if images is None else images
    return calibrate(adapted() if model is None else model, images, **given | options)


def table(loss, size=SIZE, settings=SETTINGS):
    """Losses (images, settings, ...) and costs, one image and one setting at a time."""
    toy, losses, costs = Toy(), [], np.zeros(len(settings))
    for row, image in enumerate(IMAGES):
        dense = toy(image[None], schedule.dense(), size=size)
        found = [toy(image[None], plan, size=size) for plan in settings]
        costs += [one.multiply_adds[0] / dense.multiply_adds[0] / len(IMAGES) for one in found]
        losses.append([loss(one.label_maps[0], dense.label_maps[0], row) for one in found])
    return np.asarray(losses), costs


def differing(found, dense, row):
    return (found != dense).mean()


def as_expected(found, expected):
    """Whether a lazy report is the full one, up to float32 and what was not measured."""
    measured = {point.schedule: point for point in expected.curve if point.schedule not in found.unmeasured}
    assert [point.schedule for point in found.curve] == list(measured)
    for point in found.curve:
        one = measured[point.schedule]
        assert point.certified == one.certified
        for name in ("loss", "bound", "p_value", "cost"):
            assert getattr(point, name) == pytest.approx(getattr(one, name), rel=1e-4, abs=1e-6)
    assert not any(point.certified for point in expected.curve if point.schedule in found.unmeasured)
    assert found.schedule == expected.schedule


EXPECTED = certify(SETTINGS, *table(differing), at_most=0.3, chains=CHAINS)


def test_the_report_is_that_of_the_whole_table():
    found = calibrated()
    as_expected(found.report, EXPECTED)
    assert found.report.risk == "disagreement at 8 x 12 pixels"
    assert 0 < len(found.report.unmeasured) < 4
    assert found.report.chosen is not None
    own, full = found.milliseconds
    assert str(found).startswith(
        f"{found.report}\nIn its own passes an image took {own:.3g} ms, {full / own:.2f} times"
    )
    assert certificate.from_json(certificate.to_json(found.certificate)) == found.certificate
    assert found.certificate.fingerprints == adapted().fingerprints(SIZE)


@pytest.mark.parametrize("library", ["array-api-strict", "torch", "jax"])
def test_arrays_may_be_of_any_library(library, tmp_path):
    if library == "array-api-strict":
        array = array_api_strict.asarray
    else:
        module = pytest.importorskip(library if library == "torch" else "jax.numpy")
        array = module.asarray
    toy = Toy()

    def run(images, plan, /, *, size):
        out = toy(images, plan, size=size)
        return Outcome(*(array(getattr(out, name)) for name in ARRAYS))

    store = Files(np.asarray if library == "jax" else array)  # of JAX, what has double precision is kept as NumPy
    first = calibrated(adapted(run=run, store=store), resume=tmp_path)
    as_expected(first.report, EXPECTED)
    again = calibrated(adapted(run=run, store=store), resume=tmp_path)
    assert again == first
    assert first.milliseconds is not None
    assert again.milliseconds is None  # nothing was run but for a check
    labels = array(IMAGES.argmax(axis=1))
    risk = Risk("error increase", labels=labels, ignore=0)
    found = calibrated(adapted(run=run, store=store), risk=risk)
    as_expected(found.report, certify(SETTINGS, *table(more_errors), at_most=0.3, chains=CHAINS))


LABELS = IMAGES.argmax(axis=1)


def more_errors(found, dense, row):
    counts = LABELS[row] != 0
    return max(0.0, (found != LABELS[row])[counts].mean() - (dense != LABELS[row])[counts].mean())


def ious(found, dense, row, classes=(3, 1), reference=None):
    other = dense if reference is None else reference[row]
    return risks.iou_loss(found[None], other[None], classes=classes, at_least=0.2)[0]


@pytest.mark.parametrize(
    ("risk", "loss", "words"),
    [
        (Risk("disagreement", size=GRID, scores="`scores`"), differing, "disagreement of the classes of `scores` at 4 x 6 pixels"),
        (Risk("error increase", labels=LABELS, ignore=0), more_errors, "error increase at 8 x 12 pixels"),
        (Risk("IoU loss", classes=(3, 1)), ious, "IoU loss of each of the classes 3, 1 (IoU with the dense run at least 0.2) at 8 x 12 pixels"),
        (Risk("IoU loss", labels=LABELS), partial(ious, classes=4, reference=LABELS), "IoU loss of each of the classes 0, 1, 2, 3 (IoU with labels at least 0.2) at 8 x 12 pixels"),
    ],
)  # fmt: skip
def test_each_risk_is_that_of_the_whole_table(risk, loss, words):
    at_most = 0.8 if risk.kind == "IoU loss" else 0.3
    found = calibrated(risk=risk, level=Level(at_most)).report
    losses, costs = table(loss, SIZE if risk.size is None else risk.size)
    as_expected(found, certify(SETTINGS, losses, costs, at_most=at_most, chains=CHAINS))
    assert found.risk == words


def test_what_lies_behind_a_failure_is_not_run():
    toy = Toy()
    report = calibrated(adapted(toy)).report
    assert len(report.curve) + len(report.unmeasured) == len(SETTINGS)
    assert toy.calls == (1 + len(report.curve)) * (3 + 1)  # three batches, and the first image alone


def test_too_few_images_are_refused_before_the_model_is_run():
    toy = Toy()
    with pytest.raises(TokenExitError, match="`images` must be at least 189, that 0.02 can be certified at all"):
        calibrated(adapted(toy), level=Level(0.02))
    assert toy.calls == 0


def test_the_default_settings_are_a_ladder_and_networks_cut_short():
    settings, chains = default_settings(PLAN, after=(1, 2))
    assert [len(chain) for chain in chains] == [14, 2]
    assert settings[0] == PLAN.with_threshold(0.999)
    assert settings[13] == PLAN.with_threshold(0.5)
    assert settings[14:] == (schedule.truncated(after=2), schedule.truncated(after=1))
    carried, _ = default_settings(PLAN, after=(2,), carry=Feature())
    assert carried[-1] == replace(schedule.truncated(after=2), carry=Feature())
    found = calibrated(settings=None, chains=None).report
    assert {point.schedule for point in found.curve} | set(found.unmeasured) == set(settings)


def test_the_sample_for_drift_is_that_of_the_chosen_setting():
    found = calibrated()
    plan = found.report.schedule
    out = Toy()(IMAGES, plan, size=SIZE)
    seen = drift.sample(out.scores, out.exit_depth, after=[exit.after for exit in plan.active])
    assert set(seen.statistics) == set(found.before.statistics)
    for name, row in seen.statistics.items():
        assert found.before.statistics[name] == pytest.approx(row)


def test_nothing_certified_means_never_exit():
    found = calibrated(level=Level(0.2), settings=SETTINGS[2:3], chains=None)
    assert found.certificate is None
    assert found.report.schedule == schedule.dense()
    assert list(found.before.statistics) == ["confidence"]


def stopping(after):
    """A progress that is interrupted at one of its steps."""
    steps = iter(range(10**6))

    def progress(loop):
        for item in loop:
            if next(steps) == after:
                raise KeyboardInterrupt
            yield item

    return progress


@pytest.mark.parametrize("after", [1, 4, 7, 10])
def test_an_interrupted_calibration_resumes_to_the_same_report(tmp_path, after):
    with pytest.raises(KeyboardInterrupt):
        calibrated(resume=tmp_path / "kept", progress=stopping(after))
    assert calibrated(resume=tmp_path / "kept") == calibrated(resume=tmp_path / "kept") == calibrated()
    assert not list((tmp_path / "kept").glob("*.part"))


def test_what_is_kept_is_not_run_again(tmp_path):
    first = calibrated(resume=tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir())[:2] == ["calibration.json", "dense.safetensors"]
    toy = Toy()
    assert calibrated(adapted(toy), resume=tmp_path) == first
    assert toy.calls == 1  # on the first batch, to see that the network is the same


def test_a_folder_of_another_calibration_is_refused(tmp_path):
    calibrated(resume=tmp_path)
    for change, words in (
        ({"level": Level(0.4)}, "other at_most"),
        ({"level": Level(0.3, 0.9)}, "other confidence"),
        ({"level": Level(0.3, seed=1)}, "other seed"),
        ({"level": Level(0.3, test="hoeffding-bentkus")}, "other test"),
        ({"risk": Risk(size=GRID)}, "other risk"),
        ({"images": batches(IMAGES[::-1])}, "other images"),
        ({"settings": SETTINGS[:3], "chains": None}, "other chains, settings"),
        ({"model": adapted(Toy(WEIGHTS + 1))}, "other fingerprints"),
    ):
        with pytest.raises(TokenExitError, match=f"`resume` must be a new folder, or one of the same .* with {words}"):
            calibrated(resume=tmp_path, **change)
    same_weights = adapted(Toy(-9 * WEIGHTS), fingerprints=adapted().fingerprints)
    with pytest.raises(TokenExitError, match="`resume` must be of the model as it is now"):
        calibrated(same_weights, resume=tmp_path)


def test_what_is_found_is_bound_to_the_calibration_and_to_its_content(tmp_path):
    found = calibrated(resume=tmp_path / "whole")
    calibrated(resume=tmp_path / "other", level=Level(0.3, seed=1))
    folder, name = tmp_path / "one", "setting-001.safetensors"
    arrays, metadata = Files().read(tmp_path / "whole" / name, "resume")
    raw = (tmp_path / "whole" / name).read_bytes()

    def put(**change):
        Files().write(folder / name, arrays | change, metadata, argument="resume")

    for change, message in (
        (lambda: shutil.copy(tmp_path / "other" / name, folder), "be for the same calibration as setting-001"),
        (lambda: shutil.copy(folder / "setting-000.safetensors", folder / name), "be for the same part as setting-001"),
        (lambda: put(found=arrays["found"][1:]), "hold setting-001.safetensors for these images"),
        (lambda: (folder / name).write_bytes(raw[: len(raw) // 2]), "hold a valid setting-001.safetensors"),
        (lambda: (folder / "calibration.json").write_text("{"), "hold a valid calibration.json"),
        (lambda: edit(folder / "calibration.json"), "hold a valid calibration.json"),
        (lambda: (folder / "calibration.json").unlink(), "hold the calibration.json that its other files belong to"),
    ):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "whole", folder)
        change()
        with pytest.raises(TokenExitError, match=f"`resume` must .*{message}"):
            calibrated(resume=folder)
    assert calibrated(resume=tmp_path / "whole") == found


def edit(file):
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 7'))


def test_images_that_fitted_the_heads_are_refused_unless_there_is_a_reason():
    _, digests = look(IMAGES)
    model = adapted(fitted=digests[5:7])
    with pytest.raises(TokenExitError, match="`images` must be others than .*, got 2 of 24 that were fitted to"):
        calibrated(model)
    found = calibrated(model, allow_fitted="there are no others")
    words = "Exit heads or merges were fitted to 2 of these 24 images, for this reason: there are no others"
    assert found.report.notes == found.certificate.notes == (words,)
    assert calibrated(model, batches(IMAGES[7:])).report.notes == ()


def test_a_dense_run_of_one_class_is_noted():
    images = drawn() + 100 * np.eye(CLASSES)[2][:, None, None]
    note = "The dense run gives class 2 to every pixel of every image, so that agreement says little."
    assert calibrated(adapted(Toy(0 * WEIGHTS)), batches(images)).report.notes == (note,)


def test_a_network_whose_images_see_each_other_is_refused():
    with pytest.raises(TokenExitError, match="`model` must treat each image by itself"):
        calibrated(adapted(Centred()))


class Centred(Toy):
    """A network that takes the mean of the batch from each image."""

    def __call__(self, images, plan, /, *, size):
        return super().__call__(images - images.mean(axis=0), plan, size=size)


class Once:
    """Batches of which there are fewer the second time."""

    def __init__(self, later):
        self.later, self.passes = later, 0

    def __iter__(self):
        self.passes += 1
        return iter(batches() if self.passes == 1 else self.later)


MIXING = ConfidenceAbove(0.5) & BatchBudget(0.5)
NAN = np.concatenate([IMAGES[:-1], np.full_like(IMAGES[:1], np.nan)])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": adapted(classes=1)}, "`model` must have two classes or more to be calibrated"),
        ({"images": []}, "`images` must hold at least one image, got none"),
        ({"images": batches(np.concatenate([IMAGES, IMAGES[:2]]))}, "`images` must be independent, and so no two of them equal: leave copies out, got 2 copies among 26, image 24 of image 0"),
        ({"images": [IMAGES, drawn(16, size=(8, 14))]}, "`images` must be of one size, for which alone a certificate holds, got [(8, 12), (8, 14)]"),
        ({"images": iter(batches())}, "`images` must be the same in every pass"),
        ({"images": Once(batches()[:2])}, "`images` must be the same in every pass"),
        ({"images": Once(batches(IMAGES[::-1]))}, "`images` must be the same in every pass"),
        ({"images": Once([*batches(), IMAGES[:1]])}, "`images` must be the same in every pass"),
        ({"images": batches(NAN)}, "`model` must give class scores that are numbers, got NaN"),
        ({"settings": (Schedule((Exit(1, MIXING),)),), "chains": None}, "`settings` must hold no BatchBudget, under which the images of a batch are not independent"),
        ({"settings": (Schedule((Exit(1, MIXING.retaining(per_class=1)),)),), "chains": None}, "`settings` must hold no BatchBudget"),
        ({"settings": (schedule.truncated(after=3),), "chains": None}, "`schedule` must have exits after blocks 1 to 2 only, for 3 blocks"),
        ({"settings": None}, "`chains` must be left out if `settings` are"),
        ({"settings": (), "chains": None}, "`settings` must be at least one, got 0"),
        ({"chains": ((0,),)}, "`chains` must hold every place from 0 to 4 once"),
        ({"progress": None}, "`progress` must be a function around a loop"),
        ({"allow_fitted": " "}, "`allow_fitted` must be a reason in your own words, or None, got ' '"),
        ({"risk": Risk("IoU loss", classes=(1, 1))}, "`classes` must be some of 0 to 3, each once, got (1, 1)"),
        ({"risk": Risk("IoU loss", classes=(4,))}, "`classes` must be some of 0 to 3, each once, got (4,)"),
        ({"risk": Risk("error increase", labels=LABELS[1:])}, "`labels` must be of shape (24, height, width), got an array of shape (23, 8, 12)"),
        ({"risk": Risk("error increase", labels=LABELS, size=GRID)}, "`size` must be that of `labels`, (8, 12), or left out, got (4, 6)"),
        ({"risk": Risk("error increase", labels=LABELS + 1)}, "`labels` must be classes from 0 to 3, got [4] and "),
        ({"risk": Risk("error increase", labels=LABELS * 0 + 9, ignore=9)}, "`labels` must have a pixel that counts in every image: leave images without one out, for nothing is known about them, got none in 24 of 24 images, the first being [0]"),
        ({"risk": Risk(size=(4, 0))}, "`size` must be a height and a width from 1 up, in pixels, got (4, 0)"),
    ],
)  # fmt: skip
def test_bad_input_is_named(options, message):
    with pytest.raises(TokenExitError) as found:
        calibrated(**options)
    assert str(found.value).startswith(message)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Level(0.0), "`at_most` must lie between 0 and 1, got 0.0"),
        (lambda: Level(0.3, 1.0), "`confidence` must lie between 0 and 1, got 1.0"),
        (lambda: default_settings(schedule.merged(share={1: 0.5}), after=()), "`schedule` must have similarities in the place of shares, which `tokenexit_torch.fit_merges(model, images)` measures, got shares after blocks [1]"),
        (lambda: Risk("luck"), "`risk` must be one of disagreement, error increase, IoU loss, or words for a `loss` of your own, got 'luck'"),
        (lambda: Risk(" ", OWN.loss), "`risk` must be what the `loss` is in your own words, and none of disagreement, error increase, IoU loss, got ' '"),
        (lambda: Risk("IoU loss", OWN.loss), "`risk` must be what the `loss` is in your own words, and none of disagreement, error increase, IoU loss, got 'IoU loss'"),
        (lambda: Risk(CHANGE, OWN.loss, labels=LABELS), "`labels` must be left out for a loss of your own, which compares no label maps, got an array of shape (24, 8, 12)"),
        (lambda: Risk(CHANGE, OWN.loss, size=GRID), "`size` must be left out for a loss of your own, which compares no label maps, got (4, 6)"),
        (lambda: Risk("error increase", LABELS), "`loss` must be a function from two outputs to a loss for each image; labels are `labels=`, got an array of shape (24, 8, 12)"),
        (lambda: Risk(classes=(1,)), "`classes` must be left out unless the risk is `IoU loss`, got (1,)"),
        (lambda: Risk("error increase"), "`labels` must be given for `error increase`, got None"),
        (lambda: Risk(ignore=3), "`ignore` must be left out where there are no labels, got 3"),
        (lambda: Risk(labels=LABELS), "`labels` must be left out for `disagreement`, got shape (24, 8, 12)"),
        (lambda: Risk("IoU loss", labels=LABELS > 1), "`labels` must be a tensor of whole numbers, got bool"),
        (lambda: Risk("IoU loss", labels=LABELS.tolist()), "`labels` must be a tensor of whole numbers, got list"),
        (lambda: default_settings(Schedule((Exit(1, EntropyBelow(0.3)),)), after=(1,)), "`settings` must be given for a plan without thresholds of confidence or of foretold errors, or of similarity where no token leaves, of which alone there is a default ladder, got ['entropy']"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(TokenExitError) as found:
        make()
    assert str(found.value) == message


MERGES = Schedule(merges=(Merge(1, 2, 0.9), Merge(2, 4, 0.8)))
CHANGE = "five times the mean absolute change of the map"
OWN = Risk(CHANGE, lambda out, dense: 5 * abs(out["map"] - dense["map"]).mean(axis=(1, 2)))
ALIKE = ladders.by_distance(MERGES, factors=(0.1, 0.5, 1.0, 2.0, 10.0))


class Decoding(Toy):
    """A network without classes, whose tokens merge: a map of numbers from 0 to 1."""

    def __call__(self, images, plan, /, *, size):
        assert size is None
        self.calls += 1
        count, merges = len(images), {merge.after: merge for merge in plan.merges}
        state = images.reshape(count, CLASSES, GRID[0], 2, GRID[1], 2).mean(axis=(3, 5))
        state, ran = np.moveaxis(state.reshape(count, CLASSES, PATCHES), 1, 2) + 1, []
        merged = merging.alone(np.ones((count, PATCHES), bool), grid=GRID)
        for block in range(1, DEPTH + 1):
            state = state + 0.3 * np.tanh(state @ self.weights[block - 1])
            ran.append(merged.running.sum(axis=1))
            if block in merges:
                joined = merging.merge(state, merged, side=merges[block].side, alike=merges[block].alike)
                state, merged = joined.features(), joined.merged
        drawn = 1 / (1 + np.exp(-merging.spread(state, merged.owner)[..., 0]))
        depth, ran = np.full((count, *GRID), DEPTH), np.stack(ran, axis=1)
        return Outcome(None, None, depth, 100 * ran.sum(axis=1), ran, {"map": drawn.reshape(count, *GRID)})


def decoding(toy=None, **changes):
    settings = partial(default_settings, MERGES, after=())
    return adapted(Decoding() if toy is None else toy, classes=0, settings=settings, **changes)


def measured(model=None, **options):
    given = {"level": LEVEL, "risk": OWN, "settings": ALIKE, "chains": None}
    return calibrated(decoding() if model is None else model, **given | options)


def test_a_loss_of_ones_own_needs_no_classes_and_is_that_of_the_whole_table():
    found, toy, losses, costs = measured(), Decoding(), [], []
    dense = toy(IMAGES, schedule.dense(), size=None)
    for plan in ALIKE:
        out = toy(IMAGES, plan, size=None)
        losses.append(5 * abs(out.output["map"] - dense.output["map"]).mean(axis=(1, 2)))
        costs.append(out.multiply_adds.mean() / dense.multiply_adds.mean())
    as_expected(found.report, certify(ALIKE, np.stack(losses, axis=1), costs, at_most=0.3))
    assert found.report.chosen is not None
    assert found.report.unmeasured == ALIKE[3:]
    assert list(found.before.statistics) == ["tokens per block"]
    out = toy(IMAGES, found.report.schedule, size=None)
    assert found.before.statistics["tokens per block"] == pytest.approx(out.tokens_per_block.mean(axis=1))


def test_report_and_certificate_say_whose_loss_it_is():
    found = measured()
    assert found.report.risk == found.certificate.risk == f"loss of the user's own ({CHANGE})"
    note = f"Note: The loss is a function of the user's own, of which these words are all that is known here: {CHANGE}."
    for text in (str(found), str(found.certificate)):
        assert f"Certified: mean loss of the user's own ({CHANGE}) over images at most 30 %" in text
        assert note in text
    assert certificate.from_json(certificate.to_json(found.certificate)) == found.certificate


def test_a_model_with_classes_may_have_a_loss_of_ones_own():
    """The same share of pixels as a loss of one's own, and as the library's."""

    class Returning(Toy):
        def __call__(self, images, plan, /, *, size):
            out = super().__call__(images, plan, size=SIZE)
            return replace(out, output=out.label_maps, label_maps=None if size is None else out.label_maps)

    risk = Risk("pixels that change", lambda out, dense: (out != dense).mean(axis=(1, 2)))
    own = calibrated(adapted(Returning()), risk=risk)
    as_expected(own.report, EXPECTED)
    assert own.before == calibrated().before


def test_a_calibration_with_a_loss_of_ones_own_is_resumed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measured(resume=tmp_path, progress=stopping(8))
    first, toy = measured(resume=tmp_path), Decoding()
    assert first == measured()
    assert measured(decoding(toy), resume=tmp_path) == first
    assert toy.calls == 1 + 2 * len(first.report.curve)  # the first batch, and beside each setting the dense network
    with pytest.raises(TokenExitError, match="`resume` must be a new folder, or one of the same .* with other risk"):
        measured(resume=tmp_path, risk=Risk("greatest change of the map", OWN.loss))
    half = Risk(CHANGE, lambda out, dense: OWN.loss(out, dense) / 2)
    with pytest.raises(
        TokenExitError, match="`resume` must be of the model as it is now, with the same `loss` .*differ"
    ):
        measured(resume=tmp_path, risk=half)


def test_a_loss_that_looks_at_other_images_is_refused():
    def beside_the_most(out, dense):
        losses = OWN.loss(out, dense)
        return losses / max(losses.max(), 1e-9)

    with pytest.raises(TokenExitError, match="`model` must treat each image by itself, .*losses that differ by"):
        measured(risk=Risk("change beside the most", beside_the_most), settings=ALIKE[2:])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda out, dense: OWN.loss(out, dense) - 1, f"`loss` must give losses in [0, 1], and none that is NaN, got [-1.0] and 7 more ({CHANGE})"),
        (lambda out, dense: OWN.loss(out, dense) + 1.5, f"`loss` must give losses in [0, 1], and none that is NaN, got [1.5] and 7 more ({CHANGE})"),
        (lambda out, dense: OWN.loss(out, dense) * np.nan, f"`loss` must give losses in [0, 1], and none that is NaN, got [nan] and 7 more ({CHANGE})"),
        (lambda out, dense: OWN.loss(out, dense).mean(), "`loss` must give one loss for each of the 8 images, got "),
        (lambda out, dense: OWN.loss(out, dense)[:, None], f"`loss` must give one loss for each of the 8 images, got shape (8, 1) ({CHANGE})"),
        (lambda out, dense: OWN.loss(out, dense).tolist(), f"`loss` must give one loss for each of the 8 images, got list ({CHANGE})"),
    ],
)  # fmt: skip
def test_losses_of_ones_own_that_are_none_are_named(loss, message):
    with pytest.raises(TokenExitError) as found:
        measured(risk=Risk(CHANGE, loss))
    assert str(found.value).startswith(message)


def test_what_merges_by_similarity_has_a_default_ladder():
    settings, chains = default_settings(MERGES, after=())
    assert chains == (tuple(range(14)),)
    assert settings[8] == MERGES
    assert settings[5].merges == (Merge(1, 2, 0.95), Merge(2, 4, 0.9))
    found = measured(settings=None)
    assert {point.schedule for point in found.report.curve} | set(found.report.unmeasured) == set(settings)
    agreeing = replace(MERGES, merges=(Merge(1, 2, 0.9, ConfidenceAbove(0.5)),))
    settings, chains = default_settings(agreeing, after=(1,), carry=Feature())
    assert [len(chain) for chain in chains] == [14, 1]
    assert settings[-1] == replace(schedule.truncated(after=1), carry=Feature())
    assert all(plan.merges[0].agreed == ConfidenceAbove(0.5) for plan in settings[:-1])


def test_the_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    calibrated().plot(tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")


def test_a_policy_of_policies_mixes_images_if_one_of_them_does():
    assert (policies.never() | MIXING).retaining(per_class=1).mixes_images
    assert not (policies.never() | ConfidenceAbove(0.5) & policies.Budget(0.5)).mixes_images
