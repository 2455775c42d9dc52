"""The steps of the main job, in order, each with its progress on the terminal."""

import json
import time
from collections import Counter
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from demo import chat, prometheus, report
from demo.forward import forward
from demo.load import Answer, ask
from kvserve_api.names import ARTIFACT_RUN, ENV_CALIBRATION_TOKENS, LABEL_ARTIFACT, RUN_TRIALS_KEY
from kvserve_api.strategy import StrategyConfig
from kvserve_controller.explain_cli import latest as explain
from kvserve_profiler.trials import Phase
from kvserve_strategies import config_needs_bundle
from testcluster import ClusterSpec, hostpods, start
from testcluster.cluster import Cluster, existing_cluster

SYSTEM = "kvserve-system"
NAMESPACE = "kvserve-demo"
POLICY = "chat"
CODER_THREAD = "kvserve-code"
"""Name of the connector's threads that encode and decode, as the kernel has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What to run.

    Attributes:
        root: The clone.
        out: Where results and logs go.
        fast_mbit: The link's normal bandwidth, in Mbit/s.
        slow_mbit: Its bandwidth when it drops, in Mbit/s.
        max_tokens: Tokens generated for each request.
        otlp_endpoint: Where all parts send traces and metrics, as the pods reach it; empty for nowhere.
        prompts: How many of the example's prompts to send in each phase.
        policy: File of the policy to apply; None for the example's.
        coder_share: What the prefill pod's encoding threads get of a processor in the last phase.
        slowed_rounds: How often that phase sends the prompts: with each transfer a coder is believed to be slower by a
            factor of two at most.
        calibration_tokens: Tokens that the profiling Job calibrates with; fewer than it would take by itself, so that
            the demo takes minutes on two cores.
    """

    root: Path
    out: Path
    fast_mbit: int
    slow_mbit: int
    max_tokens: int
    otlp_endpoint: str = ""
    prompts: int = 6
    calibration_tokens: int = 8192
    coder_share: float = 0.05
    slowed_rounds: int = 2
    policy: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What the decode pod has counted so far."""

    profiles: Counter[str]
    native_bytes: int
    wire_bytes: int
    failures: Counter[str]


class Job:
    """One run of the main job."""

    def __init__(self, settings: Settings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self.start_s = time.monotonic()

    def run(self) -> dict[str, Any]:
        """Run all steps and return the report.

        Raises:
            ClusterError: A step on the cluster failed.
            TimeoutError: Something did not become ready in time.
            RuntimeError: A request failed, or KV was recomputed where nothing was broken.
        """
        existing = existing_cluster()
        if existing is not None:
            self.console.print(
                "Using the cluster of KUBECONFIG: its links can't be shaped from here."
            )
            result = self.run_on(existing, shaped=False)
            self.console.print(
                f"To remove it: kubectl delete namespace {NAMESPACE}; helm uninstall kvserve -n {SYSTEM}"
            )
            return result
        model = self._step("model", lambda: chat.convert_model(self.settings.root))
        spec = ClusterSpec(nodes=1, keep_logs=self.settings.out / "logs")
        with self._step("cluster", lambda: start(spec)) as cluster:
            artifacts = self.settings.out / "artifacts"
            chat.apply(cluster, chat.volumes(model, artifacts, NAMESPACE), NAMESPACE)
            return self.run_on(cluster, shaped=True)

    def run_on(self, cluster: Cluster, *, shaped: bool) -> dict[str, Any]:
        """Run the steps that come after a cluster is there, and return the report.

        Args:
            cluster: Where to run; it is left as it is then, with everything installed.
            shaped: It is ours: its links can be shaped, and its pods run from this machine's environment.
        """
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        chat.apply(cluster, [namespace], NAMESPACE)
        self._step("helm install kvserve helm/kvserve", lambda: self._install(cluster, shaped))
        self._serve(cluster, on_host=shaped)
        fast, slow = (self.settings.fast_mbit, self.settings.slow_mbit) if shaped else (None, None)
        with (
            forward(cluster, "service/chat-router", 8000, namespace=NAMESPACE) as router,
            forward(cluster, "service/chat-decode", 8000, namespace=NAMESPACE) as decode,
            forward(cluster, "service/kvserve-controller", 8081, namespace=SYSTEM) as controller,
        ):
            self._phase_requests(router, None, "warm-up", prompts=self._prompts()[:1])
            phases = [
                self._phase(cluster, router, decode, mbit, "raw")
                # the slow link first: what is known of the link when the policy comes is the fast one
                for mbit in dict.fromkeys((slow, fast))
            ]
            pareto = self._apply_policy(cluster)
            trials = self._trials(cluster)
            bandwidths = (fast, slow, fast) if shaped else (None,)
            phases += [
                self._explained(self._phase(cluster, router, decode, mbit, "kvserve"), controller)
                for mbit in bandwidths
            ]
            if shaped:
                phases.append(self._slowed(cluster, router, decode, controller))
            # the status is written every two seconds
            time.sleep(3.0)
            switches = self._switches(cluster)
        self.console.print(cluster.kubectl("get", "kvp", "-n", NAMESPACE), end="", highlight=False)
        quality = self._policy(cluster)["spec"]["quality"]
        return report.build(
            pareto=pareto,
            trials=trials,
            budget_bp=quality["maxLossBasisPoints"],
            phases=phases,
            switches=switches,
        )

    def _install(self, cluster: Cluster, on_host: bool) -> None:
        values = (hostpods.chart_values() if on_host else {}) | chat.CHART_VALUES
        tokens = {"name": ENV_CALIBRATION_TOKENS, "value": str(self.settings.calibration_tokens)}
        profiler = values.setdefault("profiler", {})
        profiler["extraEnv"] = [*profiler.get("extraEnv", []), tokens]
        if self.settings.otlp_endpoint:
            values["otel"] = {"endpoint": self.settings.otlp_endpoint}
        cluster.helm(
            "install", "kvserve", str(self.settings.root / "helm" / "kvserve"), "-n", SYSTEM,
            "--create-namespace", "--wait", "--timeout", "120s", "-f", "-",
            input=yaml.safe_dump(values),
        )  # fmt: skip

    def _serve(self, cluster: Cluster, *, on_host: bool) -> None:
        volumes = ["model-pvc.yaml", "artifacts-pvc.yaml"]
        files = [*volumes, *([] if on_host else ["model-download.yaml"]), "serving.yaml"]
        for name in files:
            objects = chat.manifests(self.settings.root, name, on_host=on_host)
            if self.settings.otlp_endpoint:
                chat.send_telemetry(objects, self.settings.otlp_endpoint)
            chat.apply(cluster, objects, NAMESPACE)
        with self.console.status("vLLM starts") as status:
            chat.wait_ready(
                cluster, NAMESPACE, timeout_s=300.0,
                tell=lambda line: status.update(f"two vLLM servers and a router start: {line}"),
            )  # fmt: skip
        self._done("prefill, decode and router are ready")

    def _apply_policy(self, cluster: Cluster) -> dict[str, Any]:
        path = self.settings.policy or self.settings.root / chat.EXAMPLE / "policy.yaml"
        cluster.kubectl("apply", "-n", NAMESPACE, "-f", str(path))
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        deadline_s = time.monotonic() + 600.0
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task("kubectl apply -f policy.yaml", total=None)
            while True:
                policy = self._policy(cluster)
                status = policy.get("status", {})
                run = status.get("profiling", {})
                ready = _condition(policy, "Ready")
                progress.update(
                    task,
                    completed=run.get("trialsCompleted", 0) + run.get("trialsFailed", 0),
                    total=run.get("trialsTotal") or None,
                    description=f"policy: {ready.get('reason', 'not seen yet')}",
                )
                if ready.get("status") == "True" and status.get("synced") == "2/2":
                    break
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"the policy is not Ready after 600 s: {json.dumps(status)}")
                time.sleep(0.5)
        self._done("the policy is profiled, and both pods have acknowledged its table")
        name = status["pareto"]["configMapRef"]["name"]
        config_map = json.loads(
            cluster.kubectl("get", "configmap", name, "-n", NAMESPACE, "-o", "json")
        )
        pareto: dict[str, Any] = json.loads(config_map["data"]["pareto.json"])
        return pareto

    def _trials(self, cluster: Cluster) -> list[dict[str, Any]]:
        """Return all that was confirmed, also of profiles that others beat and that are not in the set."""
        selector = f"{LABEL_ARTIFACT}={ARTIFACT_RUN}"
        text = cluster.kubectl("get", "configmaps", "-n", NAMESPACE, "-l", selector, "-o", "json")
        (run,) = json.loads(text)["items"]
        lines = map(json.loads, run["data"][RUN_TRIALS_KEY].splitlines()[1:])
        confirmed = (line for line in lines if line.get("phase") == Phase.CONFIRM)
        return [_trial(line) for line in confirmed if "measurement" in line]

    def _policy(self, cluster: Cluster) -> dict[str, Any]:
        text = cluster.kubectl("get", "kvp", POLICY, "-n", NAMESPACE, "-o", "json")
        policy: dict[str, Any] = json.loads(text)
        return policy

    def _phase(
        self,
        cluster: Cluster,
        router: str,
        decode: str,
        mbit: int | None,
        mode: str,
        rounds: int = 1,
    ) -> report.Phase:
        if mbit is not None:
            self._shape(cluster, mbit)
        before = self._traffic(decode)
        answers = self._phase_requests(router, mbit, mode, prompts=self._prompts() * rounds)
        after = self._traffic(decode)
        if failures := after.failures - before.failures:
            raise RuntimeError(f"KV was recomputed though nothing was broken: {dict(failures)}")
        return report.Phase(
            bandwidth_mbit=mbit,
            mode=mode,
            answers=answers,
            bytes_raw=after.native_bytes - before.native_bytes,
            bytes_wire=after.wire_bytes - before.wire_bytes,
            profiles=after.profiles - before.profiles,
        )

    def _slowed(self, cluster: Cluster, router: str, decode: str, controller: str) -> report.Phase:
        """Return the phase in which the prefill pod's threads that encode get little of a processor."""
        share = self.settings.coder_share
        prefill = chat.pod(cluster, "chat-prefill", NAMESPACE)
        cluster.throttle(prefill, CODER_THREAD, share, namespace=NAMESPACE)
        try:
            phase = self._phase(
                cluster,
                router,
                decode,
                self.settings.fast_mbit,
                "kvserve, slow coder",
                rounds=self.settings.slowed_rounds,
            )
        finally:
            cluster.throttle(prefill, CODER_THREAD, 1.0, namespace=NAMESPACE)
        return self._explained(replace(phase, mode="kvserve", coder_share=share), controller)

    def _explained(self, phase: report.Phase, controller: str) -> report.Phase:
        """Return the phase with why its last transfer took its profile."""
        # pods send their decisions every second
        time.sleep(2.0)
        decisions = explain(controller, f"{NAMESPACE}/{POLICY}", 1)
        return replace(phase, why=decisions[0] if decisions else None)

    def _phase_requests(
        self, router: str, mbit: int | None, mode: str, *, prompts: list[tuple[str, str]]
    ) -> list[Answer]:
        link = f"{mbit} Mbit/s" if mbit is not None else "the link as it is"
        answers = []
        with self.console.status("") as status:
            for number, (name, prompt) in enumerate(prompts, 1):
                status.update(f"{mode}, {link}: request {number}/{len(prompts)} ({name})")
                try:
                    answers.append(
                        ask(router, chat.MODEL, name, prompt, max_tokens=self.settings.max_tokens)
                    )
                except httpx.HTTPError as error:
                    raise RuntimeError(
                        f"request {name} failed ({mode}, {link}): {error}"
                    ) from error
        median = report.quantiles([answer.jct_s for answer in answers])["p50"]
        self._done(f"{mode}, {link}: {len(answers)} requests, completion p50 {median:.2f} s")
        return answers

    def _shape(self, cluster: Cluster, mbit: int | None) -> None:
        assert mbit is not None
        prefill = chat.pod(cluster, "chat-prefill", NAMESPACE)
        decode = chat.pod(cluster, "chat-decode", NAMESPACE)
        cluster.shape(prefill, decode, mbit, namespace=NAMESPACE)

    def _prompts(self) -> list[tuple[str, str]]:
        folder = self.settings.root / chat.EXAMPLE / "prompts"
        paths = sorted(folder.glob("*.txt"))[: self.settings.prompts]
        return [(path.stem, path.read_text()) for path in paths]

    def _traffic(self, decode: str) -> Traffic:
        page = httpx.get(f"{decode}/metrics", timeout=30.0).text
        return Traffic(
            profiles=prometheus.totals(page, "vllm:kvserve_transfers_total", "profile"),
            native_bytes=prometheus.totals(page, "vllm:kvserve_native_bytes_total", "").total(),
            wire_bytes=prometheus.totals(page, "vllm:kvserve_wire_bytes_total", "").total(),
            failures=prometheus.totals(page, "vllm:kvserve_transfer_failures_total", "reason"),
        )

    def _switches(self, cluster: Cluster) -> list[dict[str, Any]]:
        """Return the policy's history as seconds since its first entry, oldest first."""
        history = self._policy(cluster).get("status", {}).get("history", [])
        times = [datetime.fromisoformat(entry["time"]) for entry in history]
        first = min(times, default=None)
        rows = [
            {
                "at_s": (moment - first).total_seconds() if first else 0.0,
                "from": entry.get("from"),
                "to": entry["to"],
                "reason": entry["reason"],
            }
            for moment, entry in zip(times, history, strict=True)
        ]
        return sorted(rows, key=lambda row: row["at_s"])

    def _step(self, name: str, action: Any) -> Any:
        with self.console.status(name):
            result = action()
        self._done(name)
        return result

    def _done(self, what: str) -> None:
        self.console.print(
            f"[green]✓[/] {time.monotonic() - self.start_s:5.0f} s  {what}", highlight=False
        )


def _trial(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line of the trial log as the report counts it; the example has one evaluation text."""
    (quality,) = line["measurement"]["qualities"].values()
    return {
        "profile": line["name"],
        "ratio": quality["ratio"],
        "loss_bp_upper": quality["loss_upper_bp"],
        "calibrated": config_needs_bundle(StrategyConfig.from_json(line["strategy"])),
    }


def _condition(policy: dict[str, Any], kind: str) -> dict[str, Any]:
    conditions = policy.get("status", {}).get("conditions", [])
    return next((condition for condition in conditions if condition["type"] == kind), {})
