"""The command measures strategies on tasks of a real, tiny model."""

import json
from pathlib import Path

from click.testing import CliRunner

from kvserve_profiler.codec_bench_cli import bench


def test_lossless_loses_nothing_and_noise_is_told(model_folder: Path, tmp_path: Path) -> None:
    """Answers with a lossless cache are those with the exact one; the limit still allows for few items."""
    file = tmp_path / "items.jsonl"
    lines = [
        {
            "task": "multiple-choice",
            "question": f"item {n} is " * 30,
            "choices": ["this", "that one"],
            "answer": n % 2,
        }
        for n in range(6)
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    arguments = ["tasks", "--model", str(model_folder), "--task", str(file), "--json"]
    done = CliRunner().invoke(
        bench, [*arguments, "--strategy", "lossless", "--strategy", "int4-token"]
    )
    assert done.exit_code == 0, done.stderr
    lossless, int4 = json.loads(done.stdout)
    assert lossless["strategy"] == "lossless"
    assert lossless["exact"] == lossless["compressed"]
    assert lossless["loss_upper_bp"] > 3000
    assert int4["ratio"] > 1.5
    assert int4["items"] == 6


def test_bad_input_is_named(model_folder: Path) -> None:
    """A task that is neither built in nor a file gives exit code 64."""
    arguments = ["tasks", "--model", str(model_folder), "--task", "sums", "--strategy", "none"]
    done = CliRunner().invoke(bench, arguments)
    assert done.exit_code == 64
    assert (
        "can't read 'sums': No such file or directory; built in: last-word, retrieval"
        in done.stderr
    )
