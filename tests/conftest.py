"""What all tests share: the test cluster's fixtures, and their order."""

import pytest

pytest_plugins = ["testcluster.pytest_plugin"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes minutes first: at the end one core would wait for it."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
