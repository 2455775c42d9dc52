"""A run on this machine: its texts from files, its output into a folder, its progress onto the terminal."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from kvserve_api.otel import configure
from kvserve_api.progress import Progress
from kvserve_api.run import RunInputs
from kvserve_profiler.calibration import Calibration
from kvserve_profiler.candidates import grid, preset_space
from kvserve_profiler.engine import profile
from kvserve_profiler.folder import RunFolder
from kvserve_profiler.model import Source
from kvserve_profiler.outcome import require_feasible
from kvserve_profiler.report import Section, render
from kvserve_profiler.settings import GRADIENTS, Settings
from kvserve_profiler.tables import results
from kvserve_profiler.task import BUNDLE_KEY, Task
from kvserve_profiler.tasks.sources import of_files
from kvserve_profiler.texts import Text
from kvserve_profiler.trials import TrialLog
from kvserve_strategies.artifacts import open_store


def run_local(
    inputs: RunInputs,
    *,
    model: Path,
    out: Path,
    text_files: Mapping[str, Path],
    task_files: Mapping[tuple[str, str], Path],
    threads: int,
    gradients: int = GRADIENTS,
    artifacts: str = "",
    calibration_tokens: int | None = None,
) -> None:
    """Do a run, or what is left of it, and print its result.

    Args:
        inputs: What to profile; the digests of the texts are filled in here.
        model: Folder of the model.
        out: Output folder.
        text_files: Text of each workload class that does not use the default class's.
        task_files: Items of each class and task that are not built in.
        threads: Threads of the model.
        gradients: See `Settings`.
        artifacts: URL of a store that gets the calibration bundle too; empty for none.
        calibration_tokens: See `Calibration`.

    Raises:
        SpecError: An input is wrong.
        InfeasibleError: A class has no profile but the raw one within its budget; the set was written.
        UnsupportedError: The model can't be profiled.
        MeasurementError: Not even the raw profile could be measured.
    """
    close = configure("kvserve-profiler")
    try:
        folder = RunFolder(out)
        texts = _texts(inputs, text_files)
        inputs = _with_digests(inputs, texts, text_files)
        source = Source(location=str(model))
        settings = Settings(seed=inputs.seed, threads=threads, gradients=gradients)
        task = Task.of(inputs, source, texts, preset_space(), settings, grid)
        task = task.checked_by(of_files(inputs, task_files))
        store = open_store(artifacts) if artifacts else None
        calibration = Calibration(
            store=open_store(folder.bundles.as_uri()), tokens=calibration_tokens
        )
        earlier = folder.load()
        task = calibration.plan(task)
        # trials of something else are refused before minutes of calibration
        task.log().resume(earlier, but=BUNDLE_KEY)
        with _live() as show:
            task = calibration.make(task, earlier, lambda message: show(Progress(message=message)))
            log = task.log().resume(earlier)
            if store is not None and task.bundle is not None:
                store.put_bundle(folder.bundles / task.bundle.digest.removeprefix("sha256:"))

            def report(progress: Progress, log: TrialLog) -> None:
                folder.save(log)
                show(progress)

            result = profile(task, log, report)
        path = folder.publish(result)
    finally:
        close()
    log = task.log().resume(folder.load())
    console = Console()
    for table in results(result, log, task.texts):
        console.print(table)
    console.print(f"{path}  {result.digest}", soft_wrap=True, highlight=False)
    sections = [
        Section(name=name, text=text.digest, budget=inputs.classes[name].budget)
        for name, text in task.texts.items()
    ]
    page = folder.write_report(render(result, log, sections))
    console.print(str(page), soft_wrap=True, highlight=False)
    require_feasible(inputs, result)


def _texts(inputs: RunInputs, files: Mapping[str, Path]) -> dict[str, Text]:
    read = {name: Text.read(path, f"--text {name}") for name, path in files.items()}
    fallback = read.get("default") or Text.builtin()
    return {name: read.get(name, fallback) for name in inputs.classes}


def _with_digests(
    inputs: RunInputs, texts: Mapping[str, Text], files: Mapping[str, Path]
) -> RunInputs:
    builtin = Text.builtin().digest
    return dataclasses.replace(
        inputs,
        classes={
            name: dataclasses.replace(
                wanted,
                text_digest=None if texts[name].digest == builtin else texts[name].digest,
            )
            for name, wanted in inputs.classes.items()
        },
    )


@contextmanager
def _live() -> Iterator[Callable[[Progress], None]]:
    """Yield what shows the progress: a bar on a terminal, else a line for each step."""
    console = Console(stderr=True)
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        row = bar.add_task("starting", total=None)

        def show(progress: Progress) -> None:
            done = progress.completed + progress.failed
            message = progress.message or "measured"
            bar.update(row, description=message, completed=done, total=progress.total or None)
            if not console.is_terminal and progress.message:
                console.print(f"{progress} {progress.message}", highlight=False)

        yield show
