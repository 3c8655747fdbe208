"""How the project's commands are started from a shell."""

import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from types import FrameType

from hydra.core.hydra_config import HydraConfig
from omegaconf import MissingMandatoryValue

from sim.config import ConfigError
from sim.traces import TraceError
from sim.workload import WorkloadError

_ASSIGNMENT = re.compile(r"(?P<key>[A-Za-z_]\w*(\.[\w.-]+)?)=")
_ENDS = (signal.SIGINT, signal.SIGTERM)


def run(main: Callable[[], None]) -> None:
    """Run a Hydra application whose settings are checked by a Spec.

    Hydra refuses a key that it does not know without saying which there are. Plain assignments
    are marked so that Hydra lets them pass; the Spec then refuses what is unknown, with its key,
    its value and what is allowed.
    """
    sys.argv[1:] = [_let_pass(argument) for argument in sys.argv[1:]]
    main()


@contextmanager
def ending_with_a_reason(interrupted: str) -> Iterator[None]:
    """End the command, in words, where its settings are refused or it is interrupted."""
    try:
        yield
    except MissingMandatoryValue as missing:
        sys.exit(f"refused: {missing.full_key} is missing")
    except (ConfigError, WorkloadError, TraceError, OSError) as refused:
        sys.exit(f"refused: {refused}")
    except KeyboardInterrupt:
        sys.exit(interrupted)


def line(module: str) -> str:
    """The command that is running, as a user would type it."""
    overrides = HydraConfig.get().overrides.task
    return shlex.join(["python", "-m", module, *(text.removeprefix("++") for text in overrides)])


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM came; a second one ends the process as it does by default."""
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        for end, handler in before.items():
            signal.signal(end, handler)

    before = {end: signal.signal(end, note) for end in _ENDS}
    try:
        yield lambda: asked
    finally:
        for end, handler in before.items():
            signal.signal(end, handler)


def _let_pass(argument: str) -> str:
    """`++` before an assignment that is neither Hydra's own nor the choice of a group."""
    match = _ASSIGNMENT.match(argument)
    if match is None:
        return argument
    key = match["key"]
    groups = {entry.name for entry in files("conf").iterdir() if entry.is_dir()}
    if key.startswith("hydra.") or key in groups:
        return argument
    return f"++{argument}"
