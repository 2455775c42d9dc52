"""A real Kubernetes for tests and the demo, built from source and run on one Linux machine."""

from testcluster.cluster import Cluster, existing_cluster
from testcluster.errors import ClusterError
from testcluster.launch import ClusterSpec, start

__all__ = ["Cluster", "ClusterError", "ClusterSpec", "existing_cluster", "start"]
