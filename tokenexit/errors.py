"""The one exception of the library, and the one way to raise it."""

__all__ = ["TokenExitError", "require"]


class TokenExitError(ValueError):
    """Bad input: the message names the argument, the rule it broke, and the value it had."""


def require(ok: bool, argument: str, rule: str, got: object) -> None:
    """Raise a `TokenExitError` unless a condition holds.

    Args:
        ok: The condition.
        argument: Name of the argument that it is about.
        rule: What the argument must do or be; the message reads "`argument` must `rule`, got `got`".
        got: What it was: a text as it is to be read, or anything else, which is written out as `repr` does.

    Raises:
        TokenExitError: If not `ok`.
    """
    if not ok:
        # Only now: writing out an array waits for its values.
        raise TokenExitError(f"`{argument}` must {rule}, got {got if isinstance(got, str) else repr(got)}")
