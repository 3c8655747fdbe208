"""The progress bars of measurements: shares of work done, and the time left."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


class Tell(Protocol):
    """Moves a bar."""

    def __call__(self, share: float, note: str = "") -> None:
        """To the share of the work that is done; `note` stands after the time left."""
        ...


Begin = Callable[[str], Tell]  # a bar of this name


@contextmanager
def bars(console: Console) -> Iterator[Begin]:
    """Room for bars; a bar begins when it is asked for."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:

        def begin(name: str) -> Tell:
            task = progress.add_task(name, total=1.0, note="")

            def tell(share: float, note: str = "") -> None:
                progress.update(task, completed=share, note=note)

            return tell

        yield begin
