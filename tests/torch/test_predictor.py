"""A predictor says what direct calls of the model say, in any process, and takes no weights along."""

import multiprocessing
import os
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import tokenexit_torch as tet
from tests.torch import models, recipes
from tests.torch.recipes import MEAN, STD, from_folder
from tokenexit import TokenExitError, schedule

PLAN = schedule.dtop(after=(2, 4), threshold=0.5, per_class=2)
SIZE = (32, 48)
EVERYTHING = ("label", "exit_depth", "tokens", "scores")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("exits")
    tet.save(models.wrapped(models.plain_host, PLAN), where)
    return where


@pytest.fixture
def model(folder):
    return from_folder(folder).eval()


def predictor(folder, **options):
    return tet.Predictor(partial(from_folder, folder), **{"mean": MEAN, "std": STD, "outputs": EVERYTHING} | options)


def pictures(count, size=SIZE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def prepared(images, dtype=torch.float32):
    """As one would by hand."""
    return torch.tensor((images / 255 - MEAN) / STD, dtype=torch.float32).permute(0, 3, 1, 2).to(dtype)


@torch.inference_mode()
def direct(model, images, size=None):
    """What the model says of prepared images, called by hand."""
    out = model(images)
    scores = out.upsample(tuple(images.shape[2:]) if size is None else size)
    told = {"label": scores.argmax(1), "exit_depth": out.exit_depth, "tokens": out.tokens_per_block, "scores": scores}
    return {name: value.numpy() for name, value in told.items()}


def same(found, wanted):
    assert list(found) == list(wanted)
    for name in found:
        if name == "scores":
            np.testing.assert_allclose(found[name], wanted[name], atol=1e-4, rtol=1e-4)
        else:
            np.testing.assert_array_equal(found[name], wanted[name])


def test_it_says_what_a_direct_call_says(folder, model):
    images = pictures(3)
    found = predictor(folder)({"image": images})
    same(found, direct(model, prepared(images)))
    assert {name: value.dtype.name for name, value in found.items()} == {
        "label": "uint8", "exit_depth": "int64", "tokens": "int64", "scores": "float32",
    }  # fmt: skip
    assert found["exit_depth"].min() < 6


def test_prepared_images_are_taken_as_they_are(folder, model):
    images = models.images(2).numpy()
    images.flags.writeable = False
    same(predictor(folder, size=(24, 24))({"image": images}), direct(model, torch.from_numpy(images.copy())))


def test_pictures_are_resized_for_the_model_and_told_of_in_their_own_size(folder, model):
    images = pictures(2, (50, 37))
    shown = functional.interpolate(
        torch.from_numpy(images).permute(0, 3, 1, 2) / 255, SIZE, mode="bilinear", antialias=True
    )
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    found = predictor(folder, size=SIZE)({"image": images})
    same(found, direct(model, (shown - mean) / std, (50, 37)))
    assert found["label"].shape == (2, 50, 37)


def test_pictures_of_different_sizes_keep_their_order(folder, model):
    mixed = [pictures(1, size, seed)[0] for seed, size in enumerate([SIZE, (24, 16), SIZE, (40, 8)])]
    mixed.append(models.images(1, SIZE, seed=9)[0].numpy())
    as_array = np.empty(5, dtype=object)
    for number, image in enumerate(mixed):
        as_array[number] = image
    wanted = [direct(model, prepared(image[None])) for image in mixed[:4]] + [
        direct(model, torch.from_numpy(mixed[4][None]))
    ]
    for column in (mixed, tuple(mixed), as_array):
        found = predictor(folder)({"image": column})
        for name, values in found.items():
            assert len(values) == 5
            assert values.dtype == (np.int64 if name == "tokens" and values.ndim > 1 else object)
        for number, one in enumerate(wanted):
            same({name: values[number] for name, values in found.items()}, {name: one[name][0] for name in found})


@torch.inference_mode()
def test_large_pictures_are_cut_into_windows(folder, model):
    windows = tet.Windows(SIZE, (16, 24), batch=3)
    images = pictures(2, (50, 70))
    wide = tet.sliding(model, prepared(images), windows)
    found = predictor(folder, windows=windows)({"image": images})
    count = len(wide.corners)
    same(found, {
        "label": wide.logits.argmax(1).numpy(),
        "exit_depth": wide.windows.exit_depth.unflatten(0, (2, count)).numpy(),
        "tokens": wide.windows.tokens_per_block.unflatten(0, (2, count)).sum(1).numpy(),
        "scores": wide.logits.numpy(),
    })  # fmt: skip


@pytest.mark.parametrize("windows", [None, tet.Windows((16, 16), (8, 8))], ids=["whole", "windows"])
@pytest.mark.parametrize("empty", [pictures(0, (24, 40)), models.images(0, (24, 40)).numpy(), [], np.array([])])
def test_no_pictures(folder, windows, empty):
    given = predictor(folder, windows=windows)
    found = given({"image": empty, "path": []})
    assert found.pop("path") == []
    known = isinstance(empty, np.ndarray) and empty.ndim == 4
    size = (24, 40) if known else given.load().host.image_shape[1:] if windows is None else (16, 16)
    one = given({"image": pictures(1, size)})
    assert {name: (value.dtype, value.shape[1:]) for name, value in found.items()} == {
        name: (value.dtype, value.shape[1:]) for name, value in one.items()
    }
    assert all(len(value) == 0 for value in found.values())


def test_autocast_and_evaluation_mode_are_its_own(folder):
    images = pictures(2)
    plain, half = predictor(folder)({"image": images}), predictor(folder, autocast=torch.bfloat16)({"image": images})
    assert not np.array_equal(plain["scores"], half["scores"])
    np.testing.assert_allclose(plain["scores"], half["scores"], atol=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        same(predictor(folder)({"image": images}), plain)
    built = predictor(folder)
    assert not built.load().training
    assert built.load() is built.load()
    called_first = predictor(folder)
    called_first({"image": images})
    assert not any(weight.is_inference() for weight in called_first.load().parameters())


def test_what_travels_is_a_recipe_and_no_weights(folder):
    original = predictor(folder, windows=tet.Windows(SIZE, SIZE), autocast=torch.bfloat16)
    before = pickle.dumps(original)
    images = {"image": pictures(2)}
    wanted = original(images)
    assert pickle.dumps(original) == before
    assert len(before) < 2000
    again = pickle.loads(before)
    names = ("mean", "std", "size", "windows", "device", "autocast", "outputs")
    assert {name: getattr(again, name) for name in names} == {name: getattr(original, name) for name in names}
    assert again.load() is not original.load()
    same(again(images), wanted)


def test_two_processes_share_a_list_of_pictures(folder, tmp_path):
    files = [tmp_path / f"{number}.npy" for number in range(7)]
    for seed, file in enumerate(files):
        np.save(file, pictures(1, seed=seed)[0])
    given = predictor(folder)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        shares = pool.starmap(recipes.predict_share, [(given, files, rank, 2) for rank in range(2)], chunksize=1)
    assert os.getpid() not in {process for process, *_ in shares}
    assert [built for _, built, _ in shares] == [1, 1]  # for two batches each
    assert [len(found) for *_, found in shares] == [4, 3]
    together = shares[0][2] | shares[1][2]
    assert sorted(together) == files
    for file in files:
        alone = given({"image": np.load(file)[None]})
        same(together[file], {name: value[0] for name, value in alone.items()})


class Holder:
    """A recipe that has a model inside."""

    def __init__(self, model):
        self.model = model

    def build(self):
        return self.model


def build_with(_, **__):
    return None


WEIGHTS = "`build` must be made of plain data, for weights do not travel, got a"


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), f"{WEIGHTS} module"),
        (lambda: Holder(nn.Linear(2, 2)).build, f"{WEIGHTS} module"),
        (lambda: partial(build_with, {"weights": [torch.zeros(3)]}), f"{WEIGHTS} tensor"),
        (lambda: partial(build_with, model=nn.Linear(2, 2)), f"{WEIGHTS} module"),
    ],
)
def test_modules_and_tensors_do_not_travel(make, message):
    with pytest.raises(TokenExitError, match=message):
        tet.Predictor(make(), mean=MEAN, std=STD)


@pytest.mark.usefixtures("unchecked")
def test_a_tensor_is_no_batch_of_pictures(folder):
    with pytest.raises(TokenExitError, match="`image` must be an array or a list of arrays, got Tensor"):
        predictor(folder)({"image": torch.zeros(1, 3, 8, 8)})


def test_a_function_that_builds_something_else_is_named():
    with pytest.raises(TokenExitError, match="`build` must return a model from `wrap` with a head .*, got str"):
        tet.Predictor(recipes.from_nothing, mean=MEAN, std=STD).load()


def certified(folder):
    """A certificate for the model of a folder, and the folder with exits that follow it."""
    model = from_folder(folder).eval()
    images = torch.randn(24, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    given = {"at_most": 0.9, "preprocessing": "as drawn", "settings": [PLAN], "progress": iter}
    found = tet.calibrate(model, images, **given).certificate
    assert found is not None
    return found


def test_with_a_certificate_only_what_was_certified_is_run(folder, tmp_path):
    found = certified(folder)
    whole = pictures(2)
    told, plain = predictor(folder, certificate=found)({"image": whole}), predictor(folder)({"image": whole})
    np.testing.assert_array_equal(told["label"], plain["label"])
    again = pickle.loads(pickle.dumps(predictor(folder, certificate=found)))
    assert again.certificate == found
    resized = predictor(folder, certificate=found, size=SIZE)({"image": pictures(1, (50, 70))})
    assert resized["label"].shape == (1, 50, 70)
    with pytest.raises(
        TokenExitError, match=r"`size` must be that of the certificate, \(32, 48\), got pictures shown in"
    ):
        predictor(folder, certificate=found)({"image": pictures(1, (64, 48))})
    with pytest.raises(TokenExitError, match="`windows` must be left out beside a certificate"):
        predictor(folder, certificate=found, windows=tet.Windows(SIZE, SIZE))
    with pytest.raises(TokenExitError, match="got dtype 'float32, autocast to bfloat16' instead of 'float32'"):
        predictor(folder, certificate=found, autocast=torch.bfloat16).load()
    other = models.wrapped(models.plain_host, PLAN.with_threshold(0.1))
    tet.save(other, tmp_path / "other")
    with pytest.raises(TokenExitError, match="`build` must return a model with the schedule of the certificate"):
        predictor(tmp_path / "other", certificate=found).load()
    with torch.no_grad():
        other.exit_heads["2"][-1].bias[0] += 1
    tet.save(other, tmp_path / "other")
    with pytest.raises(TokenExitError, match="other weights in 1 of"):
        predictor(tmp_path / "other", certificate=found).load()
