"""Assess, calibrate and show, end to end."""

import json
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import tokenexit_torch as tet
from tests.cli import networks, pictures
from tokenexit import TokenExitError, schedule
from tokenexit.guarantees import certificate
from tokenexit_cli import _calibrate
from tokenexit_cli._pictures import Pictures, colours, files_in, prepared, read, words
from tokenexit_cli.main import main

TEN = tuple(f"{number}.png" for number in range(10))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return pictures.write(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    return pictures.write(tmp_path_factory.mktemp("ten"), TEN, ((32, 48),) * 10)


def test_show_says_and_draws(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["show", "tests.cli.networks:wrapped", str(photos / "a/one.png")]) == 0
    network = networks.wrapped()
    with torch.inference_mode():
        out = network.model.eval()(prepared(network, read(photos / "a/one.png"))[None])
    assert capsys.readouterr().out == f"{out.summary()}\nDrawn to one_exits.png.\n"
    with Image.open(tmp_path / "one_exits.png") as drawn:
        assert drawn.width > 600
    arguments = ["show", "tests.cli.networks:wrapped", str(photos / "a/one.png"), "--threshold", "0.999999"]
    assert main([*arguments, "--out", str(tmp_path / "other.svg")]) == 0
    assert "none of the patches left" in capsys.readouterr().out
    assert (tmp_path / "other.svg").read_text().startswith("<?xml")
    for wrong in ("no/where.png", "one.what"):
        assert main([*arguments, "--out", str(tmp_path / wrong)]) == 2
        assert "error: `--out` must be a file that can be drawn, got" in capsys.readouterr().err


def calibrate(photos, out, *options):
    arguments = ["calibrate", "tests.cli.networks:wrapped", "--images", str(photos), "--out", str(out)]
    return main([*arguments, "--alpha", "0.7", "--confidence", "0.8", *options])


def test_calibrate_writes_what_the_library_finds_and_goes_on(ten, tmp_path, monkeypatch, capsys):
    network = networks.wrapped()
    shown = Pictures(network, ten, TEN, 8, torch.device("cpu"), torch.float32)
    options = {"at_most": 0.7, "confidence": 0.8, "preprocessing": words(network), "progress": iter}
    wanted = tet.calibrate(network.model.eval(), shown, **options)

    def interrupted(images, **_):
        for number, one in enumerate(images):
            if number == 1 and len(passes) == 2:
                signal.raise_signal(signal.SIGINT)
            yield one
        passes.append(number)

    passes, bar = [], _calibrate.tqdm
    monkeypatch.setattr(_calibrate, "tqdm", interrupted)
    assert calibrate(ten, tmp_path) == 130
    assert capsys.readouterr().err.strip() == "stopped; run the same command again to go on"
    assert not (tmp_path / "report.json").exists()
    monkeypatch.setattr(_calibrate, "tqdm", bar)
    assert calibrate(ten, tmp_path) == 0
    files = "report.json, drift.json, curve.png, certificate.json"
    said = re.sub("\nIn its own passes an image took .*", "", capsys.readouterr().out)  # as far as it was run again
    assert said == f"{wanted.report}\n\nWritten to {tmp_path}: {files}\n"
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(wanted.report.to_dict()))
    assert json.loads((tmp_path / "drift.json").read_text()) == json.loads(json.dumps(wanted.before.to_dict()))
    assert certificate.from_json((tmp_path / "certificate.json").read_text()) == wanted.certificate
    assert calibrate(ten, tmp_path, "--batch", "3") == 0
    assert calibrate(ten, tmp_path, "--alpha", "0.6") == 2
    assert capsys.readouterr().err.startswith("error: `resume` must")


def test_a_calibration_takes_enough_pictures_all_of_them_whole(photos, ten, tmp_path, capsys):
    assert calibrate(photos, tmp_path / "out", "--alpha", "0.02") == 2
    assert capsys.readouterr().err.startswith("error: `images` must be at least")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"no picture")
    assert calibrate(tmp_path / "bad", tmp_path / "out") == 2
    assert "`--images` must hold pictures that can be read, got" in capsys.readouterr().err


def test_calibrating_what_is_shown_in_several_sizes_is_refused(photos, tmp_path, capsys):
    arguments = ["calibrate", "tests.cli.networks:prepared", "--images", str(photos), "--out", str(tmp_path)]
    assert main(arguments) == 2
    assert "`preprocess` must give tensors of one size for this command" in capsys.readouterr().err


class Found:
    def __str__(self):
        return "Worth it."


@pytest.fixture
def told(monkeypatch):
    """What the assessment was asked, by its stand-in."""
    asked = {}

    def assess(model, images, **options):
        asked.update(options, model=model, images=list(images), again=list(images))
        return Found()

    monkeypatch.setattr(tet, "assess", assess, raising=False)
    return asked


def test_assess_hands_network_pictures_and_labels_over(photos, tmp_path, told, capsys):
    for number, (name, (height, width)) in enumerate(zip(pictures.NAMES, pictures.SIZES, strict=True)):
        file = (tmp_path / "labels" / name).with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        label = np.full((height, width), number, np.uint8)
        label[height // 2 :] = 255
        Image.fromarray(label).save(file)
    out = tmp_path / "out"
    options = ["--labels", str(tmp_path / "labels"), "--out", str(out), "--batch", "3", "--minutes", "2", "--compiled"]
    assert main(["assess", "tests.cli.networks:bare", "--images", str(photos), *options]) == 0
    assert capsys.readouterr().out == f"Worth it.\n\nWritten to {out}: assessment.json, page.html, exits/\n"
    assert [len(batch) for batch in told["images"]] == [len(batch) for batch in told["again"]] == [3, 1]
    network, names = networks.bare(), files_in(photos)
    wanted = torch.stack([prepared(network, read(photos / name)) for name in names])
    assert torch.equal(torch.cat(told["images"]), wanted)
    assert told["labels"].shape == (4, 32, 48)
    order = [pictures.NAMES.index(name) for name in names]
    assert told["labels"][:, 0, 0].tolist() == order
    assert told["labels"][:, -1, -1].tolist() == [255] * 4
    assert type(told["head"]) is torch.nn.Linear
    assert (told["decoder"], told["taps"]) == (None, None)
    assert (told["at_most"], told["batch"], told["minutes"], told["out"], told["ignore"]) == (0.01, 3, 2.0, out, 255)
    assert told["baselines"] == ("truncation", "smaller input", "compiled dense")
    assert list(told["progress"]([1, 2])) == [1, 2]


def test_assess_takes_decoders_fewer_pictures_and_a_level(photos, tmp_path, told):
    options = ["--limit", "2", "--at-most", "0.05", "--ignore", "0", "--out", str(tmp_path)]
    assert main(["assess", "tests.cli.networks:decoding", "--images", str(photos), *options]) == 0
    assert sum(map(len, told["images"])) == 2
    assert (told["batch"], told["ignore"]) == (None, 0)
    assert (type(told["decoder"]), told["taps"], told["head"]) == (networks.Summing, (3, 6), None)
    assert (told["labels"], told["at_most"], told["baselines"]) == (None, 0.05, ("truncation", "smaller input"))


@pytest.mark.parametrize(("content", "message"), [
    (None, "`--labels` must hold a PNG for each picture, as one.png for a/one.png, got"),
    (np.zeros((4, 4, 3), np.uint8), "`--labels` must hold PNGs of class indices, one channel, got"),
    (b"no picture", "`--labels` must hold pictures that can be read, got"),
])  # fmt: skip
def test_labels_that_are_missing_or_none(content, message, photos, tmp_path, told, capsys):
    (tmp_path / "a").mkdir()
    if isinstance(content, bytes):
        (tmp_path / "a/one.png").write_bytes(content)
    elif content is not None:
        Image.fromarray(content).save(tmp_path / "a/one.png")
    assert main(["assess", "tests.cli.networks:bare", "--images", str(photos), "--labels", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_pictures_are_found_in_order_and_evenly(photos, tmp_path):
    assert files_in(photos) == ("a/one.png", "a/two.jpg", "b/c/three.png", "four.webp")
    assert files_in(photos, limit=2) == ("a/one.png", "b/c/three.png")
    assert files_in(photos, limit=9) == files_in(photos)
    assert files_in(photos, without=photos / "b") == ("a/one.png", "a/two.jpg", "four.webp")
    with pytest.raises(TokenExitError, match="`--images` must be a folder of pictures \\(.bmp"):
        files_in(tmp_path)


def test_words_say_what_is_done_to_pictures():
    said = "RGB, resized to 32 x 48 bilinearly and smoothed, 0 to 1, mean 0.5, 0.4, 0.3, deviation 0.2, 0.25, 0.3"
    assert words(networks.wrapped()) == said
    assert words(networks.prepared()) == "RGB, then tests.cli.networks.cut"


def test_a_preparation_of_ones_own_is_shown_as_it_is(photos):
    network, photo = networks.prepared(), read(photos / "four.webp")
    assert torch.equal(colours(network, photo), prepared(network, photo))
    assert torch.equal(colours(network, photo), networks.cut(photo))
    assert schedule.dense() != network.model.schedule
