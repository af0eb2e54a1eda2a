"""The one exception of the library, and the one way to raise it."""

__all__ = ["TokenExitError"]


class TokenExitError(ValueError):
    """Bad input: the message names the argument, the rule it broke, and the value it had."""


def require(ok: bool, argument: str, rule: str, got: object) -> None:
    """Raise unless `ok`: "`argument` must `rule`, got `got`"."""
    if not ok:
        raise TokenExitError(f"`{argument}` must {rule}, got {got}")
