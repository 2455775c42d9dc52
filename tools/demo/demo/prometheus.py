"""Reading counters from a vLLM server's Prometheus page."""

import re
from collections import Counter

_LINE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>[^}]*)\})?\s+(?P<value>\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def totals(page: str, metric: str, label: str) -> Counter[str]:
    """Return a metric's values summed by one label.

    Args:
        page: The text of ``/metrics``.
        metric: The metric's name as it stands there, with ``_total`` for a counter.
        label: Whose values to tell apart; samples without it count under the empty string.
    """
    sums: Counter[str] = Counter()
    for line in page.splitlines():
        match = _LINE.match(line)
        if match and match["name"] == metric:
            labels = dict(_LABEL.findall(match["labels"] or ""))
            sums[labels.get(label, "")] += int(float(match["value"]))
    return sums
