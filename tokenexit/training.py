"""Training with exits: schedules of thresholds and token fractions over steps, and the loss weights of exit heads.

A schedule is plain frozen data and a function of the step alone. So a run that resumes at a step goes on with the same
number, all processes of a run agree on it, and there is no state to save.

    threshold = training.Annealed(1.0, 0.985, steps=4000)
    for step, batch in enumerate(batches, start=first):
        plan = schedule.dovit(threshold=threshold.at(step))
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenexit._plain import is_number, is_whole
from tokenexit.errors import require

__all__ = ["Annealed", "Drawn", "loss_weights"]


@dataclass(frozen=True)
class Annealed:
    """A number that moves from one value to another in a straight line, as DoViT's threshold does (2023, section 3.3).

    Attributes:
        start: The value at first. With a threshold of 1, no token leaves.
        end: The value in the end.
        steps: Over how many steps it moves.
        wait: Steps at `start` before it moves.
    """

    start: float
    end: float
    steps: int
    wait: int = 0

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If `start` or `end` is no number, or `steps` or `wait` no whole number, or too small.
        """
        _require_numbers(start=self.start, end=self.end)
        require(is_whole(self.steps, least=1), "steps", "be a whole number from 1 up", repr(self.steps))
        require(is_whole(self.wait, least=0), "wait", "be a whole number from 0 up", repr(self.wait))

    def at(self, step: int, /) -> float:
        """The value at a step.

        Args:
            step: How many steps are done.

        Returns:
            `start` until `wait`, `end` from `wait + steps` on.

        Raises:
            TokenExitError: If `step` is no whole number from 0 up.
        """
        _require_step(step)
        done = min(max(step - self.wait, 0) / self.steps, 1.0)
        return (1 - done) * self.start + done * self.end


@dataclass(frozen=True)
class Drawn:
    """A number drawn anew at every step, so that one network serves any budget (PAUMER, BMVC 2022).

    Attributes:
        low: The least value.
        high: The greatest value.
        seed: Of the draws; another seed gives another, independent number at the same step.
    """

    low: float
    high: float
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If one of them is no number, `low` is above `high`, or `seed` no whole number from 0 up.
        """
        _require_numbers(low=self.low, high=self.high)
        require(self.low <= self.high, "low", f"be at most `high`, {self.high}", self.low)
        require(is_whole(self.seed, least=0), "seed", "be a whole number from 0 up", repr(self.seed))

    def at(self, step: int, /) -> float:
        """The value at a step: uniform in [`low`, `high`], and the same whenever it is asked for.

        Args:
            step: How many steps are done.

        Returns:
            The value.

        Raises:
            TokenExitError: If `step` is no whole number from 0 up.
        """
        _require_step(step)
        return random.Random((self.seed << 32) + step).uniform(self.low, self.high)


def loss_weights(auxiliary: float | Mapping[int, float], /, *, exits: Sequence[int], depth: int) -> dict[int, float]:
    """Weight of the loss of each head, by the blocks before it; the final head's is 1.

    Args:
        auxiliary: Weight of the exits; one for all, or one for each. Weights of exits that do not run are passed over.
        exits: The blocks after which an exit head ran.
        depth: How many blocks there are: what the final head is known by.

    Returns:
        The weights.

    Raises:
        TokenExitError: If a weight is missing or negative, or of a block that can have no exit.
    """
    given = auxiliary if isinstance(auxiliary, Mapping) else dict.fromkeys(exits, auxiliary)
    rule = "be a weight from 0 up, or one for each block with an exit"
    numbers = [is_number(one) and one >= 0 for one in given.values()]
    blocks = all(isinstance(after, int) and 0 < after < depth for after in given)
    require(all(numbers) and blocks, "auxiliary", rule, repr(auxiliary))
    missing = [after for after in exits if after not in given]
    require(not missing, "auxiliary", "have a weight for every exit that runs", f"none for {missing}")
    return {**given, depth: 1.0}


def _require_numbers(**values: float) -> None:
    for argument, value in values.items():
        require(is_number(value), argument, "be a number", repr(value))


def _require_step(step: int) -> None:
    require(is_whole(step, least=0), "step", "be a whole number from 0 up", repr(step))
