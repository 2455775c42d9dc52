"""The first process of an instance: starts its programs, says "ready", reaps what ends.

With a node it is process 1 of its own process namespace: when it ends, the kernel ends everything
in there, and links, rules and mounts go with the namespaces.

Not for import by others: ``guard`` runs it as
``python -m testcluster.init RUN_DIR REQUEST [HOST_NETWORK_NAMESPACE]``.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from testcluster import controlplane, node
from testcluster.errors import ClusterError
from testcluster.layout import Layout
from testcluster.process import Components


def main() -> None:
    """Start everything, report on stdout, then reap children until killed."""
    layout = Layout.load(Path(sys.argv[1]))
    request = json.loads(sys.argv[2])
    components = Components(layout.log_dir)
    began_s = time.monotonic()
    try:
        if layout.nodes:
            node.start_cluster(layout, Path(request["bin_dir"]), components, sys.argv[3])
        else:
            credentials = controlplane.issue_credentials(layout)
            controlplane.start_control_plane(
                layout, Path(request["bin_dir"]), credentials, components
            )
    except (ClusterError, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
        raise SystemExit(1) from error
    started_s = time.monotonic() - began_s
    print(json.dumps({"slot": layout.slot, "started_s": started_s}), flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    _reap(components)


def _reap(components: Components) -> None:
    """Wait for children as long as there are any; note in the log when one of the programs ends."""
    names = {pid: name for name, pid in components.pids.items()}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.wait()
            if pid not in names:
                continue
            code = os.waitstatus_to_exitcode(status)
            print(f"{names[pid]} ended with {code}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
