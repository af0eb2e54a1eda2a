"""A frozen network, from pictures to a certificate, in one command."""

import contextlib
import io
import json
import shutil
import sys

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image

import tokenexit_torch as tet
from examples import demo, frozen, runs, shell
from examples.about import About
from examples.scenes.draw import draw
from examples.scenes.vit import Config, PlainHost, ViT
from tests.examples.strips import CAMVID, needs_data
from tests.examples.strips import SIZE as SIDES
from tests.torch import models
from tokenexit import heads, schedule
from tokenexit.guarantees import drift
from tokenexit.guarantees.calibrate import Calibrated
from tokenexit.guarantees.calibration import Report

SIZE = (32, 48)
# The types of fits and calibrations are looked at by the tests of the library.
pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A run folder with a tiny network, whose weights are random."""
    torch.manual_seed(0)
    config = vars(Config(width=32, depth=6, heads=2, patch=8))
    vit = ViT(Config(**config))
    vit.load_state_dict(models.plain_host().module.state_dict())
    model = tet.wrap(PlainHost(vit), schedule.dense(after=(2,)), num_classes=3)
    palette = ((0, 0, 0), (1, 1, 1), (2, 2, 2))
    about = About("plain", config, ("a", "b", "c"), palette, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), SIZE)
    folder = tmp_path_factory.mktemp("network")
    runs.save(folder, model, about)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Fifty drawn pictures, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    for place in range(50):
        picture = Image.fromarray(draw(np.random.default_rng(place), size=(40, 50)).image)
        picture.save(folder / f"{place:02d}{'.jpg' if place % 2 else '.PNG'}")
    (folder / "notes.txt").write_text("nothing to see")
    return folder


def call(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["frozen", *map(str, options)])
    frozen.main()


def of_folder(network, pictures, out, *options):
    return ["--model", network, "--images", pictures, "--out", out, "--alpha", 0.4, "--steps", 30, *options]


@pytest.fixture(scope="module")
def straight(network, pictures, tmp_path_factory):
    """The folder of a whole run, and what it printed."""
    out = tmp_path_factory.mktemp("straight") / "out"
    before, printed = jaxtyping.config.jaxtyping_disable, io.StringIO()
    jaxtyping.config.update("jaxtyping_disable", True)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        call(patch, *of_folder(network, pictures, out))
    jaxtyping.config.update("jaxtyping_disable", before)
    return out, printed.getvalue()


def test_from_pictures_to_a_certificate(network, straight):
    out, printed = straight
    assert "Exit heads agree with the final head, on 17 images: after block 2" in printed
    assert "Chosen: setting" in printed
    assert "This holds if:" in printed
    report = json.loads((out / "report.json").read_text())
    assert report["images"] == 33
    assert report["risk"] == "disagreement at 32 x 48 pixels"
    assert (report["at_most"], report["confidence"]) == (0.4, 0.95)
    assert set(report["agreement_of_exit_heads"]) == {"2", "3", "4"}
    before = drift.Sample.from_dict(json.loads((out / "drift.json").read_text()))
    assert before.images == 33
    with Image.open(out / "curve.png") as picture:
        assert picture.width > 500
    model, about = runs.load(network)
    again = tet.load(model.host, out / "exits", head=model.head)
    words = json.loads((out / "certificate.json").read_text())["fingerprints"]["preprocessing"]
    assert words.startswith("RGB, scaled to cover 32 x 48 and cropped in the middle, 0 to 1, mean (0.5, 0.5, 0.5)")
    found = tet.load_certificate(out, again, resolution=about.size, preprocessing=words)
    assert again.schedule == found.schedule


def test_heads_may_look_around_tokens(network, pictures, tmp_path, monkeypatch):
    out = tmp_path / "out"
    call(monkeypatch, *of_folder(network, pictures, out, "--heads", "neighbourhood"))
    model, _ = runs.load(network)
    assert tet.load(model.host, out / "exits", head=model.head).head_plan == heads.Neighbourhood()
    assert json.loads((out / "fit.json").read_text())["fitted"]["heads"] == "neighbourhood"
    with pytest.raises(shell.UsageError, match="`--out` must be new or of the same exits"):
        call(monkeypatch, *of_folder(network, pictures, out))


def test_an_interrupted_run_goes_on_to_the_same_report(network, pictures, straight, tmp_path, monkeypatch):
    whole, turns = tet.calibrate, iter(range(10**6))

    def interrupted(loop):
        for item in loop:
            if next(turns) == 17:  # 5 batches to look at, 5 of the dense network, 5 of the first setting
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(
        tet, "calibrate", lambda *images, **options: whole(*images, **options | {"progress": interrupted})
    )
    with pytest.raises(KeyboardInterrupt):
        call(monkeypatch, *of_folder(network, pictures, tmp_path / "stopped"))
    kept = sorted(file.name for file in (tmp_path / "stopped" / "measured").iterdir())
    assert kept == ["calibration.json", "dense.safetensors", "setting-000.safetensors"]
    assert not (tmp_path / "stopped" / "report.json").exists()
    monkeypatch.setattr(tet, "calibrate", whole)
    monkeypatch.setattr(tet, "fit_exits", lambda *_, **__: pytest.fail("the heads are fitted already"))
    call(monkeypatch, *of_folder(network, pictures, tmp_path / "stopped"))
    for name in ("report.json", "certificate.json", "drift.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (straight[0] / name).read_bytes()


def test_never_exit_leaves_no_certificate(network, pictures, straight, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(straight[0], out)  # what was fitted and measured is not done again
    (out / "certificate.json").unlink()

    def never(*positional, **options):
        found = whole(*positional, **options)
        report = Report(**(vars(found.report) | {"chosen": None}))
        return Calibrated(report, None, found.before)

    whole = tet.calibrate
    monkeypatch.setattr(tet, "calibrate", never)
    call(monkeypatch, *of_folder(network, pictures, out))
    assert "Never exit" in capsys.readouterr().out
    assert not (out / "certificate.json").exists()


def test_exits_of_other_pictures_are_refused(network, pictures, straight, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(straight[0], out)
    for change in (("--seed", 1), ("--after", 2, 4), ("--fit-images", 9)):
        with pytest.raises(shell.UsageError, match="`--out` must be new or of the same exits"):
            call(monkeypatch, *of_folder(network, pictures, out, *change))
    (out / "fit.json").write_text("{")
    with pytest.raises(shell.UsageError, match="`--out` must be new or a folder of this script"):
        call(monkeypatch, *of_folder(network, pictures, out))


def test_bad_options_are_named(network, pictures, tmp_path, monkeypatch):
    def refused(words, *options):
        with pytest.raises(shell.UsageError, match=words):
            call(monkeypatch, "--out", tmp_path / "out", "--model", network, *options)

    (tmp_path / "empty").mkdir()
    refused("`--images` must be a folder of pictures", "--images", tmp_path / "empty")
    refused("`--images` must leave at least 189 images to calibrate on, .* got 33", "--images", pictures)
    refused("`--fit-images` must be at least 1, got 0", "--images", pictures, "--fit-images", 0)
    refused(r"`--data` must come with a network for \(352, 480\) pixels", "--data", tmp_path)
    broken = shutil.copytree(pictures, tmp_path / "broken")
    (broken / "00.PNG").write_bytes(b"no picture")
    refused("`--images` must hold pictures, got .*00.PNG", "--images", broken, "--alpha", 0.4)


@needs_data
@pytest.mark.skipif(not demo.SHIPPED.is_dir(), reason="the shipped model is not there")
def test_a_network_on_camvid(ready_for_strips, strips, tmp_path, monkeypatch, capsys):
    options = ["--init", ready_for_strips, "--data", CAMVID, "--fit-images", 4, "--steps", 10, "--sequence", "Seq05VD"]
    call(monkeypatch, *options, "--every", 17, "--alpha", 0.6, "--confidence", 0.9, "--out", tmp_path)
    assert "on 4 images: after block 4" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["images"] == 11
    assert report["risk"] == f"disagreement at {SIDES[0]} x {SIDES[1]} pixels"
    with pytest.raises(shell.UsageError, match="`--split` must be val or test, with a --sequence of"):
        call(monkeypatch, *options[:4], "--sequence", "nowhere", "--out", tmp_path)
