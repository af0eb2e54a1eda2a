"""A predictor of NumPy alone: any batch of pictures is its pictures one by one, and what travels is a recipe."""

import dataclasses
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core import predicting, strategies
from tests.core.predicting import OWN_SIZE, PATCH, PLAN, Shades, Toy, build, build_with
from tokenexit import TokenExitError, schedule
from tokenexit.guarantees.certificate import Certificate, Fingerprints
from tokenexit.windows import Windows

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
EVERYTHING = ("label", "exit_depth", "tokens", "scores")
SIZE = (8, 12)


def toy(*given_, **options):
    return Toy(*(given_ or (build,)), **{"mean": MEAN, "std": STD, "outputs": EVERYTHING} | options)


def pictures(count, size=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def prepared(size=SIZE, seed=0):
    return np.random.default_rng(seed).normal(size=(3, *size)).astype(np.float32)


def same(found, wanted):
    assert list(found) == list(wanted)
    for name in found:
        np.testing.assert_array_equal(found[name], wanted[name])
        assert found[name].dtype == wanted[name].dtype


@st.composite
def mixed(draw):
    """Pictures of few sizes and both types, so that some are alike."""
    sizes = st.sampled_from([SIZE, (6, 4), (9, 5), (1, 1)])
    kinds = draw(st.lists(st.tuples(st.booleans(), sizes), min_size=1, max_size=6))
    return [pictures(1, size, at)[0] if raw else prepared(size, at) for at, (raw, size) in enumerate(kinds)]


@given(mixed(), st.none() | strategies.windows(largest=8), st.none() | st.just((5, 7)))
def test_each_picture_has_what_it_has_alone_in_its_order(images, windows, size):
    predictor = toy(windows=windows, size=size)
    found = predictor({"image": images})
    for number, image in enumerate(images):
        alone = predictor({"image": [image]})
        same({name: values[number] for name, values in found.items()}, {name: one[0] for name, one in alone.items()})
    for values in found.values():
        alike = len({value.shape for value in values}) == 1
        assert len(values) == len(images)
        assert (values.dtype == object) is not alike


@given(mixed())
def test_a_list_a_tuple_and_an_array_of_arrays_are_the_same(images):
    as_array = np.empty(len(images), dtype=object)
    for number, image in enumerate(images):
        as_array[number] = image
    wanted = toy(outputs=["tokens"])({"image": images})["tokens"]
    for column in (tuple(images), as_array):
        np.testing.assert_array_equal(toy(outputs=["tokens"])({"image": column})["tokens"], wanted)


def test_what_it_gives_is_what_the_model_gives():
    images = pictures(3)
    scores, depth, tokens = Shades()(((images / 255 - MEAN) / STD).transpose(0, 3, 1, 2).astype(np.float32))
    pixels = scores.repeat(PATCH, axis=2).repeat(PATCH, axis=3)
    wanted = {"label": pixels.argmax(1).astype(np.uint8), "exit_depth": depth, "tokens": tokens, "scores": pixels}
    for given_ in (images, list(images)):
        same(toy()({"image": given_}), wanted)
    assert set(np.unique(wanted["label"])) == {0, 1, 2}
    same(toy(outputs=["tokens", "label"])({"image": images}), {name: wanted[name] for name in ("tokens", "label")})


@pytest.mark.parametrize(("classes", "dtype"), [(2, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_labels_have_the_smallest_type_that_holds_all_classes(classes, dtype):
    assert toy(partial(build, classes))({"image": pictures(1)})["label"].dtype == dtype


def test_pictures_are_shown_in_one_size_and_found_in_their_own():
    predictor = toy(size=(6, 10))
    found = predictor({"image": [*pictures(2), prepared((4, 4))]})
    assert predictor.load().seen == [(2, 3, 6, 10), (1, 3, 4, 4)]
    assert [label.shape for label in found["label"]] == [SIZE, SIZE, (4, 4)]
    assert [depth.shape for depth in found["exit_depth"]] == [(3, 5), (3, 5), (2, 2)]


def test_pictures_of_one_size_and_type_run_together():
    sizes = [SIZE, (6, 4), SIZE, (6, 4), SIZE]
    predictor = toy()
    predictor({"image": [pictures(1, size)[0] for size in sizes] + [prepared()]})
    assert predictor.load().seen == [(3, 3, *SIZE), (2, 3, 6, 4), (1, 3, *SIZE)]


@pytest.mark.parametrize("windows", [None, Windows((4, 4), (2, 2))], ids=["whole", "windows"])
@pytest.mark.parametrize("empty", [pictures(0, (6, 10)), np.zeros((0, 3, 6, 10), np.float32), [], (), np.array([])])
def test_no_pictures(windows, empty):
    predictor = toy(windows=windows)
    found = predictor({"image": empty, "path": []})
    assert found.pop("path") == []
    known = isinstance(empty, np.ndarray) and empty.ndim == 4
    size = (6, 10) if known else OWN_SIZE if windows is None else windows.size
    one = predictor({"image": pictures(1, size)})
    assert {name: (value.dtype, value.shape[1:]) for name, value in found.items()} == {
        name: (value.dtype, value.shape[1:]) for name, value in one.items()
    }
    assert all(len(value) == 0 for value in found.values())


def test_what_else_is_in_a_batch_is_handed_on():
    found = toy(outputs=["label"])({"path": np.array(["a", "b"]), "image": pictures(2), "scores": "of another kind"})
    assert sorted(found) == ["label", "path", "scores"]
    assert found["path"].tolist() == ["a", "b"]
    assert found["scores"] == "of another kind"


def test_what_travels_is_a_recipe():
    original = toy(partial(build, 4), windows=Windows((4, 4), (2, 2)), mean=list(MEAN), precision="float64")
    before = pickle.dumps(original)
    images = {"image": pictures(2)}
    wanted = original(images)
    assert pickle.dumps(original) == before
    assert len(before) < 1000
    again = pickle.loads(before)
    names = ("mean", "std", "size", "windows", "outputs", "certificate", "precision")
    assert {name: getattr(again, name) for name in names} == {name: getattr(original, name) for name in names}
    assert again.mean == MEAN
    assert again.load() is not original.load()
    same(again(images), wanted)


def test_a_recipe_does_not_change_and_a_changed_copy_builds_its_own():
    original = toy()
    model = original.load()
    assert original.load() is model
    with pytest.raises(dataclasses.FrozenInstanceError):
        original.size = (4, 4)
    assert dataclasses.replace(original, size=(4, 4)).load() is not model


def test_threads_that_call_at_once_build_one_model():
    predictor = toy(partial(build, pause=0.2))
    predicting.built.clear()
    ready = threading.Barrier(4)
    batches = [{"image": pictures(2, seed=seed)} for seed in range(4)]

    def call(batch):
        ready.wait()
        return predictor(batch)

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(call, batches))
    assert len(predicting.built) == 1
    for batch, one in zip(batches, found, strict=True):
        same(one, predictor(batch))


def test_a_build_that_failed_is_tried_again():
    predicting.built.clear()
    predictor = toy(predicting.build_after_one_failure)
    with pytest.raises(OSError, match="not there yet"):
        predictor.load()
    assert predictor.load() is predictor.load()
    assert len(predicting.built) == 2


def local():
    def build():
        return None

    return build


RULE = "`build` must be a function that other processes can import by its name, or functools.partial of one"
WEIGHTS = "`build` must be made of plain data, for weights do not travel, got an array"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lambda: None, rf"{RULE}, got .*<lambda>: "),
        (local, rf"{RULE}, got local.<locals>.build: "),
        (lambda: partial(partial(lambda _: None), 1), rf"{RULE}, got .*<lambda>: "),
        (lambda: partial(build_with, threading.Lock()), f"{RULE}, got build_with: cannot pickle '_thread.lock'"),
        (lambda: "run", f"{RULE}, got 'run'"),
        (lambda: partial(build_with, {"weights": [np.zeros(3)]}), WEIGHTS),
        (lambda: partial(build_with, model=np.zeros(3)), WEIGHTS),
        (lambda: np.zeros(3).sum, WEIGHTS),
    ],
)
def test_what_other_processes_could_not_build_is_refused_at_once_with_the_reason(make, message):
    with pytest.raises(TokenExitError, match=message):
        toy(make())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": (1.0, 1.0)}, r"`std` must be 3 positive numbers, as `mean` has, got \(1.0, 1.0\)"),
        ({"std": (1.0, 0.0, 1.0)}, "`std` must be 3 positive numbers"),
        ({"mean": (), "std": ()}, r"`std` must be 0 positive numbers, as `mean` has, got \(\)"),
        ({"size": (32,)}, r"`size` must be a height and a width from 1 up, in pixels, got \(32,\)"),
        ({"size": (32, 0)}, r"`size` must be a height and a width from 1 up, in pixels, got \(32, 0\)"),
        ({"windows": (8, 8)}, r"`windows` must be a Windows, got \(8, 8\)"),
        ({"outputs": ()}, r"`outputs` must be different names among label, exit_depth, tokens, scores, got \(\)"),
        ({"outputs": ("label", "label")}, "`outputs` must be different names"),
        ({"outputs": "label"}, "`outputs` must be different names .*, got 'label'"),
        ({"certificate": "yes"}, "`certificate` must be a Certificate, got str"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(TokenExitError, match=message):
        toy(**options)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (pictures(1), "`batch` must be a mapping, got ndarray"),
        ({"images": pictures(1)}, r"`batch` must hold pictures under `image`, got \['images'\]"),
        ({"image": pictures(1), "label": [3]}, r"`batch` must leave the names of `outputs` free, .*, got \['label'\]"),
        ({"image": 3}, "`image` must be an array or a list of arrays, got int"),
        ({"image": np.array(3)}, "`image` must be an array or a list of arrays, got ndarray"),
        (
            {"image": pictures(1, (32, 48))[..., :2]},
            r"`image\[0\]` must be an array of uint8 \(height, width, 3\) or float32 \(3, height, width\), got uint8 \(32",
        ),
        ({"image": [pictures(1)[0], np.zeros((8, 8, 3), np.float32)]}, r"`image\[1\]` must be .*got float32 \(8, 8, 3"),
        ({"image": np.zeros((1, 3, 8, 8))}, r"`image\[0\]` must be .*got float64 \(3, 8, 8\)"),
        ({"image": ["a.jpg"]}, r"`image\[0\]` must be .*got str"),
        ({"image": pictures(1, (0, 8))}, r"`image\[0\]` must have pixels, got shape \(0, 8, 3\)"),
    ],
)
def test_bad_batches_are_named(batch, message):
    with pytest.raises(TokenExitError, match=message):
        toy()(batch)


def test_a_model_that_will_not_do_is_named_when_it_is_built():
    with pytest.raises(TokenExitError, match="`build` must return Shades, got str"):
        toy(predicting.build_text).load()
    with pytest.raises(TokenExitError, match="`outputs` must leave out `label` for a model of one class, got"):
        toy(partial(build, 1)).load()
    assert toy(partial(build, 1), outputs=["scores"])({"image": pictures(1)})["scores"].shape == (1, 1, *SIZE)


def certificate(resolution=SIZE, plan=PLAN):
    prints = Fingerprints({"shades": f"{3:064x}"}, "float32", resolution, "as drawn", "numpy")
    return Certificate(plan, "disagreement", 0.1, 0.9, 50, "betting", 0, 0.05, 0.3, prints)


def test_with_a_certificate_only_what_was_certified_is_run():
    images = {"image": pictures(2)}
    same(toy(certificate=certificate())(images), toy()(images))
    again = pickle.loads(pickle.dumps(toy(certificate=certificate())))
    assert again.certificate == certificate()
    shown = toy(certificate=certificate((4, 4)), size=(4, 4))
    assert shown(images)["label"].shape == (2, *SIZE)
    with pytest.raises(
        TokenExitError, match=r"`size` must be that of the certificate, \(4, 4\), got pictures shown in \(8, 12\)"
    ):
        shown({"image": [prepared()]})  # what is prepared is shown as it is
    with pytest.raises(
        TokenExitError, match=r"`size` must be that of the certificate, \(8, 12\), got pictures shown in \(4, 4\)"
    ):
        toy(certificate=certificate(), size=(4, 4))(images)
    with pytest.raises(TokenExitError, match="`windows` must be left out beside a certificate, which holds for whole"):
        toy(certificate=certificate(), windows=Windows(SIZE, SIZE))
    with pytest.raises(TokenExitError, match="got dtype 'float16' instead of 'float32'"):
        toy(certificate=certificate(), precision="float16").load()
    with pytest.raises(TokenExitError, match="other weights in 1 of 1"):
        toy(partial(build, 4), certificate=certificate()).load()
    with pytest.raises(TokenExitError, match="`build` must return a model with the schedule of the certificate"):
        toy(certificate=certificate(plan=schedule.dense())).load()
