"""`make demo`, as a person runs it, and on pictures of their own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples import segment, shell
from examples.scenes import merged
from examples.scenes.draw import draw

ROOT = Path(__file__).parents[2]


def call(monkeypatch, *options):
    """What a process of its own does, but for its start: see `test_bad_input_is_one_line`."""
    monkeypatch.setattr(sys, "argv", ["segment", *map(str, options)])
    shell.exit_with(segment.main)


def test_the_shipped_model_segments_unseen_scenes_with_fewer_tokens(unchecked, tmp_path, monkeypatch, capsys):
    call(monkeypatch, "--out", tmp_path, "--scenes", 2, "--rounds", 1)
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["agreement"] >= 0.99
    assert found["token_blocks"] < 0.65
    assert sum(found["patches_by_depth"].values()) == found["patches"] == 2 * 32 * 48
    assert sum(found["patches_by_size"].values()) == found["patches"] > found["patches_by_size"]["1"]
    assert found["multiply_adds"]["exits"] < found["multiply_adds"]["dense"]
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 800
    for word in (
        "ms a picture",
        "token-blocks",
        "pixels as in dense",
        "into tokens of 16",
        "after block 6",
        "demo.png",
    ):
        assert word in printed


def test_pictures_of_ones_own_at_another_threshold(unchecked, tmp_path, monkeypatch):
    file = tmp_path / "street.jpg"
    Image.fromarray(draw(np.random.default_rng(77), size=(200, 500)).image).save(file)
    call(monkeypatch, "--image", file, "--threshold", 1.0, "--rounds", 1, "--out", tmp_path)
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["patches_by_depth"] == {"6": 0, "12": found["patches"]}  # what merges stays
    assert found["agreement"] >= 0.9  # scaled and cropped, as no scene that the model knows


def test_the_picture_of_merging_is_small_enough_for_the_docs(unchecked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["merged", "--out", str(tmp_path / "made" / "merging.png")])
    shell.exit_with(merged.main)
    assert capsys.readouterr().out.startswith("1,536 tokens in the first block, ")
    assert (tmp_path / "made" / "merging.png").stat().st_size < 150_000


def test_bad_input_is_one_line(tmp_path):
    command = [sys.executable, "-m", "examples.segment", "--image", "no_such.png", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert done.stderr.startswith("error: `--image` must be a picture, got 'no_such.png'")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "no_such_folder"], "error: `folder` must hold a valid host.json"),
        (["--threshold", "1.5"], "error: `threshold` must be in [0, 1], got 1.5"),
        (["--rounds", "0"], "error: `--rounds` must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, options, message):
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, *options, "--out", tmp_path)
    assert str(caught.value.code).startswith(message)
