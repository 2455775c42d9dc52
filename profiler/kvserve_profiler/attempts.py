"""Measuring one strategy: a strategy that can't be measured is news about the strategy, not about the run."""

import time
from collections.abc import Callable
from typing import TypeVar

from opentelemetry import metrics, trace

from kvserve_api.errors import KVServeError, SpecError
from kvserve_api.otel import counter
from kvserve_api.quality import TaskScore
from kvserve_api.telemetry import ATTR_OUTCOME, ATTR_PROFILE, PROFILE_TRIALS, SPAN_PROFILE_TRIAL
from kvserve_profiler.candidates import Candidate
from kvserve_profiler.trials import Measurement, Phase, Trial

T = TypeVar("T")
_tracer = trace.get_tracer(__name__)
_trials = counter(metrics.get_meter(__name__), PROFILE_TRIALS)


def run_trial(candidate: Candidate, phase: Phase, measure: Callable[[], Measurement]) -> Trial:
    """Measure one strategy; a strategy that can't be measured gives a failed trial."""
    measurement, error, duration_s = _attempt(candidate, measure)
    return Trial(
        name=candidate.name,
        strategy=candidate.strategy,
        phase=phase,
        duration_s=duration_s,
        measurement=measurement,
        error=error,
    )


def run_question(candidate: Candidate, key: str, answer: Callable[[], TaskScore]) -> Trial:
    """Let one strategy answer a task; a prompt that the model does not take ends the run.

    Raises:
        SpecError: A prompt is too short or too long for the model.
    """
    score, error, duration_s = _attempt(candidate, answer, fatal=SpecError)
    return Trial(
        name=candidate.name,
        strategy=candidate.strategy,
        phase=Phase.TASK,
        duration_s=duration_s,
        task=key,
        score=score,
        error=error,
    )


def _attempt(
    candidate: Candidate, measure: Callable[[], T], *, fatal: type[Exception] | tuple[()] = ()
) -> tuple[T | None, str, float]:
    """Return what measuring gave, or why nothing, and the seconds it took."""
    start_s = time.perf_counter()
    with _tracer.start_as_current_span(
        SPAN_PROFILE_TRIAL, attributes={ATTR_PROFILE: candidate.name}
    ) as span:
        found, error = None, ""
        try:
            found = measure()
        except fatal:
            raise
        # a strategy may fail in any numeric way; that is news about the strategy, not about the run
        except (KVServeError, ArithmeticError, RuntimeError, ValueError) as failure:
            error = f"{type(failure).__name__}: {failure}"
            span.record_exception(failure)
        outcome = "failed" if error else "completed"
        span.set_attribute(ATTR_OUTCOME, outcome)
    _trials.add(1, {ATTR_OUTCOME: outcome})
    return found, error, time.perf_counter() - start_s
