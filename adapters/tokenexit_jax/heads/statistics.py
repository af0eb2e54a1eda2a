"""Parameters of heads split from the statistics of their batch norms."""

from collections.abc import Mapping
from typing import Any

from tokenexit.errors import require
from tokenexit_jax._layers import STATISTICS
from tokenexit_jax.networks.protocol import Heads

__all__ = ["merge", "split"]


def split(heads: Heads, /) -> tuple[Heads, Heads]:
    """Split the weights of heads into trainable parameters and statistics of batch norm, which only `FCN` has.

    An optimiser must not see the latter: weight decay would wear them out.

    Args:
        heads: The weights of heads, as `ExitingModel.init` made them.

    Returns:
        What is learned, and the statistics; the same dictionaries, each without the leaves of the other.

    Raises:
        TokenExitError: If `heads` are no weights by name.
    """
    _require_by_name(heads, "heads")
    return _filtered(heads, statistics=False), _filtered(heads, statistics=True)


def merge(learned: Mapping[str, Any], statistics: Mapping[str, Any], /) -> Heads:
    """The weights of heads that `split` has split.

    Args:
        learned: What is learned.
        statistics: The statistics.

    Returns:
        All of them together.

    Raises:
        TokenExitError: If one of them is no weights by name.
    """
    _require_by_name(learned, "learned")
    _require_by_name(statistics, "statistics")
    both = {
        name: merge(value, statistics.get(name, {})) for name, value in learned.items() if isinstance(value, Mapping)
    }
    return {**learned, **statistics, **both}


def _require_by_name(weights: Any, argument: str) -> None:
    require(isinstance(weights, Mapping), argument, "be weights by name, as `init` makes them", type(weights).__name__)


def _filtered(heads: Mapping[str, Any], *, statistics: bool) -> Heads:
    return {
        name: _filtered(value, statistics=statistics) if isinstance(value, Mapping) else value
        for name, value in heads.items()
        if isinstance(value, Mapping) or (name.rpartition(".")[2] in STATISTICS) == statistics
    }
