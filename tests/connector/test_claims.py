"""What of a prefill can be read while it is computed, and what its sender is told of it."""

from dataclasses import replace

import pytest

from kvserve_api.errors import TransferError
from kvserve_connector.chunks import Chunk
from kvserve_connector.claims import Claim, Computed, Entry
from kvserve_connector.handover import Prefill
from kvserve_connector.pace import Pace

SEEN = Computed(block_ids=((1, 2),), tokens=16, next_tokens=32, layers=3)


@pytest.mark.parametrize(
    ("layers", "tokens", "holds"),
    [
        pytest.param(range(10), range(16), True, id="computed"),
        pytest.param(range(3), range(16, 32), True, id="computed-in-these-layers"),
        pytest.param(range(4), range(16, 32), False, id="a-layer-too-many"),
        pytest.param(range(3), range(16, 33), False, id="a-token-too-many"),
    ],
)
def test_what_is_computed_can_be_read(layers: range, tokens: range, holds: bool) -> None:
    """All layers up to the last step, and the layers that the running step is through with."""
    chunk = Chunk(layers=layers, tokens=tokens)
    assert SEEN.holds(chunk) == holds
    assert replace(SEEN, whole=True).holds(chunk)


def test_a_sender_learns_how_its_prefill_is() -> None:
    """It sees time pass before its end and after, whether blocks are still the request's, and an abort as an error."""
    entry = Entry(Prefill(request_id="a", tokens=32, prompt_digest="d", workload="w"), begun_s=1.0)
    pace = Pace()
    pace.add(64, 2.0)
    claim = Claim(entry, lambda: 3.5, pace)
    assert (claim.kept, claim.model_s, claim.computed) == (False, 2.5, None)
    assert (claim.since_end_s, claim.left_s) == (0, 0)
    entry.computed, entry.seen_s, entry.seen_tokens = SEEN, 3.25, 16
    assert claim.left_s == 0.25
    assert claim.computed is SEEN
    assert claim.valid(SEEN)
    entry.epoch += 1
    assert not claim.valid(SEEN)
    entry.kept, entry.model_s, entry.ended_s = True, 2.0, 3.25
    assert (claim.kept, claim.model_s, claim.since_end_s) == (True, 2.0, 0.25)
    assert claim.left_s == 0
    entry.outcome = "Cancelled"
    with pytest.raises(TransferError, match="the prefill ended: Cancelled"):
        _ = claim.computed
