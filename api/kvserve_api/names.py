"""Names that several parts must agree on: labels and annotations, child names, exit codes, request fields."""

from enum import IntEnum
from typing import Final

LABEL_POLICY: Final = "kvserve.io/policy"
"""On every child: the policy's name."""
LABEL_ARTIFACT: Final = "kvserve.io/artifact"
"""On ConfigMaps: ``pareto`` for a Pareto set, ``run`` for a run's inputs, progress and trials."""
LABEL_RUN: Final = "kvserve.io/run"
"""On every child of a run: the first ten hex digits of the digest of its inputs."""
ANNOTATION_DIGEST: Final = "kvserve.io/digest"
"""On a Pareto ConfigMap: the digest of its document."""
ANNOTATION_INPUTS: Final = "kvserve.io/inputs"
"""On every child of a run: the full digest of its inputs."""

ARTIFACT_PARETO: Final = "pareto"
ARTIFACT_RUN: Final = "run"

RUN_INPUTS_KEY: Final = "inputs.json"
"""In a run's ConfigMap, written by the operator: what to profile."""
RUN_PROGRESS_KEY: Final = "progress.json"
"""In a run's ConfigMap, written by the Job: ``{"completed", "failed", "total"}``."""
RUN_TRIALS_KEY: Final = "trials.jsonl"
"""In a run's ConfigMap, written by the Job: one line a finished trial, from which a new pod resumes."""

RUN_WORK_KEY: Final = "work.json"
"""In a run's ConfigMap, written by index 0 of a Job of several pods: what the others are to measure."""
RUN_RESULTS_PREFIX: Final = "results-"
"""In a run's ConfigMap, with the index and ``.json`` behind it, written by that pod: what it measured of that."""

ENV_INDEX: Final = "JOB_COMPLETION_INDEX"
"""Environment variable with the index of a pod, which the Job controller sets."""
ENV_ARTIFACTS: Final = "KVSERVE_ARTIFACTS"
"""Environment variable with the URL of the store of calibration bundles, of the profiling Job and of serving pods."""
ENV_CALIBRATION_TOKENS: Final = "KVSERVE_CALIBRATION_TOKENS"
"""Environment variable with the number of tokens that a run calibrates with; unset for as many as the recipe takes."""
ENV_FORECASTS: Final = "KVSERVE_FORECASTS"
"""Environment variable with the number of gradients by which a run forecasts losses; 0 for no forecasts."""
ENV_STORE_USERNAME: Final = "KVSERVE_STORE_USERNAME"
"""Environment variable with the user that a Redis KV store knows serving pods by; unset for its default user."""
ENV_STORE_PASSWORD: Final = "KVSERVE_STORE_PASSWORD"
"""Environment variable with that user's password."""

TASKS_DIR: Final = "/etc/kvserve/tasks"
"""In the profiling Job: a folder with ``<class>.<task>.jsonl`` for each task whose items are in a ConfigMap."""
CLAIMS_DIR: Final = "/etc/kvserve/claims"
"""In the profiling Job: a folder for each PersistentVolumeClaim that holds items of tasks."""

XARG_WORKLOAD: Final = "kvserve_workload"
"""In a request's ``vllm_xargs``: its workload class."""


class ExitCode(IntEnum):
    """How a profiling run ends; a Job's podFailurePolicy and the operator read it."""

    OK = 0
    FAILED = 1
    BAD_INPUT = 64
    INFEASIBLE = 65
    UNSUPPORTED = 66


def child_name(policy: str, kind: str, inputs_digest: str) -> str:
    """Return the name of a run's child: ``<policy>-<kind>-<10 hex digits>``.

    Args:
        policy: The policy's name, at most 52 characters; cut so that the result is a DNS label.
        kind: ``job``, ``run`` or ``pareto``.
        inputs_digest: The digest of the run's inputs, ``sha256:…``.
    """
    suffix = f"-{kind}-{inputs_digest.removeprefix('sha256:')[:10]}"
    return policy[: 63 - len(suffix)].rstrip("-.") + suffix
