"""The table of all strategies of a space as they were measured once: what searches are replayed on.

Two files: the table, CSV with one row for each strategy, and beside it a JSON file of the same name that says what it
was measured with and what each column is. A row's losses are kept for each window and each stretch of it, so that a
search that looks at some windows only sees just what it would have seen.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from kvserve_api.errors import ArtifactError
from kvserve_api.fields import Fields
from kvserve_api.wire import KVLayout
from kvserve_profiler.space import Space
from kvserve_profiler.space_families import space_of
from kvserve_profiler.space_point import Point
from kvserve_strategies.bundle import BasisKey

SCHEMA: Final = "kvserve.io/profiler-truth/v2"
DIGEST_DIGITS: Final = 16
COLUMNS: Final = {
    "name": "the strategy's name in the space",
    "digest": f"first {DIGEST_DIGITS} hexadecimal digits of the strategy's digest",
    "ratio": "native bytes over bytes of the blobs, headers and checksums included, all windows together",
    "encode_s": "processor seconds of one thread to encode one window's cache, the least of all windows",
    "decode_s": "the same for decoding",
    "evaluation_s": "processor seconds of one thread for the whole evaluation, on all windows",
    "kl": "mean divergence from the exact predictions, in nats a token, of each stretch of each window: stretches of a "
    "window separated by spaces, windows by semicolons, in the order of 'windows'",
    "forecast": "what the error of the decoded cache is forecast to cost, in nats a token: directed and scattered "
    "(kvserve_profiler.sensitivity), separated by spaces, windows by semicolons",
}
_NUMBER: Final = "{:.4g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What was measured of one strategy.

    Attributes:
        name: In the space.
        digest: See `COLUMNS`.
        ratio: See `COLUMNS`.
        encode_s: See `COLUMNS`.
        decode_s: See `COLUMNS`.
        evaluation_s: See `COLUMNS`.
        kl: For each window the divergence of each stretch.
        forecast: For each window the directed and the scattered forecast.
    """

    name: str
    digest: str
    ratio: float
    encode_s: float
    decode_s: float
    evaluation_s: float
    kl: tuple[tuple[float, ...], ...]
    forecast: tuple[tuple[float, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """Return the row as an object."""
        return {
            "name": self.name,
            "digest": self.digest,
            "ratio": self.ratio,
            "encode_s": self.encode_s,
            "decode_s": self.decode_s,
            "evaluation_s": self.evaluation_s,
            "kl": self.kl,
            "forecast": self.forecast,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Undo `to_json`."""
        nested = {
            key: tuple(tuple(float(x) for x in window) for window in value[key])
            for key in ("kl", "forecast")
        }
        return cls(**{**value, **nested})

    def cells(self) -> list[str]:
        """Return the row as cells of the table."""
        numbers = (self.ratio, self.encode_s, self.decode_s, self.evaluation_s)
        nested = (
            ";".join(" ".join(map(_NUMBER.format, window)) for window in windows)
            for windows in (self.kl, self.forecast)
        )
        return [self.name, self.digest, *map(_NUMBER.format, numbers), *nested]

    @classmethod
    def of_cells(cls, cells: Sequence[str]) -> Self:
        """Undo `cells`."""
        name, digest, *numbers, kl, forecast = cells
        ratio, encode_s, decode_s, evaluation_s = map(float, numbers)
        return cls(
            name=name,
            digest=digest,
            ratio=ratio,
            encode_s=encode_s,
            decode_s=decode_s,
            evaluation_s=evaluation_s,
            kl=tuple(tuple(map(float, window.split())) for window in kl.split(";")),
            forecast=tuple(tuple(map(float, window.split())) for window in forecast.split(";")),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Every strategy of a space, measured.

    Attributes:
        space: The space.
        points: Its points, in its order.
        names: Of the points.
        ratio: ``[points]``.
        encode_s: ``[points]``, seconds for one window's cache.
        decode_s: ``[points]``.
        evaluation_s: ``[points]``, processor seconds of an evaluation on all windows.
        kl: ``[points, windows, stretches]``, nats a token.
        forecast: ``[points, windows, 2]``, nats a token: directed and scattered.
        kinds: For each window the kind of its text.
        provenance: What it was measured with.
    """

    space: Space
    points: tuple[Point, ...]
    names: tuple[str, ...]
    ratio: NDArray[np.float64]
    encode_s: NDArray[np.float64]
    decode_s: NDArray[np.float64]
    evaluation_s: NDArray[np.float64]
    kl: NDArray[np.float64]
    forecast: NDArray[np.float64]
    kinds: tuple[str, ...]
    provenance: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        space: Space,
        points: Sequence[Point],
        rows: Iterable[Row],
        provenance: Mapping[str, Any],
    ) -> Self:
        """Put rows into the order of points.

        Args:
            space: The space.
            points: Its points that the table is of.
            rows: What was measured, in any order, with the names of that time.
            provenance: With what.

        Raises:
            ArtifactError: A point's strategy has no row: space and table do not belong together.
        """
        by_digest = {row.digest: row for row in rows}
        strategies = {point: short(space.strategy(point).digest) for point in points}
        names = tuple(map(space.name_of, points))
        for point, name in zip(points, names, strict=True):
            if strategies[point] not in by_digest:
                raise ArtifactError(
                    "table", f"{name} is missing: the space has changed, measure anew"
                )
        chosen = [by_digest[strategies[point]] for point in points]
        return cls(
            space=space,
            points=tuple(points),
            names=names,
            ratio=np.array([row.ratio for row in chosen]),
            encode_s=np.array([row.encode_s for row in chosen]),
            decode_s=np.array([row.decode_s for row in chosen]),
            evaluation_s=np.array([row.evaluation_s for row in chosen]),
            kl=np.array([row.kl for row in chosen]),
            forecast=np.array([row.forecast for row in chosen]),
            kinds=tuple(window["kind"] for window in provenance["windows"]),
            provenance=provenance,
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a table and what is beside it.

        Raises:
            ArtifactError: There is none, it is of another schema, or it does not fit the space.
        """
        try:
            document = json.loads(path.with_suffix(".json").read_text())
            with path.open(newline="") as file:
                header, *lines = csv.reader(file)
        except (OSError, ValueError) as error:
            raise ArtifactError("table", f"can't be read: {error}") from error
        Fields(document, "table", error=ArtifactError).string("schema", choices=[SCHEMA])
        if header != list(COLUMNS):
            raise ArtifactError("table", f"must have the columns {', '.join(COLUMNS)}")
        space, points = space_of_document(document["space"])
        return cls.of(space, points, map(Row.of_cells, lines), document["provenance"])

    def write(self, rows: Iterable[Row], path: Path) -> None:
        """Write the rows of this table's points, in its order, and what is beside them."""
        by_digest = {row.digest: row for row in rows}
        digests = [short(self.space.strategy(point).digest) for point in self.points]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(by_digest[digest].cells() for digest in digests)
        document = {
            "schema": SCHEMA,
            "columns": COLUMNS,
            "space": self.provenance["space"],
            "provenance": {k: v for k, v in self.provenance.items() if k != "space"},
        }
        path.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")


def short(digest: str) -> str:
    """Return the beginning of a digest as it stands in the table."""
    return digest.removeprefix("sha256:")[:DIGEST_DIGITS]


def space_to_document(layout: KVLayout, bases: Mapping[BasisKey, bool]) -> dict[str, Any]:
    """Return what a space is made from, as JSON."""
    return {
        "layout": layout.to_json(),
        "bases": {str(key): bases[key] for key in sorted(bases)},
        "fixed": {},
    }


def space_of_document(value: Mapping[str, Any]) -> tuple[Space, list[Point]]:
    """Undo `space_to_document`.

    Returns:
        The space, and its points in which each parameter that the document fixes, if they have it, has that value.
    """
    bases = {BasisKey.parse(text): learnt for text, learnt in value["bases"].items()}
    space = space_of(KVLayout(**value["layout"]), bases)
    fixed = value["fixed"].items()
    points = [p for p in space.points() if all(p.get(name, at) == at for name, at in fixed)]
    return space, points
