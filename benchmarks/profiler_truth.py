"""Measure every strategy of the profiler's space on SmolLM2: the truth that searches are judged by.

Run by hand, about three quarters of an hour on one core; what is measured is kept in ``--log``, and a run that was
stopped goes on from there. It needs WikiText-2 (``wikitext2/test.txt``) and HumanEval
(``humaneval/HumanEval.jsonl.gz``) in ``--texts``, and a calibration bundle of the model's (``kvserve calibrate``).
The table goes to ``benchmarks/data/profiler-truth.csv``.

For each strategy the caches of all windows go through real blobs; one batched run of the model scores them all.
"""

import argparse
import contextlib
import gzip
import importlib.metadata
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from kvserve_api.canonical import digest_bytes
from kvserve_api.errors import ArtifactError, KVServeError
from kvserve_profiler.codec import Codec
from kvserve_profiler.cost import device_kind
from kvserve_profiler.exits import last_words
from kvserve_profiler.identity import identify
from kvserve_profiler.model import KV, Model, Source
from kvserve_profiler.quality import divergence
from kvserve_profiler.sensitivity import Sensitivity
from kvserve_profiler.settings import Settings
from kvserve_profiler.space import Space
from kvserve_profiler.space_families import bases_of, space_of
from kvserve_profiler.space_point import Point
from kvserve_profiler.windows import Window, cut
from kvserve_strategies import config_needs_bundle
from kvserve_strategies.bundle import Bundle
from profiler_table import Row, Table, short, space_to_document

ROOT: Final = Path(__file__).parents[1]
TABLE: Final = ROOT / "benchmarks" / "data" / "profiler-truth.csv"
SETTINGS: Final = Settings(
    prefix_tokens=256, continuation_tokens=16, max_windows=2, block_tokens=8, gradients=16
)
"""Windows are of each kind of text."""
MAX_CHARS: Final = 400_000
SEED: Final = 0
"""Of the order of strategies: a drift of the machine must not look like a difference between families."""
TOOLS: Final = ("kvserve", "numpy", "torch", "transformers")


def main() -> int:
    """Measure what is missing, and write the table when nothing is."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with the texts")
    parser.add_argument("--bundle", type=Path, required=True, help="calibration bundle")
    parser.add_argument("--model", type=Path, help="model folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "bench" / "truth.jsonl")
    parser.add_argument("--shard", default="0/1", help="which part of the work, as 0/2 and 1/2")
    parser.add_argument("--backwards", action="store_true", help="begin at the end of the part")
    parser.add_argument("--out", type=Path, default=TABLE)
    arguments = parser.parse_args()
    try:
        measure(arguments)
    except (KVServeError, OSError) as error:
        print(f"profiler_truth: {last_words(error)}", file=sys.stderr)
        return 1
    return 0


def measure(arguments: argparse.Namespace) -> None:
    """Do what the module says."""
    bundle = Bundle.open(arguments.bundle)
    source = Source(location=str(arguments.model or _smollm2()))
    identity = identify(source)
    if identity.fingerprint != bundle.model_fingerprint:
        raise ArtifactError("--bundle", "is of another model")
    space = space_of(bundle.layout, bases_of(bundle))
    texts = dict(_texts(arguments.texts))
    truth = Truth(
        Model(source), identity.fingerprint, bundle, {k: v for k, (v, _) in texts.items()}
    )
    provenance = {
        "space": space_to_document(bundle.layout, bases_of(bundle)),
        "model": {"name": "SmolLM2-135M-Instruct", "weights": identity.weights},
        "bundle": {"digest": bundle.digest, **bundle.provenance},
        "texts": {kind: digest for kind, (_, digest) in texts.items()},
        "windows": [{"kind": kind} for kind in truth.kinds],
        "settings": SETTINGS.to_json(),
        "device": device_kind(),
        "tools": {tool: importlib.metadata.version(tool) for tool in TOOLS},
    }
    log = _Log(arguments.log, provenance)
    points = list(space.points())
    random.Random(SEED).shuffle(points)
    shard, _, shards = arguments.shard.partition("/")
    points = [p for p in points[int(shard) :: int(shards)] if space.name_of(p) not in log.rows]
    if arguments.backwards:
        points.reverse()
    start_s = time.perf_counter()
    for done, point in enumerate(points):
        if done in (10, 100) or (done and done % 250 == 0):
            left_s = (time.perf_counter() - start_s) / done * (len(points) - done)
            print(f"{done}/{len(points)}: {left_s / 60:.0f} min to go", flush=True)
        log.read()
        if space.name_of(point) not in log.rows:
            log.add(truth.row(space, point))
    log.read()
    missing = len(space.points()) - len(log.rows)
    if missing:
        print(f"{arguments.log}: {missing} strategies are left to other shards")
        return
    provenance["date"] = time.strftime("%Y-%m-%d", time.gmtime())
    table = Table.of(space, space.points(), log.rows.values(), provenance)
    table.write(log.rows.values(), arguments.out)
    print(f"{arguments.out}: {len(table.points)} strategies")


class Truth:
    """The windows with what does not depend on a strategy.

    Attributes:
        kinds: For each window the kind of its text.
    """

    def __init__(
        self, model: Model, fingerprint: str, bundle: Bundle, texts: Mapping[str, Sequence[str]]
    ) -> None:
        """Compute the exact caches and predictions.

        Args:
            model: The model.
            fingerprint: Of the model.
            bundle: Its calibration.
            texts: Documents of each kind.
        """
        torch.set_num_threads(SETTINGS.threads)
        self._model = model
        self._fingerprint = fingerprint
        self._bundle = bundle
        windows: list[Window] = []
        kinds: list[str] = []
        for kind, documents in texts.items():
            tokens = [model.tokenise(document) for document in documents]
            found = cut(tokens, SETTINGS, lead=model.lead)
            windows += found
            kinds += [kind] * len(found)
        self.kinds = tuple(kinds)
        self._caches = [model.prefill(window.prefix) for window in windows]
        self._tokens = [window.continuation for window in windows]
        self._exact = model.log_probabilities_of(self._tokens, self._caches)
        self._sensitivities = [
            Sensitivity.of(model, cache, tokens, samples=SETTINGS.gradients, seed=SEED)
            for cache, tokens in zip(self._caches, self._tokens, strict=True)
        ]

    def row(self, space: Space, point: Point) -> Row:
        """Measure one strategy.

        Raises:
            KVServeError: It can't be measured.
        """
        strategy = space.strategy(point)
        codec = Codec.of(
            strategy,
            fingerprint=self._fingerprint,
            layout=self._model.layout,
            bundle=self._bundle if config_needs_bundle(strategy) else None,
        )
        begin_s = time.thread_time()
        native = wire = 0
        encode_s, decode_s, decoded = [], [], []
        for cache in self._caches:
            start_s = time.thread_time()
            blob = codec.encode(cache)
            middle_s = time.thread_time()
            decoded.append(codec.decode(blob, cache.tokens))
            decode_s.append(time.thread_time() - middle_s)
            encode_s.append(middle_s - start_s)
            native += self._model.layout.native_bytes(cache.tokens)
            wire += len(blob)
        losses = self._losses(decoded, lossless=codec.lossless)
        evaluation_s = time.thread_time() - begin_s
        forecasts = [
            sensitivity.forecast(exact, other)
            for sensitivity, exact, other in zip(
                self._sensitivities, self._caches, decoded, strict=True
            )
        ]
        return Row(
            name=space.name_of(point),
            digest=short(strategy.digest),
            ratio=native / wire,
            encode_s=min(encode_s),
            decode_s=min(decode_s),
            evaluation_s=evaluation_s,
            kl=losses,
            forecast=tuple((one.directed, one.scattered) for one in forecasts),
        )

    def _losses(self, decoded: list[KV], *, lossless: bool) -> tuple[tuple[float, ...], ...]:
        count = SETTINGS.continuation_tokens // SETTINGS.block_tokens
        if lossless:
            for one, other in zip(self._caches, decoded, strict=True):
                if not (
                    torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
                ):
                    raise ArtifactError("strategy", "says it is lossless, and is not")
            return ((0.0,) * count,) * len(decoded)
        scored = self._model.log_probabilities_of(self._tokens, decoded)
        losses = []
        for exact, other in zip(self._exact, scored, strict=True):
            blocks = divergence(exact, other).reshape(count, -1)
            losses.append(tuple(float(x) for x in np.mean(blocks, axis=1)))
        return tuple(losses)


class _Log:
    """What was measured so far: a line of provenance, then a line for each strategy; several shards may write it."""

    def __init__(self, path: Path, provenance: Mapping[str, Any]) -> None:
        self._path = path
        self._basis = json.dumps(provenance, sort_keys=True)
        self.rows: dict[str, Row] = {}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._basis + "\n")
        self.read()

    def read(self) -> None:
        """Read what is there."""
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


def _texts(folder: Path) -> Iterator[tuple[str, tuple[Sequence[str], str]]]:
    """Yield for each kind of text its documents, and the digest of its file."""
    prose = (folder / "wikitext2" / "test.txt").read_bytes()
    yield "prose", ([prose.decode()[:MAX_CHARS]], digest_bytes(prose))
    packed = (folder / "humaneval" / "HumanEval.jsonl.gz").read_bytes()
    tasks = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    code = "\n".join(task["prompt"] + task["canonical_solution"] for task in tasks)
    yield "code", ([code[:MAX_CHARS]], digest_bytes(packed))


def _smollm2() -> Path:
    sys.path.append(str(ROOT / "tools" / "models"))
    import smollm2

    return Path(smollm2.model_folder())


if __name__ == "__main__":
    # a batch of small windows gains nothing from more threads, and timings of codecs suffer
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
