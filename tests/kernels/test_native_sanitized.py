"""The native code, compiled with AddressSanitizer and UBSan, on inputs that no encoder writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvserve_kernels.native import build

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]

PAYLOADS = 200_000
SECTIONS = 1_000
TILINGS = 2_000
HOSTILE = """
import os, sys
from pathlib import Path
from kvserve_kernels.native import library
library.library_path = lambda: Path(sys.argv[1])
import numpy as np
from kvserve_kernels import ladder, rans
from kvserve_kernels.rans.values import Coded

assert library.coder() is not None
widest = library.simd()
levels = [level for level in library.Simd if 0 <= level <= widest]
rng = np.random.default_rng(int(sys.argv[2]))
tables = ladder.tables()


def use(level):
    os.environ["KVSERVE_SIMD"] = level.name.lower()


def spoil(array):
    kind = rng.integers(0, 6)
    out = array.copy()
    if kind == 0:
        out = out[: rng.integers(0, out.size + 1)].copy()
    elif kind == 1 and out.size:
        out[rng.integers(0, out.size)] ^= out.dtype.type(1 << int(rng.integers(0, 15)))
    elif kind == 2 and out.size:
        a, b = np.sort(rng.integers(0, out.size, 2))
        out[a:b] = out[a:b][::-1]
    elif kind == 3:
        most = np.iinfo(out.dtype).max
        out = np.concatenate([out, rng.integers(0, most, int(rng.integers(0, 40))).astype(out.dtype)])
    elif kind == 4:
        out[:] = rng.integers(0, np.iinfo(out.dtype).max, out.size, dtype=out.dtype)
    else:
        out[:] = rng.choice([0, 1, np.iinfo(out.dtype).max])
    return out


def fit(array, size):
    out = np.zeros(size, array.dtype)
    out[: min(size, array.size)] = array[:size]
    return out


cases = []
for _ in range(300):
    channels, tokens = int(rng.integers(1, 9)), int(rng.integers(1, 200))
    groups = int(rng.integers(1, 8))
    spread = rng.choice([0.05, 0.5, 3, 50, 4000])
    values = np.rint(rng.laplace(size=(channels, tokens)) * spread).clip(-32768, 32767)
    values = values.astype(np.int16)
    use(levels[int(rng.integers(0, len(levels)))])
    ids, coded = ladder.encode(values, ladder.live(values), groups)
    assert (rans.decode_values(coded, ids, tables, groups, tokens) == values).all()
    cases.append((values, ids, coded, groups))

count = int(sys.argv[3])
exact = refused = 0
for at in range(count):
    values, ids, coded, groups = cases[at % len(cases)]
    tokens = values.shape[1]
    use(levels[at // len(cases) % len(levels)])
    lanes = [state.size for state in coded.states]
    words, states, escapes, planes = coded.words, coded.states, coded.escapes, coded.planes
    what = rng.integers(0, 6)
    if what == 0:
        words = [spoil(w) if rng.integers(0, 2) else w for w in words]
    elif what == 1:
        states = [fit(spoil(s), s.size) for s in states]
    elif what == 2:
        escapes = spoil(escapes)
    elif what == 3:
        planes = fit(spoil(planes), planes.size)
    elif what == 4:
        # other tables than those it was coded with
        ids = rng.integers(0, len(tables.models), ids.size).astype(np.uint8)
        planes = fit(planes, tables.plane_words(ids, tokens))
    else:
        words = [spoil(w) for w in words]
        states = [fit(spoil(s), s.size) for s in states]
        escapes = spoil(escapes)
    bad = Coded(states=states, planes=planes, words=words, escapes=escapes)
    decoded = rans.decode_values(bad, ids, tables, groups, tokens)
    if decoded is None:
        refused += 1
    else:
        assert decoded.shape == values.shape
        exact += bool((decoded == values).all())
print(exact, refused)
"""

FUSED = """
import sys
from pathlib import Path
from kvserve_kernels.native import library
library.library_path = lambda: Path(sys.argv[1])
import numpy as np
from kvserve_kernels import fused
from kvserve_kernels.linear import Group, Plan, linear_native
from kvserve_kernels.linear.linear_native import Level

widest = linear_native.level()
if widest == Level.NONE:
    print("none")
    raise SystemExit
rng = np.random.default_rng(int(sys.argv[2]))


def a_plan(components, dim):
    slots = int(rng.integers(1, 4))
    width = slots * dim
    group = Group(
        rows=np.arange(slots, dtype=np.int32),
        heads=np.zeros(slots, np.int32),
        rotations=np.where(np.arange(slots) < 2, 0, -1).astype(np.int32),
        mean=rng.standard_normal(width).astype(np.float32),
        inv_scale=np.full(width, 25, np.float32),
        matrix=rng.integers(-127, 128, (components, width), dtype=np.int8),
        factor=np.full(components, 10.0 ** rng.uniform(-6, -2), np.float32),
        offset=np.full(components, 0.45, np.float32),
        delta=np.full(components, -0.05, np.float32),
        inverse=(rng.standard_normal((components, width)) / width).astype(np.float32),
    )
    return Plan(groups=(group,), dim=dim)


exact = refused = 0
for _ in range(int(sys.argv[3])):
    level = Level(int(rng.integers(1, widest + 1)))
    linear_native.level = lambda level=level: level
    tokens, dim = int(rng.integers(1, 130)), int(rng.choice([2, 10, 16, 33]))
    plan = a_plan(int(rng.integers(1, 40)), dim)
    # the arrays are exactly as large as they are said to be
    keys, values = ((rng.standard_normal((2, tokens, 1, dim)) * 3).astype(np.float16) for _ in "kv")
    angles = rng.standard_normal((1, tokens, dim // 2))
    turns = (np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), bool(rng.integers(0, 2)))
    starts = sorted({0, int(rng.integers(0, tokens)), tokens})
    plans = [plan] * (len(starts) - 1)
    coded = fused.encode_runs((keys, values), plans, rng.permutation(tokens), starts, *turns)
    assert coded is not None
    out = (np.empty_like(keys), np.empty_like(values))
    sections, lengths = coded
    bad = sections.copy()
    for where in np.minimum(rng.exponential(40, 3).astype(int), bad.size - 1):
        bad[where] = rng.integers(0, 256)
    order = rng.permutation(tokens)
    assert fused.decode_runs(sections, lengths, plans, order, starts, *turns, out)
    if fused.decode_runs(bad, lengths, plans, order, starts, *turns, out):
        exact += 1
    else:
        refused += 1
    whole = fused.encode((keys, values), plan, *turns, 4 if tokens > 96 else -(-tokens // 32))
    if whole is not None:
        bad = whole[: rng.integers(0, whole.size + 1)].copy()
        fused.decode(bad, plan, *turns, out)
        where = np.minimum(rng.exponential(40, 3).astype(int), whole.size - 1)
        bad = whole.copy()
        bad[where] = rng.integers(0, 256, 3)
        fused.decode(bad, plan, *turns, out)
print(exact, refused)
"""

TILES = """
import os, sys
from pathlib import Path
from kvserve_kernels.native import library
library.library_path = lambda: Path(sys.argv[1])
import numpy as np
from kvserve_kernels import tiles
from kvserve_kernels.tiles import tiles_ref

rng = np.random.default_rng(int(sys.argv[2]))
for at in range(int(sys.argv[3])):
    of_tokens = bool(at % 2)
    shape = (3, *(int(size) for size in rng.integers(1, [4, 3, 20, 6, 20])))
    order = rng.permutation(6)
    ours, theirs = (
        # no element more than there are tiles for
        np.zeros([shape[axis] for axis in order], np.uint32).transpose(np.argsort(order)) for _ in "ab"
    )
    _, heads, outer, inner, groups, columns = shape
    pair = (2, 1) if of_tokens else (1, 2)
    rows = rng.integers(0, 65536, (2 * outer * inner * pair[0], heads, groups * columns * pair[1]), np.uint16)
    blocks = rng.permutation(3)[:2].astype(np.int64)
    tiles.put(rows, blocks, ours, of_tokens=of_tokens)
    tiles_ref.put(rows, blocks, theirs, of_tokens=of_tokens)
    assert (ours == theirs).all()
    back = np.zeros_like(rows)
    tiles.take(back, blocks, ours, of_tokens=of_tokens)
    assert (back == rows).all()
print(at + 1)
"""

BLOCKS = """
import os, sys
from pathlib import Path
from kvserve_kernels.native import library
library.library_path = lambda: Path(sys.argv[1])
import numpy as np
from kvserve_kernels import blocks
from kvserve_kernels.blocks import blocks_ref

rng = np.random.default_rng(int(sys.argv[2]))
for at in range(int(sys.argv[3])):
    shape = (3, *(int(size) for size in rng.integers(1, [4, 40, 40])))
    order = [(0, 1, 2, 3), (0, 1, 3, 2), rng.permutation(4)][at % 3]
    ours, theirs = (
        # no element more than there are blocks for
        np.zeros([shape[axis] for axis in order], np.uint16).transpose(np.argsort(order)) for _ in "ab"
    )
    _, heads, tokens, dim = shape
    first = int(rng.integers(0, tokens))
    rows = rng.integers(0, 65536, (int(rng.integers(0, 2 * tokens - first + 1)), heads, dim), np.uint16)
    ids = rng.permutation(3)[:2].astype(np.int64)
    blocks.put(rows, ids, ours, first=first)
    blocks_ref.put(rows, ids, theirs, first=first)
    assert (ours == theirs).all()
    back = np.zeros_like(rows)
    blocks.take(back, ids, ours, first=first)
    assert (back == rows).all()
print(at + 1)
"""


def runtime(name: str) -> str:
    """Return the path of one of the compiler's run-time libraries."""
    return subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the library compiled with both sanitizers."""
    library = tmp_path_factory.mktemp("native") / "sanitized.so"
    build.compile_to(
        library,
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        # quick to compile; what is checked is the same
        "-O1",
        "-g1",
    )
    return library


def run(script: str, library: Path, count: int) -> str:
    """Return what a script prints that uses the library; none of the sanitizers may have anything to say."""
    done = subprocess.run(
        [sys.executable, "-c", script, str(library), "7", str(count)],
        env=os.environ
        | {
            "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
            # the interpreter itself leaks at its end
            "ASAN_OPTIONS": "detect_leaks=0",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=1700,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "runtime error" not in done.stderr
    return done.stdout


def test_hostile_payloads_read_nothing_else(sanitized: Path) -> None:
    """200,000 cut, flipped, spliced and random payloads: no report of a sanitizer, on any instruction set."""
    exact, refused = map(int, run(HOSTILE, sanitized, PAYLOADS).split())
    # low bits are not protected, and some changes change nothing
    assert exact > 0
    assert refused > PAYLOADS // 2


def test_hostile_sections_read_nothing_else(sanitized: Path) -> None:
    """1,000 sections, and the same cut and with bytes replaced, straight into values: no report of a sanitizer."""
    said = run(FUSED, sanitized, SECTIONS)
    if said.strip() == "none":
        pytest.skip("the processor has no dot products of AVX-512")
    exact, refused = map(int, said.split())
    assert exact > 0
    assert refused > SECTIONS // 4


def test_tiles_are_written_inside_their_blocks(sanitized: Path) -> None:
    """2,000 sizes and orders of tiles are written as their definition says: no report of a sanitizer."""
    assert int(run(TILES, sanitized, TILINGS)) == TILINGS


def test_rows_are_written_inside_their_blocks(sanitized: Path) -> None:
    """2,000 sizes and orders of blocks are written as their definition says: no report of a sanitizer."""
    assert int(run(BLOCKS, sanitized, TILINGS)) == TILINGS
