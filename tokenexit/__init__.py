"""Tokens of a vision transformer leave when they are done. The framework-agnostic core.

The functions take arrays of any library that follows the array API standard and return arrays of the same one.
"""

from tokenexit import (
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
)
from tokenexit.errors import TokenExitError

__all__ = [
    "TokenExitError",
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
]
