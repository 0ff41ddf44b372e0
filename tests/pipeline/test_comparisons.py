"""Intervals of differences: the same as plain loops and SciPy, and right about planted differences and equal arms."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from paft_merge.pipeline.comparisons import Cell, Difference, Row, TableData
from paft_merge.pipeline.paired_intervals import DRAWS, Sample, _counts, draws, interval, mcnemar

RNG = np.random.default_rng


def sample(rows: np.ndarray, tokens: np.ndarray | None = None) -> Sample:
    """A score with values by item; a perplexity if there are tokens."""
    if tokens is None:
        return Sample(float(rows.mean()), None, tuple(rows.tolist()))
    value = math.exp(float((rows * tokens).sum() / tokens.sum()))
    return Sample(value, None, tuple(rows.tolist()), tuple(tokens.tolist()), perplexity=True)


def table(cells: dict[str, Cell], better: int = 1) -> TableData:
    """A merge (`b`) and a sequence (`a`) with one evaluation."""
    groups = {"a": "sequential", "b": "parallel"}
    rows = tuple(Row(name, groups[name], {"s": cell}) for name, cell in cells.items())
    return TableData(("s",), rows, (), {"s": better})


def difference(a: list[Sample], b: list[Sample], better: int = 1) -> Difference:
    """Arm b minus arm a, with a seed for each sample."""
    cells = {name: Cell.of(dict(enumerate(found))) for name, found in (("a", a), ("b", b))}
    made = table(cells, better)
    found = made.difference("s", made.rows[1], made.rows[0])
    assert found is not None
    return found


def test_draws_are_those_of_a_plain_loop_and_shared_by_all_samples() -> None:
    one, two, tokens = RNG(0).normal(size=40), RNG(1).normal(size=40), RNG(2).integers(1, 9, 40)
    made = draws([sample(one), sample(two), sample(abs(one), tokens)])
    counts = np.concatenate(list(_counts(40)))
    assert counts.shape == (DRAWS, 40)
    assert (counts.sum(axis=1) == 40).all()
    widening = stats.t.ppf(0.975, 39) / stats.norm.ppf(0.975) * math.sqrt(40 / 39)
    for b in range(0, DRAWS, 400):
        picked = [i for i in range(40) for _ in range(int(counts[b, i]))]
        for column, rows in enumerate((one, two)):
            plain = sum(rows[i] for i in picked) / 40
            assert made[b, column] == pytest.approx(rows.mean() + widening * (plain - rows.mean()))
        plain = math.exp(sum(abs(one[i]) * tokens[i] for i in picked) / sum(tokens[i] for i in picked))
        whole = math.exp((abs(one) * tokens).sum() / tokens.sum())
        assert made[b, 2] == pytest.approx(whole + widening * (plain - whole))


def test_the_interval_of_one_seed_is_that_of_scipys_paired_bootstrap() -> None:
    one, noise = RNG(3).normal(size=300), RNG(4).normal(0.1, 0.5, size=300)
    found = difference([sample(one)], [sample(one + noise)]).interval
    theirs = stats.bootstrap((noise,), np.mean, method="percentile", n_resamples=20_000, rng=RNG(5)).confidence_interval
    assert found is not None
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    assert found.value == pytest.approx(noise.mean())


@pytest.mark.parametrize("values", [[0.3, 0.1], [0.5, 0.2, 0.4, 0.1, 0.9]])
def test_without_noise_of_items_the_interval_is_students(values: list[float]) -> None:
    found = interval(values, np.tile(values, (DRAWS, 1)))
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))
    assert (found.low, found.high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.02 * half)


def share_called_different(make: Callable[[np.random.Generator], tuple[list[Sample], list[Sample]]]) -> float:
    """How often two arms are called different."""
    return float(np.mean([difference(*make(RNG(seed))).verdict != 0 for seed in range(60)]))


@pytest.mark.parametrize(("seeds", "items"), [(1, 6), (2, 40), (3, 40)])
@pytest.mark.parametrize("binary", [False, True])
def test_arms_that_differ_by_chance_are_called_different_in_one_of_twenty(seeds: int, items: int, binary: bool) -> None:
    def make(rng: np.random.Generator) -> tuple[list[Sample], list[Sample]]:
        item, found = rng.normal(size=items), list[list[Sample]]()
        for _ in range(2):
            luck = [rng.normal(0, 0.1 * (seeds > 1)) + rng.normal(0, 0.5, items) for _ in range(seeds)]
            found.append([sample(((item + one) > 0).astype(float) if binary else item + one) for one in luck])
        return found[0], found[1]

    assert share_called_different(make) <= 0.14, "60 tables: 8 or more of them have a chance of 1 in 100"


def test_pairs_show_what_the_spread_of_items_hides() -> None:
    item = RNG(6).normal(0, 10, 200)
    found = difference([sample(item)], [sample(item + RNG(7).normal(0.5, 0.5, 200))])
    assert found.verdict == 1
    apart = table({"a": Cell((0.0,), 0.7), "b": Cell((0.5,), 0.7)})
    known = apart.difference("s", apart.rows[1], apart.rows[0])
    assert known is not None
    assert known.verdict == 0, "by standard errors alone, as scores of lm-eval"


def test_less_perplexity_is_better_and_lines_count_by_their_tokens() -> None:
    tokens = np.array([1] * 30 + [1000] * 30)
    a = np.full(60, 1.0) + RNG(8).normal(0, 0.01, 60)
    b = a + np.array([0.5] * 30 + [-0.1] * 30)
    found = difference([sample(a, tokens)], [sample(b, tokens)], better=-1)
    assert found.value < 0
    assert found.verdict == 1
    assert difference([sample(a)], [sample(b)], better=-1).verdict == -1, "by lines it would be worse"


def test_nothing_is_concluded_from_one_item_or_without_any_spread() -> None:
    one = Sample(5.0, None, (1.6,), (10,), perplexity=True)
    for pair in ((one, Sample(9.0, None, (2.2,), (10,), perplexity=True)), (Sample(1.0), Sample(2.0))):
        found = difference([pair[0]], [pair[1]])
        assert (found.interval, found.verdict) == (None, 0)
        assert "no interval" in str(found)


@pytest.mark.parametrize(("only_one", "only_other", "both"), [(3, 0, 3), (12, 3, 10), (0, 0, 5), (400, 300, 9)])
def test_mcnemar_is_scipys_exact_binomial_test(only_one: int, only_other: int, both: int) -> None:
    one = [1.0] * (only_one + both) + [0.0] * only_other
    other = [0.0] * only_one + [1.0] * (both + only_other)
    discordant = only_one + only_other
    expected = stats.binomtest(only_one, discordant, 0.5).pvalue if discordant else 1.0
    assert mcnemar(one, other) == pytest.approx(expected)


def test_mcnemar_is_for_right_and_wrong_answers_of_one_set_of_items() -> None:
    assert mcnemar([0.5, 1.0], [0.0, 1.0]) is None
    assert mcnemar([1.0], [0.0, 1.0]) is None
    assert mcnemar([], []) is None


def test_three_of_six_answers_are_too_few_although_the_resampling_excludes_zero() -> None:
    found = difference([sample(np.array([0.0] * 6))], [sample(np.array([1.0] * 5 + [0.0]))])
    assert found.interval is not None
    assert found.interval.low > 0
    assert found.mcnemar == (0.0625,)
    assert found.verdict == 0


def test_an_arm_without_seeds_is_compared_with_every_seed_and_seeds_with_their_own() -> None:
    rows = RNG(9).normal(size=(4, 50))
    base = Cell.of({None: sample(rows[0])})
    arm = Cell.of({seed: sample(rows[0] + shift) for seed, shift in ((0, 1.0), (1, 1.2), (2, 1.1))})
    made = table({"a": base, "b": arm})
    found = made.difference("s", made.rows[1], made.rows[0])
    assert found is not None
    assert found.value == pytest.approx(1.1)
    assert found.verdict == 1
    half = table({"a": Cell.of({1: sample(rows[1]), 2: sample(rows[2])}), "b": arm})
    found = half.difference("s", half.rows[1], half.rows[0])
    assert found is not None
    values = dict(zip(arm.seeds, arm.values, strict=True))
    assert found.value == pytest.approx((values[1] - rows[1].mean() + values[2] - rows[2].mean()) / 2)
    apart = table({"a": Cell.of({7: sample(rows[1])}), "b": arm})
    assert apart.difference("s", apart.rows[1], apart.rows[0]) is None


def test_merges_are_compared_with_the_best_points_of_a_swept_sequence_although_merges_beat_them_all() -> None:
    def row(name: str, group: str, skill: float, happy: float, frontier: str = "") -> Row:
        return Row(name, group, {"s": Cell((skill,), 0.01), "h": Cell((happy,), 0.01)}, frontier, {"beta": skill})

    rows = (
        row("one", "sequential", 0.5, 0.2, "sequential"), row("two", "sequential", 0.2, 0.5, "sequential"),
        row("worst", "sequential", 0.1, 0.1, "sequential"), row("merge", "parallel", 0.9, 0.9),
    )  # fmt: skip
    made = TableData(("s", "h"), rows, (), {"s": 1, "h": 1}, ("s", "h"))
    assert made.pareto == {"merge"}
    assert list(made.against) == ["one", "two"]
    assert made.verdicts()[0] == "merges against one: better and nowhere worse: merge"


def test_the_points_of_a_frontier_are_named_together() -> None:
    def row(name: str, skill: float, frontier: str = "", **point: object) -> Row:
        group = "parallel" if name != "in turn" else "sequential"
        return Row(name, group, {"s": Cell((skill,), 0.001)}, frontier, point)

    rows = (
        row("in turn", 0.5), row("plain", 0.9), row("x w=1", 0.9, "x", w=1), row("x w=2", 0.8, "x", w=2),
        row("y w=1", 0.9, "y", w=1), row("y w=2", 0.8, "y", w=2), row("y w=3", 0.1, "y", w=3),
        row("z a=1 b=1", 0.9, "z", a=1, b=1), row("z a=1 b=2", 0.9, "z", a=1, b=2), row("z a=2 b=1", 0.1, "z", a=2, b=1),
    )  # fmt: skip
    assert TableData(("s",), rows, (), {"s": 1}).verdicts()[0] == (
        "merges against in turn: better and nowhere worse: plain, x at all 2 points, y at w=1/2, z at a=1 b=1 / a=1 b=2; "
        "worse and nowhere better: y w=3, z a=2 b=1"
    )
