"""What a check found, and the judgements that need no more than values."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

from kvserve_api.errors import SpecError
from kvserve_api.fields import Fields
from kvserve_connector.versions import PROVEN, doubts

LEAST_PYTHON: Final = (3, 11)
LEAST_FILES: Final = 4096
"""Open files of a server with hundreds of requests and 128 transfers."""
MOST_SKEW_S: Final = 2.0
"""What a clock may be off: traces of two pods are laid side by side, and the Date header has whole seconds."""


class Level(StrEnum):
    """How bad it is."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: What was looked at.
        level: How bad it is.
        text: What was found.
        advice: What to do; empty if nothing.
    """

    check: str
    level: Level
    text: str
    advice: str = ""

    def __str__(self) -> str:
        """Return the line that people read."""
        line = f"{self.level:<4}  {self.check}: {self.text}"
        return f"{line}. {self.advice}" if self.advice else line

    def to_json(self) -> dict[str, str]:
        """Return the same for programs."""
        return asdict(self)


def ok(check: str, text: str) -> Finding:
    """Return that all is well."""
    return Finding(check, Level.OK, text)


def warn(check: str, text: str, advice: str) -> Finding:
    """Return what works, but not as it should."""
    return Finding(check, Level.WARN, text, advice)


def fail(check: str, text: str, advice: str) -> Finding:
    """Return what does not work."""
    return Finding(check, Level.FAIL, text, advice)


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 if anything does not work."""
    return int(any(finding.level == Level.FAIL for finding in findings))


def judge_python(found: tuple[int, ...]) -> Finding:
    """Judge Python's version."""
    text = ".".join(map(str, found[:3]))
    if found[:2] >= LEAST_PYTHON:
        return ok("python", text)
    return fail("python", text, f"Use {LEAST_PYTHON[0]}.{LEAST_PYTHON[1]} or later.")


def judge_vllm(found: str | None) -> Finding:
    """Judge vLLM's version."""
    if found is None:
        return warn("vllm", "not installed", "Nothing to do, if this is not a serving pod.")
    if doubt := doubts(found):
        return warn("vllm", doubt, f"Use vLLM {PROVEN}.")
    return ok("vllm", found)


def judge_kvserve(found: str | None) -> Finding:
    """Judge how KVServe is installed."""
    if found is None:
        return warn(
            "kvserve", "not installed as a package", 'Use pip install "kvserve[connector]".'
        )
    return ok("kvserve", found)


def judge_files(soft: int, hard: int) -> Finding:
    """Judge the limit of open files; a negative one is none."""
    if soft < 0 or soft >= LEAST_FILES:
        return ok("open files", "no limit" if soft < 0 else f"at most {soft}")
    raised = "ulimit -n" if hard < 0 or hard >= LEAST_FILES else "the container runtime's limit"
    return warn("open files", f"at most {soft}", f"Raise {raised} to {LEAST_FILES} or more.")


def judge_clock(skew_s: float) -> Finding:
    """Judge how far this clock is ahead of the controller's."""
    text = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the controller's"
    if abs(skew_s) <= MOST_SKEW_S:
        return ok("clock", "as the controller's")
    return warn("clock", text, "Synchronise the nodes' clocks: traces and certificates use them.")


def judge_transfer_config(config: Mapping[str, Any]) -> list[Finding]:
    """Judge what vLLM was told besides the connector's own settings."""
    found = []
    role = config.get("kv_role")
    if config.get("kv_connector") != "KVServeConnector":
        found.append(
            fail(
                "transfer config",
                f"kv_connector is {config.get('kv_connector')!r}",
                'Set it to "KVServeConnector".',
            )
        )
    if config.get("kv_connector_module_path") != "kvserve_connector.connector":
        found.append(
            fail(
                "transfer config",
                "kv_connector_module_path is not kvserve_connector.connector",
                "Set it: vLLM does not know the connector by name.",
            )
        )
    if role not in ("kv_producer", "kv_consumer", "kv_both"):
        found.append(
            fail("transfer config", f"kv_role is {role!r}", "Set kv_producer or kv_consumer.")
        )
    elif role != "kv_producer" and config.get("kv_load_failure_policy") != "recompute":
        found.append(
            warn(
                "transfer config",
                "a transfer that does not arrive fails its request",
                'Set "kv_load_failure_policy": "recompute".',
            )
        )
    return found or [ok("transfer config", str(role))]


def judge_model(config: Mapping[str, Any]) -> Finding:
    """Judge by a model's ``config.json`` how its KV cache will be carried; vLLM has the last word.

    Args:
        config: The parsed file; of a model with several parts, the text model's.
    """
    check = "kv layout"
    if reason := _whole_blocks(config):
        return warn(
            check,
            f"{reason}: KV is carried as whole blocks, raw or lossless",
            "Nothing to do; lossy profiles are left out.",
        )
    try:
        fields = Fields(config, "config.json")
        layers = fields.integer("num_hidden_layers", minimum=1)
        heads = fields.integer("num_attention_heads", minimum=1)
        kv_heads = fields.integer("num_key_value_heads", heads, minimum=1)
        width = fields.integer("hidden_size", minimum=1)
        head_dim = fields.integer("head_dim", width // heads, minimum=1)
    except SpecError as error:
        return warn(check, f"can't be told: {error}", "Look at the connector's first log lines.")
    per_token = 2 * layers * kv_heads * head_dim
    return ok(
        check,
        f"{layers} layers of {kv_heads} heads of {head_dim}: {2 * per_token / 1024:g} KiB a token in 16 bits",
    )


def judge_tables(statuses: Mapping[str, Any], policy: str | None) -> list[Finding]:
    """Judge what a controller says of its policies.

    Args:
        statuses: Its ``/status``.
        policy: The one that this pod names; None for all.
    """
    if policy is not None and policy not in statuses:
        return [
            fail(
                "policy",
                f"the controller knows no policy {policy}",
                f"Apply it, or name one of: {', '.join(sorted(statuses)) or 'none is there'}.",
            )
        ]
    if not statuses:
        return [warn("policy", "the controller knows none", "Apply a KVServePolicy.")]
    wanted = sorted(statuses) if policy is None else [policy]
    return [_policy(name, statuses[name]) for name in wanted]


def _policy(name: str, status: Mapping[str, Any]) -> Finding:
    conditions = {each.get("type"): each for each in status.get("conditions", ())}
    active = status.get("activeProfile") or {}
    text = f"{name}: table {active.get('version', 'none')}, profile {active.get('name', 'none')}"
    bad = [
        f"{kind}: {each.get('reason')}: {each.get('message')}"
        for kind, each in sorted(conditions.items(), key=lambda item: str(item[0]))
        if each.get("status") == "False"
    ]
    if bad:
        return warn("policy", f"{text}; {'; '.join(bad)}", "See docs/controller.md for the reason.")
    state = conditions.get("Programmed", {}).get("status", "Unknown")
    return ok("policy", f"{text}, Programmed {state}")


def _whole_blocks(config: Mapping[str, Any]) -> str:
    if config.get("kv_lora_rank"):
        return "latents of MLA"
    kinds = {str(kind) for kind in config.get("layer_types") or ()}
    if any("linear" in kind or "mamba" in kind or "conv" in kind for kind in kinds):
        return "recurrent layers"
    if "sliding_attention" in kinds or "chunked_attention" in kinds:
        return "layers with a window"
    windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
    return "layers with a window" if windowed and not kinds else ""


def skew_s(here_s: float, there_s: float, round_trip_s: float) -> float:
    """Return how far a clock is ahead of one that was asked, beyond what whole seconds and the way explain.

    Args:
        here_s: This clock when the answer came.
        there_s: The other's answer, cut to whole seconds.
        round_trip_s: How long the answer took.
    """
    ahead = here_s - there_s
    least, most = ahead - 1 - round_trip_s, ahead
    return 0.0 if least <= 0 <= most else math.copysign(min(abs(least), abs(most)), ahead)
