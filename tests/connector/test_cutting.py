"""How one engine's transfers are cut, by who is to code them."""

import pytest

from kvserve_api.wire import KVLayout
from kvserve_connector.cutting import Cutter
from kvserve_connector.form import Form, Part
from kvserve_connector.groups import Group

LAYOUT = KVLayout(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16")
GROUP = Group(index=0, layer_names=("a",), block_tokens=16)
FORM = Form(fingerprint="f", parts=(Part(layout=LAYOUT, group=GROUP, block_rows=16),))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("tokens", "most"),
    [
        pytest.param(500, 500, id="one-range"),
        pytest.param(2000, 512, id="fine"),
        pytest.param(1 << 18, 1024, id="no-more-ranges-than-there-may-be"),
    ],
)
def test_what_has_a_deadline_is_cut_finely(tokens: int, most: int, *, kept: bool) -> None:
    """Chunks of a transfer that may change midway have at most 512 tokens, unless those were too many ranges."""
    cutter = Cutter(FORM, 5, 8192)
    chunks = cutter.plan(range(tokens), kept=kept, layer_multiple=3, fine=True)
    assert max(len(chunk.tokens) for chunk in chunks) == most
    assert {len(chunk.layers) for chunk in chunks} == {3}
    whole = cutter.plan(range(tokens), kept=kept, layer_multiple=3)
    assert max(len(chunk.tokens) for chunk in whole) >= most
