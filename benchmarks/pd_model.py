"""What ``make bench-pd`` would show on GPUs: **modelled, not measured**. Pure.

Requests pass a prefill queue, then encoder, link and decoder as the tandem of `controller_queue`, then generation. The
model is first held against what was measured here, with this machine's figures (`checked`); then it gets those of a
GPU: the codec at a share of the bounds of docs/roofline.md, prefill at a share of the peak. Ratios are those of
SmolLM2's profiles, which another model's need not have.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import numpy as np

import roofline
from controller_queue import Capacity, Tandem, Work
from kvserve_api.latency import StageCost
from kvserve_api.profile_set import DEFAULT_CLASS, NONE, ParetoSet
from pd_load import LENGTHS, course, mean_tokens
from pd_plan import BITS_A_TOKEN, GENERATED, KVSERVE, LOAD, RAW
from pd_rows import by_round

CHUNKS: Final = 6
MEMORY_SHARE: Final = 0.25
"""Of a kernel's bound that it is taken to reach."""
PREFILL_SHARE: Final = 0.45
"""Of the bfloat16 peak that prefill is taken to reach."""
LAUNCH_S: Final = 1e-3
"""Launches of a transfer's kernels, each way."""
PARAMETERS: Final = 8.03e9
TOKEN_BYTES: Final = 131_072
"""Of Llama-3.1-8B in bfloat16: 32 layers, 8 heads of 128, keys and values."""
LONGER: Final = 7
"""Times the prompts of the benchmark: the paper's have 14,000 tokens."""
GBITS: Final = (5, 10, 25, 50, 100, 200, 400)
MODELLED: Final = ("joint-3", "joint-10")
GENERATE_S: Final = 0.01
"""A token, once generation runs."""
REQUESTS: Final = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Codec:
    """A profile on a device: how small, and how fast."""

    ratio: float
    encode: StageCost
    decode: StageCost

    def work(self, native_bytes: float) -> Work:
        """Return what a transfer asks of coders and link."""
        return Work(
            self.encode.seconds(native_bytes),
            native_bytes / self.ratio,
            self.decode.seconds(native_bytes),
            CHUNKS,
        )


def simulate(
    arrivals: Sequence[tuple[float, int]],
    codecs: Sequence[Codec],
    *,
    token_bytes: float,
    prefill_s_per_token: float,
    generate_s: float,
    bytes_per_s: float,
) -> list[float]:
    """Return each request's completion time.

    Args:
        arrivals: When, and of how many tokens, in order.
        codecs: What each transfer may use: the one that would end it first, if it were the last.
        token_bytes: Native bytes of a token.
        prefill_s_per_token: Of the prefill engine.
        generate_s: From the cache's arrival to the last token.
        bytes_per_s: Of the link.
    """
    tandem = Tandem(Capacity.of((0.0,), (bytes_per_s,)))
    free_s = 0.0
    sent = []
    for at_s, tokens in arrivals:
        free_s = max(free_s, at_s) + tokens * prefill_s_per_token
        tandem.advance(free_s)
        works = [codec.work(tokens * token_bytes) for codec in codecs]
        best = min(works, key=lambda work: tandem.preview_s(free_s, work))
        sent.append((at_s, tandem.send(free_s, best)))
    tandem.finish()
    return [one.done_s - at_s + generate_s for at_s, one in sent]


def checked(
    rows: Iterable[Mapping[str, Any]],
    pareto: ParetoSet,
    *,
    generate_s: float,
) -> list[dict[str, Any]]:
    """Return fixed profiles' measured median completion times beside the model's with this machine's figures.

    Args:
        rows: What was measured.
        pareto: All profiles.
        generate_s: From a cache's arrival to the last token.
    """
    profiles = {p.name: p for p in pareto.classes[DEFAULT_CLASS]}
    found = []
    for row in rows:
        name = NONE if row["policy"] == RAW else row["policy"]
        if (
            name not in profiles
            or row["bandwidth_mbit"] is None
            or row["moving"]
            or not row["per_s"]
        ):
            continue
        used = profiles[name]
        arrivals = list(zip(row["at_each_s"], row["tokens_each"], strict=True))
        times = [
            time_s
            for part, of_round in zip(row["rounds"], by_round(row, arrivals), strict=True)
            for time_s in simulate(
                of_round,
                [Codec(ratio=used.ratio, encode=used.encode, decode=used.decode)],
                token_bytes=BITS_A_TOKEN / 8,
                prefill_s_per_token=part["prefill_s_per_token"],
                generate_s=generate_s,
                bytes_per_s=row["bandwidth_mbit"] * 1e6 / 8,
            )
        ]
        found.append(
            {
                "condition": row["condition"],
                "policy": row["policy"],
                "measured_s": row["jct_s"]["p50"],
                "modelled_s": float(np.median(times)),
            }
        )
    return found


def modelled(
    rows: Sequence[Mapping[str, Any]],
    pareto: ParetoSet,
    *,
    generate_s: float,
) -> dict[str, Any]:
    """Return the model's check, and its figures for GPUs; arguments as of `checked`."""
    check = checked(rows, pareto, generate_s=generate_s)
    errors = [one["measured_s"] / one["modelled_s"] for one in check]
    return {
        "modelled_not_measured": True,
        "check": check,
        "measured_over_modelled": median(errors) if errors else None,
        "assumptions": {
            "model": "Llama-3.1-8B, bfloat16",
            "tokens": [n * LONGER for n in LENGTHS],
            "memory_share": MEMORY_SHARE,
            "prefill_share": PREFILL_SHARE,
            "launch_s": LAUNCH_S,
            "ratios": "of SmolLM2's profiles",
        },
        "gpus": [
            row
            for gpu in roofline.GPUS
            if gpu.name in ("A100", "H100")
            for row in _gpu(gpu, pareto)
        ],
    }


def _gpu(gpu: roofline.Gpu, pareto: ParetoSet) -> Iterator[dict[str, Any]]:
    bounds = roofline.tables(json.loads(roofline.BUDGETS.read_text()))[1]["chains"]
    encode, decode = (
        StageCost(offset_s=LAUNCH_S, bytes_per_s=MEMORY_SHARE * bounds[name][gpu.name])
        for name in ("encode", "decode")
    )
    profiles = {p.name: p for p in pareto.classes[DEFAULT_CLASS]}
    codecs = {RAW: Codec(ratio=1.0, encode=StageCost(), decode=StageCost())} | {
        name: Codec(ratio=profiles[name].ratio, encode=encode, decode=decode)
        for name in MODELLED
        if name in profiles
    }
    prefill_s = 2 * PARAMETERS / (PREFILL_SHARE * gpu.tensor_per_s["bfloat16"])
    per_s = LOAD / (prefill_s * mean_tokens() * LONGER)
    arrivals = [(at_s, LONGER * tokens) for at_s, tokens in course(REQUESTS, per_s, 1)]
    policies = {name: [codec] for name, codec in codecs.items()} | {KVSERVE: list(codecs.values())}
    for gbit in GBITS:
        raw_s = 0.0
        for policy, able in policies.items():
            times = simulate(
                arrivals,
                able,
                token_bytes=TOKEN_BYTES,
                prefill_s_per_token=prefill_s,
                generate_s=GENERATED * GENERATE_S,
                bytes_per_s=gbit * 1e9 / 8,
            )
            p50_s = float(np.median(times))
            raw_s = raw_s or p50_s
            yield {
                "gpu": gpu.name,
                "bandwidth_gbit": gbit,
                "policy": policy,
                "jct_p50_s": p50_s,
                "vs_raw": raw_s / p50_s,
            }
