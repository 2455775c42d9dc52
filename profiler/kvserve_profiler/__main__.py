"""``python -m kvserve_profiler job``: the entry point of the profiling Job's container."""

import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

import click

from kvserve_api.errors import KVServeError
from kvserve_api.names import (
    CLAIMS_DIR,
    ENV_ARTIFACTS,
    ENV_CALIBRATION_TOKENS,
    ENV_FORECASTS,
    ENV_INDEX,
    TASKS_DIR,
    ExitCode,
)
from kvserve_api.otel import configure
from kvserve_profiler.cli import profile

TERMINATION_LOG = "/dev/termination-log"


@click.group()
def main() -> None:
    """Measure compression strategies on a model."""


main.add_command(profile)


@main.command()
@click.option(
    "--inputs",
    envvar="KVSERVE_INPUTS",
    default="/etc/kvserve/run/inputs.json",
    help="The run's inputs.",
)
@click.option(
    "--texts", envvar="KVSERVE_TEXTS", default="/etc/kvserve/texts", help="Folder with <class>.txt."
)
@click.option(
    "--tasks",
    envvar="KVSERVE_TASKS",
    default=TASKS_DIR,
    help="Folder with <class>.<task>.jsonl.",
)
@click.option(
    "--claims",
    envvar="KVSERVE_CLAIMS",
    default=CLAIMS_DIR,
    help="Folder with a folder for each volume that holds items of tasks.",
)
@click.option(
    "--model",
    envvar="KVSERVE_MODEL_PATH",
    default="",
    help="Folder of the model; by default the hub's.",
)
@click.option(
    "--namespace", envvar="KVSERVE_NAMESPACE", default="", help="Namespace of the policy."
)
@click.option("--policy", envvar="KVSERVE_POLICY", default="", help="Name of the policy.")
@click.option(
    "--policy-uid",
    envvar="KVSERVE_POLICY_UID",
    default="",
    help="Its uid; the result is deleted with it.",
)
@click.option(
    "--artifacts",
    envvar=ENV_ARTIFACTS,
    default="",
    help="URL of the store of calibration bundles; without one only strategies that need none are measured.",
)
@click.option(
    "--calibration-tokens",
    envvar=ENV_CALIBRATION_TOKENS,
    type=click.IntRange(0),
    help="Tokens to calibrate with; by default as many as the recipe takes, 0 to calibrate nothing.",
)
@click.option(
    "--forecasts",
    "gradients",
    envvar=ENV_FORECASTS,
    type=click.IntRange(0, 1024),
    default=0,
    help="Forecast the losses of all candidates by so many gradients of each text's first window; 0 for no forecasts.",
)
@click.option(
    "--index",
    envvar=ENV_INDEX,
    type=click.IntRange(0),
    default=0,
    help="Of this pod among those of the Job; 0 decides, the others measure what it hands out.",
)
@click.option(
    "--termination-log",
    envvar="KVSERVE_TERMINATION_LOG",
    default=TERMINATION_LOG,
    help="Where the container's termination message goes, if that file exists.",
)
@click.pass_context
def job(
    context: click.Context,
    inputs: str,
    texts: str,
    tasks: str,
    claims: str,
    model: str,
    namespace: str,
    policy: str,
    policy_uid: str,
    artifacts: str,
    calibration_tokens: int | None,
    gradients: int,
    index: int,
    termination_log: str,
) -> None:
    """Do the work of a profiling Job; each option has a KVSERVE_ variable."""
    # torch and transformers take seconds to import: --help does without
    from kvserve_profiler.candidates import grid, preset_space
    from kvserve_profiler.configmaps import Owner
    from kvserve_profiler.exits import exit_code, last_words, leave_message
    from kvserve_profiler.job import JobOptions, run_job, say

    signal.signal(signal.SIGTERM, _stop)
    close = configure("kvserve-profiler")
    code = ExitCode.OK
    try:
        options = JobOptions(
            inputs=Path(inputs),
            texts=Path(texts),
            tasks=Path(tasks),
            claims=Path(claims),
            model=model,
            owner=Owner(namespace=namespace, name=policy, uid=policy_uid),
            artifacts=artifacts,
            calibration_tokens=calibration_tokens,
            gradients=gradients,
        )
        if index:
            from kvserve_profiler.helping import help_out

            message = help_out(options, index, preset_space(), grid)
        else:
            message = run_job(options, preset_space(), grid)
    except Exception as error:
        code, message = exit_code(error), last_words(error)
        if not isinstance(error, KVServeError):
            traceback.print_exc()
    finally:
        close()
    say(f"kvserve-profiler: {message}")
    leave_message(Path(termination_log), message)
    context.exit(code)


def _stop(signal_number: int, frame: FrameType | None) -> None:
    """End in order when the pod is stopped, so that the last finished trials are saved."""
    sys.exit(128 + signal_number)


if __name__ == "__main__":
    main()
