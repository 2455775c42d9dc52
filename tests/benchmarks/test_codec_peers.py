"""What the comparison with peers computes from its measurements, draws, and fetches."""

import dataclasses
import hashlib
import math
import zipfile
from pathlib import Path

import pytest

import codec_figure
import codec_peers
import peers_fetch
from codec_claims import CACHEGEN, claims, mean_of_texts, ratio_at
from codec_rows import Measured
from kvserve_strategies import PRESETS
from kvserve_strategies.peers import PEERS


def line(name: str, kind: str, ratio: float, kl: float, **others: object) -> Measured:
    """Return a measured line on the text "a", of speeds 100 and 200."""
    fields: dict[str, object] = {"top1": 1.0 if kl == 0 else 0.9, "encode_mb_s": 100.0, "text": "a"}
    fields |= {"decode_mb_s": 200.0} | others
    return Measured(name=name, kind=kind, ratio=ratio, kl=kl, **fields)  # type: ignore[arg-type]


def test_ratios_between_points_are_straight_in_logarithms() -> None:
    """Halfway in the logarithm of the loss is the geometric mean of the ratios; beyond the last, its own."""
    curve = [(0.1, 32.0), (0.001, 8.0), (0.0, 1.0)]
    assert ratio_at(curve, 0.01) == pytest.approx(16)
    assert ratio_at(curve, 0.001) == pytest.approx(8)
    assert ratio_at(curve, 0.1) == pytest.approx(32)
    assert ratio_at(curve, 0.2) == pytest.approx(32)
    assert ratio_at(curve, 0.0005) == pytest.approx(1)
    assert ratio_at(curve[:2], 0.0005) is None
    assert ratio_at([], 0.01) is None


def test_means_of_texts() -> None:
    """Losses are averaged, ratios and speeds harmonic."""
    lines = [line("x", "ours", 10, 0.1), line("x", "ours", 30, 0.3, text="b", encode_mb_s=300.0)]
    (mean,) = mean_of_texts(lines)
    assert mean.ratio == pytest.approx(15)
    assert mean.kl == pytest.approx(0.2)
    assert mean.encode_mb_s == pytest.approx(150)
    assert mean.text == "mean"


def test_claims_are_judged_by_the_best_family() -> None:
    """The widest ratio at each loss counts; CacheGen is met at its own loss, by a strategy that loses no more."""
    lines = [
        line("none", "ours", 1, 0),
        line("lossless", "ours", 1.5, 0),
        line("splitzip", "restated", 1.9, 0),
        line("w 1", "ours", 10, 0.005, family="w"),
        line("w 2", "ours", 20, 0.02, family="w"),
        line("w 4", "ours", 40, 0.08, family="w"),
        line("n 1", "ours", 5, 0.005, family="n"),
        line("n 4", "ours", 20, 0.08, family="n"),
        line("k 1", "restated", 90, 0.005, family="k"),
        line("k 4", "restated", 99, 0.08, family="k"),
        line(CACHEGEN, "peer", 4, 0.04, encode_mb_s=1.0, decode_mb_s=10.0),
    ]
    found = {(claim["claim"], claim["text"]): claim for claim in claims(lines)}
    wanted = {
        "ratio at KL 0.010": (10 * math.sqrt(2), True, "w"),
        "ratio at KL 0.040": (20 * math.sqrt(2), True, "w"),
        "lossless ratio": (1.5, True, "lossless"),
        "times smaller than CacheGen at its KL": (5 * math.sqrt(2), True, "w"),
        "times faster than CacheGen, encoding": (100, True, "w 2"),
        "times faster than CacheGen, decoding": (20, False, "w 2"),
    }
    for text in ("mean", "a"):
        for name, (measured, holds, of) in wanted.items():
            claim = found[name, text]
            assert claim["measured"] == pytest.approx(measured), name
            assert (claim["holds"], claim["of"]) == (holds, of), name


def test_what_was_not_measured_does_not_fail() -> None:
    """Without calibrated strategies a claim about them is open."""
    found = claims([line("none", "ours", 1, 0), line(CACHEGEN, "peer", 4, 0.04)])
    assert {claim["claim"] for claim in found if claim["holds"] is None} == {
        "ratio at KL 0.010",
        "ratio at KL 0.040",
        "times smaller than CacheGen at its KL",
    }


def test_strategies_of_the_comparison() -> None:
    """Every preset is in it, peers under their kind; calibrated ones come as families of steps."""
    subjects = list(codec_peers._subjects(quick=False))
    plain = {s.preset for s, _, _ in subjects if s.preset}
    calibrated = {n for n, c in (dict(PRESETS) | dict(PEERS)).items() if codec_peers.step_of(c)}
    assert plain == (set(PRESETS) | set(PEERS)) - calibrated
    kinds = {s.label: kind for s, kind, _ in subjects}
    assert (kinds["none"], kinds["kivi-4"], kinds["cachegen"]) == ("ours", "restated", "restated")
    steps = [codec_peers.step_of(s.strategy) for s, _, family in subjects if family == "kvtc"]
    assert steps == list(codec_peers.SWEEP)
    assert len({s.label for s, _, _ in subjects}) == len(subjects)


def test_another_step_changes_nothing_else() -> None:
    """Back at its own step a strategy is the same."""
    config = PEERS["kvtc"]
    step = codec_peers.step_of(config)
    assert step is not None
    other = codec_peers.with_step(config, 2 * step)
    assert other != config
    assert codec_peers.with_step(other, step) == config


def test_figure(tmp_path: Path) -> None:
    """It is drawn with points on the edge, off the scale, and on each other."""
    lines = [
        line("none", "ours", 1, 0),
        line("same place", "peer", 4, 0.04),
        line("very same place", "restated", 4, 0.04),
        line("lost", "peer", 9, 3.0),
        line("f 1", "ours", 10, 0.01, family="f"),
        line("f 2", "ours", 20, 0.1, family="f"),
    ]
    codec_figure.draw(lines, "title", tmp_path / "a" / "x.png")
    first = (tmp_path / "a" / "x.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    codec_figure.draw(lines, "title", tmp_path / "y.png")
    assert (tmp_path / "y.png").read_bytes() == first


def test_a_wheel_of_another_digest_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that differs from the pinned one raises, and leaves nothing behind; the pinned one is unpacked once."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tinypeer-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tinypeer/a.py", "A = 1\n")
        archive.writestr("tinypeer/b.py", "B = 1\n")
        info = "tinypeer-1.0.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinypeer\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(peers_fetch, "FOLDER", tmp_path / "peers")
    peer = peers_fetch.Peer(
        requirement="tinypeer==1.0", sha256="0" * 64, licence="none", members=("tinypeer/a",)
    )
    monkeypatch.setitem(peers_fetch.PEERS, "tiny", peer)
    with pytest.raises(peers_fetch.FetchError, match=r"has sha256 .* not used"):
        peers_fetch.fetch("tiny")
    assert list((tmp_path / "peers").iterdir()) == []

    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(peers_fetch.PEERS, "tiny", dataclasses.replace(peer, sha256=right))
    folder = peers_fetch.fetch("tiny")
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.py")) == [
        "tinypeer/a.py"
    ]
    wheel.unlink()
    assert peers_fetch.fetch("tiny") == folder
    monkeypatch.setitem(
        peers_fetch.PEERS, "none", dataclasses.replace(peer, requirement="nopeer==1")
    )
    with pytest.raises(peers_fetch.FetchError, match="could not download nopeer==1"):
        peers_fetch.fetch("none")
