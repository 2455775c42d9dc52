"""The chart, as tests use it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from testcluster.cluster import Cluster

Objects = list[dict[str, Any]]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def chart() -> Path:
    """The chart's folder."""
    return ROOT / "helm" / "kvserve"


@pytest.fixture
def render(control_plane: Cluster, chart: Path, tmp_path: Path) -> Callable[..., Objects]:
    """Render the chart with values, by Helm itself, and return its objects without the CRD."""

    def call(values: dict[str, Any] | None = None, *, namespace: str = "kvserve-system") -> Objects:
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump(values or {}))
        text = control_plane.helm(
            "template", "kvserve", str(chart), "--namespace", namespace, "--values", str(file)
        )
        objects = [item for item in yaml.safe_load_all(text) if item]
        return [item for item in objects if item["kind"] != "CustomResourceDefinition"]

    return call
