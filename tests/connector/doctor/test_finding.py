"""The doctor's judgements of plain values."""

import math
from typing import Any

import pytest

from kvserve_connector.doctor.finding import (
    Finding,
    Level,
    exit_code,
    fail,
    judge_clock,
    judge_files,
    judge_model,
    judge_python,
    judge_tables,
    judge_transfer_config,
    judge_vllm,
    ok,
    skew_s,
    warn,
)

PLAIN = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
}
TRANSFER = {
    "kv_connector": "KVServeConnector",
    "kv_connector_module_path": "kvserve_connector.connector",
    "kv_role": "kv_consumer",
    "kv_load_failure_policy": "recompute",
}


def test_a_line_says_level_check_text_and_advice() -> None:
    """Advice is there where something is to be done, and only a failure makes the exit code 1."""
    good, bad, worse = ok("a", "fine"), warn("b", "slow", "Wait."), fail("c", "gone", "Look.")
    assert [str(f) for f in (good, bad, worse)] == [
        "OK    a: fine",
        "WARN  b: slow. Wait.",
        "FAIL  c: gone. Look.",
    ]
    assert worse.to_json() == {"check": "c", "level": "FAIL", "text": "gone", "advice": "Look."}
    assert exit_code([good, bad]) == 0
    assert exit_code([good, worse]) == 1


@pytest.mark.parametrize(
    ("finding", "level"),
    [
        (judge_python((3, 11, 0)), Level.OK),
        (judge_python((3, 10, 9)), Level.FAIL),
        (judge_vllm("0.32.0"), Level.OK),
        (judge_vllm("0.32.3+cu130"), Level.OK),
        (judge_vllm("0.33.0"), Level.WARN),
        (judge_vllm("0.3.2"), Level.WARN),
        (judge_vllm("0.320.1"), Level.WARN),
        (judge_vllm(None), Level.WARN),
        (judge_files(1024, 1024), Level.WARN),
        (judge_files(1024, 1 << 20), Level.WARN),
        (judge_files(4096, 4096), Level.OK),
        (judge_files(-1, -1), Level.OK),
        (judge_clock(0.0), Level.OK),
        (judge_clock(-30.0), Level.WARN),
    ],
)
def test_values_are_judged(finding: Finding, level: Level) -> None:
    """Versions, limits and clocks are fine, doubtful or wrong; what is not fine says what to do."""
    assert finding.level == level
    assert bool(finding.advice) == (level != Level.OK)


def test_the_clock_is_judged_beyond_what_whole_seconds_hide() -> None:
    """An answer cut to whole seconds, and the way, explain up to a second and the round trip."""
    assert skew_s(100.9, 100.0, 0.0) == 0
    assert skew_s(101.3, 100.0, 0.4) == 0
    assert math.isclose(skew_s(110.0, 100.0, 0.0), 9.0)
    assert math.isclose(skew_s(90.0, 100.0, 0.0), -10.0)


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        ({}, Level.OK, "kv_consumer"),
        ({"kv_role": "kv_producer", "kv_load_failure_policy": "fail"}, Level.OK, "kv_producer"),
        ({"kv_load_failure_policy": "fail"}, Level.WARN, "fails its request"),
        ({"kv_connector": "NixlConnector"}, Level.FAIL, "NixlConnector"),
        ({"kv_connector_module_path": None}, Level.FAIL, "module_path"),
        ({"kv_role": "prefill"}, Level.FAIL, "prefill"),
    ],
)
def test_vllms_settings_are_judged(change: dict[str, Any], level: Level, text: str) -> None:
    """What would keep vLLM from starting, or fail requests, is named."""
    (finding,) = judge_transfer_config(TRANSFER | change)
    assert finding.level == level
    assert text in finding.text


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        ({}, Level.OK, "30 layers of 3 heads of 64: 22.5 KiB a token"),
        ({"head_dim": 128}, Level.OK, "heads of 128: 45 KiB"),
        ({"num_key_value_heads": None}, Level.OK, "of 9 heads"),
        ({"kv_lora_rank": 512}, Level.WARN, "MLA"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, Level.WARN, "window"),
        ({"layer_types": ["full_attention"], "sliding_window": 512}, Level.OK, "30 layers"),
        ({"sliding_window": 4096}, Level.WARN, "window"),
        ({"sliding_window": 4096, "use_sliding_window": False}, Level.OK, "30 layers"),
        ({"layer_types": ["linear_attention", "full_attention"]}, Level.WARN, "recurrent"),
        ({"num_hidden_layers": None}, Level.WARN, "num_hidden_layers"),
    ],
)
def test_a_models_cache_is_foreseen(change: dict[str, Any], level: Level, text: str) -> None:
    """A plain cache is told by its sizes, another one by why it is carried as whole blocks."""
    finding = judge_model(PLAIN | change)
    assert finding.level == level
    assert text in finding.text


def test_policies_are_judged_by_their_conditions() -> None:
    """A policy that is served is fine, with table and profile; one that is not says its reason; one must be there."""
    served = {
        "activeProfile": {"name": "int8", "version": "7.3"},
        "conditions": [{"type": "Programmed", "status": "True", "reason": "Acknowledged"}],
    }
    broken = {
        "conditions": [
            {"type": "Programmed", "status": "False", "reason": "NoProfiles", "message": "none yet"}
        ]
    }
    statuses = {"a/x": served, "a/y": broken}
    good, bad = judge_tables(statuses, None)
    assert str(good) == "OK    policy: a/x: table 7.3, profile int8, Programmed True"
    assert bad.level == Level.WARN
    assert "Programmed: NoProfiles: none yet" in bad.text
    assert judge_tables(statuses, "a/x") == [good]
    (missing,) = judge_tables(statuses, "a/z")
    assert missing.level == Level.FAIL
    assert "a/x, a/y" in missing.advice
    assert judge_tables({}, None)[0].level == Level.WARN
