"""Replays that are done, so that a comparison that was stopped goes on where it was."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from kvserve_api.canonical import digest_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """What a search found with one seed.

    Attributes:
        name: Of the search.
        seed: Its seed.
        most: Evaluations after which it was to stop.
        curve: Share of the hypervolume after each evaluation.
        spent_s: Processor seconds it took.
    """

    name: str
    seed: int
    most: int
    curve: list[float]
    spent_s: float


class Kept:
    """A file of replays: a line for what they depend on, then a line for each. Another basis begins a new file."""

    def __init__(self, path: Path, basis: str) -> None:
        """Read what is there."""
        self._path = path
        self._replays: dict[tuple[str, int, int], Replay] = {}
        with contextlib.suppress(FileNotFoundError):
            first, *lines = path.read_text().splitlines()
            if first == basis:
                for line in lines:
                    # a line cut short by a kill is no JSON; its replay is done again
                    with contextlib.suppress(ValueError):
                        self._take(Replay(**json.loads(line)))
                return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(basis + "\n")

    @classmethod
    def of(cls, path: Path, inputs: Sequence[Path]) -> Self:
        """Read what is there of replays of these inputs: the table, and the code of the searches."""
        return cls(
            path, digest_bytes("".join(digest_bytes(p.read_bytes()) for p in inputs).encode())
        )

    def find(self, name: str, seed: int, most: int) -> Replay | None:
        """Return a replay, if it is done."""
        return self._replays.get((name, seed, most))

    def add(self, replay: Replay) -> None:
        """Keep a replay, whatever happens next."""
        self._take(replay)
        with self._path.open("a") as file:
            # the line before may have been cut short
            file.write("\n" + json.dumps(asdict(replay)) + "\n")

    def forget(self) -> None:
        """Remove the file: the comparison is complete, and the next one begins anew."""
        self._path.unlink(missing_ok=True)

    def _take(self, replay: Replay) -> None:
        self._replays[replay.name, replay.seed, replay.most] = replay
