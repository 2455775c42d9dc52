"""Measure every strategy of the profiler's space on SmolLM2: the truth that searches are judged by.

Run by hand, about three quarters of an hour on one core, and twice as long with 64 scored tokens; what is measured is
kept in ``--log``, and a run that was stopped goes on from there. It needs WikiText-2 (``wikitext2/test.txt``) and
HumanEval (``humaneval/HumanEval.jsonl.gz``) in ``--texts``, and a calibration bundle of the model's (``kvserve
calibrate``). The table goes to ``benchmarks/data/profiler-truth.csv``.

For each strategy the caches of all windows go through real blobs; one batched run of the model scores those of a few
strategies.
"""

import argparse
import gzip
import importlib.metadata
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from kvserve_api.canonical import digest_bytes
from kvserve_api.errors import ArtifactError, KVServeError
from kvserve_api.strategy import StrategyConfig
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
from profiler_log import Log
from profiler_table import Row, Table, short, space_to_document

ROOT: Final = Path(__file__).parents[1]
TABLE: Final = ROOT / "benchmarks" / "data" / "profiler-truth.csv"
SETTINGS: Final = Settings(
    prefix_tokens=256, continuation_tokens=16, max_windows=2, block_tokens=8, gradients=16
)
"""Windows are of each kind of text, and scored in two stretches of ``--stretch`` tokens."""
BATCH: Final = 4
"""Strategies that one run of the model scores: products of more rows take a fifth less time."""
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
    parser.add_argument(
        "--stretch", type=int, default=8, help="tokens scored in each half of a window's end"
    )
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
    settings = replace(
        SETTINGS,
        continuation_tokens=2 * arguments.stretch,
        block_tokens=arguments.stretch,
    )
    truth = Truth(
        Model(source), identity.fingerprint, bundle, {k: v for k, (v, _) in texts.items()}, settings
    )
    provenance = {
        "space": space_to_document(bundle.layout, bases_of(bundle)),
        "model": {"name": "SmolLM2-135M-Instruct", "weights": identity.weights},
        "bundle": {"digest": bundle.digest, **bundle.provenance},
        "texts": {kind: digest for kind, (_, digest) in texts.items()},
        "windows": [{"kind": kind} for kind in truth.kinds],
        "settings": settings.to_json(),
        "device": device_kind(),
        "tools": {tool: importlib.metadata.version(tool) for tool in TOOLS},
    }
    log = Log(arguments.log, provenance)
    points = list(space.points())
    random.Random(SEED).shuffle(points)
    shard, _, shards = arguments.shard.partition("/")
    points = [p for p in points[int(shard) :: int(shards)] if space.name_of(p) not in log.rows]
    if arguments.backwards:
        points.reverse()
    start_s = time.perf_counter()
    for done in range(0, len(points), BATCH):
        if done in (3 * BATCH, 25 * BATCH) or (done and done % 252 == 0):
            left_s = (time.perf_counter() - start_s) / done * (len(points) - done)
            print(f"{done}/{len(points)}: {left_s / 60:.0f} min to go", flush=True)
        log.read()
        batch = [p for p in points[done : done + BATCH] if space.name_of(p) not in log.rows]
        for row in truth.rows(space, batch):
            log.add(row)
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
        self,
        model: Model,
        fingerprint: str,
        bundle: Bundle,
        texts: Mapping[str, Sequence[str]],
        settings: Settings,
    ) -> None:
        """Compute the exact caches and predictions.

        Args:
            model: The model.
            fingerprint: Of the model.
            bundle: Its calibration.
            texts: Documents of each kind.
            settings: How it is measured.
        """
        torch.set_num_threads(settings.threads)
        self._stretches = settings.continuation_tokens // settings.block_tokens
        self._model = model
        self._fingerprint = fingerprint
        self._bundle = bundle
        windows: list[Window] = []
        kinds: list[str] = []
        for kind, documents in texts.items():
            tokens = [model.tokenise(document) for document in documents]
            found = cut(tokens, settings, lead=model.lead)
            windows += found
            kinds += [kind] * len(found)
        self.kinds = tuple(kinds)
        self._caches = [model.prefill(window.prefix) for window in windows]
        self._tokens = [window.continuation for window in windows]
        self._exact = model.log_probabilities_of(self._tokens, self._caches)
        self._sensitivities = [
            Sensitivity.of(model, cache, tokens, samples=settings.gradients, seed=SEED)
            for cache, tokens in zip(self._caches, self._tokens, strict=True)
        ]

    def rows(self, space: Space, points: Sequence[Point]) -> list[Row]:
        """Measure some strategies.

        Raises:
            KVServeError: One can't be measured.
        """
        coded = [self._coded(space.strategy(point)) for point in points]
        begin_s = time.thread_time()
        losses = self._losses([one.decoded for one in coded if not one.lossless])
        share_s = (time.thread_time() - begin_s) / max(len(losses), 1)
        exact = ((0.0,) * self._stretches,) * len(self._caches)
        rows = []
        for point, one in zip(points, coded, strict=True):
            forecasts = [
                sensitivity.forecast(cache, other)
                for sensitivity, cache, other in zip(
                    self._sensitivities, self._caches, one.decoded, strict=True
                )
            ]
            rows.append(
                Row(
                    name=space.name_of(point),
                    digest=short(space.strategy(point).digest),
                    ratio=one.ratio,
                    encode_s=one.encode_s,
                    decode_s=one.decode_s,
                    evaluation_s=one.spent_s + (0.0 if one.lossless else share_s),
                    kl=exact if one.lossless else losses.pop(0),
                    forecast=tuple((each.directed, each.scattered) for each in forecasts),
                )
            )
        return rows

    def _coded(self, strategy: StrategyConfig) -> "_Coded":
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
        if codec.lossless:
            for one, other in zip(self._caches, decoded, strict=True):
                if not (
                    torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
                ):
                    raise ArtifactError("strategy", "says it is lossless, and is not")
        return _Coded(
            decoded=decoded,
            lossless=codec.lossless,
            ratio=native / wire,
            encode_s=min(encode_s),
            decode_s=min(decode_s),
            spent_s=time.thread_time() - begin_s,
        )

    def _losses(self, decoded: Sequence[Sequence[KV]]) -> list[tuple[tuple[float, ...], ...]]:
        """Return for each strategy, window and stretch the divergence."""
        if not decoded:
            return []
        caches = [cache for one in decoded for cache in one]
        scored = iter(self._model.log_probabilities_of(self._tokens * len(decoded), caches))
        losses = []
        for _ in decoded:
            blocks = [
                divergence(exact, next(scored)).reshape(self._stretches, -1).mean(axis=1).tolist()
                for exact in self._exact
            ]
            losses.append(tuple(map(tuple, blocks)))
        return losses


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Coded:
    """What came out of a codec, and what it took; ``spent_s`` is of all windows."""

    decoded: Sequence[KV]
    lossless: bool
    ratio: float
    encode_s: float
    decode_s: float
    spent_s: float


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
