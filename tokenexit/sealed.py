"""JSON with a checksum over its content: what was cut off, damaged or edited is refused.

    text = seal({"schema": 2, "threshold": 0.9})
    unseal(text)                                   # refused if a digit was changed

The checksum guards against accidents and against edits by mistake. It is no signature. JSON is read strictly: no key
twice, no NaN and no infinity, one object.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from tokenexit._plain import shortened
from tokenexit.errors import TokenExitError, require

__all__ = ["BY_HAND", "parse", "require_whole", "seal", "unseal"]

BY_HAND = "edited by hand"
"""What stands in the place of the checksum of a plan that was edited knowingly."""

_CHECKSUM = "checksum"


def seal(content: Mapping[str, Any], /) -> str:
    """Content as JSON, with its checksum as the last key.

    Args:
        content: Plain data.

    Returns:
        The JSON text.

    Raises:
        TokenExitError: If the content is no plain data, or holds a NaN or an infinity.
    """
    try:
        return json.dumps({**content, _CHECKSUM: _checksum(content)}, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise TokenExitError(f"`content` must be plain data of finite numbers, got the error: {error}") from error


def parse(text: str, /, *, argument: str = "text", what: str = "an object") -> dict[str, Any]:
    """JSON text as the one object that it holds, read strictly; its checksum is not looked at.

    Args:
        text: The JSON text.
        argument: Its name, for errors.
        what: What it should be the JSON of, for errors.

    Returns:
        The object.

    Raises:
        TokenExitError: If it is cut off or no JSON, no object, nested too deeply, or holds a key twice or a number
            that is not finite.
    """
    try:
        data = json.loads(text, object_pairs_hook=_once, parse_constant=_not_finite, parse_float=_finite)
    except TokenExitError:
        raise
    except (ValueError, RecursionError) as error:
        raise TokenExitError(f"`{argument}` must be the whole JSON of {what}, got the error: {error}") from error
    require(isinstance(data, dict), argument, f"be the JSON of {what}, a mapping", shortened(data))
    return data


def require_whole(data: Mapping[str, Any], /, *, rule: str) -> dict[str, Any]:
    """The content of a sealed object, after a check of its checksum.

    Args:
        data: What `parse` returned.
        rule: What the checksum must be, for the error.

    Returns:
        The content without its checksum.

    Raises:
        TokenExitError: If the checksum is missing or that of other content.
    """
    content = {key: value for key, value in data.items() if key != _CHECKSUM}
    found = data.get(_CHECKSUM)
    require(found == _checksum(content), _CHECKSUM, rule, shortened(found))
    return content


def unseal(text: str, /, *, argument: str = "text", what: str = "an object") -> dict[str, Any]:
    """The content that `seal` wrote.

    Args:
        text: The JSON text.
        argument: Its name, for errors.
        what: What it should be the JSON of, for errors.

    Returns:
        The content without its checksum.

    Raises:
        TokenExitError: If it is not the whole text that was written.
    """
    data = parse(text, argument=argument, what=what)
    return require_whole(data, rule="be that of the content, which was edited or damaged")


def _checksum(content: Mapping[str, Any]) -> str:
    try:
        written = json.dumps(content, sort_keys=True, separators=(",", ":"))
    except RecursionError as error:
        raise TokenExitError("`content` must not be nested so deeply, got a recursion error") from error
    return hashlib.sha256(written.encode()).hexdigest()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise TokenExitError(f"`{twice}` must stand once in an object, got it {names.count(twice)} times")
    return data


def _not_finite(constant: str) -> NoReturn:
    raise TokenExitError(f"`text` must hold finite numbers, got {constant}")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _not_finite(digits)
