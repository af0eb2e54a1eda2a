"""How each method is trained on CamVid, and with which plan its network is saved: exits of a 12-block ViT."""

from collections.abc import Callable
from dataclasses import dataclass

from tokenexit import schedule
from tokenexit.schedule import Schedule
from tokenexit.training import Annealed, Drawn

__all__ = ["METHODS", "Method", "neighbourhood"]

_PUBLISHED = (4, 6, 8)
_RADIUS = {3: 2, 4: 1, 6: 1, 8: 1, 10: 0}
_CELL = 3


@dataclass(frozen=True)
class Method:
    """A way to train with exits.

    Attributes:
        after: Blocks with an exit head.
        training: The plan of a step, from the step, how many there are, and the seed of the run; None for the network's
            own, under which nothing leaves and all heads see all tokens.
        saved: The plan that the trained network is saved with.
    """

    after: tuple[int, ...]
    training: Callable[[int, int, int], Schedule | None]
    saved: Schedule


def neighbourhood(threshold: float) -> Schedule:
    """Our own rule, with cells in place of retention by class."""
    return schedule.neighbours(radius=_RADIUS, threshold=threshold, per_class=0, cell=_CELL)


def _no_exits(_step: int, _steps: int, _seed: int) -> None:
    return None


def _dtop(_step: int, _steps: int, _seed: int) -> Schedule:
    return schedule.dtop(after=_PUBLISHED, threshold=0.9)


def _dovit(step: int, steps: int, _seed: int) -> Schedule:
    return schedule.dovit(after=_PUBLISHED, threshold=Annealed(1.0, 0.95, steps=max(1, steps // 2)).at(step))


def _paumer(step: int, _steps: int, seed: int) -> Schedule:
    draws = (Drawn(0.1, 1.0, seed=len(_PUBLISHED) * seed + index).at(step) for index in range(len(_PUBLISHED)))
    return schedule.paumer(keep=dict(zip(_PUBLISHED, sorted(draws, reverse=True), strict=True)))


def _neighbours(step: int, _steps: int, seed: int) -> Schedule:
    return neighbourhood(Drawn(0.4, 0.9, seed=seed).at(step))


METHODS = {
    "dense": Method(tuple(_RADIUS), _no_exits, neighbourhood(0.8)),
    "dtop": Method(_PUBLISHED, _dtop, schedule.dtop(after=_PUBLISHED, threshold=0.9)),
    "dovit": Method(_PUBLISHED, _dovit, schedule.dovit(after=_PUBLISHED, threshold=0.95)),
    "paumer": Method(_PUBLISHED, _paumer, schedule.paumer(keep={4: 0.7, 6: 0.4, 8: 0.25})),
    "neighbours": Method(tuple(_RADIUS), _neighbours, neighbourhood(0.8)),
}
"""The methods by the name that `--method` takes."""
