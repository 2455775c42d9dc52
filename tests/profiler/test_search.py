"""What a search suggests on a small made-up space whose every loss is known."""

import numpy as np
import pytest

from kvserve_api.errors import SpecError
from kvserve_profiler.hypervolume import axes, hypervolume
from kvserve_profiler.pool import FloatArray, Observation, Pool
from kvserve_profiler.search import INITIAL, reference, success_chance, suggest, worth_more

BUDGET_BP = 100.0


def made_up(count: int = 300, seed: int = 0) -> tuple[Pool, FloatArray]:
    """Return candidates of four families, and the loss of each on four windows."""
    rng = np.random.default_rng(seed)
    family, fine = rng.integers(0, 4, count), rng.random(count)
    octaves = 1.0 + 2.5 * fine + 0.3 * family
    loss = 2.0 + 5.0 * fine + np.array([2.0, 0.0, 1.0, 3.0])[family] + 0.1 * rng.normal(size=count)
    pool = Pool(
        features=np.column_stack([np.eye(4)[family], fine]),
        ratio=2.0**octaves,
        codec_s=0.01 * 2.0 ** np.array([0.0, 3.0, 1.5, 0.5])[family],
    )
    windows = loss[:, None] + np.array([0.0, 0.5, -0.5, 0.2]) + 0.1 * rng.normal(size=(count, 4))
    return pool, 2.0**windows - 1.0


POOL, LOSSES = made_up()


def observe(indices: list[int], windows: int = 4) -> list[Observation]:
    """Return what measuring gives."""
    return [
        Observation(index=index, losses_bp=[LOSSES[index, :windows].tolist()]) for index in indices
    ]


def volume(indices: list[int]) -> float:
    """Return the volume of some candidates by their true losses."""
    points = axes(
        POOL.ratio[indices],
        LOSSES[indices].mean(axis=1),
        POOL.codec_s[indices],
        reference(POOL, BUDGET_BP),
    )
    return hypervolume(points)


def search(count: int, *, seed: int = 0, batch: int = 4) -> list[int]:
    """Return the candidates that a search measures, in order."""
    seen: list[int] = []
    while len(seen) < count:
        seen += suggest(POOL, observe(seen), seed=seed, batch=batch, budgets_bp=[BUDGET_BP])
    return seen


def test_a_search_beats_chance() -> None:
    """With 24 of 300 candidates it has more of the volume than any of 100 random samples of 24."""
    found = volume(search(24)) / volume(list(range(len(POOL))))
    rng = np.random.default_rng(1)
    random = [
        volume(rng.permutation(len(POOL))[:24].tolist()) / volume(list(range(len(POOL))))
        for _ in range(100)
    ]
    assert found > max(random)
    assert found > 0.9


def test_suggestions_are_a_function_of_what_is_known() -> None:
    """The same observations in any order give the same batch, without doubles and without what was seen."""
    seen = search(12)
    batch = suggest(POOL, observe(seen), seed=3, batch=5, budgets_bp=[BUDGET_BP])
    assert batch == suggest(POOL, observe(seen), seed=3, batch=5, budgets_bp=[BUDGET_BP])
    assert len(set(batch)) == 5
    assert not set(batch) & set(seen)


def test_a_search_begins_all_over_the_space() -> None:
    """The first design has every family and both ends of the ratios."""
    first = suggest(POOL, [], seed=0, batch=INITIAL, budgets_bp=[BUDGET_BP])
    assert len(set(first)) == INITIAL
    assert (POOL.features[first, :4].sum(axis=0) > 0).all()
    assert POOL.ratio[first].min() < np.quantile(POOL.ratio, 0.2)
    assert POOL.ratio[first].max() > np.quantile(POOL.ratio, 0.8)


def test_starts_come_first() -> None:
    """The first design is of those that are known to be sensible, if there are enough."""
    starts = np.zeros(len(POOL), dtype=bool)
    starts[10:30] = True
    pool = Pool(features=POOL.features, ratio=POOL.ratio, codec_s=POOL.codec_s, starts=starts)
    first = suggest(pool, [], seed=0, batch=INITIAL, budgets_bp=[BUDGET_BP])
    assert set(first) <= set(range(10, 30))


def test_a_search_ends_with_the_pool() -> None:
    """No candidate is suggested twice, and when all were seen there is none left."""
    small = Pool(features=POOL.features[:10], ratio=POOL.ratio[:10], codec_s=POOL.codec_s[:10])
    seen = observe(list(range(7)))
    rest = suggest(small, seen, seed=0, batch=8, budgets_bp=[BUDGET_BP])
    assert sorted(rest) == [7, 8, 9]
    assert suggest(small, observe(list(range(10))), seed=0, batch=2, budgets_bp=[BUDGET_BP]) == []


@pytest.mark.parametrize("losses", [[], [[]], [[float("nan")]], [[float("inf"), 1.0]]])
def test_failures_teach_and_never_kill(losses: list[list[float]]) -> None:
    """NaN, infinity and nothing at all make their neighbours less likely, and all of them failing is no end."""
    family = np.flatnonzero(POOL.features[:, 1] > 0)
    failed = [Observation(index=int(index), losses_bp=losses) for index in family[:6]]
    assert all(one.failed for one in failed)
    chance = success_chance(
        POOL, [*failed, *observe([int(i) for i in np.setdiff1d(range(40), family)])]
    )
    assert chance[family].max() < chance[np.setdiff1d(range(len(POOL)), family)].min()
    only = suggest(POOL, failed * 2, seed=0, batch=3, budgets_bp=[BUDGET_BP])
    assert len(set(only) - set(family[:6].tolist())) == 3
    mixed = suggest(POOL, [*failed, *observe(search(8))], seed=0, batch=2, budgets_bp=[BUDGET_BP])
    assert len(mixed) == 2


def test_few_windows_are_brought_to_the_level_of_all() -> None:
    """Windows on which everything loses more do not make the candidates seen only there look worse."""
    from kvserve_profiler.hypervolume import loss_octaves
    from kvserve_profiler.surrogate import octaves_of

    seen = search(12)
    whole = [LOSSES[index].tolist() for index in seen]
    mixed = [row[:2] if position % 3 == 0 else row for position, row in enumerate(whole)]
    octaves, variances = octaves_of(mixed)
    assert octaves == pytest.approx(loss_octaves(LOSSES[seen].mean(axis=1)), abs=0.2)
    assert min(variances[::3]) > max(variances[1::3])


def test_further_windows_are_spared_for_what_is_beaten() -> None:
    """What its first window shows far over the budget or beaten is left; what is good or early is not."""
    seen = [index for index in search(16) if LOSSES[index].mean() < 4 * BUDGET_BP]
    known = observe(seen)

    def worth(loss_bp: float, index: int, observations: list[Observation]) -> bool:
        partial = Observation(index=index, losses_bp=[[loss_bp]])
        return worth_more(POOL, observations, partial, budgets_bp=[BUDGET_BP])

    other = next(index for index in range(len(POOL)) if index not in seen)
    assert not worth(20 * BUDGET_BP, other, known)
    assert worth(0.5, other, known)
    assert worth(20 * BUDGET_BP, other, known[:2])
    best = min(seen, key=lambda index: LOSSES[index].mean())
    assert not worth(BUDGET_BP / 2, best, [*known, *observe([best])])
    assert not worth(float("nan"), other, known)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ratio", np.array([1.0, 0.0])),
        ("codec_s", np.array([1.0, np.nan])),
        ("features", np.zeros((3, 1))),
        ("features", np.array([[0.0], [np.inf]])),
    ],
)
def test_a_pool_is_checked(field: str, value: FloatArray) -> None:
    """What would mislead a search without a word is refused by name."""
    good = {"features": np.zeros((2, 1)), "ratio": np.ones(2), "codec_s": np.ones(2)}
    with pytest.raises(SpecError, match=field):
        Pool(**(good | {field: value}))  # type: ignore[arg-type]
