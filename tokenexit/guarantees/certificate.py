"""A certificate: which setting was certified for which model, and what that means; as JSON, and refused elsewhere.

    text = to_json(certificate)                                  # a file beside the weights
    certificate = from_json(text)                                # refused if it was edited, or cut off
    require_matches(certificate, fingerprints_of_this_model)     # refused if it is for another one

The checksum in the file is taken over its content. It guards against accidents and against edits by hand. It is no
signature: whoever wants to forge a certificate can compute another checksum.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

from tokenexit._plain import is_whole, require_keys, shortened
from tokenexit.errors import TokenExitError, require
from tokenexit.guarantees.bounds import Test
from tokenexit.schedule import Schedule
from tokenexit.sealed import parse, require_whole, seal

__all__ = ["ASSUMPTIONS", "Certificate", "Fingerprints", "digest", "from_json", "require_matches", "to_json"]

SCHEMA = 2

ASSUMPTIONS = (
    "The calibration images are independent draws from what the model will see: no frames of one video, no tiles of "
    "one picture, no image twice.",
    "Nothing was trained, fitted or searched on these images: neither the network nor its exit heads, nor a threshold.",
    "The settings, their order, the test, its seed and the level were fixed before the losses of these images were "
    "seen.",
    "The weights, the preprocessing, the resolution and the dtype are those of the calibration; the model is in "
    "evaluation mode, and runs the schedule that was certified with room for every token that stays.",
    "The bound is on the average over images. One image, one kind of scene, or a class that was not certified by "
    "itself, may lose more.",
    "The confidence is over draws of the calibration images: of a hundred calibrations at 95 %, five may be wrong.",
    "It says nothing of images of another kind. Where they drift, it is void.",
)
"""What every certificate rests on."""


@dataclass(frozen=True)
class Fingerprints:
    """What must be the same in use as at the calibration.

    Attributes:
        weights: SHA-256 of every tensor, in hex, by name.
        dtype: In which the model computes, as `float32`.
        resolution: Height and width of the images, in pixels.
        preprocessing: What is done to images before the model sees them, in the caller's own words. It is compared
            letter by letter.
        adapter: Which adapter measured the losses, as `torch`: a certificate holds for that one.
    """

    weights: Mapping[str, str]
    dtype: str
    resolution: tuple[int, int]
    preprocessing: str
    adapter: str

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If there are no weights, one is no SHA-256 in hex, the resolution is no pair of whole
                numbers, or something else no text.
        """
        hashes = (
            isinstance(self.weights, Mapping) and len(self.weights) > 0 and all(map(_is_hash, self.weights.items()))
        )
        require(hashes, "weights", "be a SHA-256 in hex for each of at least one name", shortened(self.weights))
        pair = isinstance(self.resolution, tuple) and len(self.resolution) == 2
        pair = pair and all(is_whole(side, least=1) for side in self.resolution)
        require(pair, "resolution", "be a height and a width from 1 up", repr(self.resolution))
        _require_texts(self, "dtype", "preprocessing", "adapter")


@dataclass(frozen=True)
class Certificate:
    """A setting whose mean loss is at most `at_most`, with this confidence, under the `assumptions`.

    Attributes:
        schedule: The setting.
        risk: What the loss is, as `disagreement`.
        at_most: The mean loss over images that is not exceeded.
        confidence: With which confidence.
        images: How many images that rests on.
        test: Which test of `tokenexit.guarantees.bounds` certified it.
        seed: Of the order in which the test took the images.
        loss: Mean loss of the setting on these images.
        saving: Share of the dense network's cost that it saved on them; this is measured, not certified.
        fingerprints: The model that it is for.
        notes: What else has to be known of the calibration, a sentence each: that images were admitted on the caller's
            own responsibility, for example.
    """

    schedule: Schedule
    risk: str
    at_most: float
    confidence: float
    images: int
    test: Test
    seed: int
    loss: float
    saving: float
    fingerprints: Fingerprints
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If a field is of the wrong type or range.
        """
        require(
            isinstance(self.schedule, Schedule), "schedule", "be a tokenexit.schedule.Schedule", repr(self.schedule)
        )
        require(isinstance(self.fingerprints, Fingerprints), "fingerprints", "be Fingerprints", repr(self.fingerprints))
        _require_texts(self, "risk")
        require(self.test in get_args(Test), "test", f"be one of {', '.join(get_args(Test))}", repr(self.test))
        for name in ("at_most", "confidence"):
            value = getattr(self, name)
            require(_is_number(value) and 0 < value < 1, name, "be a number between 0 and 1", repr(value))
        for name in ("loss", "saving"):
            value = getattr(self, name)
            require(_is_number(value) and 0 <= value <= 1, name, "be a number in [0, 1]", repr(value))
        require(is_whole(self.images, least=1), "images", "be a whole number from 1 up", repr(self.images))
        require(is_whole(self.seed), "seed", "be a whole number from 0 up", repr(self.seed))
        texts = isinstance(self.notes, tuple) and all(isinstance(note, str) and note != "" for note in self.notes)
        require(texts, "notes", "be a tuple of texts", shortened(self.notes))

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What it rests on, in words."""
        return ASSUMPTIONS

    def __str__(self) -> str:
        """What is certified, and what that rests on."""
        claim = (
            f"mean {self.risk} over images at most {100 * self.at_most:g} %, with {100 * self.confidence:g} % "
            f"confidence ({self.test} test, {self.images} images)"
        )
        holds = [f"- {one}" for one in self.assumptions]
        return "\n".join([f"Certified: {claim}.", *(f"Note: {note}" for note in self.notes), "This holds if:", *holds])


def digest(content: bytes | memoryview, /, *, dtype: str, shape: Sequence[int]) -> str:
    """Digest of an image as it goes into the model, by which a copy of it is known.

    Args:
        content: Its numbers, row by row, as bytes.
        dtype: Their type, as `float32`.
        shape: Its shape.

    Returns:
        The first 32 hex digits of a SHA-256.
    """
    found = hashlib.sha256(f"{dtype} {tuple(shape)} ".encode())
    found.update(content)
    return found.hexdigest()[:32]


def to_json(certificate: Certificate, /) -> str:
    """The certificate as JSON, with a checksum over its content.

    Args:
        certificate: The certificate.

    Returns:
        The JSON.

    Raises:
        TokenExitError: If a policy of the schedule is not of this library.
    """
    data: dict[str, Any] = {field.name: getattr(certificate, field.name) for field in fields(Certificate)}
    prints = {field.name: getattr(certificate.fingerprints, field.name) for field in fields(Fingerprints)}
    prints |= {"weights": dict(prints["weights"]), "resolution": list(prints["resolution"])}
    data |= {"schedule": certificate.schedule.to_dict(), "fingerprints": prints, "notes": list(certificate.notes)}
    return seal({"schema": SCHEMA} | data | {"assumptions": list(certificate.assumptions)})


def from_json(text: str, /) -> Certificate:
    """The certificate that `to_json` wrote.

    Args:
        text: The JSON.

    Returns:
        The certificate. Whether it is for the model at hand, `require_matches` says.

    Raises:
        TokenExitError: If it is cut off or no JSON, a key is missing or unknown, the schema is another one, the
            checksum is not that of the content, or a value is of the wrong type or range.
    """
    data = parse(text, what="a certificate")
    names = {field.name for field in fields(Certificate)}
    require(data.get("schema") == SCHEMA, "schema", f"be {SCHEMA}", shortened(data.get("schema")))
    require_keys(data, "certificate", {"schema", *names, "assumptions", "checksum"})
    require_whole(data, rule="be that of the content, which was edited or damaged and certifies nothing")
    prints = data["fingerprints"]
    require_keys(prints, "fingerprints", {field.name for field in fields(Fingerprints)})
    for name, found in (("resolution", prints["resolution"]), ("notes", data["notes"])):
        require(isinstance(found, list), name, "be a list", shortened(found))
    prints = Fingerprints(**(prints | {"resolution": tuple(prints["resolution"])}))
    values: dict[str, Any] = {name: data[name] for name in names} | {"notes": tuple(data["notes"])}
    try:
        values |= {"schedule": Schedule.from_dict(data["schedule"]), "fingerprints": prints}
        return Certificate(**values)
    except RecursionError as error:
        raise TokenExitError("`schedule` must not be nested so deeply, got a recursion error") from error


def require_matches(certificate: Certificate, fingerprints: Fingerprints, /) -> None:
    """Raise a `TokenExitError` unless a certificate is for the model at hand.

    Args:
        certificate: The certificate.
        fingerprints: Those of the model, taken now.

    Raises:
        TokenExitError: If weights, dtype, resolution, preprocessing or adapter are others; the message names all that
            are.
    """
    certified = certificate.fingerprints
    others = [
        f"{name} {getattr(fingerprints, name)!r} instead of {getattr(certified, name)!r}"
        for name in ("adapter", "dtype", "resolution", "preprocessing")
        if getattr(fingerprints, name) != getattr(certified, name)
    ]
    names = sorted(set(certified.weights) | set(fingerprints.weights))
    moved = [name for name in names if certified.weights.get(name) != fingerprints.weights.get(name)]
    if moved:
        others.append(f"other weights in {len(moved)} of {len(names)} tensors, {moved[0]!r} first")
    require(not others, "fingerprints", "be those of the model that was certified", "; ".join(others))


def _is_hash(item: tuple[Any, Any]) -> bool:
    name, digest = item
    return isinstance(name, str) and isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_texts(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        require(isinstance(value, str) and value != "", name, "be a text", repr(value))
