"""Hostile files: folders that are damaged, mixed or forged, and what a loader makes of them.

A loader may refuse a folder by the library's own error, or give what the folder held before. What is forged knowingly,
with hashes that fit, may be loaded as it stands. Anything else is a fault: another error, other weights without a word,
something executed, memory taken for what a file merely claims.
"""

import json
import os
import pickle
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenexit import TokenExitError, folders, sealed

FILES = int(os.environ.get("HOSTILE_FILES", "0"))
"""How many hostile folders in all; the few of the quick profile if 0."""

_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 7, 2**31, 10**30, 10**400, 0.5, -0.5, 1e308, "", "x", "../../etc/passwd", "os.system",
    "0" * 64, [], [1], [[]], [2, 2], {}, {"kind": "never"}, {"kind": "not", "policy": {"kind": "never"}}, [10**9, 4],
)  # fmt: skip
_NO_JSON = (b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b"\xff", b"[" * 100_000, b'{"a":' * 50_000)
_MEMORY = 2**29  # bytes that may be taken more than before: far more than the models of the tests need


class Executed:
    """A pickle that leaves a trace if it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@dataclass
class Trials:
    """Hostile folders for one loader, and what became of them.

    Attributes:
        whole: A folder that loads.
        load: Loads a folder, and gives what can be compared: plain data and bytes.
        kind: What is saved in it, if it is a saved plan; None for other folders.
        seed: Of the damage.
        counts: What became of them.
    """

    whole: Path
    load: Callable[[Path], Any]
    kind: folders.Kind | None = None
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def run(self, count: int, scratch: Path) -> Counter[str]:
        """Damage the folder so many times, each time anew, and load what is left."""
        wanted = self.load(_copied(self.whole, scratch / "first"))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(count):
            draw = random.Random(f"{self.seed} {number}")
            folder, trace = _copied(self.whole, scratch / "hostile"), scratch / "trace"
            words, forged = self._damaged(folder, draw, trace)
            try:
                found = self.load(folder)
                same = found == wanted
                outcome = "as before" if same else "as forged" if forged else "something else, silently"
            except TokenExitError:
                outcome = "refused"
            except Exception as error:
                outcome = f"a bare {type(error).__name__}"
            assert not trace.exists(), f"trial {number} ({words}) executed what it read"
            assert outcome in ("as before", "as forged", "refused"), f"trial {number} ({words}) gave {outcome}"
            self.counts[outcome] += 1
        taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert taken < _MEMORY, f"{taken} bytes were taken"
        return self.counts

    def _damaged(self, folder: Path, draw: random.Random, trace: Path) -> tuple[str, bool]:
        """Damage a folder; in which words, and whether hashes were forged so that it may load."""
        file = draw.choice(sorted(one for one in folder.rglob("*") if one.is_file()))
        if file.suffix == ".json" and draw.random() < 0.6:
            return f"{file.name}: {_edited(file, draw, by_hand=self.kind is not None)}", True
        if file.suffix == ".safetensors" and self.kind is not None and draw.random() < 0.4:
            return f"{file.name}: {_forged(folder, self.kind, draw, trace)}", True
        return f"{file.name}: {_broken(file, draw, trace)}", False


def _copied(folder: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to))


def _broken(file: Path, draw: random.Random, trace: Path) -> str:
    """Damage the bytes of a file, or put something else in its place."""
    raw = bytearray(file.read_bytes())
    at = draw.randrange(len(raw))
    way = draw.choice(
        ["flip"] * 8 + ["cut", "zeros", "more", "swap", "noise", "pickle", "zip", "empty", "gone", "sparse"]
    )
    way = draw.choice([way] * 6 + ["folder", "link", "dangling", "fifo"])
    file.unlink()
    match way:
        case "flip":
            raw[at] ^= 1 << draw.randrange(8)
        case "cut":
            del raw[at:]
        case "zeros":
            raw[at : at + 64] = bytes(len(raw[at : at + 64]))
        case "more":
            raw += draw.randbytes(9)
        case "swap":
            half = len(raw) // 2
            raw = raw[half:] + raw[:half]
        case "noise":
            raw = bytearray(draw.randbytes(200))
        case "pickle":
            raw = bytearray(pickle.dumps(Executed(trace)))
        case "zip":
            raw = bytearray(b"PK\x03\x04" + draw.randbytes(60))
        case "empty":
            raw.clear()
        case "sparse":
            with file.open("wb") as opened:
                opened.write(raw)
                opened.truncate(2**36)
            return way
        case "folder":
            file.mkdir()
        case "fifo":
            os.mkfifo(file)
        case "link":
            file.symlink_to("/dev/zero")
        case "dangling":
            file.symlink_to(file.with_name("nowhere"))
    if way not in ("gone", "sparse", "folder", "fifo", "link", "dangling"):
        file.write_bytes(raw)
    return way


def _edited(file: Path, draw: random.Random, *, by_hand: bool) -> str:
    """Put a value into JSON where it does not belong, with a checksum that fits, or with none that could."""
    data = json.loads(file.read_text())
    places = list(_places(data))
    where, key = draw.choice(places)
    old = where[key]
    way = draw.choice(["value"] * 5 + ["gone", "new key", "twice", "no JSON"])
    marker = "HERE"
    if way == "value":
        where[key] = draw.choice(_VALUES)
    elif way == "gone":
        del where[key]
    elif way == "new key" and isinstance(where, dict):
        where["more"] = old
    else:
        where[key] = marker
    data.pop("checksum", None)
    text = json.dumps(data | {"checksum": sealed.BY_HAND}) if by_hand else sealed.seal(data)
    raw = text.encode()
    if way == "twice":
        raw = raw.replace(f'"{marker}"'.encode(), f"{json.dumps(old)}, {json.dumps(key)}: 1".encode())
    elif way == "no JSON":
        raw = raw.replace(f'"{marker}"'.encode(), draw.choice(_NO_JSON))
    file.write_bytes(raw)
    return f"{way} at {key}"


def _places(data: Any) -> Any:
    """Every place in nested data: its owner and its key."""
    keys = list(data) if isinstance(data, Mapping) else range(len(data))
    for key in keys:
        yield data, key
        if isinstance(data[key], dict | list):
            yield from _places(data[key])


def _forged(folder: Path, kind: folders.Kind, draw: random.Random, trace: Path) -> str:
    """Give a plan other weights, with the hash that fits them."""
    from tests.saved import put, weights_in

    raw = bytearray(weights_in(folder, kind).read_bytes())
    way = draw.choice(["header", "length", "dtype", "values", "pickle", "huge"])
    if way == "header":
        raw[draw.randrange(8, 8 + int.from_bytes(raw[:8], "little"))] ^= 1 << draw.randrange(8)
    elif way == "length":
        raw[:8] = draw.choice([0, 1, 2**20, 2**40, 2**63]).to_bytes(8, "little")
    elif way == "dtype":
        old, new = draw.choice([(b'"F32"', b'"I32"'), (b'"F32"', b'"U32"'), (b'"I64"', b'"F64"'), (b'"F32"', b'"BOO"')])
        raw = raw.replace(old, new)
    elif way == "values":
        at = len(raw) - 4 * draw.randrange(1, 64)
        raw[at : at + 4] = draw.choice([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\0\0\0\0"])
    elif way == "huge":
        raw = bytearray(raw.replace(b'"shape":[48]', b'"shape":[48000000000]'))
    else:
        raw = bytearray(pickle.dumps(Executed(trace)))
    put(folder, bytes(raw), kind)
    return way
