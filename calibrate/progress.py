"""The progress bars of measurements: shares of work done, and the time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Begin = Callable[[str], Callable[[float], None]]  # a bar of this name; told which share is done


@contextmanager
def bars(console: Console) -> Iterator[Begin]:
    """Room for bars; a bar begins when it is asked for."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:

        def begin(name: str) -> Callable[[float], None]:
            task = progress.add_task(name, total=1.0)
            return lambda share: progress.update(task, completed=share)

        yield begin
