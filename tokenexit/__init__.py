"""Tokens of a vision transformer leave when they are done. The framework-agnostic core.

The functions take arrays of any library that follows the array API standard and return arrays of the same one.
"""

from tokenexit import (
    annealing,
    auxiliary,
    bounds,
    calibration,
    carries,
    cells,
    certificate,
    cost,
    drift,
    gates,
    heads,
    ladders,
    ledger,
    manifest,
    policies,
    retention,
    risks,
    schedule,
    scores,
    search,
    semantic,
    surroundings,
    tokens,
)
from tokenexit.errors import TokenExitError

__all__ = [
    "TokenExitError",
    "annealing",
    "auxiliary",
    "bounds",
    "calibration",
    "carries",
    "cells",
    "certificate",
    "cost",
    "drift",
    "gates",
    "heads",
    "ladders",
    "ledger",
    "manifest",
    "policies",
    "retention",
    "risks",
    "schedule",
    "scores",
    "search",
    "semantic",
    "surroundings",
    "tokens",
]
