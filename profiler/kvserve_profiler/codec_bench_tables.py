"""What was measured of strategies, as tables for a terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvserve_profiler.codec_bench_rows import Row, Subject, means

_HEADINGS: Final = (
    "\nratio",
    "KL\nnats",
    "at most\n95 %",
    "same\ntop-1",
    "encode\nMB/s",
    "decode\nMB/s",
)


def tables(rows: Sequence[Row], subjects: Sequence[Subject]) -> Iterator[Table]:
    """Yield a table of the means over texts, after one for each text if there are several.

    Args:
        rows: What was measured.
        subjects: The strategies, for their names.
    """
    labels = {subject.strategy: subject.label for subject in subjects}
    texts = list(dict.fromkeys(row.text for row in rows))
    for text in texts:
        of_text = [row for row in rows if row.text == text]
        yield _table(text, [(labels[row.strategy], row.to_json()) for row in of_text])
    if len(texts) > 1:
        yield _table(
            f"mean of {len(texts)} texts",
            [(labels[row.strategy], mean) for row, mean in means(rows)],
        )


def _table(title: str, lines: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("\nstrategy", no_wrap=True)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for label, line in lines:
        table.add_row(
            label,
            f"{line['ratio']:.2f}",
            f"{line['kl']:.4f}",
            f"{line['kl_upper']:.4f}",
            f"{line['top1']:.1%}",
            f"{line['encode_mb_s']:.0f}",
            f"{line['decode_mb_s']:.0f}",
        )
    return table
