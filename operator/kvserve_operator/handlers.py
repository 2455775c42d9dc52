"""What kopf is told to watch: every object goes into the cache, and the policies it matters to into the queue.

Only index and event handlers are used: kopf fills indices with all there is before the first event is handled, and
neither kind writes anything to the objects, no finalizer and no annotation.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

import aiohttp
import kopf

from kvserve_api.names import ARTIFACT_PARETO, LABEL_ARTIFACT, LABEL_POLICY
from kvserve_api.policy import GROUP, PLURAL, VERSION
from kvserve_operator.client import log_in
from kvserve_operator.health import Pulse
from kvserve_operator.jobs import JobFacts, PodFacts
from kvserve_operator.observed import PolicyFacts, RunFacts
from kvserve_operator.reconcile import Reconciler
from kvserve_operator.sets import SetFacts

POLICIES: Final = (GROUP, VERSION, PLURAL)
JOBS: Final = ("batch", "v1", "jobs")
CONFIGMAPS: Final = ("", "v1", "configmaps")
PODS: Final = ("", "v1", "pods")
RESOURCES: Final = (POLICIES, JOBS, CONFIGMAPS, PODS)

WATCH_S: Final = 60
"""How long one watch request lasts; the next is a sign of life even where nothing happens."""


def settings() -> kopf.OperatorSettings:
    """Return kopf's settings: no events of its own, no scanning of the cluster, watches that notice silence."""
    value = kopf.OperatorSettings()
    value.posting.enabled = False
    value.scanning.disabled = True
    value.watching.server_timeout = WATCH_S
    value.watching.client_timeout = WATCH_S + 15
    value.watching.connect_timeout = 10
    value.networking.request_timeout = 30
    value.watching.label_selectors[JOBS] = LABEL_POLICY
    value.watching.label_selectors[CONFIGMAPS] = f"{LABEL_ARTIFACT},{LABEL_POLICY}"
    return value


def registry(reconciler: Reconciler, pulse: Pulse) -> kopf.OperatorRegistry:
    """Return the handlers.

    Args:
        reconciler: Whose cache and queue they feed.
        pulse: What is told of each sign of life.
    """
    handlers = kopf.OperatorRegistry()
    kopf.on.login(registry=handlers)(_login(pulse))
    _watch(handlers, POLICIES, _policy_facts, _policy_keys(reconciler), reconciler, pulse)
    _watch(handlers, JOBS, JobFacts.read, _child_keys, reconciler, pulse)
    _watch(handlers, CONFIGMAPS, _configmap_facts, _child_keys, reconciler, pulse)
    _watch(handlers, PODS, PodFacts.read, _pod_keys(reconciler), reconciler, pulse)
    return handlers


def _login(pulse: Pulse) -> Callable[..., Awaitable[kopf.AiohttpSession]]:
    """Return a login handler whose sessions tell the pulse of each list and watch request that is answered."""

    async def answered(_: object, __: object, params: aiohttp.TraceRequestEndParams) -> None:
        if params.method == "GET" and params.response.status == 200:
            pulse.beat(params.url.name)

    async def login(**_: Any) -> kopf.AiohttpSession:
        info = log_in()
        tracing = aiohttp.TraceConfig()
        tracing.on_request_end.append(answered)
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=info.as_ssl_context()),
            headers=info.as_http_headers(),
            trace_configs=[tracing],
        )
        return kopf.AiohttpSession(server=info.server, aiohttp_session=session)

    return login


Facts = PolicyFacts | JobFacts | PodFacts | RunFacts | SetFacts
Key = tuple[str, str]


def _watch(
    handlers: kopf.OperatorRegistry,
    resource: tuple[str, str, str],
    read: Callable[[Any], Facts],
    keys: Callable[[Any], list[Key]],
    reconciler: Reconciler,
    pulse: Pulse,
) -> None:
    plural = resource[2]

    @kopf.index(*resource, id=f"index-{plural}", registry=handlers)
    async def fill(body: kopf.Body, **_: Any) -> None:
        reconciler.cache.put(read(body))

    @kopf.on.event(*resource, id=f"event-{plural}", registry=handlers)
    async def enqueue(event: kopf.RawEvent, body: kopf.Body, **_: Any) -> None:
        # the first event comes after all there is was put into the cache
        reconciler.filled = True
        pulse.beat(plural)
        if event["type"] == "DELETED":
            reconciler.cache.drop(body.metadata["uid"])
        for key in keys(read(body)):
            reconciler.queue.add(key)


def _policy_facts(body: kopf.Body) -> PolicyFacts:
    return PolicyFacts.read(dict(body))


def _configmap_facts(body: kopf.Body) -> RunFacts | SetFacts:
    artifact = (body.metadata.get("labels") or {}).get(LABEL_ARTIFACT)
    return SetFacts.read(body) if artifact == ARTIFACT_PARETO else RunFacts.read(body)


def _child_keys(facts: JobFacts | RunFacts | SetFacts) -> list[Key]:
    return [(facts.meta.namespace, facts.meta.policy)]


def _policy_keys(reconciler: Reconciler) -> Callable[[PolicyFacts], list[Key]]:
    seen: dict[str, tuple[int, bool]] = {}

    def keys(facts: PolicyFacts) -> list[Key]:
        """Name the policy itself and, where its selectors may have changed, its neighbours."""
        meta = facts.meta
        gone = reconciler.cache.policy(meta.namespace, meta.name) is None
        version = (facts.generation, meta.deleting or gone)
        known = seen.pop(meta.uid, None) == version
        if not gone:
            seen[meta.uid] = version
        mine = (meta.namespace, meta.name)
        if known:
            return [mine]
        return [
            mine,
            *((p.meta.namespace, p.meta.name) for p in reconciler.cache.policies(mine[0])),
        ]

    return keys


def _pod_keys(reconciler: Reconciler) -> Callable[[PodFacts], list[Key]]:
    def keys(facts: PodFacts) -> list[Key]:
        """Name the policy of a Job's pod, or those that select the pod."""
        namespace = facts.meta.namespace
        if facts.job:
            return [(namespace, facts.meta.policy)]
        return [
            (namespace, policy.meta.name)
            for policy in reconciler.cache.policies(namespace)
            if policy.policy and any(t.matches(facts.labels) for t in policy.policy.targets)
        ]

    return keys
