"""Does the guarantee hold? Calibrations by the thousand on losses whose true means are known, and wrong ways beside it.

    python -m tests.core.coverage [--repeats 2000]

Every calibration draws the losses of some images, chooses a setting as `calibration.certify` does, and is violated if
the true mean of that setting is above the level. That may happen in a share `DELTA` of all draws. Beside the two tests
stand two ways that are wrong, to show that this can be seen: the last setting whose mean on the images is within the
level, and the setting after the last one certified. Two columns look at the upper bound of the setting that betting
chooses, and how often the true mean is above it: "bound alone" is that of the setting by itself, as if it had not been
chosen by its losses, which is wrong as well, and "bound" the one that `Point.bound` has.

Prints a table in Markdown; a cell has one number for each number of images. The exit status is 1 if one of the tests,
or the bound, is violated more often than `DELTA` and three standard errors.
"""

import argparse
import math
import sys
from dataclasses import dataclass

import numpy as np

from tokenexit.guarantees import bounds, calibration

LEVEL, DELTA = 0.1, 0.1
IMAGES = (50, 100, 500, 2000)
SETTINGS = (5, 41)
TESTS = ("betting", "hoeffding-bentkus")
WRONG = ("empirical mean", "first uncertified", "bound alone")
ROOM = 4_000_000  # losses that are held at a time


def rising(settings: int) -> np.ndarray:
    """Two good settings, and then ever worse ones, the first of them hardly too bad."""
    return LEVEL * np.concatenate([[0, 0.3], np.linspace(1.001, 1.5, settings - 2)])


def waves(settings: int) -> np.ndarray:
    """Good settings, and behind each one that is hardly too bad."""
    return LEVEL * np.concatenate([[0], np.where(np.arange(settings - 1) % 2 == 0, 0.3, 1.001)])


def zeros(settings: int) -> np.ndarray:
    return np.zeros(settings)


def bernoulli(draw: np.random.Generator, risks: np.ndarray, images: int, repeats: int) -> np.ndarray:
    """0 or 1, the same images failing at all settings."""
    return (draw.random((images, 1, repeats)) < risks[:, None]).astype(float)


def beta(draw: np.random.Generator, risks: np.ndarray, images: int, repeats: int) -> np.ndarray:
    """Shares of pixels, drawn anew for every setting."""
    losses = np.zeros((images, len(risks), repeats))
    risk = risks[risks > 0][:, None]
    losses[:, risks > 0] = draw.beta(20 * risk, 20 * (1 - risk), (images, len(risk), repeats))
    return losses


CASES = (
    ("Bernoulli", bernoulli, rising),
    ("Bernoulli", bernoulli, waves),
    ("beta", beta, rising),
    ("beta", beta, waves),
    ("all zero", bernoulli, zeros),
)


@dataclass(frozen=True)
class Outcome:
    """Shares of some calibrations: violated, by name of the way; and of settings certified by betting."""

    violated: dict[str, float]
    certified: float


def study(draw_losses, risks: np.ndarray, *, images: int, repeats: int, seed: int = 0) -> Outcome:
    """Many calibrations on losses of these true means, some at a time."""
    draw = np.random.default_rng(seed)
    parts, left = [], repeats
    while left:
        now = max(1, min(left, ROOM // (images * len(risks))))
        parts.append((now, one_part(draw_losses(draw, risks, images, now), risks)))
        left -= now
    names = parts[0][1].violated
    mean = {name: sum(count * part.violated[name] for count, part in parts) / repeats for name in names}
    return Outcome(mean, sum(count * part.certified for count, part in parts) / repeats)


def one_part(losses: np.ndarray, risks: np.ndarray) -> Outcome:
    """Calibrations side by side; `losses` is (images, settings, repeats)."""
    count = {}
    for test in TESTS:
        p = bounds.p_values(losses, at_most=LEVEL, delta=DELTA, test=test)
        count[test] = np.array([calibration.fixed_sequence(column, delta=DELTA) for column in p.T])
    within = losses.mean(axis=0) <= LEVEL
    count["empirical mean"] = np.where(within.any(axis=0), len(risks) - np.argmax(within[::-1], axis=0), 0)
    count["first uncertified"] = np.minimum(count["betting"] + 1, len(risks))
    violated = {name: float((at_last(risks, number) > LEVEL).mean()) for name, number in count.items()}
    chosen = losses[:, np.maximum(count["betting"] - 1, 0), np.arange(losses.shape[2])]
    for name, delta in (("bound alone", DELTA), ("bound", DELTA / len(risks))):
        bound = bounds.upper_bounds(chosen, delta=delta)
        violated[name] = float((at_last(risks, count["betting"]) > bound).mean())
    return Outcome(violated, float(count["betting"].mean()) / len(risks))


def at_last(risks: np.ndarray, count: np.ndarray) -> np.ndarray:
    """True mean of the last of the first so many settings; 0 for none, "never exit"."""
    return np.concatenate([[0.0], risks])[count]


def allowed(repeats: int) -> float:
    """`DELTA`, and three standard errors of a share of so many."""
    return DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / repeats)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2000, help="calibrations in every cell (default %(default)s)")
    repeats = parser.parse_args().repeats
    columns = (*TESTS, "bound", *WRONG)
    print(f"Violated, % of {repeats} calibrations with {' / '.join(map(str, IMAGES))} images; allowed are "
          f"{100 * DELTA:g} %, and {100 * allowed(repeats):.1f} % within three standard errors.\n")  # fmt: skip
    print(f"| losses | true means | settings | {' | '.join(columns)} | certified |")
    print("|---|---|---|" + "---|" * (len(columns) + 1))
    worst = 0.0
    for row, (name, draw_losses, curve) in enumerate(CASES):
        for settings in SETTINGS:
            risks = curve(settings)
            found = [study(draw_losses, risks, images=images, repeats=repeats, seed=row) for images in IMAGES]
            cells = [" / ".join(f"{100 * one.violated[column]:.1f}" for one in found) for column in columns]
            cells.append(" / ".join(f"{100 * one.certified:.0f}" for one in found))
            print(f"| {name} | {curve.__name__} | {settings} | {' | '.join(cells)} |", flush=True)
            worst = max(worst, *(one.violated[right] for one in found for right in (*TESTS, "bound")))
    print(f"\nAt worst {100 * worst:.1f} % where it must not be.")
    return 0 if worst <= allowed(repeats) else 1


if __name__ == "__main__":
    sys.exit(main())
