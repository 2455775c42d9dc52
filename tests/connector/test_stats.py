"""What vLLM's front end makes of the worker's totals."""

from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector

from kvserve_connector.connector import KVServeConnector


def test_totals_are_found_beside_those_of_other_connectors() -> None:
    """Under MultiConnector totals arrive as plain data under our class's name, and add up to the line that we log."""
    name = KVServeConnector.__name__
    row = {"rows": {"receive none": [1, 800.0, 400.0, 0.0, 0.1, 0.1, 0.5, 0.2]}}
    first, second = (
        MultiConnector.build_kv_connector_stats({name: row | {"failures": {"send Expired": count}}})
        for count in (1, 2)
    )
    assert first.aggregate(second).reduce() == {
        name: {
            "receive none transfers": 2,
            "receive none ratio": 2.0,
            "receive none avg s": 0.5,
            "send Expired failures": 3,
        }
    }
