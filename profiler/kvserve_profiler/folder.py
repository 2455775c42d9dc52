"""A run's output in a folder: the trial log, from which a killed run goes on, the Pareto set and the report."""

import os
from pathlib import Path
from typing import Final

from kvserve_api.errors import SpecError
from kvserve_api.names import RUN_TRIALS_KEY
from kvserve_api.profile_set import CONFIGMAP_KEY, ParetoSet
from kvserve_profiler.trials import TrialLog

REPORT: Final = "report.html"
MAX_LOG_BYTES: Final = 64 * 1024 * 1024


class RunFolder:
    """The output folder of one run; one process at a time."""

    def __init__(self, folder: Path) -> None:
        """Make the folder if need be.

        Raises:
            SpecError: It can't be made or written.
        """
        self._folder = folder
        self._written: int | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpecError("out", f"can't make {folder}: {error.strerror}") from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise SpecError("out", f"can't write in {folder}")

    @property
    def log_path(self) -> Path:
        """Where the trial log is."""
        return self._folder / RUN_TRIALS_KEY

    @property
    def bundles(self) -> Path:
        """Where calibration bundles are; an artifact store."""
        return self._folder.absolute() / "bundles"

    def load(self) -> str:
        """Return the trial log of an earlier run; empty for none.

        Raises:
            SpecError: There is a file that can't be one.
        """
        if not self.log_path.exists():
            return ""
        if self.log_path.stat().st_size > MAX_LOG_BYTES:
            raise SpecError("out", f"{self.log_path} is too large for a trial log: remove it")
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def save(self, log: TrialLog) -> None:
        """Write what of the log is not yet on disk; the first time the whole log, in one step."""
        lines = log.lines()
        if self._written is None:
            _replace(self.log_path, "".join(lines).encode())
        elif len(lines) > self._written:
            with self.log_path.open("ab") as file:
                file.write("".join(lines[self._written :]).encode())
                file.flush()
                os.fsync(file.fileno())
        self._written = len(lines)

    def write_report(self, page: str) -> Path:
        """Write the report in one step and return its path."""
        path = self._folder / REPORT
        _replace(path, page.encode())
        return path

    def publish(self, result: ParetoSet) -> Path:
        """Write the Pareto set in one step and return its path.

        Raises:
            ArtifactError: It is larger than a Pareto set may be.
        """
        path = self._folder / CONFIGMAP_KEY
        _replace(path, result.canonical())
        return path


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
