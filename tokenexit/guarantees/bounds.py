"""Is a mean small enough? p-values and upper bounds for the mean of losses in [0, 1], valid for any sample size.

Nothing is assumed of the losses but that the images are independent draws from one distribution and that every loss
lies in [0, 1]. The first axis is that of the images; all other axes are tested side by side.

Two tests are offered. `betting` (Waudby-Smith and Ramdas, JRSS-B 2024, section 4) bets against "the mean is greater":
it is the sharper one where the losses of the images are alike, as the shares of disagreeing pixels are.
`hoeffding-bentkus` (Bates et al., JACM 2021, section 3.1; Angelopoulos et al., Learn then Test, 2021) knows only the
mean of the losses, and is about as sharp where they are 0 or 1. Which one is used must be settled before the losses
are seen.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

from jaxtyping import Float

from tokenexit._array import Array, array_namespace, counting, device, is_array, take, with_doubles
from tokenexit._plain import require_share
from tokenexit.errors import require

__all__ = ["Test", "images_needed", "p_values", "upper_bounds"]

Test = Literal["betting", "hoeffding-bentkus"]
"""Name of a test."""

_BOLDEST = 1 - 1e-9
"""The greatest bet, of a wealth of 1. Any constant up to 1 is allowed; one that depends on the level to be tested would
make the p-value rise with it somewhere, and could not be inverted by halving. At 1 itself a loss of 1 takes all."""

_TERMS = 4096  # of a sum over images that are added up one by one
_STEPS = 256  # of the integral that stands for the others


def p_values(
    losses: Float[Array, "images *columns"],
    /,
    *,
    at_most: float | Float[Array, "*columns"],
    delta: float = 0.05,
    test: Test = "betting",
) -> Float[Array, "*columns"]:
    """How well the losses go together with a mean of more than `at_most`: if it is, p <= x has probability x at most.

    Args:
        losses: Losses in [0, 1] of independent images. Their order must not depend on them; betting goes along it.
        at_most: The level, between 0 and 1; one for all columns or one for each.
        delta: The p-value that is hoped for; betting is tuned to it, and valid whatever it is.
        test: Which test.

    Returns:
        The p-values, as float64; of JAX arrays as NumPy's.

    Raises:
        TokenExitError: If there are no images, a loss is not in [0, 1], a number does not lie between 0 and 1, or the
            test is unknown.
    """
    losses = _checked(losses, delta, test)
    xp = array_namespace(losses)
    level = xp.asarray(at_most, dtype=xp.float64, device=device(losses))
    between = bool(xp.all((level > 0) & (level < 1)))
    require(between, "at_most", "lie between 0 and 1", repr(at_most) if isinstance(at_most, float) else at_most)
    return _TESTS[test](losses, delta)(level)


def upper_bounds(
    losses: Float[Array, "images *columns"], /, *, delta: float = 0.05, test: Test = "betting"
) -> Float[Array, "*columns"]:
    """The mean is at most this, with a probability of at least `1 - delta`: the test, inverted.

    It holds for each column by itself. Whoever picks a column by its losses, and then reads its bound, has picked a
    lucky one: divide `delta` by the number of columns to have all bounds hold together.

    Args:
        losses: As for `p_values`.
        delta: Probability that a bound fails.
        test: Which test.

    Returns:
        The smallest level that is certified, to within 1e-9 above it, as float64; 1 where none is.

    Raises:
        TokenExitError: As for `p_values`.
    """
    losses = _checked(losses, delta, test)
    xp = array_namespace(losses)
    p_value = _TESTS[test](losses, delta)
    low = xp.zeros_like(losses[0, ...])
    high = xp.ones_like(low)
    for _ in range(30):  # p-values fall as the level rises
        middle = (low + high) / 2
        certified = p_value(middle) <= delta
        low, high = xp.where(certified, low, middle), xp.where(certified, middle, high)
    return high


def images_needed(*, at_most: float, delta: float = 0.05, test: Test | None = None) -> int:
    """How many images are needed at the least: with fewer nothing is certified, were all losses 0.

    If a share of a little more than `at_most` of all images have a loss of 1 and the others none, n images show nothing
    of it with a probability of `(1 - at_most) ** n`. While that is more than `delta`, no test can certify `at_most`.
    `hoeffding-bentkus` does with that number, and `betting` asks for a few more.

    Args:
        at_most: The level to certify.
        delta: Probability of being wrong that is allowed.
        test: The test; None for what no test can do without.

    Returns:
        How many: for 2 % and the default 149, and 154 for betting. If the losses are not all 0, it takes more.

    Raises:
        TokenExitError: If a number does not lie between 0 and 1, or the test is unknown.
    """
    require_share(at_most, "at_most")
    require_share(delta, "delta")
    require(test is None or test in _TESTS, "test", f"be None or one of {', '.join(_TESTS)}", repr(test))
    low = max(1, math.ceil(math.log(delta) / math.log1p(-at_most) - 1e-9))
    if test != "betting" or _betting_on_zeros(low, at_most, delta) <= delta:
        return low
    high = 2 * low
    while _betting_on_zeros(high, at_most, delta) > delta:
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _betting_on_zeros(middle, at_most, delta) <= delta else (middle, high)
    return high


def _betting_on_zeros(images: int, at_most: float, delta: float) -> float:
    """The p-value of `_betting` where all losses are 0, in a time that does not grow with the number of images.

    The bet on image t is `reach * sqrt(t / h(t))`, h(t) being the sum of 1 / j**2 up to t, and never more than
    `_BOLDEST`. The first terms are added up; the others, which are smooth, are an integral; those at the boldest bet
    are all equal.
    """
    reach = math.sqrt(-8 * math.log(delta) / images)

    def gain(t: int | float, h: float) -> float:
        return math.log1p(min(reach * math.sqrt(t / h), _BOLDEST) * at_most)

    first, h, wealth = min(images, _TERMS), 0.0, 0.0
    for t in range(1, first + 1):
        h += 1 / t**2
        wealth += gain(t, h)
    boldest = math.ceil((_BOLDEST / reach) ** 2 * _squares(images))  # from about here on, h hardly grows
    last = min(max(boldest, first), images)
    if last > first:
        # A sum is the integral between halves, here over the root of t, by Simpson's rule.
        low, high = math.sqrt(first + 0.5), math.sqrt(last + 0.5)
        step = (high - low) / _STEPS
        for at in range(_STEPS + 1):
            u = low + at * step
            weight = 1 if at in (0, _STEPS) else 4 if at % 2 else 2
            wealth += weight * step / 3 * 2 * u * gain(u * u, _squares(u * u))
    wealth += (images - last) * math.log1p(_BOLDEST * at_most)
    return math.exp(-wealth)


def _squares(t: int | float) -> float:
    """The sum of 1 / j**2 up to t, for large t."""
    return math.pi**2 / 6 - 1 / t + 1 / (2 * t**2) - 1 / (6 * t**3)


def _checked(losses: Array, delta: float, test: str) -> Array:
    """The losses in double precision."""
    there = is_array(losses) and losses.ndim >= 1 and losses.shape[0] > 0
    require(there, "losses", "be an array with at least one image on its first axis", losses)
    require_share(delta, "delta")
    require(test in _TESTS, "test", f"be one of {', '.join(_TESTS)}", repr(test))
    losses = with_doubles(losses)
    xp = array_namespace(losses)
    real = xp.isdtype(losses.dtype, ("real floating", "integral"))
    require(real, "losses", "be real numbers", f"dtype {losses.dtype}")
    losses = xp.astype(losses, xp.float64)
    unknown = int(xp.sum(xp.astype(xp.any(xp.reshape(xp.isnan(losses), (losses.shape[0], -1)), axis=1), xp.int64)))
    rule = "be numbers: an image about which nothing is known, as one without a labelled pixel, is to be left out"
    require(unknown == 0, "losses", rule, f"NaN for {unknown} of {losses.shape[0]} images")
    inside = bool(xp.all((losses >= 0) & (losses <= 1)))
    require(inside, "losses", "be numbers in [0, 1], every one of them", "others among them")
    return losses


def _betting(losses: Array, delta: float) -> Callable[[Array], Array]:
    """Wealth of a bet on a smaller loss; the stake before every image depends on earlier images only.

    While the mean is the level or more, no such game can be won in the long run: the wealth, 1 at first, reaches 1 / p
    with a probability of p at most (Ville's inequality). So its greatest value so far is 1 / p.
    """
    xp, images = array_namespace(losses), losses.shape[0]
    seen = xp.astype(counting(images, losses), xp.float64) + 1
    seen = xp.reshape(seen, (images, *[1] * (losses.ndim - 1)))
    mean = (xp.cumulative_sum(losses, axis=0) + 0.5) / (seen + 1)
    variance = (xp.cumulative_sum((losses - mean) ** 2, axis=0) + 0.25) / (seen + 1)
    before = xp.concat([xp.full_like(variance[:1, ...], 0.25), variance[:-1, ...]], axis=0)
    bet = xp.clip(xp.sqrt(-2 * math.log(delta) / (images * before)), None, _BOLDEST)

    def p_value(level: Array) -> Array:
        wealth = xp.cumulative_sum(xp.log1p(-bet * (losses - level)), axis=0)
        return xp.exp(-xp.clip(xp.max(wealth, axis=0), 0.0, None))

    return p_value


def _hoeffding_bentkus(losses: Array, delta: float) -> Callable[[Array], Array]:  # noqa: ARG001
    """Hoeffding's inequality in its sharper form, or Bentkus's, whichever is less."""
    xp, images = array_namespace(losses), losses.shape[0]
    total = xp.sum(losses, axis=0)
    whole = xp.ceil(total)

    def p_value(level: Array) -> Array:
        level = xp.zeros_like(total) + level
        hoeffding = -images * _divergence(xp.where(total < images * level, total / images, level), level)
        bentkus = 1 + _log_lower_tail(whole, images, level)
        return xp.exp(xp.where(hoeffding < bentkus, hoeffding, bentkus))

    return p_value


_TESTS: Mapping[str, Callable[[Array, float], Callable[[Array], Array]]] = {
    "betting": _betting,
    "hoeffding-bentkus": _hoeffding_bentkus,
}


def _divergence(a: Array, b: Array, /) -> Array:
    """From a coin of probability `a` to one of `b`, in nats; `a` may be 0."""
    xp = array_namespace(a, b)
    return a * xp.log(xp.where(a > 0, a, b) / b) + (1 - a) * (xp.log1p(-a) - xp.log1p(-b))


def _log_lower_tail(successes: Array, trials: int, chance: Array, /) -> Array:
    """Log of P(Bin(trials, chance) <= successes), and 0 from the mean on, where the probability is more than a half.

    The last term, times a sum of its ratios to those before, all of them positive and, below the mean, falling.
    """
    xp = array_namespace(successes, chance)
    below = successes < trials * chance
    most = xp.where(below, successes, 0.0)
    term = xp.astype(below, xp.float64)
    total, step = term, 0
    while bool(xp.any(term > 1e-18)):
        term = term * xp.clip(most - step, 0.0, None) / (trials - most + step + 1) * (1 - chance) / chance
        total, step = total + term, step + 1
    last = _log_choose(trials, most) + most * xp.log(chance) + (trials - most) * xp.log1p(-chance)
    return xp.where(below, last + xp.log(xp.where(below, total, 1.0)), 0.0)


def _log_choose(trials: int, successes: Array, /) -> Array:
    xp = array_namespace(successes)
    logs = xp.log(xp.astype(counting(trials, successes), xp.float64) + 1)
    factorial = xp.concat([xp.zeros_like(logs[:1]), xp.cumulative_sum(logs, axis=0)])
    chosen = xp.astype(xp.reshape(successes, (-1,)), xp.int64)
    ways = factorial[trials] - take(factorial, chosen) - take(factorial, trials - chosen)
    return xp.reshape(ways, successes.shape)
