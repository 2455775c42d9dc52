"""The items of each workload class's tasks: built in, or JSON lines from a ConfigMap, a volume or the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from kvserve_api.errors import SpecError
from kvserve_api.run import RunInputs, TaskInputs
from kvserve_api.task_check import BUILT_IN, CLAIM
from kvserve_profiler.tasks.builtin import task_set
from kvserve_profiler.tasks.items import TaskSet

MAX_BYTES: Final = 64 * 1024 * 1024


def read_items(path: Path, field: str) -> TaskSet:
    """Read a file of items.

    Raises:
        SpecError: It can't be read, is too large, or holds no items.
    """
    try:
        with path.open("rb") as file:
            document = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise SpecError(field, f"can't read {str(path)!r}: {error.strerror}") from error
    if len(document) > MAX_BYTES:
        raise SpecError(field, f"{path} has more than {MAX_BYTES} bytes: use an excerpt")
    return TaskSet.parse(document, f"{field}: {path}")


def of_inputs(inputs: RunInputs, folder: Path, claims: Path) -> dict[str, dict[str, TaskSet]]:
    """Return the tasks of each workload class of a Job, by their names.

    Args:
        inputs: The run's inputs.
        folder: Holds ``<class>.<task>.jsonl`` for each task whose items are in a ConfigMap.
        claims: Holds a folder for each PersistentVolumeClaim with items.

    Raises:
        SpecError: Items are missing or malformed, or are not those that the inputs name.
    """
    return {
        name: {
            task: _read(name, task, wanted, inputs.seed, folder, claims)
            for task, wanted in sorted(inputs.classes[name].tasks.items())
        }
        for name in inputs.classes
    }


def of_files(
    inputs: RunInputs, files: Mapping[tuple[str, str], Path]
) -> dict[str, dict[str, TaskSet]]:
    """Return the tasks of each workload class of a run on this machine.

    Args:
        inputs: The run's inputs.
        files: The items of each class and task that are not built in.

    Raises:
        SpecError: A file can't be read, or holds no items.
    """
    found: dict[str, dict[str, TaskSet]] = {name: {} for name in inputs.classes}
    for name, wanted in inputs.classes.items():
        for task, one in sorted(wanted.tasks.items()):
            if (name, task) in files:
                read = read_items(files[name, task], f"--task {name}/{task}")
            else:
                read = _built_in(one, inputs.seed)
            found[name][task] = read.first(one.items)
    return found


def _built_in(wanted: TaskInputs, seed: int) -> TaskSet:
    return task_set(wanted.source.removeprefix(BUILT_IN), seed=seed, items=wanted.items)


def _read(
    name: str, task: str, wanted: TaskInputs, seed: int, folder: Path, claims: Path
) -> TaskSet:
    field = f"classes.{name}.tasks.{task}"
    if wanted.source.startswith(BUILT_IN):
        return _built_in(wanted, seed)
    if wanted.source.startswith(CLAIM):
        found = read_items(claims / wanted.source.removeprefix(CLAIM), field)
    else:
        found = read_items(folder / f"{name}.{task}.jsonl", field)
    if wanted.digest not in (None, found.digest):
        raise SpecError(
            field,
            f"is {wanted.digest}, but its items have {found.digest}: "
            "they were edited after the run was planned",
        )
    return found.first(wanted.items)
