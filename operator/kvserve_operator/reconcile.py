"""The loop: take a policy's key, look, plan, act."""

import asyncio
import datetime
import logging
import random
from collections.abc import Callable, Sequence
from typing import Any, Final

from opentelemetry import metrics, trace

from kvserve_api.canonical import digest_bytes
from kvserve_api.errors import UnavailableError
from kvserve_api.names import ARTIFACT_PARETO, LABEL_ARTIFACT, LABEL_POLICY, child_name
from kvserve_api.otel import counter
from kvserve_api.policy import KIND, Policy
from kvserve_api.telemetry import ATTR_OUTCOME, ATTR_POLICY, RECONCILES, SPAN_RECONCILE
from kvserve_operator.apply import Executor, path_of
from kvserve_operator.cache import Cache
from kvserve_operator.client import ApiError, Client, NotLeaderError
from kvserve_operator.config import ProfilerConfig
from kvserve_operator.conflicts import winner
from kvserve_operator.jobs import JobFacts, PodFacts
from kvserve_operator.observed import Observed, PolicyFacts, RunFacts, TextFacts
from kvserve_operator.plan import Action, Apply, ApplyStatus, LookAgain, Record, Tune, plan
from kvserve_operator.queue import KeyedQueue
from kvserve_operator.sets import SetFacts

Key = tuple[str, str]

RESYNC_S: Final = 300.0
PROGRESS_S: Final = 5.0
"""Shortest time between two status writes that tell of progress only."""
TEXTS_S: Final = 60.0
"""How soon a changed evaluation text is noticed: those ConfigMaps carry no label to watch them by."""
MISSING_TEXT_S: Final = 3.0

logger = logging.getLogger(__name__)


class Reconciler:
    """Brings policies to what they want, one key at a time.

    Attributes:
        cache: What the watches delivered.
        queue: The keys to look at.
        filled: The cache holds all there is; before that every plan would be wrong.
    """

    def __init__(
        self,
        client: Client,
        executor: Executor,
        config: ProfilerConfig,
        *,
        leads: Callable[[], bool],
    ) -> None:
        self.cache = Cache()
        self.queue: KeyedQueue[Key] = KeyedQueue()
        self.filled = False
        self._client = client
        self._executor = executor
        self._config = config
        self._leads = leads
        self._told_s: dict[Key, float] = {}
        self._unchecked: set[Key] = set()
        self._tracer = trace.get_tracer("kvserve.operator")
        self._count = counter(metrics.get_meter("kvserve.operator"), RECONCILES)

    def add_all(self) -> None:
        """Look at every policy."""
        for key in self.cache.policy_keys():
            self.queue.add(key)

    async def resync(self) -> None:
        """Look at every policy now and then, spread over time; never returns."""
        while True:
            await asyncio.sleep(RESYNC_S)
            for key in self.cache.policy_keys():
                self._unchecked.add(key)
                self.queue.add_after(key, random.uniform(0, RESYNC_S / 5))

    async def work(self) -> None:
        """Take keys and reconcile them; never returns."""
        while True:
            key = await self.queue.get()
            try:
                if self.filled and self._leads():
                    await self._guarded(key)
            finally:
                self.queue.done(key)

    async def _guarded(self, key: Key) -> None:
        """Reconcile a key; whatever goes wrong is counted and tried again later."""
        outcome = "ok"
        with self._tracer.start_as_current_span(SPAN_RECONCILE) as span:
            span.set_attribute(ATTR_POLICY, "/".join(key))
            try:
                await self.reconcile(key)
                self.queue.succeeded(key)
            except NotLeaderError:
                # the next leader looks at everything
                outcome = "not-leader"
            except UnavailableError as error:
                outcome = "unavailable"
                delay_s = self.queue.failed(key, at_least_s=error.retry_after_s)
                logger.warning("%s/%s: %s; again in %.0f s", *key, error, delay_s)
            except ApiError as error:
                outcome = "refused"
                delay_s = self.queue.failed(key)
                logger.warning("%s/%s: %s; again in %.0f s", *key, error, delay_s)
            except Exception:
                # a mistake of ours in one policy must not end the work on the others
                outcome = "error"
                self.queue.failed(key)
                logger.exception("%s/%s", *key)
            span.set_attribute(ATTR_OUTCOME, outcome)
        self._count.add(1, {ATTR_OUTCOME: outcome})

    async def reconcile(self, key: Key) -> None:
        """Look at a policy, plan and act.

        Raises:
            ApiError: The API server refuses what nothing can be said about in the status.
            NotLeaderError: This process does not lead any more.
            UnavailableError: The API server does not answer.
        """
        if key in self._unchecked:
            await self.refresh(key)
            self._unchecked.discard(key)
        facts = self.cache.policy(*key)
        if facts is None or facts.meta.deleting:
            self._told_s.pop(key, None)
            return
        observed = await self._observe(facts)
        actions = plan(observed, self._config)
        if any(isinstance(a, Apply) for a in actions) and not await self._exists(facts):
            return
        refused = await self._act(actions, observed)
        if refused:
            again = await self._observe(facts, refused=refused)
            told = [a for a in plan(again, self._config) if isinstance(a, ApplyStatus | Record)]
            await self._act(told, again)
            self.queue.failed(key)
        texts = [*observed.texts.values(), *observed.tasks.values()]
        if any(text.problem for text in texts):
            self.queue.add_after(key, MISSING_TEXT_S)
        elif texts:
            self.queue.add_after(key, TEXTS_S)

    async def refresh(self, key: Key) -> None:
        """Forget children that are not there any more: a watch that was interrupted for long misses deletions."""
        namespace, name = key
        jobs = [facts.meta for facts in self.cache.children(JobFacts, namespace, name)]
        configmaps = [facts.meta for facts in self.cache.children(RunFacts, namespace, name)]
        configmaps += [facts.meta for facts in self.cache.children(SetFacts, namespace, name)]
        for kind, known in (("Job", jobs), ("ConfigMap", configmaps)):
            path = path_of(kind, namespace, "").rstrip("/")
            query = f"?labelSelector={LABEL_POLICY}%3D{name}&resourceVersion=0"
            answer = await self._client.get(path + query)
            listed = int(answer["metadata"]["resourceVersion"])
            live = {item["metadata"]["uid"] for item in answer["items"]}
            for meta in known:
                if meta.uid not in live and meta.version <= listed:
                    self.cache.drop(meta.uid)

    async def _exists(self, facts: PolicyFacts) -> bool:
        """Ask whether the policy is still there: children of one that is not would come and go for ever."""
        meta = facts.meta
        try:
            value = await self._client.get(path_of(KIND, meta.namespace, meta.name))
        except ApiError as error:
            if error.status != 404:
                raise
            value = {"metadata": {}}
        if value["metadata"].get("uid") == meta.uid:
            return True
        self.cache.drop(meta.uid)
        return False

    async def _act(self, actions: Sequence[Action], observed: Observed) -> str:
        """Carry out actions until one is refused; return what was refused, or an empty string."""
        policy = observed.policy
        key = (policy.meta.namespace, policy.meta.name)
        for action in actions:
            if isinstance(action, LookAgain):
                self.queue.add_after(key, action.after_s)
                continue
            if isinstance(action, ApplyStatus) and not action.urgent and self._too_soon(key):
                continue
            try:
                answer = await self._executor.carry_out(action, policy)
            except ApiError as error:
                if "NamespaceTerminating" in error.causes or error.status == 404:
                    # the policy goes with its namespace, or went already
                    return ""
                if isinstance(action, Apply):
                    kind, name = action.manifest["kind"], action.manifest["metadata"]["name"]
                    return f"to write {kind} {name}: {error}"
                raise
            if isinstance(action, ApplyStatus):
                self._told_s[key] = asyncio.get_running_loop().time()
            if answer and isinstance(action, Apply | ApplyStatus | Tune):
                self.take(answer)
        return ""

    def _too_soon(self, key: Key) -> bool:
        """Put progress off if it was told a moment ago."""
        now_s = asyncio.get_running_loop().time()
        wait_s = self._told_s.get(key, now_s - PROGRESS_S) + PROGRESS_S - now_s
        if wait_s > 0:
            self.queue.add_after(key, wait_s)
        return wait_s > 0

    def take(self, value: dict[str, Any]) -> None:
        """Put an object that the API server answered with into the cache."""
        match value.get("kind"):
            case "Job":
                self.cache.put(JobFacts.read(value))
            case "ConfigMap":
                artifact = (value["metadata"].get("labels") or {}).get(LABEL_ARTIFACT)
                pareto = artifact == ARTIFACT_PARETO
                self.cache.put(SetFacts.read(value) if pareto else RunFacts.read(value))
            case kind if kind == KIND:
                self.cache.put(PolicyFacts.read(value))

    async def _observe(self, facts: PolicyFacts, *, refused: str = "") -> Observed:
        namespace, name, policy = facts.meta.namespace, facts.meta.name, facts.policy
        pods = [pod for pod in self.cache.pods(namespace) if pod.live]
        jobs = self.cache.children(JobFacts, namespace, name)
        for job in jobs:
            if job.complete:
                await self._look_for_set(job)
        texts, tasks = await self._texts(policy) if policy else ({}, {})
        return Observed(
            policy=facts,
            now=datetime.datetime.now(datetime.UTC),
            winner=winner(facts, self.cache.policies(namespace), [pod.labels for pod in pods]),
            texts=texts,
            tasks=tasks,
            jobs=jobs,
            job_pods=self.cache.children(PodFacts, namespace, name),
            runs=self.cache.children(RunFacts, namespace, name),
            sets=self.cache.children(SetFacts, namespace, name),
            desired={
                target.role: sum(target.matches(pod.labels) for pod in pods)
                for target in (policy.targets if policy else ())
            },
            refused=refused,
        )

    async def _look_for_set(self, job: JobFacts) -> None:
        """Ask for a complete Job's result if the watch has not brought it: two watches may differ by a moment."""
        sets = self.cache.children(SetFacts, job.meta.namespace, job.meta.policy)
        if any(s.meta.inputs_digest == job.meta.inputs_digest for s in sets):
            return
        name = child_name(job.meta.policy, ARTIFACT_PARETO, job.meta.inputs_digest)
        try:
            self.take(await self._client.get(path_of("ConfigMap", job.meta.namespace, name)))
        except ApiError as error:
            if error.status != 404:
                raise

    async def _texts(
        self, policy: Policy
    ) -> tuple[dict[str, TextFacts], dict[tuple[str, str], TextFacts]]:
        """Read the evaluation texts that the policy names, and the items of its tasks."""
        answers: dict[str, dict[str, Any] | None] = {}

        async def read(config_map: str, key: str) -> TextFacts:
            if config_map not in answers:
                answers[config_map] = await self._configmap(policy.namespace, config_map)
            return read_text(answers[config_map], config_map, key)

        texts = {
            name: await read(workload.text.config_map, workload.text.key)
            for name, workload in policy.classes.items()
            if workload.text is not None
        }
        tasks = {
            (name, task.name): await read(task.config_map, task.key)
            for name, workload in policy.classes.items()
            for task in workload.tasks
            if task.config_map
        }
        return texts, tasks

    async def _configmap(self, namespace: str, name: str) -> dict[str, Any] | None:
        try:
            return await self._client.get(path_of("ConfigMap", namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise


def read_text(value: dict[str, Any] | None, config_map: str, key: str) -> TextFacts:
    """Return what is known of the text in a ConfigMap.

    Args:
        value: The ConfigMap, or None if there is none.
        config_map: Its name.
        key: The text's key.
    """
    if value is None:
        return TextFacts(problem=f"create ConfigMap {config_map} with the key {key}")
    text = (value.get("data") or {}).get(key)
    if not text:
        return TextFacts(problem=f"give ConfigMap {config_map} a text below the key {key} of data")
    return TextFacts(digest=digest_bytes(text.encode()))
