"""The fit of heads that know no framework: steps, checks, interrupts, and reports in words."""

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.core.files import Files
from tests.core.tables import CLASSES, Table, tables
from tokenexit import TokenExitError
from tokenexit.features import FINAL, TARGET
from tokenexit.fitting import FitReport, HeldOut, Missed, Recipe, Standing, fit

RECIPE = Recipe(20, 6, 0.2, 0.0, 0.0, 5, 3)
HELD = replace(RECIPE, held_out=0.4)
BATCHES = tables((3, 2, 3), bad=(1,))


class Interrupted(KeyboardInterrupt):
    pass


class Toy:
    """Heads of one matrix each, moved down their gradients."""

    def __init__(self, exits=(1, 2), seed=0, fails_at=None):
        self.exits, self.marks = exits, {"heads": "matrices", "generator": str(seed)}
        self.heads = dict.fromkeys(exits, np.zeros((5, CLASSES)))
        self.kept, self.model, self.fitted = None, None, frozenset()
        self.draws, self.taken, self.fails_at, self.rates = np.random.default_rng(seed), 0, fails_at, []
        self.after_step, self.seen = {}, []

    def draw(self, rows, size, /):
        return self.draws.integers(0, rows, size)

    def step(self, rows, rate, /):
        assert len(rows[TARGET]) > 0
        for after in self.exits:
            moved = rows[str(after)].T @ (self.given(after, rows) - self.wish(rows)) / len(rows[TARGET])
            self.heads = self.heads | {after: self.heads[after] - rate * moved}
        self.taken += 1
        self.rates.append(rate)
        self.after_step[self.taken] = self.heads
        if self.taken == self.fails_at:
            raise Interrupted

    def given(self, after, rows):
        weight = np.exp(rows[str(after)] @ self.heads[after])
        return weight / weight.sum(axis=1, keepdims=True)

    @staticmethod
    def wish(rows):
        return np.eye(CLASSES)[rows[FINAL]]

    def step_decoded(self, rows, batch, rate, /):
        assert self.kept is None
        self.seen.append(float(np.nansum(batch)))
        self.step({**rows, FINAL: (rows[FINAL] + len(batch)) % CLASSES}, rate)

    def revert(self):
        self.heads, self.kept = self.kept or self.heads, None

    def changed(self, batch, /):
        assert self.kept is None
        return float(sum(np.abs(head).sum() for head in self.heads.values()) * len(batch))

    def loss(self, rows, /):
        return sum(-(self.wish(rows) * np.log(self.given(after, rows))).sum() for after in self.exits)

    def keep(self):
        self.kept = self.heads

    def finish(self, digests, /):
        self.model, self.fitted = self.heads if self.kept is None else self.kept, digests

    def agreed(self, rows, /):
        return {
            after: int(((rows[str(after)] @ head).argmax(axis=1) == rows[FINAL]).sum())
            for after, head in self.model.items()
        }

    def measure(self, chunks, /):
        pass

    def foretold(self, chunks, /):
        pass

    def missed(self, rows, /):
        return {}

    def state(self):
        state = {f"heads.{after}": head for after, head in self.heads.items()}
        state |= {f"best.{after}": head for after, head in (self.kept or {}).items()}
        return state | {"draws": np.frombuffer(json.dumps(self.draws.bit_generator.state).encode(), np.uint8)}

    def restore(self, state, /, *, kept):
        if "draws" not in state:
            raise TokenExitError("`resume` must hold the state of the generator, got none")
        self.heads = {after: state[f"heads.{after}"] for after in self.exits}
        self.kept = {after: state[f"best.{after}"] for after in self.exits} if kept else None
        self.draws.bit_generator.state = json.loads(state["draws"].tobytes())


class Imitating(Toy):
    """The same; the second of its heads translates, and misses as much as the first number of a row."""

    measured = corrected = 0

    def measure(self, chunks, /):
        assert self.taken == 0
        self.measured = sum(len(rows[TARGET]) for rows in chunks)

    def foretold(self, chunks, /):
        assert self.model is not None
        self.corrected = sum(len(rows[TARGET]) for rows in chunks)

    def missed(self, rows, /):
        far = np.abs(rows["1"][:, :2]).sum(axis=0).tolist()
        return {2: {3: Missed(far[0], far[1]), 4: Missed(far[1], 2 * far[1])}}


class Noise(Table):
    """Classes that nothing foretells, so that what is learned of them is worse than nothing on other images."""

    @staticmethod
    def classes(found):
        return (1000 * found).astype(int).sum(axis=1) % CLASSES


def fitted(recipe=RECIPE, batches=BATCHES, toy=None, teacher=Table, **options):
    toy = Toy() if toy is None else toy
    return toy, fit(toy, batches, teacher(), recipe, **{"store": Files()} | options)


def stopping(at):
    """Interrupts the loop of steps, which alone has a length, before its item `at`."""

    def progress(loop):
        for turn, item in enumerate(loop):
            if isinstance(loop, range) and turn == at:
                raise Interrupted
            yield item

    return progress


def same(one, other):
    return all((one.model[after] == other.model[after]).all() for after in one.exits)


def test_heads_learn_and_the_report_counts_what_they_learned():
    toy, report = fitted(replace(RECIPE, steps=300, learning_rate=1.0))
    rows = [Table().rows(batch)[0] for batch in BATCHES]
    for after in toy.exits:
        right = sum(int(((one[str(after)] @ toy.model[after]).argmax(axis=1) == one[FINAL]).sum()) for one in rows)
        assert report.agreement[after] == right / 28 > 0.9
    assert (report.images, report.patches, report.held_out) == (8, 28, None)
    assert (report.steps, report.kept_step, report.stopped_early) == (300, 300, False)
    assert len(toy.fitted) == 8
    assert toy.rates[0] == 1.0
    assert toy.rates == sorted(toy.rates, reverse=True)
    assert 0 < toy.rates[-1] < 1e-4
    assert toy.rates[150] == pytest.approx(0.5)


@pytest.mark.parametrize("recipe", [RECIPE, HELD, replace(HELD, patience=1, learning_rate=9.0)], ids=repr)
@pytest.mark.parametrize("cache", ["memory", "disk", None])
@pytest.mark.parametrize("at", [0, 5, 7, 20])
def test_an_interrupted_fit_ends_as_if_it_had_not_been(recipe, cache, at, tmp_path):
    cache = tmp_path / "rows" if cache == "disk" else cache
    straight, report = fitted(recipe, cache=cache)
    options = {"cache": cache, "resume": tmp_path / "fit"}
    if at < report.steps:
        for left in (at, 2):  # interrupted twice
            with pytest.raises(Interrupted):
                fitted(recipe, **options, progress=stopping(left))
    toy, resumed = fitted(recipe, **options)
    assert resumed == report
    assert same(toy, straight)
    assert not (tmp_path / "fit" / "fit.safetensors").exists()


DECODED = replace(HELD, decoder_steps=7, decoder_images=2)


@pytest.mark.parametrize("recipe", [DECODED, replace(DECODED, held_out=0.0), replace(DECODED, patience=1)], ids=repr)
@pytest.mark.parametrize("cache", ["memory", None])
def test_steps_through_a_decoder_come_last_and_are_resumed(recipe, cache, tmp_path):
    toy, report = fitted(recipe, cache=cache)
    fitted_to, held = report.images, 8 - report.images
    images = np.nan_to_num(np.concatenate(BATCHES))
    sizes = [len(batch) for batch in BATCHES]
    starts = [sum(sizes[:at]) + low for at, size in enumerate(sizes) for low in range(0, size, 2)]
    stops = [min([s for s in starts if s > start] + [8]) for start in starts]
    turn = [float(images[a : min(b, fitted_to)].sum()) for a, b in zip(starts, stops, strict=True) if a < fitted_to]
    assert toy.seen == pytest.approx((turn * 7)[:7])
    assert report.decoded is not None
    assert report.decoded[1] > 0
    assert "The decoder's output changes by" in str(report)
    assert len(toy.rates) == report.steps + 7
    last = toy.rates[-7:]
    assert last[0] == pytest.approx(0.1 * recipe.learning_rate)
    assert last == sorted(last, reverse=True)
    plain, _ = fitted(replace(recipe, decoder_steps=0), cache=cache)
    assert not same(toy, plain)
    assert held == (3 if recipe.held_out else 0)

    def stopped(loops):
        seen = 0

        def progress(loop):
            nonlocal seen
            seen += isinstance(loop, range)
            for turn, item in enumerate(loop):
                if isinstance(loop, range) and seen == 2 and turn == loops:
                    raise Interrupted
                yield item

        return progress

    options = {"cache": cache, "resume": tmp_path}
    for at in (0, 3, 2):
        with pytest.raises(Interrupted):
            fitted(recipe, **options, progress=stopped(at))
    again, resumed = fitted(recipe, **options)
    assert len(again.rates) == 2
    assert resumed == report
    assert same(again, toy)


def test_an_interrupt_within_a_step_costs_what_came_after_the_last_check(tmp_path):
    straight, report = fitted(HELD)
    with pytest.raises(Interrupted):
        fitted(HELD, toy=Toy(fails_at=13), resume=tmp_path)
    _, marks = Files().read(tmp_path / "fit.safetensors", "resume")
    assert json.loads(marks["where"])["step"] == 10
    toy, resumed = fitted(HELD, resume=tmp_path)
    assert (toy.taken, resumed) == (10, report)
    assert same(toy, straight)


def test_nothing_is_finished_by_an_interrupt():
    toy = Toy()
    with pytest.raises(Interrupted):
        fitted(toy=toy, progress=stopping(3))
    assert toy.model is None
    assert toy.fitted == frozenset()


def test_the_heads_kept_are_those_of_the_lowest_loss_held_out():
    recipe = replace(HELD, steps=200, patience=4)
    toy, report = fitted(recipe, teacher=Noise)
    assert toy.model is toy.after_step[report.kept_step]
    assert report.stopped_early
    assert report.steps == report.kept_step + recipe.patience * recipe.check_every < recipe.steps
    assert (report.images, report.held_out.images) == (5, 3)
    losses, one = {}, Toy()
    one.keep = lambda: None
    checked = one.loss
    one.loss = lambda rows: losses.setdefault(one.taken, checked(rows))
    fitted(replace(recipe, patience=100), toy=one, teacher=Noise)
    until = {step: loss for step, loss in losses.items() if step <= report.steps}
    assert min(until, key=until.get) == report.kept_step


def test_a_step_without_rows_is_passed_over_and_a_loss_that_is_no_number_keeps_nothing():
    batches = tables((1, 1), bad=(1,))
    toy, report = fitted(batches=batches, cache=None)
    assert (toy.taken, report.steps, report.patches) == (10, 20, 4)
    toy = Toy()
    toy.loss = lambda rows: math.nan
    toy, report = fitted(replace(HELD, patience=3), toy=toy)
    assert toy.kept is None
    assert (report.steps, report.kept_step, report.stopped_early) == (15, 15, True)


def test_another_fit_is_not_resumed_and_a_damaged_one_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        fitted(HELD, resume=tmp_path, progress=stopping(7))
    for name, options in (
        ("images", {"batches": tables((3, 2, 3), seed=5)}),
        ("steps", {"recipe": replace(HELD, steps=21)}),
        ("patience", {"recipe": replace(HELD, patience=4)}),
        ("generator", {"toy": Toy(seed=1)}),
        ("cache", {"cache": None}),
    ):
        with pytest.raises(TokenExitError, match=rf"`resume` must be for the same {name} as fit\.safetensors in it"):
            fitted(**{"recipe": HELD, "resume": tmp_path} | options)
    file = tmp_path / "fit.safetensors"
    arrays, marks = Files().read(file, "resume")
    for where in ("", "[1", "[" * 100_000):
        Files().write(file, arrays, marks | {"where": where}, argument="resume")
        with pytest.raises(TokenExitError, match=r"`resume` must hold a valid fit\.safetensors"):
            fitted(HELD, resume=tmp_path)
    Files().write(file, {"heads.1": arrays["heads.1"]}, marks, argument="resume")
    with pytest.raises(TokenExitError, match="`resume` must hold the state of the generator"):
        fitted(HELD, resume=tmp_path)


LOSSES = st.lists(st.floats(0, 1) | st.just(math.nan), max_size=12)


@given(losses=LOSSES, every=st.integers(1, 3))
def test_the_best_check_is_the_first_of_the_lowest_loss(losses, every):
    standing = Standing()
    for loss in losses:
        standing = replace(standing, step=standing.step + every).checked(loss)
    numbers = [(loss, at) for at, loss in enumerate(losses, start=1) if not math.isnan(loss)]
    if numbers:
        loss, at = min(numbers)
        assert standing.best == (loss, at * every)
        assert standing.kept_step == at * every
        assert standing.checks_since == len(losses) - at
    else:
        assert (standing.best, standing.checks_since) == (None, len(losses))
        assert standing.kept_step == standing.step
    recipe = Recipe(max(standing.step, 1), 2, 0.1, 0.0, 0.5, 1, max(len(losses), 1))
    assert Standing.from_dict(json.loads(json.dumps(asdict(standing))), recipe) == standing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": math.inf}, "`step` must be a whole number from 0 to 20, got inf"),
        ({"step": 21}, "`step` must be a whole number from 0 to 20, got 21"),
        ({"step": True}, "`step` must be a whole number from 0 to 20, got True"),
        ({"checks_since": 4}, "`checks_since` must be a whole number from 0 to 3, got 4"),
        ({"best": [math.nan, 1]}, "`best` must be a loss and a step from 0 to 5"),
        ({"best": [1.0, 6]}, "`best` must be a loss and a step from 0 to 5"),
        ({"decoded": 1}, "`decoded` must be a whole number from 0 to 0, got 1"),
        ({"before": math.nan}, "`before` must be a finite number, got nan"),
        ({"best": [1.0]}, "`best` must be a loss and a step from 0 to 5"),
        ({"more": 1}, "`where` must have the keys"),
    ],
)
def test_a_standing_that_cannot_be_is_refused(change, message):
    with pytest.raises(TokenExitError, match=message):
        Standing.from_dict({"step": 5, "checks_since": 0, "best": None, "decoded": 0, "before": 0.0} | change, RECIPE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"decoder_steps": -1}, "`decoder_steps` must be at least 0, got -1"),
        ({"decoder_images": 0}, "`decoder_images` must be at least 1, got 0"),
        ({"patches_per_step": 1}, "`patches_per_step` must be at least 2, got 1"),
        ({"check_every": 0}, "`check_every` must be at least 1, got 0"),
        ({"patience": 0}, "`patience` must be at least 1, got 0"),
        ({"held_out": 1.0}, "`held_out` must be at least 0 and less than 1"),
        ({"held_out": -0.1}, "`held_out` must be at least 0 and less than 1"),
    ],
)
def test_a_recipe_out_of_range_is_refused(change, message):
    with pytest.raises(TokenExitError, match=message):
        replace(RECIPE, **change)


@pytest.mark.parametrize("cache", ["memory", None])
def test_translators_see_all_rows_before_and_the_report_has_what_they_miss_of_them(cache):
    toy, report = fitted(HELD, toy=Imitating(), cache=cache)
    rows = np.concatenate([Table().rows(batch)[0]["1"] for batch in BATCHES])
    assert toy.measured == report.patches
    assert toy.corrected == report.held_out.patches
    for found, part in ((report, rows[: report.patches]), (report.held_out, rows[report.patches :])):
        far = np.abs(part[:, :2]).mean(axis=0)
        one, other = found.missed[2].values()
        assert list(found.missed[2]) == [3, 4]
        assert (one.error, one.variance) == (pytest.approx(far[0]), pytest.approx(far[1]))
        assert (other.error, other.variance) == (pytest.approx(far[1]), pytest.approx(2 * far[1]))
    _, plain = fitted(HELD, cache=cache)
    assert (plain.missed, plain.held_out.missed) == ({}, {})
    toy, _ = fitted(replace(HELD, held_out=0.0), toy=Imitating(), cache=cache)
    assert toy.corrected == 0
    assert plain.agreement == report.agreement


def test_a_report_is_read_in_words():
    report = FitReport({3: 0.9, 6: 0.954}, 2400, 100, 350, 100, True, HeldOut({3: 0.5, 6: 0.75}, 240, 10))
    assert str(report) == (
        "Fitted to 2400 patches of 100 images; held out: 240 patches of 10.\n"
        "350 steps, stopped early; the heads are those after step 100.\n"
        "They predict what the final head, or the decoder, predicts:\n"
        "  after block 3: on 90.0% of the patches fitted, 50.0% of those held out\n"
        "  after block 6: on 95.4% of the patches fitted, 75.0% of those held out"
    )
    held = replace(report.held_out, missed={6: {12: Missed(0.2, 0.7)}})
    translating = replace(report, missed={6: {12: Missed(0.0814, 0.913)}}, held_out=held)
    missed = (
        "\nOf the variance of the tokens that are read later, translators miss:\n"
        "  after block 6, of those of block 12: 0.081, 0.200 held out; they have 0.91 of their variance"
    )
    assert str(translating) == str(report) + missed
    alone = replace(translating, agreement={}, held_out=None)
    assert str(alone).splitlines()[2:] == [line.replace(", 0.200 held out", "") for line in missed.splitlines()[1:]]
    plain = str(FitReport({3: 0.9}, 2400, 100, 350, 350, False, None))
    assert "held out: none." in plain
    assert plain.endswith("after block 3: on 90.0% of the patches fitted")
