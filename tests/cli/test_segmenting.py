"""A folder of pictures to label PNGs: what is written, what is done once, and what is refused."""

import json
import os
import re
import signal
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tokenexit_torch as tet
from tests.cli import networks, parts, pictures
from tokenexit import TokenExitError
from tokenexit.area import Area
from tokenexit.carries import Feature
from tokenexit_cli import _segment
from tokenexit_cli._processes import shared_out
from tokenexit_cli.main import main

LABELS = tuple(Path(name).with_suffix(".png").as_posix() for name in pictures.NAMES)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return pictures.write(tmp_path_factory.mktemp("photos"))


def segment(photos, out, *options, network="wrapped"):
    return main(["segment", f"tests.cli.networks:{network}", "--images", str(photos), "--out", str(out), *options])


def content(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def labels(folder, names=LABELS):
    return {name: np.array(Image.open(folder / "labels" / name)) for name in names}


def predicted(photos, build=None, outputs=("label", "exit_depth")):
    """What a predictor of the library says of the pictures."""
    shown = networks.SHOWN
    predictor = tet.Predictor(build or model_of, **shown, outputs=outputs)
    read = [np.array(Image.open(photos / name).convert("RGB")) for name in pictures.NAMES]
    return predictor({"image": read})


def model_of():
    return networks.wrapped().model


def test_labels_are_those_of_a_predictor_in_the_sizes_of_the_pictures(photos, tmp_path, capsys):
    assert segment(photos, tmp_path, "--maps") == 0
    wanted = predicted(photos)
    assert {path for path in content(tmp_path) if path.startswith("labels")} == {f"labels/{name}" for name in LABELS}
    for name, size, label, depth in zip(LABELS, pictures.SIZES, wanted["label"], wanted["exit_depth"], strict=True):
        found = Image.open(tmp_path / "labels" / name)
        assert (found.mode, found.size) == ("L", size[::-1])
        assert np.array_equal(np.array(found), label)
        map = Image.open(tmp_path / "exit_maps" / name)
        assert (map.mode, map.size) == ("P", size[::-1])
        assert len(np.unique(depth)) > 1
        shown = np.array(map.resize((depth.shape[1], depth.shape[0]), Image.Resampling.NEAREST))
        assert np.array_equal(shown, depth)
    said = capsys.readouterr().out
    assert re.fullmatch(
        r"4 of 4 pictures segmented into .*, [0-9.]+ s; blocks ran on [0-9.]+ % of the tokens .*\.\n", said
    )


def test_exit_maps_lie_where_the_patches_do():
    depth = np.array([[1, 2, 3], [4, 5, 6]])
    # Patches of 8 x 8 pixels, which leave 4 rows and 6 columns out, shown at twice the size.
    found = np.array(_segment._exit_map(depth, 6, (40, 60), Area((16, 24), (20, 30))))
    wanted = np.pad(depth.repeat(16, 0).repeat(16, 1), ((0, 8), (0, 12)), mode="edge")
    assert np.array_equal(found, wanted)
    whole = np.array(_segment._exit_map(depth, 6, (4, 6), None))
    assert np.array_equal(whole, depth.repeat(2, 0).repeat(2, 1))


def test_batches_and_palettes_change_no_class(photos, tmp_path):
    assert segment(photos, tmp_path / "one") == 0
    assert segment(photos, tmp_path / "all", "--batch", "3", network="coloured") == 0
    with Image.open(tmp_path / "all/labels/four.png") as found:
        assert found.mode == "P"
        assert tuple(found.getpalette()[: 3 * len(networks.COLOURS)]) == sum(networks.COLOURS, ())
    alone, together = labels(tmp_path / "one"), labels(tmp_path / "all")
    assert [(alone[name] != together[name]).sum() for name in LABELS] == [0] * len(LABELS)


def test_more_than_256_classes_take_16_bits(photos, tmp_path):
    assert segment(photos, tmp_path, network="many") == 0
    found = labels(tmp_path)
    assert {label.dtype for label in found.values()} == {np.dtype(np.uint16)}
    wanted = predicted(photos, many_of, outputs=("label",))["label"]
    assert all(np.array_equal(*pair) for pair in zip(found.values(), wanted, strict=True))
    assert max(label.max() for label in wanted) > 255


def many_of():
    return networks.many().model


@pytest.mark.parametrize("network", ["merging", "prepared"])
def test_decoders_and_preparation_of_ones_own(network, photos, tmp_path, unchecked):
    assert segment(photos, tmp_path, "--batch", "4", network=network) == 0
    built = getattr(networks, network)()
    for name, file in zip(LABELS, pictures.NAMES, strict=True):
        photo = Image.open(photos / file).convert("RGB")
        if network == "prepared":
            shown = networks.cut(photo)[None]
        else:
            pixels = torch.tensor(np.array(photo)).permute(2, 0, 1)[None] / 255
            shown = torch.nn.functional.interpolate(pixels, (32, 48), mode="bilinear", antialias=True)
            shown = (shown - torch.tensor(built.mean)[:, None, None]) / torch.tensor(built.std)[:, None, None]
        with torch.inference_mode():
            out = built.model.eval()(shown)
            scores = out.decoded if network == "merging" else out.logits
            scores = torch.nn.functional.interpolate(scores, (photo.height, photo.width), mode="bilinear")
        assert np.array_equal(labels(tmp_path)[name], scores[0].argmax(0).numpy())


@pytest.mark.parametrize("network", ["bare", "decoding"])
def test_exits_come_from_a_folder_and_are_retuned(network, photos, tmp_path, capsys, unchecked):
    built, exits = getattr(networks, network)(), tmp_path / "exits"
    if network == "bare":
        model = tet.wrap(built.model, networks.PLAN, head=built.head)
    else:
        plan = replace(networks.PLAN, carry=Feature())
        model = tet.wrap(built.model, plan, decoder=built.decoder, taps=built.taps, num_classes=3)
    tet.save(model, exits)
    said = {}
    for threshold in (0.25, 0.999999):
        out = tmp_path / str(threshold)
        assert segment(photos, out, "--exits", str(exits), "--threshold", str(threshold), network=network) == 0
        said[threshold] = float(re.search(r"ran on ([0-9.]+) %", capsys.readouterr().out)[1])
    assert said[0.25] < said[0.999999] == 100


def test_saving_and_change_are_targets_of_the_model(photos, tmp_path, monkeypatch):
    told, own = [], tet.ExitingModel.retune

    def retune(model, *plan, **targets):
        told.append(targets) if targets else own(model, *plan)

    monkeypatch.setattr(tet.ExitingModel, "retune", retune)
    assert segment(photos, tmp_path, "--saving", "0.4") == 0
    assert segment(photos, tmp_path, "--changed", "0.01") == 0
    assert told == [{"saving": 0.4}, {"changed": 0.01}]


def test_what_is_there_is_not_done_again_unless_its_picture_is_newer(photos, tmp_path, capsys):
    mine = pictures.write(tmp_path / "photos")
    assert segment(mine, tmp_path / "out") == 0
    before = content(tmp_path / "out")
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out/labels").rglob("*.png")}
    assert segment(mine, tmp_path / "out") == 0
    assert "0 of 4 pictures segmented (4 were there)" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in times} == times
    later = time.time() + 10
    os.utime(mine / "four.webp", (later, later))
    assert segment(mine, tmp_path / "out") == 0
    assert "1 of 4 pictures segmented (3 were there)" in capsys.readouterr().out
    assert segment(mine, tmp_path / "out", "--maps") == 0
    assert "4 of 4 pictures segmented into" in capsys.readouterr().out
    assert before.items() <= content(tmp_path / "out").items()


def test_two_processes_give_the_files_of_one(photos, tmp_path):
    assert segment(photos, tmp_path / "one", "--maps") == 0
    assert segment(photos, tmp_path / "two", "--maps", "--processes", "2") == 0
    assert content(tmp_path / "two") == content(tmp_path / "one")


def forked(work):
    """Exit status of a child that does this; negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = work()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(place, count, photos, out):
    """Segment, and be killed while the file of this number is written: half of it is there, or all but its name."""
    save, rename, seen = Image.Image.save, os.replace, []

    def half(image, file, **options):
        save(image, file, **options)
        seen.append(file)
        if len(seen) == count and place == "writing":
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def unnamed(part, file):
        if len(seen) == count and place == "naming":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(part, file)

    Image.Image.save, os.replace = half, unnamed  # in a child of its own
    return segment(photos, out, "--maps")


def test_a_killed_run_is_gone_on_with_nothing_lost_or_done_twice_or_half_written(photos, tmp_path, capsys):
    assert segment(photos, tmp_path / "whole", "--maps") == 0
    wanted = content(tmp_path / "whole")
    out, times = tmp_path / "out", {}
    for place in ("writing", "naming"):
        for count in (1, 2, 3):  # files, of which there are two for each picture
            status = forked(partial(killed_at, place, count, photos, out))
            assert status in (-signal.SIGKILL, 0)
            there = {path: one for path, one in content(out).items() if not path.endswith(".part")}
            assert there.items() <= wanted.items()  # whatever has its name is whole
            done = {file for file in (out / "labels").rglob("*.png") if not file.name.startswith(".")}
            assert all(file.stat().st_mtime_ns == times.setdefault(file, file.stat().st_mtime_ns) for file in done)
    assert len(list(out.rglob(".*.part"))) >= 3
    for stray in out.rglob(".*.part"):
        os.utime(stray, (0, 0))
    assert segment(photos, out, "--maps") == 0
    assert content(out) == wanted
    assert all(file.stat().st_mtime_ns == seen for file, seen in times.items())


def test_after_ctrl_c_a_line_says_how_to_go_on(photos, tmp_path, monkeypatch, capsys):
    read, seen = _segment.read, []

    def interrupted(file):
        seen.append(file)
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        return read(file)

    monkeypatch.setattr(_segment, "read", interrupted)
    assert segment(photos, tmp_path) == 130
    said = capsys.readouterr()
    assert said.err.strip() == "stopped: 2 of 4 pictures are segmented; run the same command again to go on"
    assert said.out == ""
    assert segment(photos, tmp_path) == 0
    assert len(seen) == 5
    assert "2 of 4 pictures segmented (2 were there)" in capsys.readouterr().out


def test_bad_pictures_are_named_at_the_end(tmp_path, capsys):
    mine = pictures.write(tmp_path / "photos")
    whole = (mine / "a/one.png").read_bytes()
    (mine / "cut.png").write_bytes(whole[: len(whole) // 2])
    (mine / "no.jpg").write_bytes(b"no picture")
    (mine / ".hidden.jpg").write_bytes(b"no picture")
    (mine / "notes.txt").write_text("no picture")
    for _ in range(2):  # it stays bad, whatever is there
        assert segment(mine, mine / "out", "--batch", "6") == 1
        said = capsys.readouterr()
        head, *lines = said.err.strip().splitlines()
        assert head == "error: 2 of 6 pictures cannot be read:"
        assert [line.split(":")[0].strip() for line in lines] == ["cut.png", "no.jpg"]
    assert "0 of 6 pictures segmented (4 were there)" in said.out
    assert sorted(labels(mine / "out")) == sorted(LABELS)


@pytest.mark.parametrize(("options", "network", "differs"), [
    ((), "other", "weights"),
    (("--threshold", "0.9"), "wrapped", "plan"),
    ((), "coloured", "classes and palette"),
    ((), "prepared", "preparation"),
])  # fmt: skip
def test_results_of_two_runs_do_not_mix(options, network, differs, photos, tmp_path, capsys):
    assert segment(photos, tmp_path) == 0
    before = content(tmp_path)
    capsys.readouterr()
    assert segment(photos, tmp_path, *options, network=network) == 2
    rule = f"`--out` must be new, or of the same model, exits and options: results of two do not mix, got {tmp_path}"
    assert capsys.readouterr().err == f"error: {rule}, of another run by its {differs}\n"
    assert content(tmp_path) == before


def test_labels_of_nobody_knows_what_are_refused(photos, tmp_path, capsys):
    (tmp_path / "labels").mkdir()
    assert segment(photos, tmp_path) == 2
    assert "`--out` must be new, or hold the segment.json of the run that it is of" in capsys.readouterr().err
    state = {"schema": 1, "weights": "0", "checksum": "0"}
    (tmp_path / "segment.json").write_text(json.dumps(state))
    assert segment(photos, tmp_path) == 2
    assert "`--out` must hold a valid segment.json" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert segment(photos, tmp_path / "file") == 2
    assert "`--out` must be a folder that can be written to" in capsys.readouterr().err


def test_two_pictures_with_one_name_are_refused(tmp_path, capsys):
    mine = pictures.write(tmp_path / "photos", ("a.png", "a.jpg"), pictures.SIZES[:2])
    assert segment(mine, tmp_path / "out") == 2
    rule = "`--images` must hold pictures that differ in more than their ending, got a.jpg and a.png"
    assert capsys.readouterr().err == f"error: {rule}\n"


@pytest.mark.parametrize(("network", "options", "message"), [
    ("bare", (), "`--exits` must be given for a model without exits: a folder that"),
    ("wrapped", ("--exits", "exits"), "`--exits` must be left out for a model that has exits, got exits"),
    ("bare", ("--exits", "nowhere"), "`folder` must hold the file exits.json for kind='exits', got nowhere"),
    ("headed_twice", (), "`head` must be left out for a model that is wrapped, got Linear"),
    ("gated", (), "`model` must be a vision transformer, or wrapped by `wrap` or `wrap_decoder`, got GatedModel"),
    ("mistitled", (), "`classes` must be as many as the classes of the model, 5, got 2"),
    ("badly_prepared", (), "`preprocess` must give a tensor of floats of shape (3, height, width), got torch.float32 of"),
    ("undecided", (), "`decoder` must give class scores of shape (1, classes, height, width) for labels, got dict"),
    ("wrapped", ("--device", "hyperspace"), "`--device` must be one that PyTorch has here, got 'hyperspace'"),
    ("wrapped", ("--threshold", "7"), "must"),
    ("wrapped", ("--threshold", "0.5", "--saving", "0.4"), "argument --saving: not allowed with argument --threshold"),
    ("wrapped", ("--batch", "0"), "argument --batch: must be a whole number from 1 up, got '0'"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(network, options, message, photos, tmp_path, capsys, unchecked):
    assert segment(photos, tmp_path, *options, network=network) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


def test_a_network_that_is_drawn_anew_is_found(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(networks, "ANEW", [0])
    job = _segment._Job("tests.cli.networks:drawn_anew", None, {}, "cpu", None, photos, tmp_path, maps=False)
    first = _segment._ready(job)
    with pytest.raises(TokenExitError, match="`MODULE:FUNCTION` must build the same network whenever it is called"):
        _segment._ready(replace(job, state=first.state))


def test_processes_take_parts_as_they_become_free():
    done = list(shared_out(parts.squares, range(8), 2))
    assert sorted(square for square, _ in done) == [number**2 for number in range(8)]
    assert len({process for _, process in done}) == 2
    assert os.getpid() not in {process for _, process in done}


def test_processes_end_what_they_are_at_when_nobody_listens(tmp_path):
    with closing(shared_out(partial(parts.slow, tmp_path), range(20), 2)) as results:
        next(results)
    begun, ended = (sorted(file.name[6:] for file in tmp_path.glob(f"{name}-*")) for name in ("begun", "ended"))
    assert begun == ended
    assert len(ended) < 20


def test_processes_end_after_that_of_a_killed_one(tmp_path):
    child = os.fork()
    if child == 0:
        try:
            list(shared_out(partial(parts.slow, tmp_path), range(100), 2))
        finally:
            os._exit(1)
    patience = time.monotonic() + 60
    while not list(tmp_path.glob("ended-*")) and time.monotonic() < patience:
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    count = len(list(tmp_path.glob("begun-*")))
    while time.monotonic() < patience:
        time.sleep(1.2)  # more than twice what a part takes
        before, count = count, len(list(tmp_path.glob("begun-*")))
        if count == before:
            break
    assert 0 < count < 100
    assert len(list(tmp_path.glob("ended-*"))) == count
    assert time.monotonic() < patience


@pytest.mark.parametrize(("number", "error", "message"), [
    (3, TokenExitError, "^`three` must not be, got 3$"),
    (4, RuntimeError, "KeyError: 'four'"),
    (5, TokenExitError, "`--processes` must fit into .*, got 2, of which one was ended from outside, with status -9"),
])  # fmt: skip
def test_what_goes_wrong_in_a_process_is_said(number, error, message):
    with pytest.raises(error, match=message):
        list(shared_out(parts.failing, (1, number), 2))
