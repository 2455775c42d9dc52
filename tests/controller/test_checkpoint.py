"""What was learned survives a controller."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve_api.canonical import canonical_json, digest
from kvserve_api.errors import ArtifactError
from kvserve_api.policy import Policy
from kvserve_api.profile_set import ParetoSet
from kvserve_api.table import Version
from kvserve_controller.checkpoint import MAX_BYTES, Checkpoint, read, write
from kvserve_controller.controller import Controller
from kvserve_controller.metrics import Metrics
from kvserve_controller.program import Instant
from kvserve_controller.source import Entry
from podclient import transfer_report
from samples import INT4, RAW, pareto, policy_object

SIZE = 100_000_000


def controller(wall_s: float = 1000.0, checkpoint: Checkpoint | None = None) -> Controller:
    """Return a controller that started at a time."""
    return Controller(
        prior_bytes_per_s=125e6,
        now=lambda: Instant(50.0, wall_s),
        metrics=Metrics(),
        checkpoint=checkpoint,
    )


def serve(subject: Controller, set_: ParetoSet | None = None) -> None:
    """Give a controller the policy ``default/chat``."""
    policy = Policy.from_object(policy_object())
    subject.apply({policy.key: Entry(policy=policy, pareto=set_ or pareto())})


def taught(wall_s: float = 1000.0) -> Controller:
    """Return a controller that saw int4 encode three times slower than profiled."""
    subject = controller(wall_s)
    serve(subject)
    slow = transfer_report(
        "int4",
        native_bytes=SIZE,
        wire_bytes=int(SIZE / 3.6),
        encode_s=3 * SIZE / 1e9,
        decode_s=SIZE / 1e9,
        producer="p",
        predicted_s=0.2,
        total_s=0.4,
    )
    subject.reports("default/chat", "d", [slow] * 40)
    return subject


def encode_s(subject: Controller, name: str = "int4") -> float:
    """Return what the table in force says of an encoding of 100 MB."""
    offer = subject.hub._offers["default/chat"]
    return offer.table.candidates[name].encode.seconds(SIZE)


def test_learning_goes_on_after_a_restart() -> None:
    """A controller with a checkpoint compiles its first table with what the one before had learned."""
    document = taught().checkpoint().document()
    again = controller(1010.0, Checkpoint.parse(document))
    serve(again)
    assert encode_s(again) == pytest.approx(0.3, rel=0.1)
    anew = controller(1010.0)
    serve(anew)
    assert encode_s(anew) == pytest.approx(0.1)
    assert len(document) < 2000


def test_old_learning_is_doubted() -> None:
    """What was learned an hour ago is nearly forgotten."""
    document = taught().checkpoint().document()
    later = controller(1000.0 + 3600.0, Checkpoint.parse(document))
    serve(later)
    assert encode_s(later) == pytest.approx(0.1, rel=0.05)


def test_learning_of_another_set_is_left() -> None:
    """Corrections are of one Pareto set's profiles: another set starts anew."""
    again = controller(1010.0, Checkpoint.parse(taught().checkpoint().document()))
    serve(again, pareto(INT4, RAW))
    assert encode_s(again) == pytest.approx(0.1)


def test_versions_never_go_back() -> None:
    """A controller whose clock went back goes above the last version of the one before."""
    before = taught(wall_s=5000.0)
    last = before.checkpoint().version
    again = controller(100.0, Checkpoint.parse(before.checkpoint().document()))
    serve(again)
    assert again.checkpoint().version > last


@given(st.binary(max_size=200))
def test_anything_else_is_refused(document: bytes) -> None:
    """Bytes that are no checkpoint are a typed error, whatever they are."""
    with pytest.raises(ArtifactError):
        Checkpoint.parse(document)


@given(st.data())
def test_damage_is_noticed(data: st.DataObject) -> None:
    """A checkpoint with any byte changed is refused, or says the same."""
    document = bytearray(Checkpoint(1.0, Version(epoch=1, counter=1), {}).document())
    place = data.draw(st.integers(0, len(document) - 1))
    document[place] = data.draw(st.integers(0, 255))
    try:
        read_again = Checkpoint.parse(bytes(document))
    except ArtifactError:
        return
    assert read_again == Checkpoint(1.0, Version(epoch=1, counter=1), {})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"schema": "kvserve.io/controller-state/v2"}, id="schema"),
        pytest.param({"version": "x"}, id="version"),
        pytest.param({"version": f"{1 << 60}.1"}, id="epoch"),
        pytest.param({"wall_s": -1.0}, id="time"),
        pytest.param({"policies": {"a/b": {"pareto": "", "learner": {}}}}, id="learner"),
        pytest.param({"policies": [1]}, id="policies"),
        pytest.param({"more": 1}, id="unknown-key"),
    ],
)
def test_other_forms_are_refused(change: dict[str, Any]) -> None:
    """A whole document of another form is refused, even with the digest of what it says."""
    value = json.loads(taught().checkpoint().document())
    del value["digest"]
    value |= change
    with pytest.raises(ArtifactError):
        Checkpoint.parse(canonical_json(value | {"digest": digest(value)}))


def test_file_is_always_whole(tmp_path: Path) -> None:
    """A file is replaced as one; none is no error, a damaged or huge one is, and so is a folder that is gone."""
    path = tmp_path / "state.json"
    assert read(path) is None
    checkpoint = Checkpoint(1.0, Version(epoch=1, counter=1), {})
    write(path, checkpoint.document())
    write(path, checkpoint.document())
    assert read(path) == checkpoint
    assert [each.name for each in tmp_path.iterdir()] == ["state.json"]
    path.write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(ArtifactError, match="more than"):
        read(path)
    with pytest.raises(ArtifactError, match="can't write"):
        write(tmp_path / "gone" / "state.json", b"")
