import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.core.backends import each_backend
from tokenexit import TokenExitError, cost, heads
from tokenexit.cost import HeadCost
from tokenexit.semantic import SemanticPlan, stvit

PARTS = cost.Cost(
    embed=7,
    blocks=(100, 200, 300),
    width=8,
    prefix=1,
    exit_heads={1: HeadCost(11, 5), 2: HeadCost(13)},
    head=HeadCost(17, 3),
    decoder=1000,
)
RAN = hnp.arrays(np.int64, st.tuples(st.integers(0, 3), st.just(3)), elements=st.integers(0, 20))
HEAD_ON = st.sampled_from(["running", "all"])
SIZE = st.integers(1, 6)
NORM = st.sampled_from([0, 5])


def of_a_head(head, tokens):
    return head.per_token * tokens + head.fixed if tokens > 0 else 0


def of_blocks(parts, blocks, tokens):
    """Linear layers and attention of some blocks, counted from 0."""
    return sum(tokens * parts.blocks[block] for block in blocks), sum(2 * tokens * tokens * parts.width for _ in blocks)


class Counter:
    """Multiplies matrices of which only the shapes are known, and counts."""

    def __init__(self, norm=0):
        self.total = 0
        self.per_normed = norm

    def product(self, a, b):
        """(n, k) times (k, m)."""
        assert a[1] == b[0]
        self.total += a[0] * a[1] * b[1]
        return a[0], b[1]

    def linear(self, x, wide):
        return self.product(x, (x[1], wide))

    def norm(self, x):
        self.total += self.per_normed * x[0] * x[1]
        return x

    def attention(self, query, memory):
        q, k, v = self.linear(query, query[1]), self.linear(memory, query[1]), self.linear(memory, query[1])
        weights = self.product(q, k[::-1])
        return self.linear(self.product(weights, v), query[1])

    def mlp(self, x, inside):
        return self.linear(self.linear(x, inside), x[1])


@each_backend
@given(ran=RAN, exits=st.sets(st.sampled_from([1, 2])), head_on=HEAD_ON)
def test_multiply_adds_are_the_sum_over_what_ran(backend, ran, exits, head_on):
    got = backend.numpy(PARTS.multiply_adds(backend.array(ran), patches=5, exits=exits, head_on=head_on))
    for row, total in zip(ran.tolist(), got.tolist(), strict=True):
        wanted = 5 * 7 + 1000
        for block, count in enumerate(row):
            wanted += sum(of_blocks(PARTS, [block], count))
        for after in exits:
            wanted += of_a_head(PARTS.exit_heads[after], row[after - 1] - 1)
        wanted += of_a_head(PARTS.head, 5 if head_on == "all" else row[2] - 1)
        assert total == wanted


@each_backend
@given(ran=RAN, dim=st.sampled_from([None, 12]), keys=st.sampled_from(["running", "all"]))
def test_what_a_network_with_gates_runs_is_counted(backend, ran, dim, keys):
    gates, slots, patches = [HeadCost(31), HeadCost(37, 2)], 20, 19
    options = {"patches": patches, "slots": slots, "gates": gates, "keys": keys, "dim": dim}
    found = backend.numpy(PARTS.gated(backend.array(ran), **options))

    def one(tokens):
        total = patches * 7 + 1000 + (17 * patches + 3) + slots * (31 + 37) + 2
        total += sum(sum(of_blocks(PARTS, [block], active)) for block, active in enumerate(tokens))
        beside = sum((slots - active) * (3 * (dim or 8) ** 2 + 2 * 8 * active) for active in tokens)
        return total + (beside if keys == "all" else 0)

    np.testing.assert_array_equal(found, [one(row.tolist()) for row in ran])


@pytest.mark.parametrize("keys", ["running", "all"])
@pytest.mark.parametrize("before", ["decoder", "last block"])
def test_what_gates_are_foretold_to_cost_is_what_is_counted(keys, before):
    vit, gate = cost.plain_vit(width=48, depth=6, patch=8, prefix=2, head=HeadCost(5)), HeadCost(7, 3)
    ran = np.array([[26, 20, 14, 14, 8, 26 if before == "last block" else 8]])
    counted = vit.gated(ran, patches=24, slots=26, gates=[gate] * 3, keys=keys)
    foretold = vit.skipping({1: 0.75, 2: 0.5, 4: 0.25}, patches=24, gate=gate, keys=keys, before=before)
    assert counted.tolist() == [foretold.total]


@each_backend
@given(
    tokens=hnp.arrays(np.int32, st.integers(0, 4), elements=st.integers(-1, 3)), head=st.builds(HeadCost, SIZE, SIZE)
)
def test_a_head_that_reads_no_token_costs_nothing(backend, tokens, head):
    got = backend.numpy(head.multiply_adds(backend.array(tokens)))
    assert got.tolist() == [of_a_head(head, count) for count in tokens.tolist()]


@given(
    width=SIZE, depth=SIZE, patch=SIZE, channels=SIZE, inside=SIZE, prefix=st.integers(0, 2), norm=NORM,
    height=SIZE, wide=SIZE, classes=SIZE,
)  # fmt: skip
def test_a_plain_vit_costs_what_its_matrices_do(
    width, depth, patch, channels, inside, prefix, norm, height, wide, classes
):
    count = Counter(norm)
    patches = height * wide
    count.linear((patches, channels * patch * patch), width)
    tokens = (patches + prefix, width)
    for _ in range(depth):
        count.attention(count.norm(tokens), tokens)
        count.mlp(count.norm(tokens), inside * width)
    count.linear(count.norm((patches, width)), classes)
    parts = cost.plain_vit(
        width=width, depth=depth, patch=patch, channels=channels, mlp_ratio=float(inside), prefix=prefix,
        head=HeadCost(width * classes), norm=norm,
    )  # fmt: skip
    assert parts.multiply_adds(np.full((1, depth), patches + prefix), patches=patches).tolist() == [count.total]


@given(tokens=SIZE, half=SIZE, classes=SIZE, layers=SIZE, norm=NORM)
def test_an_atm_head_costs_what_its_matrices_do(tokens, half, classes, layers, norm):
    count = Counter(norm)
    memory = count.norm(count.linear((tokens, 2 * half), half))
    queries = (classes, half)
    for _ in range(layers):
        queries = count.norm(count.attention(queries, queries))
        queries = count.norm(count.attention(queries, memory))
        queries = count.norm(count.mlp(queries, 4 * half))
    count.linear(queries, 2)
    head = cost.atm_head(width=2 * half, classes=classes, layers=layers, norm=norm)
    assert head.multiply_adds(np.array([tokens, 0])).tolist() == [count.total, 0]
    assert cost.of_head(heads.ATM(layers), width=2 * half, classes=classes, norm=norm) == head


@pytest.mark.parametrize(("plan", "inside", "normed"), [
    (heads.Linear(), [], True), (heads.MLP(), [4], True), (heads.MLP(6), [6], True), (heads.FCN(5), [5], False),
])  # fmt: skip
@pytest.mark.parametrize("norm", [0, 5])
def test_a_head_from_a_plan_costs_what_its_matrices_do(plan, inside, normed, norm):
    count = Counter(norm)
    x = count.norm((3, 4)) if normed else (3, 4)
    for wide in [*inside, 7]:
        x = count.linear(x, wide)
    head = cost.of_head(plan, width=4, classes=7, norm=norm)
    assert head.multiply_adds(np.array([3])).tolist() == [count.total]


def test_a_head_that_looks_around_reads_twice_the_channels():
    wide = cost.of_head(heads.Neighbourhood(6), width=4, classes=7, norm=5).multiply_adds(np.array([3]))
    assert wide.tolist() == [3 * (5 * 4 + 2 * 4 * 6 + 6 * 7)]
    assert cost.of_head(heads.Neighbourhood(), width=4, classes=7) == cost.HeadCost(2 * 4 * 4 + 4 * 7)


@pytest.mark.parametrize("norm", [0, 5])
def test_a_translator_costs_itself_and_the_final_norm_and_head_on_what_it_gives(norm):
    count, hidden = Counter(norm), 6
    x = count.linear((3, 4), 4)
    inside = count.linear(count.norm(x), hidden)
    x = count.linear(inside, 4)
    count.linear(inside, 1)
    final = cost.of_head(heads.MLP(5), width=4, classes=7, norm=norm)
    x = count.norm(x)
    count.linear(count.linear(count.norm(x), 5), 7)
    found = cost.of_head(heads.Translator(hidden), width=4, classes=7, norm=norm, final=final)
    assert found.multiply_adds(np.array([3])).tolist() == [count.total]
    taps = cost.of_head(heads.Translator(hidden), width=4, norm=norm, targets=3)
    assert taps == cost.HeadCost(norm * 4 + 3 * 4 * 4 + 4 * hidden + hidden * 3 * 4 + hidden)
    every = cost.of_head(heads.Translator(), width=4, classes=7, final=cost.HeadCost(2, 3))
    assert every == cost.HeadCost(5 * 4 * 4 + 2 * 4 + 2, 3)


def test_upsampling_is_counted_by_what_comes_out():
    assert cost.upsampling(channels=3, size=(5, 7), per_element=4) == 3 * 5 * 7 * 4
    parts = cost.plain_vit(width=4, depth=1, patch=2, decoder=11)
    assert int(parts.multiply_adds(np.zeros((1, 1), np.int64), patches=0)[0]) == 11


def test_a_dense_vit_base_costs_what_is_published():
    """ViT-B/16 at 224 pixels: 17.6 G multiply-adds with its attention products, classifier aside."""
    vit = cost.plain_vit(width=768, depth=12, patch=16, prefix=1)
    total = int(vit.multiply_adds(np.full((1, 12), 196 + 1), patches=196)[0])
    assert total / 1e9 == pytest.approx(17.56, abs=0.05)


@pytest.mark.parametrize(("width", "depth", "exits", "size", "classes", "one", "three"), [
    (768, 12, (6, 8), 512, 150, 109.9, 114.8),  # ADE20K
    (1024, 24, (8, 16), 640, 150, 617.0, 628.4),
    (1024, 24, (8, 16), 480, 59, 315.4, 320.7),  # Pascal Context
    (1024, 24, (8, 16), 512, 171, 366.9, 376.0),  # COCO-Stuff-10K
])  # fmt: skip
def test_the_dense_networks_of_dtop_cost_what_is_published(width, depth, exits, size, classes, one, three):
    """Its dense networks with one ATM head, and with the two of the exits beside it; in 10⁹ multiply-adds."""
    atm = cost.atm_head(width=width, classes=classes, norm=5)
    vit = cost.plain_vit(
        width=width, depth=depth, patch=16, exit_heads=dict.fromkeys(exits, atm), head=atm, norm=5,
        decoder=cost.upsampling(channels=classes, size=(size, size), per_element=4),
    )  # fmt: skip
    patches = (size // 16) ** 2
    ran = np.full((1, depth), patches)
    with_one = int(vit.multiply_adds(ran, patches=patches)[0])
    assert with_one / 1e9 == pytest.approx(one, abs=0.3)
    assert round((with_one + vit.decoder) / 1e9, 1) == one  # the guide says so: as if upsampling were counted twice
    assert int(vit.multiply_adds(ran, patches=patches, exits=exits)[0]) / 1e9 == pytest.approx(three, abs=0.05)


@st.composite
def exiting(draw):
    """Tokens that run in each image, prefix included, how many of them leave, and an interval of blocks."""
    running = draw(hnp.arrays(np.int64, st.integers(0, 4), elements=st.just(0) | st.integers(2, 30)))
    leaving = np.array([draw(st.integers(0, max(count - 1, 0))) for count in running.tolist()], dtype=np.int64)
    after, until = draw(st.sampled_from([(1, 2), (1, 3), (2, 3), (1, None), (2, None)]))
    return running, leaving, after, until


def stays(count, gone):
    """Of PARTS, with one prefix token: without patches, nothing runs on."""
    return count - gone if count - gone > 1 else 0


@each_backend
@given(drawn=exiting(), head_on=HEAD_ON, per_moved=st.floats(0, 50))
def test_what_repacking_saves_and_spends_is_that_of_the_oracle(backend, drawn, head_on, per_moved):
    running, leaving, after, until = drawn
    got = PARTS.repacking(
        backend.array(running), backend.array(leaving),
        after=after, until=until, per_moved_element=per_moved, head_on=head_on,
    )  # fmt: skip
    end = until or 3
    head = HeadCost(0) if (end, head_on) == (3, "all") else PARTS.head if end == 3 else PARTS.exit_heads[end]
    saved, spent = [], []
    for i, (count, gone) in enumerate(zip(running.tolist(), leaving.tolist(), strict=True)):
        stay = stays(count, gone)
        (linear, attention), (linear_left, attention_left) = (
            of_blocks(PARTS, range(after, end), tokens) for tokens in (count, stay)
        )
        parts = {
            "linear": linear - linear_left,
            "attention": attention - attention_left,
            "next_head": of_a_head(head, count - 1) - of_a_head(head, stay - 1),
            "exit_head": of_a_head(PARTS.exit_heads[after], count - 1),
            "moving": stay * round(per_moved * 8),
        }
        assert {name: int(backend.numpy(getattr(got, name))[i]) for name in parts} == parts
        saved.append(parts["linear"] + parts["attention"] + parts["next_head"])
        spent.append(parts["exit_head"] + parts["moving"])
    assert backend.numpy(got.saved).tolist() == saved
    assert backend.numpy(got.spent).tolist() == spent
    assert backend.numpy(got.pays).tolist() == [a > b for a, b in zip(saved, spent, strict=True)]
    assert bool(backend.numpy(got.batch_pays)) == (sum(saved) > sum(spent))


@each_backend
@given(drawn=exiting(), head_on=HEAD_ON)
def test_the_prediction_is_the_difference_of_two_counts(backend, drawn, head_on):
    running, leaving, after, until = drawn
    stay = np.array([stays(*pair) for pair in zip(running.tolist(), leaving.tolist(), strict=True)], dtype=np.int64)
    end = until or 3

    def total(exits, between):
        """Before the interval all run, after it only those that stay."""
        columns = [running if block < after else between if block < end else stay for block in range(3)]
        ran = backend.array(np.stack(columns, axis=1))
        later = [end] if end < 3 else []
        return backend.numpy(PARTS.multiply_adds(ran, patches=30, exits=[*exits, *later], head_on=head_on))

    got = PARTS.repacking(
        backend.array(running), backend.array(leaving), after=after, until=until, per_moved_element=0.0, head_on=head_on
    )
    difference = total([], running) - total([after], stay)
    assert backend.numpy(got.saved - got.spent).tolist() == difference.tolist()


def test_one_count_of_leavers_serves_all_images():
    running = np.array([10, 7])
    one = PARTS.repacking(running, 3, after=1, per_moved_element=2.0)
    many = PARTS.repacking(running, np.array([3, 3]), after=1, per_moved_element=2.0)
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(many, field.name))


def test_it_pays_where_the_machine_moves_fast_enough():
    vit = cost.plain_vit(
        width=768, depth=12, patch=16, exit_heads={6: cost.of_head(heads.MLP(), width=768, classes=150)}
    )
    fast = vit.repacking(np.array([1024, 1024]), np.array([400, 1]), after=6, per_moved_element=100.0)
    assert fast.pays.tolist() == [True, False]
    assert fast.batch_pays
    slow = vit.repacking(np.array([1024, 1024]), np.array([400, 1]), after=6, per_moved_element=1e5)
    assert slow.pays.tolist() == [False, False]
    assert not slow.batch_pays


def test_nothing_is_saved_in_blocks_after_the_leavers_are_back():
    """Leavers that rejoin before the last block miss blocks 2 alone, and no head."""
    parts = dataclasses.replace(PARTS, exit_heads={1: HeadCost(11)})
    got = parts.repacking(np.array([10]), 4, after=1, until=2, per_moved_element=0.0)
    assert (int(got.linear[0]), int(got.next_head[0])) == (4 * 200, 0)


def test_large_counts_are_right_inside_jit():
    """One image takes more multiply-adds than 32 bits hold, and its constants may be as large."""
    jax = pytest.importorskip("jax")
    atm = cost.atm_head(width=4096, classes=300)
    vit = cost.plain_vit(
        width=4096, depth=40, patch=14, prefix=1, exit_heads={20: atm}, head=atm, decoder=5_000_000_000
    )
    ran, gone = np.repeat([[1601] * 20 + [900] * 20], 2, axis=0), np.array([701, 1600])

    def count(ran):
        return vit.multiply_adds(ran, patches=1600, exits=[20])

    def predict(running, gone):
        got = vit.repacking(running, gone, after=20, per_moved_element=9.5)
        return got.saved, got.spent, got.pays, got.batch_pays

    assert atm.fixed > 2**31
    np.testing.assert_allclose(jax.jit(count)(jax.numpy.asarray(ran)), count(ran), rtol=1e-6)
    arrays = ran[:, 0], gone
    for traced, wanted in zip(jax.jit(predict)(*map(jax.numpy.asarray, arrays)), predict(*arrays), strict=True):
        np.testing.assert_allclose(traced, wanted, rtol=1e-6)


def test_token_blocks_are_a_share_of_all():
    assert cost.token_blocks(np.array([[10, 10], [10, 0]]), slots=10) == 0.75


@pytest.mark.usefixtures("unchecked")
def test_bad_input_is_named():
    with pytest.raises(TokenExitError, match=r"`tokens_per_block` must have shape \(images, 3\), got shape \(1, 2\)"):
        PARTS.multiply_adds(np.zeros((1, 2), np.int64), patches=5)
    with pytest.raises(
        TokenExitError, match=r"`exits` must be among the blocks with an exit head, \[1, 2\], got \[3\]"
    ):
        PARTS.multiply_adds(np.zeros((1, 3), np.int64), patches=5, exits=[3])
    with pytest.raises(TokenExitError, match="`head_on` must be 'running' or 'all', got 'every'"):
        PARTS.multiply_adds(np.zeros((1, 3), np.int64), patches=5, head_on="every")
    with pytest.raises(TokenExitError, match="at least one image, block and slot"):
        cost.token_blocks(np.zeros((0, 3), np.int64), slots=5)


@pytest.mark.parametrize("after", [0, 3])
def test_an_exit_head_follows_a_block_that_is_not_the_last(after):
    with pytest.raises(
        TokenExitError, match=rf"`exit_heads` must follow blocks from 1 to 2, for 3 blocks, got \[{after}\]"
    ):
        dataclasses.replace(PARTS, exit_heads={1: HeadCost(1), after: HeadCost(1)})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("change", "message"), [
    ({"after": 3}, r"`after` must be a block with an exit head, of \[1, 2\], got 3"),
    ({"until": 1}, "`until` must be a block from 2 to 3, got 1"),
    ({"until": 4}, "`until` must be a block from 2 to 3, got 4"),
    ({"per_moved_element": -1.0}, "`per_moved_element` must be a finite number, 0 or more, got -1.0"),
    ({"per_moved_element": float("nan")}, "`per_moved_element` must be a finite number, 0 or more, got nan"),
    ({"running": np.zeros((2, 1), np.int64)}, r"`running` must have shape \(images,\), got shape \(2, 1\)"),
    ({"leaving": np.zeros(3, np.int64)}, r"`leaving` must have shape \(2,\), got shape \(3,\)"),
    ({"head_on": "none"}, "`head_on` must be 'running' or 'all', got 'none'"),
])  # fmt: skip
def test_a_bad_question_about_repacking_is_named(change, message):
    given = {"running": np.array([4, 4]), "leaving": 1, "after": 1, "per_moved_element": 1.0} | change
    with pytest.raises(TokenExitError, match=message):
        PARTS.repacking(given.pop("running"), given.pop("leaving"), **given)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("make", "message"), [
    (lambda: cost.plain_vit(width=0, depth=1, patch=1), "`width` must be at least 1, got 0"),
    (lambda: cost.plain_vit(width=1, depth=0, patch=1), "`depth` must be at least 1, got 0"),
    (lambda: cost.plain_vit(width=1, depth=1, patch=0), "`patch` must be at least 1, got 0"),
    (lambda: cost.plain_vit(width=1, depth=1, patch=1, channels=0), "`channels` must be at least 1, got 0"),
    (lambda: cost.plain_vit(width=2, depth=1, patch=1, mlp_ratio=0.4),
     "`mlp_ratio` must give at least one channel for width 2, got 0.4"),
    (lambda: cost.plain_vit(width=1, depth=1, patch=1, prefix=-1), "`prefix` must be 0 or more, got -1"),
    (lambda: cost.plain_vit(width=1, depth=1, patch=1, decoder=-1), "`decoder` must be 0 or more, got -1"),
    (lambda: cost.plain_vit(width=1, depth=1, patch=1, norm=-1), "`norm` must be 0 or more, got -1"),
    (lambda: cost.of_head("mlp", width=1, classes=1), "`plan` must be a plan of tokenexit.heads, got 'mlp'"),
    (lambda: cost.of_head(heads.Translator(), width=1, classes=1),
     r"`final` must be given for a plan that translates, .*got None beside None for Translator\(hidden=None\)"),
    (lambda: cost.of_head(heads.Translator(), width=1, final=cost.HeadCost(1), targets=1), "`final` must be given for a"),
    (lambda: cost.of_head(heads.Translator(), width=1, targets=0), "`targets` must be at least 1, got 0"),
    (lambda: cost.of_head(heads.MLP(), width=1, classes=1, final=cost.HeadCost(1)), "`final` must be left out for a plan"),
    (lambda: cost.of_head(heads.MLP(), width=1, classes=1, targets=2), "`final` must be left out for a plan that gives"),
    (lambda: cost.of_head(heads.MLP(), width=1, classes=0), "`classes` must be at least 1, got 0"),
    (lambda: cost.of_head(heads.MLP(), width=1, classes=1, norm=-1), "`norm` must be 0 or more, got -1"),
    (lambda: cost.atm_head(width=3, classes=1), "`width` must be even, got 3"),
    (lambda: cost.atm_head(width=2, classes=1, layers=0), "`layers` must be at least 1, got 0"),
    (lambda: cost.upsampling(channels=1, size=(0, 2), per_element=4), "`height` must be at least 1, got 0"),
    (lambda: cost.upsampling(channels=1, size=(2, 2), per_element=-4), "`per_element` must be 0 or more, got -4"),
])  # fmt: skip
def test_sizes_and_plans_are_checked(make, message):
    with pytest.raises(TokenExitError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": {12: 0.5}}, "`rates` must have gates after blocks 1 to 11, got [12]"),
        ({"rates": {3: 1.5}}, "`rates` must be shares in [0, 1], got {3: 1.5}"),
        ({"keys": "some"}, "`keys` must be 'running' or 'all', got 'some'"),
        ({"before": "head"}, "`before` must be 'decoder' or 'last block', got 'head'"),
        ({"per_moved_element": -1.0}, "`per_moved_element` must be a finite number, 0 or more, got -1.0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_gates_that_cannot_be_are_refused(options, message):
    whole = cost.plain_vit(width=192, depth=12, patch=16)
    gate = cost.HeadCost(9312)
    rates = options.pop("rates", {3: 0.5})
    with pytest.raises(TokenExitError) as found:
        whole.skipping(rates, patches=660, gate=gate, **options)
    assert str(found.value) == message


@pytest.mark.usefixtures("unchecked")
def test_keys_that_there_are_not_are_refused():
    with pytest.raises(TokenExitError, match="`keys` must be 'running' or 'all', got 'some'"):
        PARTS.gated(np.zeros((1, 3), int), patches=1, slots=1, gates=[], keys="some")


def test_fewer_gates_cost_and_move_less_at_the_same_rates():
    whole, gate = cost.plain_vit(width=192, depth=12, patch=16, prefix=1), cost.HeadCost(9312)
    nine, three = (
        whole.skipping(dict.fromkeys(after, 0.5), patches=660, gate=gate, per_moved_element=10.0)
        for after in (range(3, 12), (3, 6, 9))
    )
    assert nine.network == three.network < whole.skipping({}, patches=660, gate=gate).total
    assert nine.gates == 3 * three.gates == 9 * 661 * 9312
    assert nine.moving == 3 * three.moving == 9 * 10 * 192 * (2 * 331 + 661)


def of_semantic(queries, keys, width, hidden):
    """A layer, step by step: projections, two products of attention, the MLP."""
    projections = queries * width * width + keys * width * 2 * width + queries * width * width
    return projections + 2 * queries * keys * width + queries * 2 * width * hidden


@pytest.mark.parametrize("until", [None, 5, 6])
def test_blocks_on_semantic_tokens_cost_what_they_run(until):
    """4 x 6 patches and one more token; 2 x 3 semantic tokens of all, or in windows that hang over the edge."""
    parts = cost.Cost(7, (100, 200, 300, 400, 500, 600), width=8, prefix=1, exit_heads={}, head=HeadCost(9))
    blocks = [lambda tokens, one=one: tokens * one + 2 * 8 * tokens * tokens for one in parts.blocks]
    layer = functools.partial(of_semantic, width=8, hidden=20)
    asked = {"after": 1, "until": until, "hidden": 20}

    def wanted(few, making, recovery):
        last = 6 if until is None else until - 1
        total = 24 * 7 + blocks[0](25) + making + sum(blocks[index](few) for index in range(3, last))
        return total if until is None else total + recovery + sum(blocks[index](25) for index in range(until, 6))

    found = parts.semantic(stvit((2, 3)), (4, 6), **asked)
    assert found == wanted(7, 2 * layer(7, 31), layer(24, 7))
    around = SemanticPlan((3, 4), (2, 3), (5, 5), (9, 9), (3, 3), "inside", own_keys=False)
    found = parts.semantic(around, (4, 6), **asked)
    assert found == wanted(25, 4 * (layer(6, 20) + layer(6, 24)), 4 * layer(12, 9))
    found = parts.semantic(dataclasses.replace(around, edges="beyond", own_keys=True), (4, 6), **asked)
    assert found == wanted(25, 4 * (layer(6, 31) + layer(6, 87)), 4 * layer(12, 9))


def test_blocks_must_leave_room_for_semantic_tokens():
    for asked, message in (
        ({"after": 2, "until": None}, "`after` must be a block from 0 to 1, for 3 blocks"),
        ({"after": 0, "until": 2}, "`until` must be a block from 3 to 3"),
    ):
        with pytest.raises(TokenExitError, match=message):
            PARTS.semantic(stvit(), (4, 6), hidden=8, **asked)
    with pytest.raises(TokenExitError, match="`hidden` must be at least 1, got 0"):
        PARTS.semantic(stvit(), (4, 6), after=0, until=None, hidden=0)
