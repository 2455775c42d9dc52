"""``kvserve profile``: a profiling run without Kubernetes."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import click

from kvserve_api.errors import KVServeError, PolicyError, SpecError
from kvserve_api.names import ENV_ARTIFACTS, ENV_CALIBRATION_TOKENS, ENV_FORECASTS
from kvserve_api.policy import KIND, Policy
from kvserve_api.profile_set import DEFAULT_CLASS, NAME_PATTERN
from kvserve_api.run import ClassInputs, RunInputs
from kvserve_api.space_limits import SpaceLimits
from kvserve_profiler.settings import GRADIENTS

for _package in ("torch", "transformers"):
    # the command line tells from this which extra is missing, without importing what takes seconds
    if importlib.util.find_spec(_package) is None:
        raise ModuleNotFoundError(f"No module named {_package!r}", name=_package)

DEFAULT_MAX_LOSS_BP = 100
DEFAULT_MAX_TRIALS = 64


@click.command()
@click.option(
    "--model",
    required=True,
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path, resolve_path=True),
    help="Folder of the model, as transformers and vLLM load it.",
)
@click.option(
    "--out",
    required=True,
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where pareto.json, trials.jsonl and bundles/ go. A run that was stopped goes on from there.",
)
@click.option(
    "--policy",
    "policy_file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A KVServePolicy; its workload classes and budgets count.",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="[CLASS=]FILE",
    help="Evaluation text of a workload class, by default of the class 'default'. Repeatable. "
    "Without it, a small built-in corpus is used.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="[CLASS/]NAME=FILE",
    help="Items of a task that the policy has in a ConfigMap or volume, by default of the class 'default'. Repeatable.",
)
@click.option(
    "--max-trials",
    type=click.IntRange(1, 4096),
    help=f"Most strategies to measure; by default the policy's number, or {DEFAULT_MAX_TRIALS}.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of everything random."
)
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Threads of the model; codecs are always timed on one.",
)
@click.option(
    "--forecasts",
    "gradients",
    envvar=ENV_FORECASTS,
    type=click.IntRange(0, 1024),
    default=GRADIENTS,
    show_default=True,
    metavar="GRADIENTS",
    help="Forecast the losses of all candidates by so many gradients of each text's first window, so that fewer "
    "trials are needed; 0 spares their memory, and half of the screening's time.",
)
@click.option(
    "--artifacts",
    metavar="URL",
    envvar=ENV_ARTIFACTS,
    default="",
    help="Store to put the calibration bundle into as well, so that serving pods find it: file:///FOLDER, "
    "s3://BUCKET/PREFIX. It always goes into DIR/bundles, which is a store too.",
)
@click.option(
    "--calibration-tokens",
    envvar=ENV_CALIBRATION_TOKENS,
    type=click.IntRange(0),
    help="Tokens to calibrate with; by default as many as the recipe takes, 0 to calibrate nothing.",
)
@click.pass_context
def profile(
    context: click.Context,
    model: Path,
    out: Path,
    policy_file: Path | None,
    texts: tuple[str, ...],
    tasks: tuple[str, ...],
    max_trials: int | None,
    seed: int,
    threads: int,
    gradients: int,
    artifacts: str,
    calibration_tokens: int | None,
) -> None:
    """Measure compression strategies on a model and keep those that no other beats.

    Exit codes: 64 bad input, 65 no strategy within the quality budget (the set is written all the same), 66 the
    model can't be profiled, 1 anything else.
    """
    # torch and transformers take seconds to import: --help and the other commands do without
    from kvserve_profiler.exits import exit_code, last_words
    from kvserve_profiler.local import run_local

    try:
        files = text_files(texts)
        policy = read_policy(policy_file) if policy_file else None
        items = task_files(tasks, policy)
        inputs = local_inputs(model, policy, files, max_trials=max_trials, seed=seed)
        run_local(
            inputs,
            model=model,
            out=out,
            text_files=files,
            task_files=items,
            threads=threads,
            gradients=gradients,
            artifacts=artifacts,
            calibration_tokens=calibration_tokens,
        )
    except KVServeError as error:
        click.echo(f"kvserve profile: {last_words(error)}", err=True)
        context.exit(exit_code(error))


def text_files(options: Sequence[str]) -> dict[str, Path]:
    """Return the text file of each workload class from the values of ``--text``.

    Raises:
        SpecError: A class has two texts.
    """
    files: dict[str, Path] = {}
    for option in options:
        name, separator, path = option.partition("=")
        if not separator or not NAME_PATTERN.fullmatch(name):
            name, path = DEFAULT_CLASS, option
        if name in files:
            raise SpecError("--text", f"class {name} has two texts: join them into one file")
        files[name] = Path(path)
    return files


def task_files(options: Sequence[str], policy: Policy | None) -> dict[tuple[str, str], Path]:
    """Return the file of each workload class and task from the values of ``--task``.

    A class that has the default class's tasks takes its files too.

    Raises:
        SpecError: A task has no file or two, or there is no such task.
    """
    given: dict[tuple[str, str], Path] = {}
    for option in options:
        place, separator, path = option.partition("=")
        name, _, task = place.rpartition("/")
        key = (name or DEFAULT_CLASS, task)
        if not separator or not task:
            raise SpecError("--task", f"must be [CLASS/]NAME=FILE, got {option!r}")
        if key in given:
            raise SpecError("--task", f"{place} has two files: join them into one")
        given[key] = Path(path)
    files: dict[tuple[str, str], Path] = {}
    known: set[tuple[str, str]] = set()
    for name, workload in policy.classes.items() if policy else ():
        for check in workload.tasks:
            key = (name, check.name)
            known.add(key)
            shared = check in policy.classes[DEFAULT_CLASS].tasks if policy else False
            file = given.get(key) or (given.get((DEFAULT_CLASS, check.name)) if shared else None)
            if file is not None:
                files[key] = file
            elif check.built_in is None:
                where = (
                    f"file {check.path} of volume {check.claim}"
                    if check.claim
                    else f"ConfigMap {check.config_map}, key {check.key}"
                )
                raise SpecError(
                    "--task",
                    f"{name}/{check.name} has its items in {where}: give {name}/{check.name}=FILE",
                )
    if unknown := sorted(given.keys() - known):
        told = ", ".join("/".join(key) for key in sorted(known)) or "none"
        raise SpecError("--task", f"the policy has no task {'/'.join(unknown[0])}; it has {told}")
    return files


def read_policy(path: Path) -> Policy:
    """Read the only KVServePolicy of a YAML file, which may hold other objects beside it.

    Raises:
        PolicyError: The file is no YAML, or holds no policy or several, or the policy is wrong.
    """
    import yaml

    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PolicyError("--policy", f"{path} is not YAML: {error}") from error
    policies = [d for d in documents if isinstance(d, dict) and d.get("kind") == KIND]
    if len(policies) != 1:
        raise PolicyError("--policy", f"{path} must hold one {KIND}, holds {len(policies)}")
    return Policy.from_object(policies[0])


def local_inputs(
    model: Path,
    policy: Policy | None,
    files: dict[str, Path],
    *,
    max_trials: int | None,
    seed: int,
) -> RunInputs:
    """Return a run's inputs from the command line.

    Raises:
        SpecError: A text belongs to no class, or a class's text lies in a ConfigMap and was not given.
    """
    classes = {DEFAULT_CLASS: ClassInputs(max_loss_bp=DEFAULT_MAX_LOSS_BP)}
    if policy:
        classes = dict(RunInputs.of_policy(policy, text_digests={}).classes)
        default = policy.profiling.text if DEFAULT_CLASS in files else None
        for name, workload in policy.classes.items():
            if workload.text and name not in files and workload.text != default:
                where = f"ConfigMap {workload.text.config_map}, key {workload.text.key}"
                raise SpecError("--text", f"class {name} has its text in {where}: give {name}=FILE")
    if unknown := sorted(set(files) - set(classes)):
        known = ", ".join(sorted(classes))
        raise SpecError("--text", f"there is no class {unknown[0]!r}; known: {known}")
    trials = max_trials or (policy.profiling.max_trials if policy else DEFAULT_MAX_TRIALS)
    return RunInputs(
        policy=policy.key if policy else f"default/{model.name}",
        model=policy.model.name if policy else model.name,
        revision=policy.model.revision if policy else "",
        model_source=f"folder:{model.name}",
        classes=classes,
        max_trials=trials,
        seed=seed,
        space=policy.profiling.space if policy else SpaceLimits(),
    )
