"""Makes the ladder's tables: ``python -m kvserve_kernels.ladder.make_tables > tables.json``.

The file that it made once is one byte format for ever: this script says where the numbers come from, and a test that it
still gives them. Probabilities are rounded to 2**-36 before anything is decided by them, so that the last bit of a
logarithm or exponential, which differs from library to library, does not count.

A table is for levels ``rint(x / step)`` of a generalised Gaussian x: density proportional to exp(-abs(x / a) ** shape),
standard deviation ``scale`` steps. Shape 2 is the Gaussian, 1 the Laplacian, below that it is more peaked still, which
is what coefficients with outliers look like. Table 0 is for channels of zeros only.
"""

import json
import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvserve_kernels.ladder.bins import LEAST
from kvserve_kernels.rans.models import ESCAPE_BITS, Model, normalise
from kvserve_kernels.rans.rans_cpu import MAX_SYMBOLS, TOTAL

SHAPES: Final = (0.7, 1.0, 1.4, 2.0)
STEPS_PER_OCTAVE: Final = 2
LARGEST_OCTAVE: Final = 9
SMALLEST_OCTAVE: Final = -8
RAREST: Final = 7e-4
# prices are in 1/1024 bits
BIT: Final = 1024
# the encoder computes with 16 bits
DEAREST: Final = 32767
_GRID: Final = 1 << 36
_PEAK: Final = 32767
# a smaller table decodes faster: it may cost so much more, relative and in bits
_SLACK: Final = (1.001, 2e-4)


def probabilities(shape: float, scale: float) -> NDArray[np.int64]:
    """Return the mass of the positive side at each magnitude 0 to 32767, in 2**-36, of a generalised Gaussian."""
    width = scale * math.sqrt(math.gamma(1 / shape) / math.gamma(3 / shape))
    # midpoints of cells: fine cells near 0, where the density has its peak
    points = np.arange(0, 64, 1 / 256) + 1 / 512
    near = np.exp(-((points / width) ** shape)) / 256
    sums = np.zeros(_PEAK + 1)
    np.add.at(sums, np.floor(points + 0.5).astype(int), near)
    # from 64 on, where cells of 1/4 do
    points = np.arange(64, _PEAK + 0.5, 1 / 4) + 1 / 8
    np.add.at(sums, np.floor(points + 0.5).astype(int), np.exp(-((points / width) ** shape)) / 4)
    rounded: NDArray[np.int64] = np.rint(sums / sums.sum() * _GRID).astype(np.int64)
    return rounded


def signed(magnitudes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the probability of each value -32767 to 32767, doubled so that both signs get a whole number."""
    return np.concatenate([magnitudes[:0:-1], [2 * magnitudes[0]], magnitudes[1:]])


def candidates() -> list[tuple[int, int, int]]:
    """Return all windows to try: low bits, symbols without the escape, base."""
    found = [(0, 2 * k + 1, -k) for k in range(1, MAX_SYMBOLS // 2)]
    for low_bits in range(1, 12):
        for count in range(15, MAX_SYMBOLS):
            # an odd number of cells has one around 0
            base = -(count // 2 << low_bits) - ((1 << low_bits) // 2 if count % 2 else 0)
            found.append((low_bits, count, base))
    return found


def bits(frequency: int) -> float:
    """Return the length of a symbol's code, rounded to 2**-20 bits."""
    return round(math.log2(TOTAL / frequency) * (1 << 20)) / (1 << 20)


def fit(values: NDArray[np.int64]) -> Model:
    """Return the best model of probabilities of the values -32767 to 32767."""
    total = int(values.sum())
    sums = np.concatenate([[0], np.cumsum(values)])
    tried: list[tuple[float, Model]] = []
    for low_bits, count, base in candidates():
        edges = base + _PEAK + (np.arange(count + 1) << low_bits)
        if edges[0] < 0 or edges[-1] > values.size:
            continue
        cells = np.diff(sums[edges])
        outside = total - int(cells.sum())
        # an escape must be possible, however rare
        counts = np.append(cells, max(outside, 1))
        frequencies = normalise(np.maximum(counts, 1))
        if frequencies[-1] < 1 or min(frequencies) < 1:
            continue
        lengths = [bits(f) for f in frequencies]
        lengths[-1] += ESCAPE_BITS
        cost = sum(int(n) / total * length for n, length in zip(counts, lengths, strict=True))
        model = Model(base=base, low_bits=low_bits, escape=True, frequencies=tuple(frequencies))
        tried.append((cost + low_bits, model))
    least = min(cost for cost, _ in tried)
    bound = least * _SLACK[0] + _SLACK[1]
    good = [(len(m.frequencies), cost, m) for cost, m in tried if cost <= bound]
    return min(good, key=lambda entry: entry[:2])[2]


def prices(model: Model, magnitudes: NDArray[np.int64]) -> list[int]:
    """Return the mean code length of the magnitudes of each bin, in 1/1024 bits."""
    lengths = np.full(2 * _PEAK + 1, bits(model.frequencies[-1]) + ESCAPE_BITS)
    inside = np.repeat([bits(f) for f in model.frequencies[:-1]], 1 << model.low_bits)
    lengths[model.base + _PEAK : model.base + _PEAK + inside.size] = inside
    of_magnitude = (lengths[_PEAK:] + lengths[_PEAK::-1]) / 2
    result = []
    for first, stop in zip(LEAST, (*LEAST[1:], _PEAK + 1), strict=True):
        # one more for each, for bins that never occur
        weights = magnitudes[first:stop] + 1
        mean = float((of_magnitude[first:stop] * weights).sum() / weights.sum())
        result.append(min(round((mean + model.low_bits) * BIT), DEAREST))
    return result


def tables() -> list[dict[str, object]]:
    """Return all tables, the widest last."""
    zeros = Model(base=0, low_bits=0, escape=False, frequencies=(TOTAL,))
    made: list[tuple[Model, list[int]]] = [(zeros, [0] * len(LEAST))]
    for step in range(SMALLEST_OCTAVE * STEPS_PER_OCTAVE, LARGEST_OCTAVE * STEPS_PER_OCTAVE + 1):
        for shape in SHAPES:
            magnitudes = probabilities(shape, 2 ** (step / STEPS_PER_OCTAVE))
            values = signed(magnitudes)
            if 1 - int(values[_PEAK]) / int(values.sum()) >= RAREST:
                model = fit(values)
                made.append((model, prices(model, magnitudes)))
    return [
        {
            "base": model.base,
            "low_bits": model.low_bits,
            "frequencies": list(model.frequencies),
            "prices": price,
        }
        for model, price in made
    ]


def text() -> str:
    """Return the file: a list, one table a line."""
    return "[\n" + ",\n".join(json.dumps(table) for table in tables()) + "\n]\n"


if __name__ == "__main__":
    print(text(), end="")
