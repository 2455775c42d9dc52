"""What can go wrong with the test cluster."""


class ClusterError(Exception):
    """The test cluster cannot do what was asked; the message says why and what to do."""


class UnavailableHereError(ClusterError):
    """This machine cannot run it (no root, no Linux, no Go, no packages): tests skip with this."""
