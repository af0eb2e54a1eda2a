"""Tokens of a vision transformer leave when they are done. The framework-agnostic core.

The functions take arrays of any library that follows the array API standard and return arrays of the same one.
"""

from tokenexit import (
    adapting,
    area,
    carries,
    cells,
    cost,
    folders,
    gates,
    guarantees,
    heads,
    ledger,
    manifest,
    policies,
    retention,
    schedule,
    scores,
    sealed,
    search,
    semantic,
    surroundings,
    tokens,
    training,
    weights,
)
from tokenexit.errors import TokenExitError

__all__ = [
    "TokenExitError",
    "adapting",
    "area",
    "carries",
    "cells",
    "cost",
    "folders",
    "gates",
    "guarantees",
    "heads",
    "ledger",
    "manifest",
    "policies",
    "retention",
    "schedule",
    "scores",
    "sealed",
    "search",
    "semantic",
    "surroundings",
    "tokens",
    "training",
    "weights",
]
