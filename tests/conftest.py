"""What all tests share: the test cluster's fixtures."""

pytest_plugins = ["testcluster.pytest_plugin"]
