"""A worker as a process: `python -m live.workers.process FD PARENT SETTINGS`, started by a gateway.

FD is its end of a socket pair, PARENT the gateway's process id, SETTINGS a `DeviceSpec` as JSON.
It ends when the gateway does, in whatever way: Linux kills it, elsewhere its connection ends.
SIGTERM lets it finish what is inside; an interrupt from a terminal is the gateway's to act on.
"""

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

from live.workers.device import DeviceSpec
from live.workers.loop import Hosted, Worker
from live.workers.messages import Broken, Ready, ServedModel, encode
from sim.config import ConfigError

PR_SET_PDEATHSIG = 1

Load = Callable[[DeviceSpec], tuple[list[Hosted], Ready]]

_log = logging.getLogger(__name__)


def load(spec: DeviceSpec) -> tuple[list[Hosted], Ready]:
    """The engines of a device, warm, and what they are.

    Raises:
        ConfigError: for a device, a model or a setting that cannot be had.
    """
    import torch  # slow: a parent that dies meanwhile is noticed by now

    from calibrate.engine import Engine
    from calibrate.machine import device_name, find_device, use_cores
    from calibrate.memory import spare_the_collector

    device = find_device(spec.device)
    use_cores(spec.threads, spec.cores)
    if device.type == "cpu" and spec.niceness:
        let_others_first(spec.niceness)
    engines = {
        name: Engine(hosted.source, device, hosted.engine) for name, hosted in spec.models.items()
    }
    for engine in engines.values():
        engine.submit("warm", [0] * min(8, engine.max_context - 2), 2)
        while engine.step() is not None:
            pass
    spare_the_collector()
    models = [
        ServedModel(
            name=name,
            max_context=engine.max_context,
            vocab_size=engine.vocab_size,
            kv_tokens=engine.kv_capacity_tokens,
            block_tokens=engine.spec.block_tokens,
            max_batch=engine.spec.max_batch,
            token_budget=engine.spec.token_budget,
            load_s=engine.load_s,
        )
        for name, engine in engines.items()
    ]
    cores = len(os.sched_getaffinity(0))
    ready = Ready(models, device_name(device), os.getpid(), torch.get_num_threads(), cores)
    return [*engines.values()], ready


def let_others_first(niceness: int) -> None:
    """Have Linux run a gateway on the same core first: it wants little time, but at once.

    A worker that a message wakes would otherwise begin at once, and one that computes would go on:
    the gateway would wait for the next tick of the scheduler, 4 ms and more.
    """
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        os.nice(niceness)


def serve(
    connection: Connection, spec: DeviceSpec, load: Load, tell: Callable[[Worker], object]
) -> None:
    """Load the models and serve until the gateway ends or says so.

    Args:
        connection: To the gateway, which is told of whatever goes wrong.
        spec: What to host.
        load: Loads it.
        tell: Given the worker before it serves.
    """
    try:
        try:
            engines, ready = load(spec)
            worker = Worker(connection, engines)
            tell(worker)
            connection.send_bytes(encode(ready))
            worker.run()
            worker.close()
        except (EOFError, ConnectionError):
            _log.info("the gateway has gone")
        except ConfigError as error:
            connection.send_bytes(encode(Broken(str(error), refused=True)))
        except Exception as error:
            _log.exception("the worker ends")
            reason = f"{type(error).__name__}: {error}"
            connection.send_bytes(encode(Broken(reason, refused=False)))
    except ConnectionError:
        _log.info("the gateway has gone")


def die_with(parent: int) -> None:
    """Let Linux kill this process when its parent's thread ends that started it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the gateway ended before its worker began")


def main(load: Load = load) -> None:
    """Serve the gateway that started this process."""
    fd, parent, settings = sys.argv[1:]
    die_with(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(format="%(asctime)s %(levelname)s worker %(process)d: %(message)s")
    spec = DeviceSpec.model_validate_json(settings)

    def drain_when_told(worker: Worker) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: worker.drain(spec.drain_s))

    serve(Connection(int(fd)), spec, load, drain_when_told)


if __name__ == "__main__":
    main()
