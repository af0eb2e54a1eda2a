"""A certificate: which setting was certified for which model, and what that means; as JSON, and refused elsewhere.

    text = to_json(certificate)                                  # a file beside the weights
    certificate = from_json(text)                                # refused if it was edited, or cut off
    require_matches(certificate, fingerprints_of_this_model)     # refused if it is for another one

The checksum in the file is taken over its content. It guards against accidents and against edits by hand. It is no
signature: whoever wants to forge a certificate can compute another checksum.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from tokenexit._plain import is_whole, require_keys
from tokenexit.bounds import Test
from tokenexit.errors import TokenExitError, require
from tokenexit.schedule import Schedule

__all__ = ["ASSUMPTIONS", "Certificate", "Fingerprints", "from_json", "require_matches", "to_json"]

SCHEMA = 1

ASSUMPTIONS = (
    "The calibration images are independent draws from what the model will see: no frames of one video, no tiles of "
    "one picture.",
    "The weights, the preprocessing, the resolution and the dtype are those of the calibration.",
    "The settings, their order, the test and the level were fixed before the losses of these images were seen; no "
    "threshold was searched on them.",
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
    """

    weights: Mapping[str, str]
    dtype: str
    resolution: tuple[int, int]
    preprocessing: str

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If there are no weights, one is no SHA-256 in hex, the resolution is no pair of whole
                numbers, or something else no text.
        """
        hashes = (
            isinstance(self.weights, Mapping) and len(self.weights) > 0 and all(map(_is_hash, self.weights.items()))
        )
        require(hashes, "weights", "be a SHA-256 in hex for each of at least one name", repr(self.weights)[:200])
        pair = isinstance(self.resolution, tuple) and len(self.resolution) == 2
        pair = pair and all(is_whole(side, least=1) for side in self.resolution)
        require(pair, "resolution", "be a height and a width from 1 up", repr(self.resolution))
        _require_texts(self, "dtype", "preprocessing")


@dataclass(frozen=True)
class Certificate:
    """A setting whose mean loss is at most `at_most`, with this confidence, under the `assumptions`.

    Attributes:
        schedule: The setting.
        risk: What the loss is, as `disagreement`.
        at_most: The mean loss over images that is not exceeded.
        confidence: With which confidence.
        images: How many images that rests on.
        test: Which test of `tokenexit.bounds` certified it.
        seed: Of the order in which the test took the images.
        loss: Mean loss of the setting on these images.
        saving: Share of the dense network's cost that it saved on them; this is measured, not certified.
        fingerprints: The model that it is for.
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
        return "\n".join([f"Certified: {claim}.", "This holds if:", *(f"- {one}" for one in self.assumptions)])


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
    data |= {"schedule": certificate.schedule.to_dict(), "fingerprints": prints}
    content = {"schema": SCHEMA} | data | {"assumptions": list(certificate.assumptions)}
    return json.dumps(content | {"checksum": _checksum(content)}, indent=2) + "\n"


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
    data = _read(text)
    names = {field.name for field in fields(Certificate)}
    require_keys(data, "certificate", {"schema", *names, "assumptions", "checksum"})
    require(data["schema"] == SCHEMA, "schema", f"be {SCHEMA}", repr(data["schema"]))
    content = {key: value for key, value in data.items() if key != "checksum"}
    rule = "be that of the content, which was edited or damaged and certifies nothing"
    require(data["checksum"] == _checksum(content), "checksum", rule, repr(data["checksum"]))
    prints = data["fingerprints"]
    require_keys(prints, "fingerprints", {field.name for field in fields(Fingerprints)})
    require(isinstance(prints["resolution"], list), "resolution", "be a list", repr(prints["resolution"]))
    prints = Fingerprints(**(prints | {"resolution": tuple(prints["resolution"])}))
    values = {name: data[name] for name in names}
    return Certificate(**(values | {"schedule": Schedule.from_dict(data["schedule"]), "fingerprints": prints}))


def require_matches(certificate: Certificate, fingerprints: Fingerprints, /) -> None:
    """Raise a `TokenExitError` unless a certificate is for the model at hand.

    Args:
        certificate: The certificate.
        fingerprints: Those of the model, taken now.

    Raises:
        TokenExitError: If weights, dtype, resolution or preprocessing are others; the message names all that are.
    """
    certified = certificate.fingerprints
    others = [
        f"{name} {getattr(fingerprints, name)!r} instead of {getattr(certified, name)!r}"
        for name in ("dtype", "resolution", "preprocessing")
        if getattr(fingerprints, name) != getattr(certified, name)
    ]
    names = sorted(set(certified.weights) | set(fingerprints.weights))
    moved = [name for name in names if certified.weights.get(name) != fingerprints.weights.get(name)]
    if moved:
        others.append(f"other weights in {len(moved)} of {len(names)} tensors, {moved[0]!r} first")
    require(not others, "fingerprints", "be those of the model that was certified", "; ".join(others))


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenExitError(f"`text` must be the whole JSON of a certificate, got the error: {error}") from error


def _checksum(content: Mapping[str, Any]) -> str:
    written = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(written.encode()).hexdigest()


def _is_hash(item: tuple[Any, Any]) -> bool:
    name, digest = item
    return isinstance(name, str) and isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_texts(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        require(isinstance(value, str) and value != "", name, "be a text", repr(value))
