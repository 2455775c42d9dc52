"""What was measured of a truth so far, so that a run that was stopped goes on where it was.

A line of provenance, then a line for each strategy; several shards may write one file.
"""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvserve_api.errors import ArtifactError
from profiler_table import Row


class Log:
    """What was measured so far.

    Attributes:
        rows: By name.
    """

    def __init__(self, path: Path, provenance: Mapping[str, Any]) -> None:
        """Read what is there, or begin.

        Args:
            path: The file.
            provenance: With what it is measured.

        Raises:
            ArtifactError: The file is of another provenance.
        """
        self._path = path
        self._basis = json.dumps(provenance, sort_keys=True)
        self.rows: dict[str, Row] = {}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._basis + "\n")
        self.read()

    def read(self) -> None:
        """Read what is there now, of other shards too."""
        basis, *lines = self._path.read_text().split("\n")
        if basis != self._basis:
            raise ArtifactError(
                "--log", f"{self._path} is of another measurement: remove it to begin anew"
            )
        for line in lines:
            # a line cut short by a kill is no JSON; its strategy is measured again
            with contextlib.suppress(ValueError):
                row = Row.from_json(json.loads(line))
                self.rows[row.name] = row

    def add(self, row: Row) -> None:
        """Keep a row, whatever happens next."""
        self.rows[row.name] = row
        with self._path.open("a") as file:
            file.write("\n" + json.dumps(row.to_json()))
