"""Checks and small rules for authors of adapters: what every framework's side asks of its arguments in the same words.

A user of an adapter needs none of this. An adapter imports what it needs of it from here, and no name of the core that
starts with an underscore.
"""

from tokenexit._array import aligned, require_marks
from tokenexit._plain import (
    LARGEST,
    MOST,
    NORMALISED,
    Progress,
    is_number,
    is_whole,
    require_share,
    require_takes,
    warn_of_pixels,
)
from tokenexit.gates import coin_for, rates_by_gate
from tokenexit.schedule import require_fits, require_gates_fit
from tokenexit.scores import ONE
from tokenexit.semantic import require_places, require_room

__all__ = [
    "LARGEST",
    "MOST",
    "NORMALISED",
    "ONE",
    "Progress",
    "aligned",
    "coin_for",
    "is_number",
    "is_whole",
    "rates_by_gate",
    "require_fits",
    "require_gates_fit",
    "require_marks",
    "require_places",
    "require_room",
    "require_share",
    "require_takes",
    "warn_of_pixels",
]
