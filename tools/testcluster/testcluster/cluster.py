"""A running cluster as tests and the demo see it."""

import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from testcluster import node, shaping, throttling
from testcluster.errors import ClusterError, UnavailableHereError
from testcluster.layout import Layout

_STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """One cluster: ours, or one that the user named.

    Attributes:
        kubeconfig: The administrator's configuration.
        bin_dir: Folder of ``kubectl`` and ``helm``; None means those on PATH.
        layout: Addresses, folders and names; None for a cluster that is not ours.
        guard: The process that ends with the cluster; None if it is not this process's to end.
        started_s: How long it took to start, in seconds.
    """

    kubeconfig: Path
    bin_dir: Path | None = None
    layout: Layout | None = None
    guard: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0

    @property
    def env(self) -> dict[str, str]:
        """This process's environment with KUBECONFIG and the binaries in front of PATH."""
        env = {**os.environ, "KUBECONFIG": str(self.kubeconfig)}
        if self.bin_dir is not None:
            env["PATH"] = f"{self.bin_dir}{os.pathsep}{env.get('PATH', os.defpath)}"
        return env

    @property
    def own(self) -> Layout:
        """The layout of a cluster of ours.

        Raises:
            UnavailableHereError: It is an existing cluster, whose machine we cannot touch.
        """
        if self.layout is None:
            raise UnavailableHereError("not available on an existing cluster: unset KUBECONFIG")
        return self.layout

    def kubectl(
        self,
        *args: str,
        input: str | None = None,  # noqa: A002 - as in subprocess.run
        timeout_s: float = 60.0,
    ) -> str:
        """Run kubectl as administrator and return what it prints.

        Raises:
            ClusterError: It failed or took too long; the message holds its standard error.
        """
        return self._run("kubectl", args, input, timeout_s)

    def wait_established(self, crd: str, timeout_s: float = 30.0) -> None:
        """Wait until a custom resource definition's objects are served.

        ``kubectl wait`` and filters fail at once where a definition is so new that it has no conditions.

        Raises:
            ClusterError: There is no such definition, or it is not served in time.
        """
        deadline_s = time.monotonic() + timeout_s
        while not self._is_established(crd):
            if time.monotonic() > deadline_s:
                raise ClusterError(f"{crd} is not served after {timeout_s:g} s")
            time.sleep(0.05)

    def _is_established(self, crd: str) -> bool:
        status = json.loads(self.kubectl("get", "crd", crd, "-o", "json")).get("status") or {}
        found = {c["type"]: c["status"] for c in status.get("conditions") or ()}
        return found.get("Established") == "True"

    def helm(
        self,
        *args: str,
        input: str | None = None,  # noqa: A002 - as in subprocess.run
        timeout_s: float = 180.0,
    ) -> str:
        """Run Helm as administrator and return what it prints.

        Raises:
            ClusterError: It failed or took too long; the message holds its standard error.
        """
        return self._run("helm", args, input, timeout_s)

    def load_image(self, archive: Path) -> None:
        """Import a docker-archive into all nodes.

        Raises:
            UnavailableHereError: It is an existing cluster.
            ClusterError: The archive is not one.
        """
        node.import_archive(self.own, archive)

    def shape(
        self, sender: str, receiver: str, megabits_per_s: float, namespace: str = "default"
    ) -> None:
        """Limit the rate from one pod to another, or change the limit; nothing else is slowed.

        The limit goes with the receiver's pod: shape again when a pod was replaced.

        Args:
            sender: Name of the pod that sends.
            receiver: Name of the pod that receives.
            megabits_per_s: Rate on the wire in 10^6 bit/s.
            namespace: Of both pods.

        Raises:
            UnavailableHereError: It is an existing cluster.
            ClusterError: A pod has no address yet, or the rate is not positive.
        """
        link = self._link(sender, receiver, namespace)
        shaping.shape(shaping.init_pid_of(self.own), link, megabits_per_s)

    def unshape(self, sender: str, receiver: str, namespace: str = "default") -> None:
        """Take the limit from one pod to another away.

        Raises:
            UnavailableHereError: It is an existing cluster.
            ClusterError: A pod has no address.
        """
        link = self._link(sender, receiver, namespace)
        shaping.unshape(shaping.init_pid_of(self.own), link)

    def throttle(self, pod: str, thread: str, share: float, namespace: str = "default") -> int:
        """Limit the processor time of some threads of a pod, or change the limit; nothing else of it is slowed.

        Args:
            pod: Its name.
            thread: The threads' name as the kernel has it.
            share: What all of them together get of one processor, from 0.05; 1 or more is no limit.
            namespace: The pod's.

        Returns:
            How many threads it is about.

        Raises:
            UnavailableHereError: It is an existing cluster.
            ClusterError: There is no such thread, or the share is too small.
        """
        path = "jsonpath={.metadata.uid}"
        uid = self.kubectl("get", "pod", pod, "-n", namespace, "-o", path)
        return throttling.throttle(self.own.name, uid, thread, share)

    def pod_ip(self, name: str, namespace: str = "default") -> str:
        """Return a pod's address.

        Raises:
            ClusterError: There is no such pod, or it has none yet.
        """
        path = "jsonpath={.status.podIP}"
        address = self.kubectl("get", "pod", name, "-n", namespace, "-o", path)
        if not address:
            raise ClusterError(f"pod {namespace}/{name} has no address yet")
        return address

    def stop(self) -> None:
        """End the cluster and wait until nothing of it is left; a second call does nothing.

        Raises:
            ClusterError: Its guard process did not end in time or failed.
        """
        if self.guard is None:
            return
        if self.guard.poll() is None:
            self.guard.terminate()
        try:
            code = self.guard.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"the cluster did not end in {_STOP_TIMEOUT_S:.0f} s") from error
        if code != 0:
            raise ClusterError(f"cleaning up after the cluster failed: guard ended with {code}")

    def _link(self, sender: str, receiver: str, namespace: str) -> shaping.Link:
        """Return the way between two pods."""
        sender_ip, receiver_ip = self.pod_ip(sender, namespace), self.pod_ip(receiver, namespace)
        return shaping.find_link(self.own, sender_ip, receiver_ip)

    def _run(self, name: str, args: tuple[str, ...], stdin: str | None, timeout_s: float) -> str:
        """Run one of the two command-line programs."""
        env = self.env
        program = shutil.which(name, path=env.get("PATH"))
        if program is None:
            raise UnavailableHereError(f"`{name}` is not on PATH")
        shown = f"{name} {' '.join(args)}"
        try:
            done = subprocess.run(
                [program, *args],
                env=env,
                input=stdin,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"`{shown}` took longer than {timeout_s:.0f} s") from error
        if done.returncode != 0:
            raise ClusterError(f"`{shown}` failed with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def existing_cluster() -> Cluster | None:
    """Return the user's cluster where KVSERVE_EXISTING_CLUSTER=1 asks for it.

    Raises:
        ClusterError: KUBECONFIG names no file.
    """
    if os.environ.get("KVSERVE_EXISTING_CLUSTER") != "1":
        return None
    path = Path(os.environ.get("KUBECONFIG", ""))
    if not path.is_file():
        raise ClusterError(
            "KVSERVE_EXISTING_CLUSTER=1 needs KUBECONFIG to name one file,"
            f" got {os.environ.get('KUBECONFIG')!r}"
        )
    return Cluster(kubeconfig=path.resolve())
