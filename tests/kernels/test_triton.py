"""GPU kernels give the bytes of their definitions, as far as Triton's interpreter can show it."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("interpreted_triton.py")
NAMES = [
    line.removeprefix("def ").partition("(")[0]
    for line in CASES.read_text().splitlines()
    if line.startswith("def test_")
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Return for each test of `interpreted_triton` what each of its cases reported, "" if it passed.

    In a process of its own: Triton reads the variable when a kernel is defined.
    """
    report = tmp_path_factory.mktemp("triton") / "report.xml"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", str(CASES), "-q", "-p", "no:cacheprovider"),
            *(f"--junit-xml={report}", f"--rootdir={Path(__file__).parents[2]}"),
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.exists(), done.stdout + done.stderr
    found: dict[str, list[str]] = {}
    for case in ET.parse(report).iter("testcase"):
        texts = [
            "".join(child.itertext()) or child.tag for child in case if child.tag != "properties"
        ]
        found.setdefault(case.attrib["name"].partition("[")[0], []).append("\n".join(texts))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name: str, outcomes: dict[str, list[str]]) -> None:
    """The kernel agrees with its definition in every case."""
    assert outcomes[name]
    assert not any(outcomes[name]), "\n".join(outcomes[name])
