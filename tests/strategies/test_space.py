"""What can't work does not construct, and says why."""

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from kvserve_api.errors import StrategyError
from kvserve_api.profile_set import NAME_PATTERN, NONE
from kvserve_api.strategy import StrategyConfig
from kvserve_strategies import PRESETS, Pipeline, preset
from kvserve_strategies.cli import strategies
from kvserve_strategies.registry import STAGES, register
from kvserve_strategies.stages import Raw

RAW = {"id": "code.raw.v1"}
PACK = {"id": "code.pack.v1"}
RANS = {"id": "code.rans.v1", "tables": 4}
TOKEN = {"id": "quantise.token.v1", "levels": 16, "group": 0}
STEP = {"id": "quantise.step.v1", "relative_step": 0.5}
CENTRE = {"id": "transform.centre.v1"}
LEAD = {"id": "transform.lead.v1", "tokens": 4}


def build(*chain: dict[str, Any]) -> Pipeline:
    """Return the pipeline of a chain for keys, with raw values."""
    parts = [{"kind": "k", "chain": list(chain)}, {"kind": "v", "chain": [RAW]}]
    document = {"schema": "kvserve.io/strategy/v1", "parts": parts}
    return Pipeline.of(StrategyConfig.from_json(document))


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        pytest.param([TOKEN], "must end with a coder", id="no coder"),
        pytest.param([RAW, PACK], "a coder is the last stage", id="two coders"),
        pytest.param([TOKEN, CENTRE, PACK], "the order is", id="order"),
        pytest.param([TOKEN, STEP, RANS], "quantised once", id="two quantisers"),
        pytest.param([TOKEN, RAW], "takes native values", id="raw of levels"),
        pytest.param([CENTRE, RAW], "takes native values", id="raw of reals"),
        pytest.param([PACK], "takes levels values", id="pack of floats"),
        pytest.param([STEP, PACK], "use code.rans", id="pack of unbounded levels"),
        pytest.param([CENTRE, LEAD, RAW], "takes native values", id="lead of reals"),
        pytest.param([{"id": "code.zip.v1"}], "no known stage", id="unknown id"),
        pytest.param([{"id": "os.system"}], "no known stage", id="no import by name"),
        pytest.param([RAW | {"level": 3}], r"chain\[0\].level: is not known", id="unknown key"),
        pytest.param([{"id": "code.rans.v1"}], "tables: is required", id="missing key"),
        pytest.param([TOKEN | {"levels": 1}, PACK], "levels: must be at least 2", id="too few"),
        pytest.param([TOKEN | {"levels": 257}, PACK], "levels: must be at most 256", id="too many"),
        pytest.param([TOKEN | {"levels": True}, PACK], "levels: must be an integer", id="boolean"),
        pytest.param([TOKEN | {"levels": 16.0}, PACK], "levels: must be an integer", id="float"),
        pytest.param([STEP | {"relative_step": "1"}, RANS], "must be a number", id="string"),
        pytest.param([STEP | {"relative_step": 0}, RANS], "must be at least", id="zero step"),
        pytest.param([LEAD | {"tokens": 0}, RAW], "tokens: must be at least 1", id="no lead"),
    ],
)
def test_bad_chains(chain: list[dict[str, Any]], message: str) -> None:
    """Each wrong chain is refused with a message that names the stage or field."""
    with pytest.raises(StrategyError, match=message):
        build(*chain)


def test_a_refused_chain_stays_refused() -> None:
    """1 and True are equal to Python; a pipeline kept for one is not taken for the other."""
    build(TOKEN, RANS | {"tables": 1})
    with pytest.raises(StrategyError):
        build(TOKEN, RANS | {"tables": True})


def test_pipelines_are_kept() -> None:
    """Equal strategies share a pipeline."""
    assert Pipeline.of(preset("kivi-4")) is Pipeline.of(preset("kivi-4"))


def test_ids_are_never_replaced() -> None:
    """A second stage of the same id is refused and the first stays."""
    with pytest.raises(StrategyError, match="is taken by Raw"):
        register(Raw)
    assert STAGES["code.raw.v1"] is Raw


def test_presets() -> None:
    """Names are DNS labels, digests differ, `none` is raw and unknown names are refused with the known ones."""
    assert all(NAME_PATTERN.fullmatch(name) for name in PRESETS)
    assert len({config.digest for config in PRESETS.values()}) == len(PRESETS)
    assert Pipeline.of(preset(NONE)).stage_ids == ("code.raw.v1",)
    exact = {name for name in PRESETS if Pipeline.of(PRESETS[name]).lossless}
    assert exact == {"none", "lossless", "splitzip"}
    with pytest.raises(StrategyError, match="kivi-4"):
        preset("kivi-5")


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        pytest.param(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5), id="shapes"),
        pytest.param(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4).half(), id="dtypes"),
        pytest.param(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), id="dimensions"),
        pytest.param(torch.zeros(1, 0, 3, 4), torch.zeros(1, 0, 3, 4), id="empty"),
        pytest.param(torch.zeros(1, 1, 1, 1).double(), torch.zeros(1, 1, 1, 1).double(), id="f64"),
        pytest.param(
            torch.zeros(1, 1, 1, 1, device="meta"),
            torch.zeros(1, 1, 1, 1, device="meta"),
            id="meta",
        ),
    ],
)
def test_bad_tensors(keys: torch.Tensor, values: torch.Tensor) -> None:
    """Tensors that are not canonical are refused."""
    with pytest.raises(StrategyError):
        Pipeline.of(preset("none")).encode(keys, values)


def test_command() -> None:
    """`kvserve strategies` lists every preset and stage, as tables and as JSON, with ratios above 1 but for none."""
    result = CliRunner().invoke(strategies, ["--json"], catch_exceptions=False)
    document = json.loads(result.output)
    assert {p["name"] for p in document["presets"]} == set(PRESETS)
    assert {s["id"] for s in document["stages"]} == set(STAGES)
    ratios = {p["name"]: p["ratio"] for p in document["presets"] if not p["needs"]}
    assert ratios.pop("none") == 1.0
    assert min(ratios.values()) > 1.3
    assert all(p["ratio"] is None for p in document["presets"] if p["needs"])
    assert ratios["centred-rans"] > 1.25 * ratios["int4-token"]
    text = CliRunner().invoke(strategies, [], catch_exceptions=False).output
    assert "centred" in text
    assert "transform.lead.v1" in text
