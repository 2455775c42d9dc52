"""What the comparison of searches computes, on a small table of its own."""

import json
from pathlib import Path

import numpy as np
import pytest

import profiler_figure
import profiler_search
from kvserve_api.errors import ArtifactError
from kvserve_api.wire import KVLayout
from kvserve_profiler.pool import Pool
from kvserve_profiler.space import Space
from kvserve_profiler.space_families import space_of
from profiler_curves import Outcome, Scoring, evals_to
from profiler_kept import Kept, Replay
from profiler_methods import METHODS, replay
from profiler_paper import acquisition
from profiler_search import Effort, document_of, measure, printed, problem_of
from profiler_table import Row, Table, short, space_to_document

LAYOUT = KVLayout(layers=2, kv_heads=1, head_dim=32, dtype="float32")
FAMILIES = ("raw", "lossless", "absmax", "lloyd", "fp8")


def rows_of(space: Space) -> list[Row]:
    """Return rows of a space whose losses follow from its names, with two windows of each of two texts."""
    rows = []
    for point in space.points():
        name = space.name_of(point)
        size = 1 + sum(map(ord, name)) % 23
        loss = 1e-4 * size**2 * (name != "none")
        rows.append(
            Row(
                name=name,
                digest=short(space.strategy(point).digest),
                ratio=float(1 + size / 3),
                encode_s=0.001 * (1 + len(name) % 7),
                decode_s=0.002,
                evaluation_s=0.5,
                kl=tuple((loss * text, loss * text * 1.5) for text in (1, 2, 1, 2)),
                forecast=tuple((loss * text, 2 * loss * text) for text in (1, 2, 1, 2)),
            )
        )
    return rows


def provenance_of(space_document: dict[str, object]) -> dict[str, object]:
    """Return the provenance of such a table."""
    windows = [{"kind": kind} for kind in ("prose", "code", "prose", "code")]
    return {"space": space_document, "windows": windows, "model": {"name": "small"}}


@pytest.fixture(scope="module")
def table() -> Table:
    """A table of some of the families."""
    space = space_of(LAYOUT).within(FAMILIES)
    return Table.of(space, space.points(), rows_of(space), provenance_of({}))


def test_table_survives_its_files(tmp_path: Path) -> None:
    """What is written is read back to four digits; a table that lacks a strategy of the space is refused."""
    space = space_of(LAYOUT)
    rows = rows_of(space)
    document = space_to_document(LAYOUT, {}) | {"fixed": {"coder": "rans"}}
    points = [point for point in space.points() if point.get("coder") != "pack"]
    table = Table.of(space, points, rows, provenance_of(document))
    path = tmp_path / "truth.csv"
    table.write(rows, path)
    again = Table.read(path)
    assert again.names == table.names
    assert again.kinds == ("prose", "code", "prose", "code")
    np.testing.assert_allclose(again.ratio, table.ratio, rtol=1e-3)
    np.testing.assert_allclose(again.kl, table.kl, rtol=1e-3)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    with pytest.raises(ArtifactError, match="is missing: the space has changed"):
        Table.read(path)


def test_table_of_another_strategy() -> None:
    """A row whose name now means another strategy is not used."""
    space = space_of(LAYOUT).within(["raw"])
    (row,) = rows_of(space)
    other = Row(**{**row.to_json(), "kl": row.kl, "digest": "0" * 16})
    with pytest.raises(ArtifactError, match="none is missing"):
        Table.of(space, space.points(), [other], provenance_of({}))


def test_curve_of_known_volumes() -> None:
    """Each point adds the volume that it alone dominates, and a worse one adds nothing."""
    pool = Pool(
        features=np.zeros((4, 1)), ratio=np.array([2, 4, 2, 1.0]), codec_s=np.array([1, 2, 2, 4.0])
    )
    # octaves of the budget over the losses: 3, 2, 2, 3
    losses = np.array([[1.0], [3.0], [3.0], [1.0]])
    scoring = Scoring(pool, losses, budget_bp=15.0)
    # boxes of 1 x 3 x 2 and 2 x 2 x 1 share one of 1 x 2 x 1
    assert scoring.exhaustive == pytest.approx([8.0], rel=1e-6)
    assert scoring.all_knowing(0.7) == 1
    assert scoring.all_knowing(0.98) == 2
    assert scoring.curve([3, 2, 0, 1]) == pytest.approx([0, 2 / 8, 6 / 8, 1], abs=1e-6)


def test_losses_over_the_budget_count_nothing() -> None:
    """What loses more than the reference point adds no volume, nor does what was not finite."""
    pool = Pool(features=np.zeros((2, 1)), ratio=np.array([2.0, 64]), codec_s=np.array([1.0, 1.5]))
    whole = Scoring(pool, np.array([[1.0], [20.0]]), budget_bp=15.0)
    broken = Scoring(pool, np.array([[1.0], [np.nan]]), budget_bp=15.0)
    assert whole.exhaustive == pytest.approx(broken.exhaustive)
    assert broken.curve([1, 0])[0] == 0


def test_evaluations_to_a_share() -> None:
    """The median counts seeds that never get there as later than all others."""
    curves = (np.array([0.5, 0.99]), np.array([0.98, 1.0]), np.array([0.1, 0.2, 0.3]))
    assert [evals_to(curve, 0.98) for curve in curves] == [2, 1, np.inf]
    outcome = Outcome(name="x", curves=curves, suggest_s=0.1)
    assert outcome.evals_to_target == 2
    assert outcome.quartiles(2) == pytest.approx((0.595, 0.99, 0.995))
    assert Outcome(name="y", curves=curves[2:], suggest_s=0.1).evals_to_target is None


@pytest.mark.parametrize("name", METHODS)
def test_searches_measure_nothing_twice(name: str, table: Table) -> None:
    """A search measures different strategies of the pool, and the same ones with the same seed."""
    problem, losses, _ = problem_of(table)
    order = list(replay(METHODS[name](problem, 3), losses, 12))
    assert len(set(order)) == len(order) == 12
    assert set(order) <= set(range(len(table.points)))
    assert list(replay(METHODS[name](problem, 3), losses, 12)) == order


@pytest.mark.parametrize("name", ["random", "Sobol"])
def test_searches_that_measure_all(name: str, table: Table) -> None:
    """Random order and the sequence come to every strategy."""
    problem, losses, _ = problem_of(table)
    order = list(replay(METHODS[name](problem, 0), losses, len(table.points)))
    assert sorted(order) == list(range(len(table.points)))


def test_papers_acquisition() -> None:
    """Certain candidates are worth their ratio, infeasible ones nothing, unknown ones a share that shrinks."""
    ratio, mean = np.array([2.0, 4, 4]), np.array([99.9, 90, 98.0])
    scores = acquisition(ratio, mean, np.array([1e-9, 1e-9, 2.0]), 98.0, 0)
    assert scores == pytest.approx([2, 0, 4 * 0.5 + 10 / 3], abs=1e-6)
    late = acquisition(ratio, mean, np.array([1e-9, 1e-9, 2.0]), 98.0, 30)
    assert late[2] == pytest.approx(4 * 0.5 + 0.99**30 / 2 * 10 / 3)


def test_document_and_figure(
    table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result has what the benchmark promises, in numbers that follow from the curves; and it is drawn."""
    problem, losses, scoring = problem_of(table)
    ticks = iter(range(100))
    kept = Kept(tmp_path / "replays.jsonl", "basis")
    outcomes = [
        measure(
            name, Effort(2, evaluations, 0), problem, losses, scoring, kept, lambda: next(ticks)
        )
        for name, evaluations in (("random", 0), ("KVServe", 10))
    ]
    document = json.loads(json.dumps(document_of(table, scoring, outcomes, 0.5)))
    assert document["space"] == len(table.points)
    assert document["exhaustive_hv"] == pytest.approx(scoring.exhaustive.mean())
    random, ours = document["methods"]
    assert random["evals_to_98"] is not None
    assert set(ours["hv_at_budget"]) == {"p25", "p50", "p75"}
    # one tick for each of two runs of ten
    assert ours["suggest_s"] == pytest.approx(0.1)
    assert document["overhead"] == pytest.approx(0.2)
    path = tmp_path / "figure.png"
    count = len(table.points)
    profiler_figure.draw(outcomes, space=count, budget=count // 50, title="small", path=path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert printed(document).row_count == 2


def test_a_comparison_that_was_stopped_goes_on(table: Table, tmp_path: Path) -> None:
    """What is kept is not replayed again, but for what was cut short, and what another table or code gave."""
    problem, losses, scoring = problem_of(table)
    path = tmp_path / "replays.jsonl"
    kept = Kept(path, "basis")
    kept.add(Replay(name="random", seed=0, most=4, curve=[0.1, 0.2, 0.2, 0.3], spent_s=8.0))
    path.write_text(path.read_text() + '{"name": "random", "seed": 1, "most"')
    ticks = iter([10.0, 12.0])
    again = Kept(path, "basis")
    effort = Effort(2, 4, 0)
    outcome = measure("random", effort, problem, losses, scoring, again, lambda: next(ticks))
    assert outcome.curves[0].tolist() == [0.1, 0.2, 0.2, 0.3]
    assert outcome.suggest_s == pytest.approx((8 + 2) / 8)
    assert Kept(path, "basis").find("random", 1, 4) is not None
    assert Kept(path, "other").find("random", 0, 4) is None
    assert Kept(path, "basis").find("random", 0, 4) is None


def test_efforts_name_searches() -> None:
    """Every search is run, quickly and whole, with ten seeds or more if whole."""
    assert set(profiler_search.WHOLE) == set(profiler_search.QUICK) == set(METHODS)
    assert min(effort.seeds for effort in profiler_search.WHOLE.values()) >= 10
