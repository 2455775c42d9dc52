"""`kvserve bench codec`: rows, texts, strategies, exit codes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from kvserve_api.errors import SpecError, StrategyError
from kvserve_profiler.codec_bench import CodecBench, Passage, first_windows
from kvserve_profiler.codec_bench_cli import bench, named_texts, read_strategy, subjects_of
from kvserve_profiler.codec_bench_rows import Row, Subject, means
from kvserve_profiler.model import KV, Model, Source, fingerprint
from kvserve_profiler.quality import MeasurementError
from kvserve_profiler.settings import Settings
from kvserve_profiler.texts import Text
from kvserve_profiler.windows import Window
from kvserve_strategies.presets import PRESETS

TEXT = "The quick brown fox jumps over the lazy dog. " * 18
KEYS = [
    "strategy", "preset", "ratio", "kl", "kl_upper", "top1", "encode_mb_s", "decode_mb_s", "bytes_raw", "bytes_wire",
    "text",
]  # fmt: skip
SHORT = ("--prefix", "48", "--continuation", "16", "--repeats", "1")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text that suffices for windows of a few tokens."""
    path = tmp_path / "fox.txt"
    path.write_text(TEXT)
    return path


def invoke(*arguments: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(bench, ["codec", *(str(argument) for argument in arguments)])


def test_json(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Each strategy has a row for each text: presets by name, files by their JSON; exact ones lose nothing."""
    strategy = tmp_path / "mine.json"
    strategy.write_text(json.dumps(PRESETS["kivi-2"].to_json()))
    other = tmp_path / "other.txt"
    other.write_text(TEXT[::-1])
    options = [x for name in ("none", "int4-token", strategy) for x in ("--strategy", name)]
    done = invoke(
        "--model", model_folder, "--text", text_file, "--text", other, *options, *SHORT, "--json"
    )
    assert done.exit_code == 0, done.output
    assert "3 strategies on 2 texts: about" in done.stderr
    rows = json.loads(done.stdout)
    assert [list(row) for row in rows] == [KEYS] * 6
    assert [(row["text"], row["preset"]) for row in rows] == [
        (text, preset) for text in ("fox.txt", "other.txt") for preset in ("none", "int4-token", "")
    ]
    assert rows[2]["strategy"] == PRESETS["kivi-2"].to_json()
    raw = 2 * 2 * 48 * 2 * 8 * 2
    for row in rows:
        assert row["bytes_raw"] == raw
        assert row["ratio"] == pytest.approx(raw / row["bytes_wire"])
        assert 0 <= row["kl"] <= row["kl_upper"]
        assert row["encode_mb_s"] > 0
        assert row["decode_mb_s"] > 0
    assert (rows[0]["kl"], rows[0]["kl_upper"], rows[0]["top1"]) == (0, 0, 1)
    assert rows[2]["kl"] > rows[1]["kl"] > 0


def test_table(model_folder: Path, text_file: Path) -> None:
    """Without --json the same is a table, wide enough for every number on a narrow terminal."""
    done = invoke(
        "--model",
        model_folder,
        "--text",
        text_file,
        "--strategy",
        "none",
        "--strategy",
        "fp8",
        *SHORT,
    )
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert "fox.txt" in lines[0]
    assert [x.split()[0] for x in lines if x.strip().startswith(("none", "fp8"))] == ["none", "fp8"]
    assert "…" not in done.stdout
    assert "0.0000 0.0000 100.0%" in " ".join(next(x for x in lines if "none" in x).split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        pytest.param(("--strategy", "nope"), 64, "'nope' is no file and no preset", id="strategy"),
        pytest.param(("--prefix", "900"), 64, "give a longer text", id="short-text"),
        pytest.param(("--prefix", "2000"), 66, "the model takes 1024 tokens", id="short-model"),
        pytest.param(("--text", "missing.txt"), 64, "can't read missing.txt", id="missing"),
    ],
)
def test_bad_input(
    model_folder: Path, text_file: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    """What is wrong is said in one line, and the exit code tells that a retry is pointless."""
    options = ("--strategy", "none", *SHORT, *arguments)
    done = invoke("--model", model_folder, "--text", text_file, *options)
    assert message in done.stderr
    assert done.exit_code == code
    assert done.stdout == ""


def test_texts_need_enough_tokens() -> None:
    """A text shorter than one window is refused with both numbers; a longer one gives as many as fit."""
    settings = Settings(prefix_tokens=16, continuation_tokens=8, max_windows=3)
    with pytest.raises(SpecError, match=r"--text x: has 22 tokens, but 23 are needed"):
        list(first_windows(range(22), settings, lead=(7,), name="x"))
    assert list(first_windows(range(50), settings, lead=(7,), name="x")) == [
        Window(prefix=(7, *range(15)), continuation=tuple(range(15, 23))),
        Window(prefix=(7, *range(23, 38)), continuation=tuple(range(38, 46))),
    ]


def test_names_of_texts(tmp_path: Path) -> None:
    """Files of one name keep their paths; one file given twice is refused."""
    text = Text(digest="", documents=("x",))
    paths = [tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt", tmp_path / "y.txt"]
    assert list(named_texts([(path, text) for path in paths])) == [*map(str, paths[:2]), "y.txt"]
    with pytest.raises(SpecError, match="given twice"):
        named_texts([(paths[0], text), (tmp_path / "a" / ".." / "a" / "x.txt", text)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"{", "is not JSON", id="cut"),
        pytest.param(b"\xff\xfe", "is not JSON", id="binary"),
        pytest.param(b"[]", "strategy", id="list"),
        pytest.param(b" " * 20_000, "more than 16384 bytes", id="large"),
        pytest.param(
            b'{"schema":"kvserve.io/strategy/v1","parts":['
            b'{"kind":"k","chain":[{"id":"code.raw.v1"}]},'
            b'{"kind":"v","chain":[{"id":"code.pack.v1"}]}]}',
            r"code\.pack\.v1: takes levels",
            id="can-not-work",
        ),
    ],
)
def test_strategy_files_are_checked(content: bytes, message: str, tmp_path: Path) -> None:
    """A file that holds no strategy that can work is a typed error that says why."""
    path = tmp_path / "strategy.json"
    path.write_bytes(content)
    with pytest.raises(StrategyError, match=message):
        read_strategy(path)


def test_all_presets_by_default() -> None:
    """Without --strategy every preset is measured, in order."""
    assert [subject.preset for subject in subjects_of(())] == list(PRESETS)


def test_a_strategy_that_only_says_it_is_lossless_is_found_out(model_folder: Path) -> None:
    """One bit that differs is an error for a strategy that calls itself lossless."""
    source = Source(location=str(model_folder))
    model = Model(source)
    settings = Settings(prefix_tokens=16, continuation_tokens=8)
    made = CodecBench(model, settings, fingerprint=fingerprint(source.config()))
    (passage,) = made.prepare("abcdefgh" * 3, "x")
    assert made.loss(passage, passage.kv, lossless=True)[1] == 1.0
    keys = passage.kv.keys.clone()
    keys[0, 0, 0, 0] *= 2
    with pytest.raises(MeasurementError, match="says it is lossless"):
        made.loss(passage, KV(keys=keys, values=passage.kv.values), lossless=True)
    assert isinstance(passage, Passage)
    assert torch.equal(
        passage.exact, model.log_probabilities(passage.window.continuation, passage.kv)
    )


def test_means() -> None:
    """Ratios are of all bytes together, losses are averaged, speeds are harmonic."""
    strategies = [PRESETS["fp8"], PRESETS["none"]]

    def row(index: int, text: str, wire: int, kl: float, speed: float) -> Row:
        return Row(
            strategy=strategies[index], preset="", ratio=100 / wire, kl=kl, kl_upper=2 * kl, top1=0.5,
            encode_mb_s=speed, decode_mb_s=speed, bytes_raw=100, bytes_wire=wire, text=text,
        )  # fmt: skip

    rows = [row(0, "a", 50, 0.1, 100), row(1, "a", 100, 0, 900), row(0, "b", 30, 0.3, 300)]
    (first, mean), (second, _) = means(rows)
    assert (first.strategy, second.strategy) == tuple(strategies)
    np.testing.assert_allclose(
        [mean[name] for name in ("ratio", "kl", "kl_upper", "encode_mb_s")], [2.5, 0.2, 0.4, 150]
    )


def test_subjects_know_whether_they_need_a_bundle() -> None:
    """A plain preset needs none."""
    assert not Subject(label="fp8", preset="fp8", strategy=PRESETS["fp8"]).calibrated
