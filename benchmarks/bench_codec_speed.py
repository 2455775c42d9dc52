"""How fast whole strategies code a model's cache on one core, beside a copy of memory and LMCache's own CacheGen.

Run it with ``python benchmarks/bench_codec_speed.py [--model DIR] [--bundle DIR] [--text FILE]``; by default with
SmolLM2-135M-Instruct, its bundle made once, and the profiler's built-in corpus. It takes about two minutes
(``QUICK=1``: half a minute, without LMCache) and writes ``build/bench/codec-speed.json``. LMCache's code is fetched
from the package index by `peers_fetch`.

Everything is timed in turn, round after round, in processor time of this process, so that other work on the machine
hits all alike: ratios to the copy and to LMCache are those of one round, and their median counts more than rates, which
are given with the 10th and the 90th percentile. Blobs are whole, with header and checksums. "request" is all layers of
1,024 tokens in one blob; "chunks" are those that the connector cuts.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from kvserve_api.wire import KVLayout
from kvserve_connector.chunks import Chunk, plan
from kvserve_connector.config import ConnectorConfig
from kvserve_profiler import corpus
from kvserve_profiler.codec_bench_bundle import calibrated_folder
from kvserve_profiler.model import Model, Source, fingerprint
from kvserve_strategies import Expectation, Pipeline, decode_blob, encode_blob, preset
from kvserve_strategies.bundle import Bundle

ROOT: Final = Path(__file__).parents[1]
OUT: Final = ROOT / "build" / "bench" / "codec-speed.json"
TOKENS: Final = 1024
NAMES: Final = (
    "splitzip", "lossless", "cachegen", "centred-rans",
    "joint-head", "joint-layer", "joint-3", "joint-10", "focus-3",
)  # fmt: skip
QUICK: Final = ("cachegen", "joint-head", "joint-3", "focus-3")
COPY: Final = "copy of memory"
PEER: Final = "LMCache CacheGen, its own code"
Job = tuple[Callable[[], Any], Callable[[], Any]]


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="model folder; by default SmolLM2-135M-Instruct")
    parser.add_argument("--bundle", type=Path, help="calibration bundle; by default made once")
    parser.add_argument("--text", type=Path, help="UTF-8 text; by default the built-in corpus")
    parser.add_argument("--strategy", action="append", help="preset; may be given several times")
    arguments = parser.parse_args()
    quick = os.environ.get("QUICK", "") not in ("", "0")
    torch.set_num_threads(1)
    folder = arguments.model or _smollm2()
    names = tuple(arguments.strategy or (QUICK if quick else NAMES))
    bundle = None
    if any(Pipeline.of(preset(name)).calibrated for name in names):
        made = arguments.bundle or calibrated_folder(folder, map(preset, names), _say)
        bundle = Bundle.open(made)
    source = Source(location=str(folder))
    model = Model(source)
    text = arguments.text.read_text() if arguments.text else corpus.documents()[0]
    cache = model.prefill(model.tokenise(text)[:TOKENS])
    identity = fingerprint(source.config())
    rows = measure(identity, model.layout, cache.keys, cache.values, names, bundle, quick=quick)
    print_and_write(rows)


def measure(
    identity: str,
    layout: KVLayout,
    keys: torch.Tensor,
    values: torch.Tensor,
    names: Sequence[str],
    bundle: Bundle | None,
    *,
    quick: bool,
) -> list[dict[str, Any]]:
    """Return a row for each strategy and way of cutting.

    Args:
        identity: Fingerprint of the model.
        layout: Form of its cache.
        keys: ``[layers, tokens, kv_heads, head_dim]``.
        values: The same.
        names: The presets.
        bundle: The calibration, if one of them needs it.
        quick: Few rounds, and not LMCache.
    """
    tokens = range(keys.shape[1])
    copies = torch.empty_like(keys), torch.empty_like(values)
    copy = lambda: (copies[0].copy_(keys), copies[1].copy_(values))  # noqa: E731
    jobs: dict[tuple[str, str], Job] = {(COPY, ""): (copy, copy)}
    for name in names:
        pipeline = Pipeline.of(preset(name), bundle)
        whole = (Chunk(layers=range(layout.layers), tokens=tokens),)
        layers = ConnectorConfig().chunk_layers
        cut = plan(layout, tokens, layers, layer_multiple=pipeline.layer_step)
        jobs[name, "request"] = _job(pipeline, whole, identity, layout, keys, values)
        jobs[name, "chunks"] = _job(pipeline, cut, identity, layout, keys, values)
    if not quick:
        jobs[PEER, ""] = _peer(keys, values)
    for encode, decode in jobs.values():
        encode(), decode()
    rounds = 3 if quick else 9
    times_s = {job: np.empty((2, rounds)) for job in jobs}
    for at in range(rounds):
        for job, both in jobs.items():
            for way, action in enumerate(both):
                start_s = time.process_time()
                action()
                times_s[job][way, at] = time.process_time() - start_s
    nbytes = 2 * keys.numel() * keys.element_size()
    return [_row(job, nbytes, times_s) for job in jobs]


def _job(
    pipeline: Pipeline,
    chunks: Sequence[Chunk],
    identity: str,
    layout: KVLayout,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> Job:
    def encoded(chunk: Chunk) -> memoryview:
        rows, tokens = chunk.layers, chunk.tokens
        keys_part, values_part = (
            half[rows.start : rows.stop, tokens.start : tokens.stop] for half in (keys, values)
        )
        return encode_blob(
            pipeline,
            keys_part,
            values_part,
            model_fingerprint=identity,
            layout=layout,
            layers=rows,
            tokens=tokens,
        )

    # as a socket leaves them
    blobs = [bytearray(encoded(chunk)) for chunk in chunks]

    def decode() -> None:
        for blob, chunk in zip(blobs, chunks, strict=True):
            expect = Expectation(
                model_fingerprint=identity,
                layout=layout,
                layers=chunk.layers,
                tokens=chunk.tokens,
                max_bytes=len(blob),
                bundles=lambda _: pipeline.bundle,
            )
            decode_blob(blob, expect=expect)

    return lambda: [encoded(chunk) for chunk in chunks], decode


def _peer(keys: torch.Tensor, values: torch.Tensor) -> Job:
    import peers_code

    objects = peers_code.cachegen_encode(keys, values)
    return (
        lambda: peers_code.cachegen_encode(keys, values),
        lambda: peers_code.cachegen_decode(objects, keys.dtype),
    )


def _row(
    job: tuple[str, str], nbytes: int, times_s: dict[tuple[str, str], np.ndarray[Any, Any]]
) -> dict[str, Any]:
    row: dict[str, Any] = {"what": job[0], "cut": job[1]}
    for way, name in enumerate(("encode", "decode")):
        low, median, high = np.percentile(nbytes / 1e6 / times_s[job][way], (10, 50, 90))
        row |= {f"{name}_mb_s": median, f"{name}_p10": low, f"{name}_p90": high}
        for what, key in (("copy", (COPY, "")), ("peer", (PEER, ""))):
            if key in times_s:
                row[f"{name}_of_{what}"] = float(np.median(times_s[key][way] / times_s[job][way]))
    return row


def print_and_write(rows: Sequence[dict[str, Any]]) -> None:
    """Print a table and write the file."""
    print("MB of native KV a second: median (10th to 90th percentile), times a copy, times LMCache")
    for row in rows:
        line = f"{row['what']:30} {row['cut']:8}"
        for way in ("encode", "decode"):
            rate = f"{row[f'{way}_mb_s']:6.0f} ({row[f'{way}_p10']:.0f} to {row[f'{way}_p90']:.0f})"
            peer = row.get(f"{way}_of_peer")
            line += f"  {way} {rate:22} {row[f'{way}_of_copy']:.3f}" + (
                f" {peer:6.1f}x" if peer else ""
            )
        print(line)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(list(rows), indent=2) + "\n")


def _smollm2() -> Path:
    sys.path.append(str(ROOT / "tools" / "models"))
    import smollm2

    return Path(smollm2.model_folder())


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
