"""The other pods of a Job, by the keys of the run's ConfigMap."""

from collections.abc import Callable, Collection

from kvserve_api.errors import ArtifactError, UnavailableError
from kvserve_api.names import RUN_RESULTS_PREFIX
from kvserve_profiler.configmaps import RunConfigMaps
from kvserve_profiler.crew import Work, read_results
from kvserve_profiler.trials import Trial, TrialLog


class Helpers:
    """A crew whose members are pods. While the API server does not answer, the deciding pod goes on alone."""

    def __init__(self, maps: RunConfigMaps, pods: int, say: Callable[[str], None]) -> None:
        """Keep where they are.

        Args:
            maps: The run's ConfigMaps.
            pods: How many there are, the deciding one included.
            say: Writes a line to the Job's log.
        """
        self.pods = pods
        self._maps = maps
        self._say = say
        self._brought: dict[int, str] = {}
        self._given_up: dict[int, str] = {}

    @property
    def present(self) -> Collection[int]:
        """Indices of the helpers that have signed in, but for those that let us wait and brought nothing since."""
        return [i for i, text in self._brought.items() if self._given_up.get(i) != text]

    def give_up(self, index: int) -> None:
        """Wait for a helper no more, until it brings something."""
        self._say(f"pod {index} brings nothing: index 0 measures its share")
        self._given_up[index] = self._brought.get(index, "")

    def offer(self, log: TrialLog, work: Work) -> None:
        """Hand out work."""
        try:
            self._maps.offer(log, work.document())
        except UnavailableError as error:
            self._say(f"nothing was handed out: {error}")

    def found(self) -> list[Trial]:
        """Return what helpers have brought of late; what can't be read is said, and measured by somebody else."""
        try:
            data = self._maps.read()
        except UnavailableError as error:
            self._say(f"nothing was brought: {error}")
            return []
        found = []
        keys = {index: results_key(index) for index in range(1, self.pods)}
        self._brought = {index: data[key] for index, key in keys.items() if data.get(key)}
        for index, text in self._brought.items():
            try:
                found += read_results(text)
            except ArtifactError as error:
                self._say(f"results of pod {index} not used: {error}")
        return found


def results_key(index: int) -> str:
    """Return the key that a helper writes to."""
    return f"{RUN_RESULTS_PREFIX}{index}.json"
