"""How the project's commands are started from a shell."""

import re
import shlex
import sys
from collections.abc import Callable
from importlib.resources import files

from hydra.core.hydra_config import HydraConfig

_ASSIGNMENT = re.compile(r"(?P<key>[A-Za-z_]\w*(\.[\w.-]+)?)=")


def run(main: Callable[[], None]) -> None:
    """Run a Hydra application whose settings are checked by a Spec.

    Hydra refuses a key that it does not know without saying which there are. Plain assignments
    are marked so that Hydra lets them pass; the Spec then refuses what is unknown, with its key,
    its value and what is allowed.
    """
    sys.argv[1:] = [_let_pass(argument) for argument in sys.argv[1:]]
    main()


def line(module: str) -> str:
    """The command that is running, as a user would type it."""
    overrides = HydraConfig.get().overrides.task
    return shlex.join(["python", "-m", module, *(text.removeprefix("++") for text in overrides)])


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
