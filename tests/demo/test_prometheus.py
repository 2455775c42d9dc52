"""Reading counters from a Prometheus page."""

from demo.prometheus import totals

PAGE = """
# HELP vllm:kvserve_transfers_total Transfers.
# TYPE vllm:kvserve_transfers_total counter
vllm:kvserve_transfers_total{engine="0",model_name="m",profile="int4-token"} 3.0
vllm:kvserve_transfers_total{engine="1",model_name="m",profile="int4-token"} 2.0
vllm:kvserve_transfers_total{engine="0",model_name="m",profile="none"} 1.0
vllm:kvserve_transfers_created{engine="0",profile="none"} 1.7e9
plain_total 7
"""


def test_samples_are_summed_by_label() -> None:
    """Samples that differ in other labels are added up; other metrics are not."""
    assert totals(PAGE, "vllm:kvserve_transfers_total", "profile") == {"int4-token": 5, "none": 1}
    assert totals(PAGE, "plain_total", "profile") == {"": 7}
