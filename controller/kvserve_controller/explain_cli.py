"""The command ``kvserve explain``: why a transfer uses the profile it uses."""

import json
import urllib.error
import urllib.parse
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click
import yaml

from kvserve_api.decision import decide, explained
from kvserve_api.errors import PolicyError, SpecError, UnavailableError
from kvserve_api.latency import Link, Load
from kvserve_api.policy import Policy
from kvserve_api.profile_set import DEFAULT_CLASS, ParetoSet
from kvserve_api.selection import Bound
from kvserve_api.table import Version
from kvserve_controller.compile import compile_table

BYTES_PER_S_PER_MBIT: Final = 125_000
TIMEOUT_S: Final = 10.0
_FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)
_COLUMNS: Final = (
    "profile",
    "ratio",
    "encode",
    "wire",
    "decode",
    "wait",
    "total",
    "at SLO",
    "others",
    "busy",
)


@click.command()
@click.option("--controller", metavar="URL", help="A running controller, like http://HOST:8081.")
@click.option("--policy", required=True, help="NAMESPACE/NAME at a controller, or else its file.")
@click.option(
    "--last", type=click.IntRange(1, 256), default=10, show_default=True, help="How many."
)
@click.option("--profiles", type=_FILE, help="Pareto set (JSON), without a controller.")
@click.option("--workload", default=DEFAULT_CLASS, show_default=True, help="Workload class.")
@click.option("--bytes", "native_bytes", type=click.IntRange(1, 1 << 44), help="Native KV bytes.")
@click.option("--mbit", type=click.FloatRange(1e-3, 1e7), help="Goodput of the link, in Mbit/s.")
@click.option("--backlog-bytes", type=click.FloatRange(0, 1e15), default=0.0, help="Queued ahead.")
@click.option("--arrivals-per-s", type=click.FloatRange(0, 1e6), default=0.0, help="Offered load.")
@click.option("--chunks", type=click.IntRange(1, 8192), default=1, show_default=True, help="Of it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(
    controller: str | None,
    policy: str,
    last: int,
    profiles: Path | None,
    workload: str,
    native_bytes: int | None,
    mbit: float | None,
    backlog_bytes: float,
    arrivals_per_s: float,
    chunks: int,
    as_json: bool,
) -> None:
    """Say why transfers use the profiles they use.

    Of a running controller it shows the latest decisions of the policy's pods: with what each candidate was expected to
    take, and what ruled it out. Without one it decides for a transfer of --bytes over a link of --mbit by a policy file
    and its Pareto set, from the profiles alone.
    """
    if controller is not None:
        found = latest(controller, policy, last)
    elif profiles is None or native_bytes is None or mbit is None:
        raise click.UsageError("give either --controller, or --profiles, --bytes and --mbit")
    else:
        load = Load(arrivals_per_s=arrivals_per_s, native_bytes_per_s=arrivals_per_s * native_bytes)
        link = Link(
            bytes_per_s=mbit * BYTES_PER_S_PER_MBIT,
            backlog_bytes=backlog_bytes,
            load=load,
            encoder_load=load,
        )
        table = compile_table(
            read_policy(Path(policy)),
            ParetoSet.parse(profiles.read_bytes()),
            version=Version(epoch=0, counter=0),
            prior_bytes_per_s=link.bytes_per_s,
        )
        decision = decide(table, workload, native_bytes=native_bytes, link=link, chunks=chunks)
        found = [explained(table, decision)]
    if as_json:
        click.echo(json.dumps(found))
        return
    for each in found:
        click.echo("\n".join(lines(each)))
    if not found:
        click.echo("no transfer was decided yet, or no pod that decides is connected")


def read_policy(path: Path) -> Policy:
    """Read the KVServePolicy of a file.

    Raises:
        PolicyError: There is none, or not just one.
    """
    try:
        documents = list(yaml.safe_load_all(path.read_bytes()))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise PolicyError(str(path), f"can't be read: {error}") from error
    policies = [d for d in documents if isinstance(d, dict) and d.get("kind") == "KVServePolicy"]
    if len(policies) != 1:
        raise PolicyError(str(path), f"must hold one KVServePolicy, holds {len(policies)}")
    return Policy.from_object(policies[0])


def latest(controller: str, policy: str, limit: int) -> list[dict[str, Any]]:
    """Ask a controller for the latest decisions of a policy's pods.

    Raises:
        SpecError: It knows no such policy, or the URL is none.
        UnavailableError: It does not answer.
    """
    if not controller.startswith(("http://", "https://")):
        raise SpecError("--controller", f"must look like http://HOST:8081, got {controller!r}")
    query = urllib.parse.urlencode({"policy": policy, "limit": limit})
    try:
        with urllib.request.urlopen(
            f"{controller.rstrip('/')}/decisions?{query}", timeout=TIMEOUT_S
        ) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            raise SpecError("--policy", error.read(1000).decode(errors="replace")) from error
    except (OSError, ValueError) as error:
        raise UnavailableError(f"{controller} does not answer: {error}") from error
    return found if isinstance(found, list) else []


def lines(value: dict[str, Any]) -> list[str]:
    """Return an explanation for people."""
    link = value["link"]
    when = (
        f"{datetime.fromtimestamp(value['time_s'], UTC):%Y-%m-%d %H:%M:%S}Z "
        if value["time_s"]
        else ""
    )
    who = f"{value['pod']} → {value['peer']}  " if "pod" in value else ""
    deadline_s = value.get("deadline_s")
    head = [
        f"{when}{who}{value['native_bytes'] / 1e6:.1f} MB of class {value['workload']}, table {value['version']}",
        f"  link {link['bytes_per_s'] / BYTES_PER_S_PER_MBIT:.1f} Mbit/s, {link['backlog_bytes'] / 1e6:.1f} MB ahead,"
        f" {link['arrivals_per_s']:.2f} transfers/s; coder {link['encode_backlog_s']:.2f} s ahead,"
        f" {link['encode_factor']:.2f}x the table's time, delays {link['encode_delays']:.1f} requests here and"
        f" {link['decode_delays']:.1f} there",
        *before(value),
        f"  {value['profile']}: {reason(value)}"
        + (f"; deadline {deadline_s:.3f} s" if deadline_s is not None else "")
        + (f" after {link['hidden_s']:.3f} s of prefill" if link["hidden_s"] else ""),
    ]
    if "candidates" not in value:
        return [*head, "  (its table is no longer known)"]
    rows = [
        (
            f"{'*' if each['verdict'] == 'Chosen' else ' '} {each['name']}",
            f"{each['ratio']:.2f}",
            *(f"{each[key]:.4f}" for key in ("encode_s", "wire_s", "decode_s", "wait_s")),
            f"{each['total_s']:.4f}",
            f"{each['percentile_s']:.4f}",
            f"{each['others_s']:.4f}",
            f"{each['utilisation']:.2f}",
            each["verdict"],
        )
        for each in value["candidates"]
    ]
    table = [(*_COLUMNS, ""), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return head + [
        "    "
        + "  ".join(
            text.ljust(width) if column in (0, len(widths) - 1) else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def before(value: dict[str, Any]) -> list[str]:
    """Return what came before a decision about the rest of a transfer."""
    if not value.get("before_bytes_per_s"):
        return []
    mbit = value["before_bytes_per_s"] / BYTES_PER_S_PER_MBIT
    return [
        f"  the rest of a transfer that {value['incumbent']} had coded, chosen for {mbit:.1f} Mbit/s;"
        f" {value['spent_s']:.3f} s of its deadline had passed"
    ]


def reason(value: dict[str, Any]) -> str:
    """Return in words what decided."""
    words = {
        "Goal": f"best by the goal {value.get('goal', '')}".rstrip(),
        "Kept": "in use, and nothing else is better by more than the hysteresis",
        "Explored": f"tried out, it could be better than is known; expected to cost {value['extra_s']:.4f} s",
        "DeadlineUnmet": "no candidate meets the deadline, this one misses it least",
        "LoadUnmet": "the offered load exceeds every candidate, this one by the least",
        "Pinned": "pinned by the policy",
        "Off": "the policy's mode is Off",
        "TableExpired": "the table has expired: the policy's fallback",
        "PeerCannotDecode": "the consumer can't decode what was wanted",
        Bound.OPAQUE.value: "what was wanted can't code a cache of this kind",
    }
    told = words.get(value["bound"], str(value["bound"]))
    if value["wanted"] != value["profile"]:
        told = f"not acting; {value['wanted']} would be used: {told}"
    return told
