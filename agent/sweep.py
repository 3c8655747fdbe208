"""A job of a sweep: a folder of its own, and a record of what became of it.

`python -m agent.train -m …` runs a job for each combination. One that fails is recorded and does
not end the others; the same command again runs those that are not done. `agent.gather` reads the
records.
"""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sim.config import Spec
from sim.files import whole

RECORD = "job.json"
Status = Literal["running", "done", "failed"]


class JobRecord(Spec):
    """What became of a job; `running` with nobody at it: it was killed."""

    program: str  # such as agent.train
    overrides: tuple[str, ...]
    status: Status
    reason: str  # why it failed


def enter() -> None:
    """Go, as a worker of a cluster, to the folder where the sweep was started."""
    os.chdir(os.environ["SWEEP_FOLDER"])


def perform(config: DictConfig, program: str, main: Callable[[DictConfig], None]) -> None:
    """Run a program; in a sweep as one of its jobs.

    Args:
        config: Composed by Hydra; its `output_dir` becomes the job's own folder.
        program: The module.
        main: Runs it, and ends by `sys.exit` with a reason where it fails.
    """
    of_hydra = HydraConfig.get()
    if of_hydra.mode != RunMode.MULTIRUN:
        main(config)
        return
    folder = Path(of_hydra.runtime.output_dir)
    overrides = tuple(of_hydra.overrides.task)
    file = folder / RECORD

    def note(status: Status, reason: str = "") -> None:
        record = JobRecord(program=program, overrides=overrides, status=status, reason=reason)
        with whole(file) as draft:
            draft.write_text(record.model_dump_json(indent=1) + "\n", "utf-8")

    name = " ".join(overrides)
    if config.resume and file.is_file():
        known = JobRecord.model_validate_json(file.read_bytes())
        if known.status == "done" and known.overrides == overrides:
            print(f"done before: {name}")
            return
    note("running")
    OmegaConf.update(config, "output_dir", str(folder))
    try:
        main(config)
    except SystemExit as ended:
        if ended.code and not isinstance(ended.code, str):
            raise  # by a scheduler, which puts the job back into its queue
        if ended.code:
            note("failed", ended.code)
            print(f"failed: {name}: {ended.code}")
            return
    except Exception as error:  # whatever it is, the other jobs go on
        note("failed", f"{type(error).__name__}: {error}")
        (folder / "error.txt").write_text(traceback.format_exc(), "utf-8")
        print(f"failed: {name}: {error!r}; see {folder / 'error.txt'}")
        return
    note("done")
