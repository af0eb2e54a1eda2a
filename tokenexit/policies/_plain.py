"""Policies as plain data, by the closed registry of their kinds."""

from collections.abc import Mapping
from typing import Any

from tokenexit._array import array_namespace, is_array
from tokenexit._plain import from_plain, to_plain
from tokenexit.errors import require
from tokenexit.policies.kinds import KINDS
from tokenexit.policies.policy import PerClass, Policy

__all__ = ["from_dict", "to_dict"]


def to_dict(policy: Policy, /) -> dict[str, Any]:
    """The policy as plain data, for JSON.

    Args:
        policy: A policy of this library, thresholds included.

    Returns:
        `{"kind": ..., field: value, ...}`, nested for policies of policies.

    Raises:
        TokenExitError: If the policy, or one inside it, is not of this library, or a threshold is out of range.
    """
    data = to_plain(policy, KINDS, argument="policy", write=_plain)
    from_dict(data)  # an array's value, which may be out of range, has not been looked at before
    return data


def from_dict(data: Mapping[str, Any], /) -> Policy:
    """The policy that `to_dict` wrote down.

    Args:
        data: What `to_dict` returned, or its like read from a file.

    Returns:
        The policy.

    Raises:
        TokenExitError: If the kind is unknown, a field is missing or unknown, or a value is out of its range.
    """
    policy = from_plain(data, KINDS, argument="policy", read=_read)
    require(isinstance(policy, Policy), "policy", "be a policy", policy)
    return policy


def _plain(value: Any) -> Any:
    if isinstance(value, Policy | PerClass):
        return to_plain(value, KINDS, argument="policy", write=_plain)
    if isinstance(value, tuple) or (is_array(value) and value.ndim == 1):
        return [float(one) for one in value]
    if is_array(value):
        return int(value) if array_namespace(value).isdtype(value.dtype, "integral") else float(value)
    return value


def _read(name: str, value: Any) -> Any:
    if name in ("left", "right", "policy"):
        return from_dict(value)
    if name == "threshold" and isinstance(value, Mapping):
        found = from_plain(value, KINDS, argument="threshold", read=_read)
        require(isinstance(found, PerClass), "threshold", "be a number or PerClass", repr(found))
        return found
    if name == "thresholds":
        require(isinstance(value, list), name, "be a list of numbers", repr(value))
        return tuple(value)
    if name != "by":
        require(isinstance(value, int | float) and not isinstance(value, bool), name, "be a number", repr(value))
    return value
