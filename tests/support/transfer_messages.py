"""A PULL and an ACCEPT, as a consumer and a producer would write them."""

from kvserve_api.table import Version
from kvserve_api.wire import KVLayout
from kvserve_connector.chunks import plan
from kvserve_connector.commands import Pull
from kvserve_connector.replies import Accept

LAYOUT = KVLayout(layers=30, kv_heads=3, head_dim=64, dtype="bfloat16")
PULL = Pull(
    engine_id="e",
    request_id="r",
    tokens=range(128, 1000),
    prompt_digest="d" * 32,
    fingerprint="sha256:" + "a" * 64,
    layout=LAYOUT,
    stages=frozenset({"code.raw.v1", "code.rans.v1"}),
    budget_s=7.5,
    traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01",
)
ACCEPT = Accept(
    profile="int4-token",
    wanted="none",
    bound="Goal",
    predicted_s=0.25,
    version=Version(epoch=7, counter=9),
    pod="prefill-0",
    model_s=1.5,
    chunks=plan(LAYOUT, range(128, 1000), 5),
)
