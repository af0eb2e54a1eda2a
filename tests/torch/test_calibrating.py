"""Calibration of a model with exits: every setting run for real, lazily, resumably, to a certificate."""

import dataclasses
import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional

import tokenexit_torch as tet
from tests.torch import models
from tests.torch.decoders import DECODERS
from tokenexit import TokenExitError, policies, schedule
from tokenexit.carries import Feature
from tokenexit.guarantees import certificate, drift, ladders
from tokenexit.guarantees.calibrate import Risk
from tokenexit.guarantees.calibration import certify
from tokenexit.heads import Neighbourhood, Translator
from tokenexit.schedule import Exit, Merge, Schedule
from tokenexit_torch import _files
from tokenexit_torch.calibration import adapted as calibrating

PLAN = schedule.neighbours(radius={2: 1, 4: 0}, threshold=0.9, per_class=2)
SETTINGS = (
    *ladders.by_threshold(PLAN, thresholds=(0.999, 0.6, 0.0)),
    schedule.truncated(after=4),
    schedule.truncated(after=2),
)
CHAINS = (range(3), (3, 4))
IMAGES = models.images(24, seed=3)
WORDS = "drawn numbers, as they are"


def easy(plan=PLAN):
    """A model whose exits say what the final head says, more or less: the more blocks have run, the more."""
    model = models.wrapped(models.timm_vit(), plan)
    with torch.no_grad():
        for block in model.model.blocks:  # a network that changes its tokens less
            for one in (block.attn.proj, block.mlp.fc2):
                one.weight.mul_(0.5)
        for head in model.exit_heads.values():
            head.load_state_dict(model.head.state_dict())
    return model


def calibrated(model=None, images=None, **options):
    images = IMAGES if images is None else images
    given = {"at_most": 0.3, "preprocessing": WORDS, "settings": SETTINGS, "chains": CHAINS, "progress": iter}
    return tet.calibrate(easy() if model is None else model, images, **given | options)


@torch.no_grad()
def table(model, images, settings, truth=None, size=(32, 48)):
    """Losses (images, settings) and costs, by the book: one image at a time, one setting at a time."""

    def run(plan, image):
        out = model(image[None], schedule=plan)
        full = functional.interpolate(out.logits, size, mode="bilinear", align_corners=False)
        return full.argmax(1)[0].numpy(), model.multiply_adds(out).item()

    losses, costs = np.zeros((len(images), len(settings))), np.zeros(len(settings))
    for row, image in enumerate(images):
        dense, full = run(schedule.dense(), image)
        for column, plan in enumerate(settings):
            found, work = run(plan, image)
            costs[column] += work / full / len(images)
            if truth is None:
                losses[row, column] = (found != dense).mean()
            else:
                right = truth[row].numpy()
                valid = right != 9
                more = (found != right)[valid].mean() - (dense != right)[valid].mean()
                losses[row, column] = max(0.0, more)
    return losses, costs


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


def test_the_report_is_that_of_the_whole_table():
    model = easy()
    found = calibrated(model)
    expected = certify(SETTINGS, *plain_table(), at_most=0.3, chains=CHAINS)
    as_expected(found.report, expected)
    assert found.report.risk == "disagreement at 32 x 48 pixels"
    assert found.report.images == 24
    assert found.report.chosen is not None
    assert found.report.unmeasured
    assert "of the dense network's multiply-adds:" in str(found)
    own, full = found.milliseconds
    assert str(found).startswith(
        f"{found.report}\nIn its own passes an image took {own:.3g} ms, {full / own:.2f} times"
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("size", [(4, 6), (16, 17)])
def test_label_maps_may_be_of_another_size(size):
    model = easy()
    found = calibrated(model, size=size)
    expected = certify(SETTINGS, *table(model, IMAGES, SETTINGS, size=size), at_most=0.3, chains=CHAINS)
    as_expected(found.report, expected)
    assert found.report.risk == f"disagreement at {size[0]} x {size[1]} pixels"


@pytest.mark.usefixtures("unchecked")
def test_with_labels_it_is_the_increase_of_the_error():
    model = easy()
    truth = torch.randint(0, 10, (24, 20, 30), generator=torch.Generator().manual_seed(0))
    truth[truth >= models.CLASSES] = 9
    found = calibrated(model, risk="error increase", labels=truth.byte(), ignore=9)
    expected = certify(SETTINGS, *table(model, IMAGES, SETTINGS, truth, (20, 30)), at_most=0.3, chains=CHAINS)
    as_expected(found.report, expected)
    assert found.report.risk == "error increase at 20 x 30 pixels"


@functools.cache
def plain_table():
    """Losses and costs of the images and settings as they are."""
    return table(easy(), IMAGES, SETTINGS)


@torch.no_grad()
def iou_table(model, settings, classes, at_least, truth=None, ignore=None):
    """Losses (images, settings, classes): `at_least` times the union, less the intersection, shifted."""

    def maps(plan):
        full = functional.interpolate(
            model(IMAGES, schedule=plan).logits, (32, 48), mode="bilinear", align_corners=False
        )
        return full.argmax(1).numpy()

    right = maps(schedule.dense()) if truth is None else truth.numpy()
    of_settings = [maps(plan) for plan in settings]
    losses = np.zeros((len(IMAGES), len(settings), len(classes)))
    for row in range(len(IMAGES)):
        valid = right[row] != ignore
        for column, every in enumerate(of_settings):
            found = every[row]
            for place, one in enumerate(classes):
                both = ((found == one) & (right[row] == one))[valid].mean()
                either = ((found == one) | (right[row] == one))[valid].mean()
                losses[row, column, place] = at_least * either - both + 1 - at_least
    return losses


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("labels", "classes", "words"),
    [
        (None, None, "of each of the classes 0, 1, 2, 3, 4 (IoU with the dense run at least 0.2)"),
        (None, (0, 1), "of each of the classes 0, 1 (IoU with the dense run at least 0.2)"),
        (9, (4, 1), "of each of the classes 4, 1 (IoU with labels at least 0.2)"),
    ],
)
def test_iou_may_be_the_risk(labels, classes, words):
    model = easy()
    truth = None
    if labels is not None:  # what the dense network says, some of it void: an IoU that can be certified
        with torch.no_grad():
            truth = model(IMAGES, schedule=schedule.dense()).upsample((32, 48)).argmax(1)
        truth[:, ::5] = labels
    found = calibrated(model, risk="IoU loss", at_most=0.8, labels=truth, ignore=labels, classes=classes).report
    watched = tuple(range(models.CLASSES)) if classes is None else classes
    _, costs = plain_table()
    expected = certify(
        SETTINGS, iou_table(model, SETTINGS, watched, 0.2, truth, labels), costs, at_most=0.8, chains=CHAINS
    )
    as_expected(found, expected)
    assert found.risk == f"IoU loss {words} at 32 x 48 pixels"
    assert (found.chosen is not None) == (classes is not None)  # of all five one is too rare


class Counting(tuple):
    """Batches that count how often they are gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_what_lies_behind_a_failure_is_not_run():
    images = Counting(IMAGES.split(8))
    report = calibrated(images=images).report
    assert images.passes == 2 + len(report.curve)  # a look, the dense network, and each setting once
    assert len(report.curve) + len(report.unmeasured) == len(SETTINGS)


def test_batches_give_what_one_tensor_gives():
    one, other = calibrated().report, calibrated(images=list(IMAGES.split(3))).report
    as_expected(one, other)


@pytest.mark.usefixtures("unchecked")
def test_the_settings_that_are_there_by_default():
    settings, chains = tet.default_settings(easy())
    assert [len(chain) for chain in chains] == [14, 3]
    assert settings[0] == PLAN.with_threshold(0.999)
    assert settings[13] == PLAN.with_threshold(0.5)
    assert settings[14:] == tuple(schedule.truncated(after=after) for after in (4, 3, 2))
    found = calibrated(settings=None, chains=None)
    assert {point.schedule for point in found.report.curve} | set(found.report.unmeasured) == set(settings)


def test_training_mode_plan_and_gradients_stay_as_they_were():
    model = easy()
    model.train()
    before = [part.training for part in model.modules()]
    ran = []
    model.head[0].register_forward_pre_hook(lambda part, _: ran.append(part.training))
    eager = calibrated(model).report
    assert ran
    assert not any(ran)
    assert [part.training for part in model.modules()] == before
    assert model.schedule == PLAN
    assert all(parameter.grad is None for parameter in model.parameters())
    as_expected(eager, calibrated().report)


def test_nothing_certified_means_never_exit():
    model = easy()
    with torch.no_grad():
        for head in model.exit_heads.values():  # they say another class than the final head, and are sure of it
            head[-1].bias.copy_(100 * torch.eye(models.CLASSES)[0])
    found = calibrated(model)
    assert found.certificate is None
    assert found.report.schedule == schedule.dense()
    assert str(found).startswith("Never exit: nothing is certified")
    assert list(found.before.statistics) == ["confidence"]
    assert found.before.images == 24


def test_the_certificate_is_loaded_onto_the_model_and_onto_no_other(tmp_path):
    model = easy()
    found = calibrated(model)
    assert found.certificate is not None
    tet.save_certificate(found.certificate, tmp_path)
    fresh = easy()
    fresh.retune(schedule.dense())
    loaded = tet.load_certificate(tmp_path, fresh, resolution=(32, 48), preprocessing=WORDS)
    assert loaded == found.certificate
    assert loaded.schedule == fresh.schedule == found.report.schedule
    assert loaded.risk == "disagreement at 32 x 48 pixels"
    for change, message in (
        ({"resolution": (32, 64)}, r"resolution \(32, 64\) instead of \(32, 48\)"),
        ({"preprocessing": "other"}, "preprocessing 'other' instead of 'drawn numbers, as they are'"),
    ):
        with pytest.raises(TokenExitError, match=message):
            tet.load_certificate(tmp_path, fresh, **{"resolution": (32, 48), "preprocessing": WORDS} | change)


def changed(change):
    model = easy()
    model.retune(schedule.dense())
    with torch.no_grad():
        change(model)
    return model


def test_a_radius_is_part_of_what_was_certified():
    plans = [Neighbourhood(8, radius) for radius in (1, 3)]
    torch.manual_seed(0)
    models_of = [tet.wrap(models.timm_vit(), PLAN, num_classes=5, exit_heads=plan) for plan in plans]
    models_of[1].load_state_dict(models_of[0].state_dict())
    one, other = (tet.fingerprints(model, resolution=(32, 48), preprocessing=WORDS) for model in models_of)
    certified = certificate.Certificate(PLAN, "x", 0.1, 0.9, 1, "betting", 0, 0.0, 0.0, one)
    with pytest.raises(TokenExitError, match=r"other weights in 3 of .* tensors, 'exit_heads.2.radius"):
        certificate.require_matches(certified, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.model.blocks[3].mlp.fc1.weight[0, 0].add_(1e-3),
            "other weights in 1 of .* tensors, 'model.blocks.3",
        ),
        (lambda m: m.exit_heads["2"][-1].bias[0].add_(1e-3), "other weights in 1 of .* tensors, 'exit_heads.2"),
        (lambda m: m.head[-1].bias[0].add_(1e-3), "other weights in 1 of .* tensors, 'head"),
        (lambda m: m.bfloat16(), "dtype 'bfloat16' instead of 'float32'"),
        (lambda m: m.head.double(), "dtype 'float32, float64' instead of 'float32'"),
    ],
)
def test_a_certificate_is_refused_for_another_model(tmp_path, change, message):
    found = calibrated().certificate
    assert found is not None
    tet.save_certificate(found, tmp_path)
    model = changed(change)
    with pytest.raises(TokenExitError, match=message):
        tet.load_certificate(tmp_path, model, resolution=(32, 48), preprocessing=WORDS)
    assert model.schedule == schedule.dense()


def test_a_certificate_that_was_edited_or_cut_off_is_refused(tmp_path):
    model, file = easy(), tmp_path / "certificate.json"
    with pytest.raises(TokenExitError, match="`folder` must hold the file certificate.json"):
        tet.load_certificate(tmp_path, model, resolution=(32, 48), preprocessing=WORDS)
    found = calibrated(model).certificate
    assert found is not None
    tet.save_certificate(found, tmp_path)
    text = file.read_text()
    for damaged, message in (
        (text.replace('"at_most": 0.3', '"at_most": 0.02').encode(), "`checksum` must be that of the content"),
        (text[:-40].encode(), "`text` must be the whole JSON"),
        (b"\xff" + text.encode(), "must hold a valid certificate.json"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(TokenExitError, match=message):
            tet.load_certificate(tmp_path, model, resolution=(32, 48), preprocessing=WORDS)


def test_fingerprints_tell_dtypes_shapes_and_autocast_apart():
    one = torch.arange(6, dtype=torch.int32)
    tensors = [one, one.reshape(2, 3), one.float(), one.view(torch.float32), one + 1, one.bfloat16(), one[0], one[:0]]
    holders = []
    for tensor in tensors:
        holder = torch.nn.Module()
        holder.register_buffer("x", tensor)
        holder.register_buffer("y", torch.ones(1))
        holders.append(tet.fingerprints(holder, resolution=(1, 2), preprocessing=WORDS).weights["x"])
    assert len(set(holders)) == len(tensors)
    strided = torch.nn.Module()
    strided.register_buffer("y", torch.ones(1))
    strided.register_buffer("x", torch.stack([one, one], dim=1)[:, 0])
    assert tet.fingerprints(strided, resolution=(1, 2), preprocessing=WORDS).weights["x"] == holders[0]
    plain = tet.fingerprints(easy(), resolution=(32, 48), preprocessing=WORDS)
    assert (plain.dtype, plain.resolution, plain.preprocessing) == ("float32", (32, 48), WORDS)
    assert set(plain.weights) == set(easy().state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        cast = tet.fingerprints(easy(), resolution=(32, 48), preprocessing=WORDS)
    assert cast.dtype == "float32, autocast to bfloat16"
    assert cast.weights == plain.weights
    with pytest.raises(TokenExitError, match="instead of 'float32'"):
        certificate.require_matches(
            certificate.Certificate(PLAN, "x", 0.1, 0.9, 1, "betting", 0, 0.0, 0.0, plain), cast
        )


def test_calibration_under_autocast_is_for_autocast():
    model = easy()
    with torch.autocast("cpu", torch.bfloat16):
        found = calibrated(model).certificate
    assert found is not None
    assert found.fingerprints.dtype == "float32, autocast to bfloat16"


def stopping(after):
    """A progress that is interrupted at one of its steps."""
    steps = iter(range(10**6))

    def progress(loop):
        for item in loop:
            if next(steps) == after:
                raise KeyboardInterrupt
            yield item

    return progress


@pytest.mark.parametrize("after", [1, 4, 7, 16])
def test_an_interrupted_calibration_resumes_to_the_same_report(tmp_path, after):
    images = Counting(IMAGES.split(8))
    with pytest.raises(KeyboardInterrupt):
        calibrated(images=images, resume=tmp_path / "kept", progress=stopping(after))
    resumed = calibrated(images=images, resume=tmp_path / "kept")
    again = calibrated(images=images, resume=tmp_path / "kept")
    straight = calibrated(images=images)
    assert resumed == again == straight
    assert not list((tmp_path / "kept").glob("*.part"))


def test_what_is_kept_is_not_run_again(tmp_path):
    images = Counting(IMAGES.split(8))
    first = calibrated(images=images, resume=tmp_path)
    assert images.passes == 2 + len(first.report.curve)
    images.passes = 0
    assert calibrated(images=images, resume=tmp_path) == first
    assert images.passes == 2  # a look, and the first batch, to see that the network is the same


@pytest.mark.usefixtures("unchecked")
def test_a_folder_of_another_calibration_is_refused(tmp_path):
    calibrated(resume=tmp_path)
    other = IMAGES.clone()
    other[7, 0, 3, 3] += 1
    for change, words in (
        ({"at_most": 0.4}, "with other at_most"),
        ({"confidence": 0.9}, "with other confidence"),
        ({"seed": 1}, "with other seed"),
        ({"test": "hoeffding-bentkus"}, "with other test"),
        ({"size": (4, 6)}, "with other risk"),
        ({"images": other}, "with other images"),
        ({"images": IMAGES.flip(0)}, "with other images"),
        ({"model": changed(lambda m: m.head[-1].bias.add_(1))}, "with other fingerprints"),
        ({"preprocessing": "other"}, "with other fingerprints"),
        ({"settings": SETTINGS[:3], "chains": None}, "with other chains, settings"),
    ):
        with pytest.raises(TokenExitError, match="`resume` must be a new folder.*" + words):
            calibrated(resume=tmp_path, **change)
    for name, content, words in (
        ("setting-000.safetensors", b"x" * 20, "`resume` must hold a valid .*safetensors, got .*setting-000"),
        ("calibration.json", b"{", "`resume` must hold a valid calibration.json"),
        ("calibration.json", b"[]", "`resume` must hold a valid calibration.json"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TokenExitError, match=words):
            calibrated(resume=tmp_path)


@pytest.mark.usefixtures("unchecked")
def test_what_is_found_is_bound_to_the_calibration_and_to_its_content(tmp_path):
    """A folder without its identity, a file of another folder, other numbers: none of them may be taken for evidence."""
    found = calibrated(resume=tmp_path / "one")
    calibrated(resume=tmp_path / "other", seed=1)
    shutil.copytree(tmp_path / "one", tmp_path / "whole")
    file, name = tmp_path / "one" / "setting-002.safetensors", "setting-002.safetensors"
    raw = file.read_bytes()
    tensors, _ = _files.read(file, "resume")
    with safe_open(file, framework="pt") as opened:
        marks = {key: mark for key, mark in opened.metadata().items() if key != "content"}
    best = tensors | {"found": tensors["found"] * 0}
    short = {key: value[1:].clone() for key, value in tensors.items()}  # the file itself will change
    for change, message in (
        (lambda: file.write_bytes((tmp_path / "other" / name).read_bytes()), "for the same calibration as setting-002"),
        (
            lambda: file.write_bytes(bytes([*raw[:-3], raw[-3] ^ 64, *raw[-2:]])),
            "hold setting-002.safetensors as it was",
        ),
        (lambda: file.write_bytes(raw[:-600] + bytes(600)), "hold setting-002.safetensors as it was written"),
        (lambda: save_file(best, file, metadata=marks), "hold setting-002.safetensors as it was written"),
        (
            lambda: _files.write(file, short, marks, argument="resume"),
            "hold setting-002.safetensors for these images, with",
        ),
        (lambda: (file.parent / "setting-001.safetensors").replace(file), "for the same part as setting-002"),
        (lambda: (file.unlink(), file.mkdir()), "hold a valid setting-002.safetensors"),
        (
            lambda: (file.parent / "calibration.json").unlink(),
            "hold the calibration.json that its other files belong to",
        ),
    ):
        shutil.rmtree(file.parent)
        shutil.copytree(tmp_path / "whole", file.parent)
        change()
        with pytest.raises(TokenExitError, match=f"`resume` must .*{message}"):
            calibrated(resume=tmp_path / "one")
    assert calibrated(resume=tmp_path / "whole") == found


def test_images_that_fitted_the_heads_are_refused_unless_the_caller_says_why(tmp_path):
    model = easy()
    tet.fit_exits(model, torch.cat([IMAGES[5:7], models.images(2, seed=8)]), steps=1, progress=iter)
    tet.save(model, tmp_path)
    loaded = tet.load(model.model, tmp_path)  # the digests travel with the exits
    for one in (model, loaded):
        with pytest.raises(TokenExitError, match="`images` must be others than those that `fit_exits` .*2 of 24 that"):
            calibrated(one)
    found = calibrated(loaded, allow_fitted="there are no others", at_most=0.9)
    words = "Exit heads or merges were fitted to 2 of these 24 images, for this reason: there are no others"
    assert found.report.notes == found.certificate.notes == (words,)
    assert f"Note: {words}" in str(found)
    assert f"Note: {words}" in str(found.certificate)
    assert calibrated(model, IMAGES[7:]).report.notes == ()


def test_a_dense_run_of_one_class_is_noted():
    model = easy()
    with torch.no_grad():
        for head in (*model.exit_heads.values(), model.head):
            head[-1].bias.copy_(100 * torch.eye(models.CLASSES)[2])
    found = calibrated(model)
    note = "The dense run gives class 2 to every pixel of every image, so that agreement says little."
    assert found.certificate.notes == (note,)


def test_a_network_whose_images_see_each_other_is_refused():
    model = easy()
    model.model.blocks[1].register_forward_hook(lambda _, __, out: out + out.mean(dim=(0, 1)) * len(out))
    with pytest.raises(TokenExitError, match="`model` must treat each image by itself, for the losses of images that"):
        calibrated(model)


def test_classes_beyond_sixteen_bits_are_told_apart():
    scores = torch.zeros(1, 2**15 + 2, 1, 1)
    scores[0, 2**15 + 1] = 1
    assert calibrating.label_maps(scores, (1, 1), None, grid=(1, 1)).item() == 2**15 + 1


def test_options_that_are_refused_leave_no_folder_behind(tmp_path):
    with pytest.raises(TokenExitError, match="`at_most` must lie between 0 and 1"):
        calibrated(resume=tmp_path / "kept", at_most=2.0)
    assert not (tmp_path / "kept").exists()


def test_the_sample_for_drift_is_that_of_the_chosen_setting():
    model = easy()
    found = calibrated(model)
    model.retune(found.report.schedule)
    with torch.no_grad():
        out = model(IMAGES)
    seen = tet.drift_sample(model, out)
    assert set(seen.statistics) == set(found.before.statistics)
    for name, row in seen.statistics.items():
        assert found.before.statistics[name] == pytest.approx(row, abs=1e-5)
    assert not drift.compare(found.before, seen).drifted
    assert drift.Sample.from_dict(json.loads(json.dumps(found.before.to_dict()))) == found.before


def test_the_curve_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    found = calibrated()
    found.plot(tmp_path / "curve.svg")
    found.plot(str(tmp_path / "curve.png"))
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width > 500


def test_a_truncation_that_beats_the_exits_is_chosen_and_said():
    report = calibrated(settings=(SETTINGS[0], SETTINGS[3]), chains=((0,), (1,)), at_most=0.5).report
    assert report.schedule == schedule.truncated(after=4)
    assert "Cutting is the better deal: this is the network cut short after block 4" in str(report)


class Shuffled:
    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return iter(self.images[torch.randperm(len(self.images))].split(8))


LABELS = torch.zeros(24, 32, 48, dtype=torch.int64)
FEW = LABELS.where(torch.arange(24)[:, None, None] < 4, 9)
BUDGET = Schedule((Exit(2, policies.ConfidenceAbove(0.5) & policies.BatchBudget(0.5)),))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": models.timm_vit()}, "`model` must be wrapped by `wrap` or `wrap_decoder`, got VisionTransformer"),
        ({"images": models.images(13)}, "`images` must be at least 15, that 0.3 can be certified at all by this test, got 13"),
        ({"images": []}, "`images` must hold at least one image, got none"),
        ({"images": [models.images(16), models.images(16, size=(32, 40))]}, "`images` must be of one size, for which alone a certificate holds, got [(32, 40), (32, 48)]"),
        ({"images": list(models.images(16))}, "`images` must be of shape (images, channels, height, width), got an array of shape (3, 32, 48)"),
        ({"images": iter(models.images(24).split(8))}, "`images` must be the same in every pass"),
        ({"images": Shuffled(models.images(24))}, "`images` must be the same in every pass"),
        ({"images": torch.full((24, 3, 32, 48), math.nan)}, "`images` must be independent, and so no two of them equal: leave copies out, got 23 copies among 24, image 1 of image 0"),
        ({"images": torch.cat([IMAGES[:23], IMAGES[:1] * math.nan])}, "`model` must give class scores that are numbers, got NaN"),
        ({"at_most": 0.0}, "`at_most` must lie between 0 and 1, got 0.0"),
        ({"confidence": 1.0}, "`confidence` must lie between 0 and 1, got 1.0"),
        ({"test": "luck"}, "`test` must be"),
        ({"risk": "luck"}, "`risk` must be one of disagreement, error increase, IoU loss, or words for a `loss` of your own, got 'luck'"),
        ({"risk": "error increase"}, "`labels` must be given for `error increase`, got None"),
        ({"labels": LABELS}, "`labels` must be left out for `disagreement`, got shape (24, 32, 48)"),
        ({"classes": (1,)}, "`classes` must be left out unless the risk is `IoU loss`, got (1,)"),
        ({"risk": "IoU loss", "classes": (1, 1)}, "`classes` must be some of 0 to 4, each once, got (1, 1)"),
        ({"risk": "IoU loss", "classes": 3}, "`classes` must be a sequence of some of 0 to 4, got 3"),
        ({"risk": "IoU loss", "classes": (5,)}, "`classes` must be some of 0 to 4, each once, got (5,)"),
        ({"risk": "IoU loss", "classes": ()}, "`classes` must be some of 0 to 4, each once, got ()"),
        ({"scores": torch.nn.Identity()}, "`scores` must be left out for a model with a final head, got Identity()"),
        ({"ignore": 3}, "`ignore` must be left out where there are no labels, got 3"),
        ({"risk": "error increase", "labels": LABELS[:9]}, "`labels` must be of shape (24, height, width), got an array of shape (9, 32, 48)"),
        ({"risk": "error increase", "labels": LABELS, "size": (4, 6)}, "`size` must be that of `labels`, (32, 48), or left out, got (4, 6)"),
        ({"images": 1}, "`images` must be a tensor of images, or batches of them, got int"),
        ({"images": [1]}, "`images` must come in batches that are one tensor of images, their labels in `labels`, got int"),
        ({"images": [(IMAGES, LABELS)]}, "`images` must come in batches that are one tensor of images, their labels in `labels`, got tuple"),
        ({"images": IMAGES.to("meta")}, "`images` must be dense tensors with numbers in them, got torch.strided on meta"),
        ({"images": IMAGES.to_sparse()}, "`images` must be dense tensors with numbers in them, got torch.sparse"),
        ({"at_most": "0.1"}, "`at_most` must lie between 0 and 1, got '0.1'"),
        ({"confidence": None}, "`confidence` must lie between 0 and 1, got None"),
        ({"progress": None}, "`progress` must be a function around a loop, as `tqdm` or `iter`, got None"),
        ({"allow_fitted": " "}, "`allow_fitted` must be a reason in your own words, or None, got ' '"),
        ({"risk": "error increase", "labels": LABELS.float()}, "`labels` must be a tensor of whole numbers, got torch.float32"),
        ({"risk": "error increase", "labels": LABELS > 1}, "`labels` must be a tensor of whole numbers, got torch.bool"),
        ({"risk": "error increase", "labels": LABELS.tolist()}, "`labels` must be a tensor of whole numbers, got list"),
        ({"risk": "error increase", "labels": LABELS * 0 + 9, "ignore": 9}, "`labels` must have a pixel that counts in every image: leave images without one out, for nothing is known about them, got none in 24 of 24 images, the first being [0]"),
        ({"risk": "error increase", "labels": FEW, "ignore": 9}, "`labels` must have a pixel that counts in every image: leave images without one out, for nothing is known about them, got none in 20 of 24 images, the first being [4]"),
        ({"risk": "error increase", "labels": FEW}, "`labels` must be classes from 0 to 4, got [9] and 30719 more"),
        ({"risk": "error increase", "labels": LABELS + 100, "ignore": 9}, "`labels` must be classes from 0 to 4, or 9 to be ignored, got [100] and"),
        ({"risk": "error increase", "labels": LABELS - 100}, "`labels` must be classes from 0 to 4, got [-100] and"),
        ({"risk": "IoU loss", "labels": LABELS + 100}, "`labels` must be classes from 0 to 4, got [100] and"),
        ({"size": (4, 0)}, "`size` must be a height and a width from 1 up, in pixels, got (4, 0)"),
        ({"settings": (BUDGET,), "chains": None}, "`settings` must hold no BatchBudget, under which the images of a batch are not independent"),
        ({"settings": (schedule.truncated(after=5),), "chains": None}, "`schedule` must have exits only after blocks with an exit head"),
        ({"settings": None}, "`chains` must be left out if `settings` are"),
        ({"settings": (), "chains": None}, "`settings` must be at least one, got 0"),
        ({"chains": ((0,),)}, "`chains` must hold every place from 0 to 4 once"),
        ({"preprocessing": ""}, "`preprocessing` must be a text, got ''"),
        ({"model": easy(schedule.dense()), "settings": None, "chains": None}, "`settings` must be given for a plan without thresholds of confidence"),
        ({"model": easy(Schedule((Exit(2, policies.EntropyBelow(0.3)),))), "settings": None, "chains": None}, "`settings` must be given for a plan without thresholds of confidence or of foretold errors, or of similarity where no token leaves, of which alone there is a default ladder, got ['entropy']"),
    ],
)  # fmt: skip
def test_bad_input_is_named(options, message):
    with pytest.raises(TokenExitError) as found:
        calibrated(**options)
    assert str(found.value).startswith(message)


@pytest.mark.usefixtures("unchecked")
def test_too_few_images_are_refused_before_the_model_is_run():
    model = easy()
    model.register_forward_pre_hook(lambda *_: pytest.fail("it was run"))
    with pytest.raises(TokenExitError, match="`images` must be at least 189"):
        calibrated(model, at_most=0.02)


def decoding(name):
    """A model with a decoder of its own, whose blocks change little, and two exits that rejoin for the decoder."""
    model = DECODERS[name].make()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "layer" in key and key.endswith(("output.dense.weight", "fc2.weight")):
                value.mul_(0.3)
    plan = dataclasses.replace(schedule.neighbours(radius={1: 1, 2: 0}, threshold=0.4, per_class=0), carry=Feature())
    return tet.wrap_decoder(model, plan, num_classes=None if DECODERS[name].classes else 3).eval()


@torch.no_grad()
def decoded_table(model, images, settings, read):
    """Losses and costs, one image and one setting at a time, the decoder counted beside the blocks."""
    decoder = model.decoder_multiply_adds((SIDE, SIDE))

    def run(plan, image):
        out = model(image[None], schedule=plan)
        full = functional.interpolate(read(out.decoded), (SIDE, SIDE), mode="bilinear", align_corners=False)
        return full.argmax(1)[0].numpy(), model.multiply_adds(out).item() + decoder

    losses, costs = np.zeros((len(images), len(settings))), np.zeros(len(settings))
    for row, image in enumerate(images):
        dense, full = run(schedule.dense(), image)
        for column, plan in enumerate(settings):
            found, work = run(plan, image)
            losses[row, column] = (found != dense).mean()
            costs[column] += work / full / len(images)
    return losses, costs


def nearer_or_farther(output):
    """Three classes of depth, around its mean."""
    depth = output.predicted_depth[:, None]
    return -((depth - depth.mean(dim=(1, 2, 3), keepdim=True) * torch.tensor([0.95, 1.0, 1.05])[:, None, None]) ** 2)


SIDE = 32


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["DPT, segmentation", "EoMT", "Depth Anything"])
def test_a_model_with_a_decoder_of_its_own_is_calibrated_by_what_the_decoder_says(name, tmp_path):
    model, images = decoding(name), models.images(20, (SIDE, SIDE), seed=1)
    scores = None if DECODERS[name].classes else nearer_or_farther
    read = model.host.class_scores if scores is None else scores
    ladder = ladders.by_threshold(model.schedule, thresholds=(0.9, 0.5, 0.2))
    cut = dataclasses.replace(schedule.truncated(after=2), carry=Feature())
    settings, chains = (*ladder, cut), ((0, 1, 2), (3,))
    options = {"at_most": 0.45, "preprocessing": WORDS, "scores": scores, "progress": iter}
    found = tet.calibrate(model, images, settings=settings, chains=chains, **options)
    expected = certify(settings, *decoded_table(model, images, settings, read), at_most=0.45, chains=chains)
    as_expected(found.report, expected)
    assert found.report.curve[0].cost < 1.1
    assert (
        found.report.risk == "disagreement" + (" of the classes of `scores`" if scores else "") + " at 32 x 32 pixels"
    )
    default, _ = tet.default_settings(model)
    assert default[-1] == dataclasses.replace(schedule.truncated(after=1), carry=Feature())
    again = tet.calibrate(model, images, **options | {"at_most": 0.9})
    assert again.certificate is not None
    assert set(again.before.statistics) >= {"confidence"}
    tet.save_certificate(again.certificate, tmp_path)
    model.retune(schedule.dense())
    tet.load_certificate(tmp_path, model, resolution=(SIDE, SIDE), preprocessing=WORDS)
    assert model.schedule == again.report.schedule
    with torch.no_grad():
        seen = tet.drift_sample(model, model(images), scores=scores)
    assert set(seen.statistics) == set(again.before.statistics)
    for statistic, row in seen.statistics.items():
        assert again.before.statistics[statistic] == pytest.approx(row, abs=1e-5)


def test_another_function_for_class_scores_is_noticed_by_what_it_gives(tmp_path):
    model, images = decoding("Depth Anything"), models.images(20, (SIDE, SIDE), seed=1)
    options = {"at_most": 0.9, "settings": (model.schedule,), "chains": None, "resume": tmp_path}
    first = calibrated(model, images, scores=nearer_or_farther, **options)
    assert calibrated(model, images, scores=nearer_or_farther, **options) == first
    with pytest.raises(TokenExitError, match="`resume` must be of the model as it is now, with the same `scores`"):
        calibrated(model, images, scores=lambda output: nearer_or_farther(output).roll(1, dims=1), **options)


def test_a_decoder_without_classes_must_be_read_by_a_function():
    model, images = decoding("Depth Anything"), models.images(20, (SIDE, SIDE))
    for scores, message in (
        (None, "`scores` must be given where a decoder does not return one map of class scores: a function from its"),
        (lambda output: output.predicted_depth, r"`scores` must give class scores of shape \(8, 3, height, width\)"),
    ):
        with pytest.raises(TokenExitError, match=message):
            tet.calibrate(model, images, at_most=0.5, preprocessing=WORDS, scores=scores, progress=iter)


@pytest.mark.parametrize("how", ["merges", "translators", "classes of exits"])
def test_a_map_of_class_scores_that_a_decoder_returns_is_compared_as_it_is(how):
    torch.manual_seed(0)
    vit, decoder, images = models.timm_vit(), torch.nn.Conv2d(48, 4, 3, padding=1), models.pictures(20)
    if how == "merges":
        model = tet.wrap(vit, MERGES, decoder=decoder).eval()
    elif how == "translators":
        plan = schedule.foretold(depth=6)
        model = tet.wrap(vit, plan, decoder=decoder, exit_heads=Translator()).eval()
    else:
        plan = dataclasses.replace(schedule.neighbours(radius={2: 0}, threshold=0.5), carry=Feature())
        model = tet.wrap(vit, plan, decoder=decoder, num_classes=4).eval()
    options = {"at_most": 0.9, "preprocessing": WORDS, "progress": iter}
    found = tet.calibrate(model, images, **options)
    given = tet.calibrate(model, images, scores=lambda decoded: decoded, **options)
    assert [point.loss for point in found.report.curve] == [point.loss for point in given.report.curve]
    assert found.report.chosen is not None


CHANGE = "twenty times the mean absolute change of the map, 1 at most"
OWN = Risk(CHANGE, lambda out, dense: (20 * (out.decoded - dense.decoded).abs().mean(dim=(1, 2, 3))).clamp(max=1))
MERGES = Schedule(merges=(Merge(1, 2, alike=0.9), Merge(3, 4, alike=0.8)))


def drawing():
    """A network under a decoder of convolutions to a map in [0, 1], without classes; its tokens merge."""
    torch.manual_seed(0)
    last = torch.nn.Conv2d(48, 1, 3, padding=1)
    with torch.no_grad():
        last.weight.mul_(100.0)
    return tet.wrap(models.timm_vit(), MERGES, decoder=torch.nn.Sequential(last, torch.nn.Sigmoid())).eval()


def test_a_loss_of_ones_own_certifies_what_merges_under_a_decoder_without_classes(tmp_path):
    model, images, losses, costs = drawing(), models.pictures(20), [], []
    settings, chains = tet.default_settings(model)
    assert (len(settings), len(chains)) == (14, 1)
    assert settings[8] == MERGES == model.schedule
    settings = settings[3::2]
    options = {"at_most": 0.45, "preprocessing": WORDS, "risk": OWN, "settings": settings, "progress": iter}
    found = tet.calibrate(model, images, resume=tmp_path / "kept", **options)
    decoder = model.decoder_multiply_adds((32, 48))
    with torch.no_grad():
        dense = model(images, schedule=schedule.dense())
        for plan in settings:
            out = model(images, schedule=plan)
            losses.append(OWN.loss(out, dense).double().numpy())
            work, full = (model.multiply_adds(one).double() + decoder for one in (out, dense))
            costs.append(float(work.mean() / full.mean()))
    as_expected(found.report, certify(settings, np.stack(losses, axis=1), costs, at_most=0.45))
    assert found.report.chosen is not None
    assert found.report.unmeasured
    assert f"Certified: mean loss of the user's own ({CHANGE}) over images at most 45 %" in str(found.certificate)
    assert tet.calibrate(model, images, resume=tmp_path / "kept", **options) == found
    with pytest.raises(TokenExitError, match="one of the same calibration, .* with other risk"):
        tet.calibrate(model, images, resume=tmp_path / "kept", **options | {"risk": Risk("change", OWN.loss)})

    tet.save_certificate(found.certificate, tmp_path)
    model.retune(schedule.dense())
    tet.load_certificate(tmp_path, model, resolution=(32, 48), preprocessing=WORDS)
    assert model.schedule == found.report.schedule
    with torch.no_grad():
        seen = tet.drift_sample(model, model(images))
    assert seen.statistics.keys() == found.before.statistics.keys() == {"tokens per block"}
    assert not drift.compare(found.before, seen).drifted


def test_a_loss_of_ones_own_may_look_at_whatever_a_model_returns():
    """Here exit depths, of a model with a final head; its parameters may have gradients."""
    weight = torch.nn.Parameter(torch.ones(()))
    late = Risk(
        "share of early patches", lambda out, dense: weight * (out.exit_depth < dense.exit_depth).float().mean((1, 2))
    )
    found = calibrated(risk=late, at_most=0.9)
    assert found.report.chosen is not None
    shares = sum(np.asarray(row) for name, row in found.before.statistics.items() if name.startswith("share"))
    assert found.report.chosen.loss == pytest.approx(shares.mean(), abs=1e-6)
    assert weight.grad is None


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": LABELS}, "`labels` must be given in `risk` where that is a Risk, and not beside it"),
        ({"size": (4, 6)}, "`size` must be given in `risk` where that is a Risk, and not beside it, got (4, 6)"),
        ({"risk": Risk(CHANGE, lambda out, _: out.logits)}, "`loss` must give one loss for each of the 8 images, got shape (8, 5, 4, 6) (twenty times"),
        ({"risk": Risk(CHANGE, lambda out, _: out.logits.mean((1, 2, 3)) * math.nan)}, "`loss` must give losses in [0, 1], and none that is NaN, got [nan] and 7 more (twenty times"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_a_risk_is_named(options, message):
    with pytest.raises(TokenExitError) as found:
        calibrated(**{"risk": OWN} | options)
    assert str(found.value).startswith(message)
