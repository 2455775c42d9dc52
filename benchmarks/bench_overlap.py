# ruff: noqa: E402, I001 -- where the servers' helpers are must be known before they are imported
"""How much of a transfer's time is hidden behind its prefill: two real vLLM servers, a core each, over a limited link.

Run it as root, ``python benchmarks/bench_overlap.py --bundle FOLDER``; it takes about four minutes (QUICK=1: two). The
folder is a calibration bundle of SmolLM2-135M-Instruct, as ``kvserve calibrate`` writes it. Everything runs in a
network namespace of its own, in which what the prefill server's transfer port sends is limited (htb).

Each prompt is asked for in turn in three ways: prefilled alone; prefilled, then decoded elsewhere (routers in NIXL's
way); and both at once (routers in Mooncake's way). With ``t`` the time of a request of one token at the decode server:

    transfer = second answer of the second way - t
    left     = what the third way's first token comes after its prefill's answer - t
    hidden   = 1 - left / transfer

Where codec and engine share a core, as here, the prefill takes longer the while: compare ``in turn`` and ``at once``,
the times to the first token of the second and the third way.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tests" / "support"), str(ROOT / "tools" / "models")]

import smollm2
from controller_process import ControllerProcess, pareto_of_presets
from vllm_servers import Plan, Server, free_port, post, start

from kvserve_api.latency import StageCost
from kvserve_api.profile_set import Profile
from kvserve_profiler import corpus
from kvserve_strategies import preset
from kvserve_strategies.artifacts import open_store
from kvserve_strategies.bundle import Bundle

PRODUCER: Final = "127.0.0.2"
"""Where the prefill server's transfer port listens: packets from here are limited, HTTP is not."""
OUT: Final = ROOT / "build" / "bench"
_INSIDE: Final = "KVSERVE_BENCH_NAMESPACE"


def main() -> None:
    """Measure, print a table and write ``build/bench/overlap.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--bundle", type=Path, required=True, help="calibration bundle of the model"
    )
    parser.add_argument("--profile", default="focus-3-coarse", help="preset to send by")
    parser.add_argument("--mbit", type=float, default=100.0)
    parser.add_argument("--tokens", type=int, nargs="+", default=[500, 1000, 1900])
    parser.add_argument(
        "--step-tokens", type=int, default=2048, help="most tokens of an engine step"
    )
    parser.add_argument("--repeats", type=int, default=2 if os.environ.get("QUICK") else 4)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    arguments = parser.parse_args()
    if os.environ.get(_INSIDE) is None:
        os.environ[_INSIDE] = "1"
        os.execvp("unshare", ["unshare", "--net", sys.executable, *sys.argv])
    # so that the servers are stopped too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    shape(arguments.mbit)
    OUT.mkdir(parents=True, exist_ok=True)
    document = measure(arguments)
    (OUT / "overlap.json").write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document) if arguments.json else table(document))


def shape(mbit: float) -> None:
    """Limit what leaves the producer's address, in a namespace that has nothing but its loopback."""
    rate = f"{round(mbit * 1e6)}bit"
    for command in (
        "ip link set lo up",
        "tc qdisc add dev lo root handle 1: htb default 1 r2q 1000",
        "tc class add dev lo parent 1: classid 1:1 htb rate 100gbit burst 10mb",
        f"tc class add dev lo parent 1: classid 1:2 htb rate {rate} burst 128kb cburst 128kb",
        f"tc filter add dev lo parent 1: protocol ip prio 1 u32 match ip src {PRODUCER}/32 flowid 1:2",
    ):
        subprocess.run(command.split(), check=True, capture_output=True)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Start controller and servers, and ask for each prompt in the three ways."""
    folder = OUT / "overlap"
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.mkdir(parents=True)
    model = Path(smollm2.model_folder())
    bundle = Bundle.open(arguments.bundle)
    fingerprint = bundle.model_fingerprint
    artifacts = (folder / "artifacts").as_uri()
    open_store(artifacts).put_bundle(arguments.bundle)
    controller = ControllerProcess(folder / "controller", fingerprint)
    pareto = pareto_of_presets(fingerprint)
    profile = Profile(
        name=arguments.profile,
        strategy=preset(arguments.profile),
        ratio=10.0,
        loss_bp=1.0,
        loss_upper_bp=2.0,
        encode=StageCost(bytes_per_s=3e8),
        decode=StageCost(bytes_per_s=3e8),
        lossless=False,
        bundle=bundle.digest,
    )
    others = tuple(p for p in pareto.classes["default"] if p.name == "none")
    controller.set_set(replace(pareto, classes={"default": (profile, *others)}))
    controller.set_policy(control={"mode": "Pinned", "pinnedProfile": arguments.profile})
    controller.start()
    extra = {
        "control_endpoint": f"127.0.0.1:{controller.port}",
        "policy": "default/chat",
        "artifacts": artifacts,
        "listen_host": PRODUCER,
        "listen_port": free_port(),
        "advertise_host": PRODUCER,
    }
    cores = sorted(os.sched_getaffinity(0))
    more = (
        "--dtype", "bfloat16",
        "--kv-cache-memory-bytes", str(256 << 20),
        "--max-num-batched-tokens", str(arguments.step_tokens),
    )  # fmt: skip
    servers = [
        start(
            Plan(role=role, core=core, extra=extra | {"pod": role[3:]}, arguments=more),
            model,
            folder,
        )
        for role, core in (("kv_producer", cores[0]), ("kv_consumer", cores[-1]))
    ]
    try:
        for server in servers:
            server.wait_ready()
        controller.wait(lambda: _synced(controller, arguments.profile), 60)
        rows = [
            ask(*servers, prompt, extra["listen_port"])
            for _ in range(arguments.repeats + 1)
            for prompt in prompts(model, arguments.tokens)
        ][len(arguments.tokens) :]
        ratio = _ratio(servers[1], arguments.profile)
    finally:
        for server in servers:
            server.stop()
        controller.kill()
    return {
        "bandwidth_mbit": arguments.mbit,
        "profile": arguments.profile,
        "ratio": ratio,
        "step_tokens": arguments.step_tokens,
        "runs": rows,
        "hidden": {
            str(tokens): statistics.median(r["hidden"] for r in rows if r["tokens"] == tokens)
            for tokens in arguments.tokens
        },
    }


def prompts(model: Path, lengths: list[int]) -> list[list[int]]:
    """Return prompts of real text of these lengths, as token ids."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)("\n".join(corpus.documents())).input_ids
    return [ids[:length] for length in lengths]


def ask(producer: Server, consumer: Server, prompt: list[int], port: int) -> dict[str, Any]:
    """Ask for a prompt in all three ways; all times in seconds."""
    one = {"model": "m", "prompt": prompt, "max_tokens": 1, "temperature": 0.0}

    def timed(server: Server, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        start_s = time.perf_counter()
        answer = post(server.port, "/v1/completions", body)
        return time.perf_counter() - start_s, answer

    alone_s, _ = timed(producer, one)
    least_s = min(timed(consumer, one | {"prompt": prompt[:1]})[0] for _ in range(3))
    wish = {"do_remote_decode": True, "do_remote_prefill": False}
    first_s, answer = timed(producer, one | {"kv_transfer_params": wish})
    second_s, _ = timed(consumer, one | {"kv_transfer_params": answer["kv_transfer_params"]})
    name = {"transfer_id": f"xfer-{uuid.uuid4()}"}
    where = {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "remote_host": PRODUCER,
        "remote_port": port,
    }
    with ThreadPoolExecutor(1) as pool:
        prefill = pool.submit(timed, producer, one | {"kv_transfer_params": wish | name})
        both_s, _ = timed(consumer, one | {"kv_transfer_params": where | name})
        during_s, _ = prefill.result()
    transfer_s, left_s = second_s - least_s, both_s - during_s - least_s
    print(
        f"{len(prompt)} tokens: prefill {alone_s:.2f} s, transfer {transfer_s:.2f} s,"
        f" left {left_s:.2f} s",
        file=sys.stderr,
        flush=True,
    )
    return {
        "tokens": len(prompt),
        "prefill_s": alone_s,
        "request_s": least_s,
        "one_after_the_other_s": first_s + second_s,
        "at_once_s": both_s,
        "prefill_at_once_s": during_s,
        "transfer_s": transfer_s,
        "left_s": left_s,
        "hidden": 1 - left_s / transfer_s,
    }


def table(document: dict[str, Any]) -> str:
    """Return the figures' medians as text."""
    lines = [
        f"{document['bandwidth_mbit']:g} Mbit/s, {document['profile']} ({document['ratio']:.1f}x),"
        f" steps of {document['step_tokens']} tokens; medians in ms",
        f"{'tokens':>8}{'prefill':>9}{'at once':>9}{'transfer':>10}{'left':>7}{'hidden':>8}"
        f"   first token in turn / at once",
    ]
    for tokens, hidden in document["hidden"].items():
        rows = [row for row in document["runs"] if row["tokens"] == int(tokens)]

        def middle(name: str, rows: list[dict[str, Any]] = rows) -> str:
            return f"{1e3 * statistics.median(row[name] for row in rows):.0f}"

        lines.append(
            f"{tokens:>8}{middle('prefill_s'):>9}{middle('prefill_at_once_s'):>9}"
            f"{middle('transfer_s'):>10}{middle('left_s'):>7}{hidden:>8.0%}"
            f"   {middle('one_after_the_other_s')} / {middle('at_once_s')}"
        )
    return "\n".join(lines)


def _synced(controller: ControllerProcess, profile: str) -> bool:
    status = controller.status().get("default/chat", {})
    targets = status.get("targets", [])
    synced = [target["connected"] == 1 == target["synced"] for target in targets]
    return status.get("activeProfile", {}).get("name") == profile and synced == [True, True]


def _ratio(consumer: Server, profile: str) -> float:
    marks = ('direction="receive"', f'profile="{profile}"')
    native, wire = (
        consumer.count(f"vllm:kvserve_{name}_bytes_total", *marks) for name in ("native", "wire")
    )
    return native / max(wire, 1.0)


if __name__ == "__main__":
    main()
