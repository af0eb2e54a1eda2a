"""Saving is one act: the old save or the new one, whatever happens in between."""

import contextlib
import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenexit import TokenExitError, folders, sealed

OLD, NEW = ({"threshold": 0.9}, b"old weights"), ({"threshold": 0.5}, b"new weights, which are longer")


class Killed(BaseException):
    """A process that ends: nothing behind it is done."""


def plan_of(data):
    if not isinstance(data.get("threshold"), float):
        raise TokenExitError(f"`threshold` must be a number, got {data.get('threshold')!r}")
    return dict(data)


def read(folder):
    plan, file = folders.read(folder, "exits", plan_of)
    return plan, file.read_bytes()


def names(folder):
    return sorted(file.name for file in Path(folder).iterdir())


def edit(folder, **changes):
    file = folder / "exits.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def saved(tmp_path):
    folders.save(tmp_path / "deep" / "exits", "exits", *OLD)
    return tmp_path / "deep" / "exits"


def test_what_was_saved_is_read_and_nothing_else_is_there(saved):
    assert read(saved) == OLD
    weights = folders.Weights.of("exits", OLD[1])
    assert names(saved) == [weights.file, "exits.json"]
    folders.save(saved, "exits", *OLD)
    folders.save(saved, "exits", NEW[0], OLD[1])  # other thresholds of the same weights
    assert read(saved) == (NEW[0], OLD[1])
    folders.save(saved, "gates", *OLD)
    folders.save(saved, "exits", *NEW)
    assert read(saved) == NEW
    assert len(names(saved)) == 4
    assert folders.read(saved, "gates", plan_of)[1].read_bytes() == OLD[1]


# Every place at which a save touches a file.
STEPS = ("write_bytes", "fsync", "replace", "unlink")


@pytest.mark.parametrize("failure", [Killed(), OSError(28, "No space left on device")], ids=["killed", "full"])
@pytest.mark.parametrize("step", STEPS)
def test_a_save_that_ends_anywhere_leaves_the_old_one_or_the_new_one(saved, monkeypatch, failure, step):
    owner = Path if step in ("write_bytes", "unlink") else os
    real = getattr(owner, step)
    for when in range(20):
        left = when

        def stopping(*args, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise failure
            return real(*args, **options)

        folders.save(saved, "exits", *OLD)
        with monkeypatch.context() as patched, contextlib.suppress(Killed, TokenExitError):
            patched.setattr(owner, step, stopping)
            folders.save(saved, "exits", *NEW)
        assert read(saved) in (OLD, NEW)
        if left >= 0:  # the save does not come to this step so often
            assert when > 0
            assert read(saved) == NEW
            return
    raise AssertionError("a save has fewer steps")


def test_a_failure_leaves_no_file_behind(saved, monkeypatch):
    before = names(saved)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(TokenExitError, match=r"`folder` must be a folder that can be written to, got .*No space left"):
        folders.save(saved, "exits", *NEW)
    assert names(saved) == before


def test_strays_are_removed_when_they_are_old_and_ours(saved):
    old = [
        f"exits-{'0' * 16}.safetensors",
        ".exits.json.12-0123abcd.part",
        f".exits-{'0' * 16}.safetensors.1-00000000.part",
    ]
    kept = ["exits-backup.safetensors", f"gates-{'0' * 16}.safetensors", ".mine.part", f"exits-{'1' * 16}.safetensors"]
    for name in old + kept:
        (saved / name).write_bytes(b"")
        if not name.startswith("exits-1"):
            os.utime(saved / name, (0, 0))
    folders.save(saved, "exits", *NEW)
    assert {*kept} <= {*names(saved)}
    assert not {*old} & {*names(saved)}


def test_two_processes_that_save_leave_one_of_the_two(saved):
    failures = []

    def saving(what):
        try:
            for _ in range(30):
                folders.save(saved, "exits", *what)
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=saving, args=(what,)) for what in (OLD, NEW)]
    for writer in writers:
        writer.start()
    seen = []
    while any(writer.is_alive() for writer in writers):
        seen.append(read(saved) in (OLD, NEW))  # a reader meanwhile finds a whole save
    for writer in writers:
        writer.join()
    assert not failures
    assert all(seen)
    assert read(saved) in (OLD, NEW)


def test_a_reader_is_not_misled_by_a_save_of_the_same_text(saved, monkeypatch):
    """A, B, A: whenever the weights are looked for, another process has saved the same text anew, and is not done."""
    difference, rounds = folders._difference, iter(range(3))

    def meanwhile(file, weights):
        if next(rounds, None) is None:
            return difference(file, weights)
        folders.save(saved, "exits", *NEW)
        folders.save(saved, "exits", *OLD)
        return "there is no such file"

    monkeypatch.setattr(folders, "_difference", meanwhile)
    assert read(saved) == OLD


def test_weights_that_are_gone_are_missed(saved):
    (saved / folders.Weights.of("exits", OLD[1]).file).unlink()
    with pytest.raises(TokenExitError, match=r"`folder` must hold the weights .*: there is no such file"):
        read(saved)


@given(data=st.data())
@settings(max_examples=40)
def test_damage_is_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    folders.save(folder, "exits", *OLD)
    file = folder / data.draw(st.sampled_from(names(folder)))
    raw = bytearray(file.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "zeros", "more"]))
    at = data.draw(st.integers(0, len(raw) - 1))
    if kind == "flip":
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del raw[at:]
    elif kind == "zeros":
        raw[at:] = bytes(len(raw) - at)
    else:
        raw += b"more"
    if bytes(raw) == file.read_bytes():
        return
    file.write_bytes(raw)
    with contextlib.suppress(TokenExitError):
        assert read(folder) == OLD  # white space, an escaped letter


def test_a_plan_edited_by_hand_is_refused_unless_it_says_so(saved):
    edit(saved, threshold=0.7)
    message = (
        "`folder` must hold a valid exits.json, got .*: `checksum` must be that of the content, which was edited or "
        'damaged: "edited by hand" in its place says that it was on purpose, got '
    )
    with pytest.raises(TokenExitError, match=message):
        read(saved)
    edit(saved, checksum=sealed.BY_HAND)
    assert read(saved) == ({"threshold": 0.7}, OLD[1])
    edit(saved, threshold="low")
    with pytest.raises(TokenExitError, match="`threshold` must be a number, got 'low'"):
        read(saved)


def test_files_of_two_saves_are_refused(saved, tmp_path):
    folders.save(tmp_path / "other", "exits", *NEW)
    weights = next(saved.glob("*.safetensors"))
    other = next((tmp_path / "other").glob("*.safetensors"))
    weights.write_bytes(other.read_bytes())
    with pytest.raises(TokenExitError, match="hold the weights that exits.json names.* bytes instead of 11"):
        read(saved)
    weights.write_bytes(b"bad weights")
    with pytest.raises(TokenExitError, match="hold the weights that exits.json names.* SHA-256 .* instead of"):
        read(saved)
    weights.unlink()
    with pytest.raises(TokenExitError, match="hold the weights that exits.json names.*there is no such file"):
        read(saved)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "`weights` must be a mapping"),
        ({"file": "../x"}, "`weights` must have exactly the keys"),
        (
            {"file": "../../etc/passwd", "sha256": "0" * 64, "size": 1},
            "`file` must be exits-<16 hex digits>.safetensors",
        ),
        ({"file": f"gates-{'0' * 16}.safetensors", "sha256": "0" * 64, "size": 1}, "`file` must be exits-"),
        ({"file": f"exits-{'0' * 16}.safetensors", "sha256": "x", "size": 1}, "`sha256` must be a SHA-256 in hex"),
        ({"file": f"exits-{'0' * 16}.safetensors", "sha256": "0" * 64, "size": True}, "`size` must be a whole number"),
    ],
)
def test_what_a_plan_says_of_its_weights_is_checked(saved, weights, message):
    edit(saved, weights=weights, checksum=sealed.BY_HAND)
    with pytest.raises(TokenExitError, match=message):
        read(saved)


def test_what_is_in_the_way_is_named(saved, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TokenExitError, match="`folder` must be a folder that can be written to, got "):
        folders.save(tmp_path / "file", "exits", *NEW)
    with pytest.raises(TokenExitError, match="`folder` must hold the file gates.json, got "):
        folders.read(saved, "gates", plan_of)
    (saved / "gates.json").mkdir()
    with pytest.raises(TokenExitError, match="`folder` must be a folder that can be written to, got "):
        folders.save(saved, "gates", *NEW)
    os.mkfifo(saved / "semantic.json")
    with pytest.raises(TokenExitError, match="`folder` must hold the file semantic.json, got "):
        folders.read(saved, "semantic", plan_of)
    with (saved / "exits.json").open("wb") as large:
        large.truncate(2**40)  # sparse: nothing of it is read
    with pytest.raises(TokenExitError, match="must hold a exits.json of at most|must hold an exits.json of at most"):
        read(saved)
    (saved / "exits.json").write_bytes(b"\xff")
    with pytest.raises(TokenExitError, match="`folder` must hold a valid exits.json"):
        read(saved)


def exits(network, folder, /, *, head=None):
    return "exits", network, Path(folder).name, head


def decoder(network, folder, /):
    return "decoder", network


def gates(network, folder, /, *, head=None, taps=None):
    return "gates", network, taps


LOADERS = {"exits": ("exits", exits), "decoder": ("exits", decoder), "gates": ("gates", gates)}
LOADERS["semantic"] = ("semantic", lambda network, folder, /: ("semantic", network))


def load(folder, kind=None, /, **options):
    return folders.load_by_kind(LOADERS, "network", folder, kind, options)


def test_a_folder_is_loaded_by_the_kind_that_it_holds(saved, tmp_path):
    assert load(saved) == load(str(saved), "exits") == ("exits", "network", "exits", None)
    assert load(saved, head="h", taps=None) == ("exits", "network", "exits", "h")
    assert load(saved, "decoder") == ("decoder", "network")
    folders.save(tmp_path / "two", "gates", *OLD)
    assert load(tmp_path / "two", taps=(1,)) == ("gates", "network", (1,))
    folders.save(tmp_path / "two", "semantic", *OLD)
    assert load(tmp_path / "two", "gates") == ("gates", "network", None)
    assert load(tmp_path / "two", "semantic") == ("semantic", "network")


def test_a_folder_of_several_kinds_is_not_guessed(saved):
    folders.save(saved, "gates", *OLD)
    several = "`kind` must be given for a folder that holds several kinds, exits and gates, got None"
    with pytest.raises(TokenExitError, match=several):
        load(saved)
    with pytest.raises(TokenExitError, match=several):
        load(saved, taps=(1,))


@pytest.mark.usefixtures("unchecked")
def test_a_kind_or_an_option_that_does_not_serve_is_named_with_those_that_do(saved, tmp_path):
    for call, message in (
        (
            lambda: load(tmp_path / "none"),
            "`folder` must hold the file exits.json or gates.json or semantic.json, got ",
        ),
        (lambda: load(tmp_path, "exits"), "`folder` must hold the file exits.json for kind='exits', got [^,]*$"),
        (
            lambda: load(saved, "gates"),
            "`folder` must hold the file gates.json for kind='gates', got .*, which holds exits: load it with kind='exits'",
        ),
        (lambda: load(saved, taps=(1,)), "`taps` must be left out for kind='exits': it is for kind='gates', got tuple"),
        (
            lambda: load(saved, "decoder", head="h"),
            "`head` must be left out for kind='decoder': it is for kind='exits' or 'gates', got str",
        ),
        (lambda: load(saved, "head"), "`kind` must be one of exits, decoder, gates, semantic, or None, got 'head'"),
        (lambda: load(saved, ["exits"]), r"`kind` must be one of .*, got \['exits'\]"),
        (lambda: load(3), "`folder` must be a path, got int"),
        (lambda: folders.read(None, "exits", plan_of), "`folder` must be a path, got NoneType"),
        (lambda: folders.save(2.0, "exits", *OLD), "`folder` must be a path, got float"),
    ):
        with pytest.raises(TokenExitError, match=message):
            call()


def test_what_is_no_file_is_no_kind(saved):
    (saved / "gates.json").mkdir()
    assert load(saved)[0] == "exits"
