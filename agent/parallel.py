"""Work that ends in files, many pieces at once, under a progress bar."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from joblib import Parallel, delayed  # type: ignore[import-untyped]
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agent.comparison import OfCell

J = TypeVar("J", bound=OfCell)


def make_files(
    jobs: Sequence[J],
    files: Sequence[Path],
    to_file: Callable[[J, Path], object],
    *,
    named: Callable[[J], str],
    n_jobs: int,
    resume: bool,
    console: Console,
) -> None:
    """Make the file of each job that has none yet, those of high rates first.

    Args:
        jobs: The work.
        files: A file for each.
        to_file: Does one piece of work and writes its file; it must be picklable.
        named: What the bar says of a job, beside its scenario and rate.
        n_jobs: How many run at once; −1: as many as cores.
        resume: Whether files that are there already are kept.
        console: Where progress is shown.
    """
    found = [resume and file.is_file() for file in files]
    # the longest first, so that no core waits for a long one at the end
    missing = [i for i, known in enumerate(found) if not known]
    missing.sort(key=lambda i: jobs[i].rate_rps or np.inf, reverse=True)
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("left"), TimeRemainingColumn(), console=console,
    )  # fmt: skip
    with progress:
        bar = progress.add_task("", total=len(jobs), completed=sum(found))
        parallel = Parallel(n_jobs=n_jobs, return_as="generator_unordered")
        work = (delayed(_made)(jobs[i], files[i], to_file) for i in missing)
        for job in parallel(work):
            rate = "" if job.rate_rps is None else f" {job.rate_rps:g} req/s"
            text = f"{job.scenario}{rate} · {named(job)}"
            progress.update(bar, advance=1, description=f"{text:<44}")


def _made(job: J, file: Path, to_file: Callable[[J, Path], object]) -> J:
    to_file(job, file)
    return job
