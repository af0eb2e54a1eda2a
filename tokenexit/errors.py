"""The one exception of the library, the one way to raise it, and its one warning."""

from typing import Any

from array_api_compat import is_array_api_obj

__all__ = ["TokenExitError", "UnfittedWarning", "require"]


class TokenExitError(ValueError):
    """Bad input: the message names the argument, the rule it broke, and the value it had."""


class UnfittedWarning(UserWarning):
    """A plan asks exit heads that have random weights: all that leaves is left to chance."""


def require(ok: bool, argument: str, rule: str, got: Any) -> None:
    """Raise a `TokenExitError` unless a condition holds.

    Args:
        ok: The condition.
        argument: Name of the argument that it is about.
        rule: What the argument must do or be; the message reads "`argument` must `rule`, got `got`".
        got: What it was: a text as it is to be read, or anything else, which is written out.

    Raises:
        TokenExitError: If not `ok`.
    """
    if not ok:
        array: Any = got if is_array_api_obj(got) else None
        if array is not None:  # every library writes out an array in its own way
            got = f"an array of shape {tuple(array.shape)}"
        raise TokenExitError(f"`{argument}` must {rule}, got {got if isinstance(got, str) else repr(got)}")
