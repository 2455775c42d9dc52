"""The tables that pods refused, kept over reconnects."""

from typing import Final, TypeAlias

from kvserve_controller.match import Pod
from kvserve_controller.session import Rejection

MAX_REFUSALS: Final = 4096

_Key: TypeAlias = tuple[str, str, frozenset[str]]


class Refusals:
    """Each pod's last refusal, until the pod is another one or refuses another table; the oldest make room."""

    def __init__(self) -> None:
        self._by_pod: dict[_Key, Rejection] = {}

    def remember(self, pod: Pod, rejection: Rejection) -> None:
        """Keep a pod's refusal."""
        self._by_pod.pop(_key(pod), None)
        self._by_pod[_key(pod)] = rejection
        if len(self._by_pod) > MAX_REFUSALS:
            del self._by_pod[next(iter(self._by_pod))]

    def of(self, pod: Pod) -> Rejection | None:
        """Return what a pod refused last; None if it is not known to have refused anything."""
        return self._by_pod.get(_key(pod))


def _key(pod: Pod) -> _Key:
    """Return what makes a pod one that may answer differently: another connector, or other stages."""
    return pod.key, pod.connector_version, pod.stages
