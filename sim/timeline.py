"""A run as a timeline in the Chrome trace event format, for https://ui.perfetto.dev.

A process per device and a thread per replica show every step; counters show queues, batches and
KV blocks; one more process shows the router's decisions, and each request from its arrival to its
last token. Times are simulated microseconds. Format: Trace Event Format, Google, 2016.
"""

import gzip
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from sim.files import whole
from sim.ticks import TICKS_PER_S
from sim.types import Outcome, Result, Steps

Event = dict[str, object]

MICROSECONDS = 1e6 / TICKS_PER_S


def write_timeline(result: Result, path: Path) -> None:
    """Write the timeline of a run with recorded steps, gzipped if `path` ends in `.gz`.

    Raises:
        ValueError: if the run did not record its steps.
    """
    if result.steps is None:
        raise ValueError("a timeline needs a run with record_steps=True")
    opener = gzip.open if path.suffix == ".gz" else open
    with whole(path) as draft, opener(draft, "wt", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        separator = ""
        for event in events(result, result.steps):
            file.write(separator + json.dumps(event))
            separator = ",\n"
        file.write("\n]}\n")


def events(result: Result, steps: Steps) -> Iterator[Event]:
    """All events of the timeline."""
    return chain(_tracks(result), _steps(result, steps), _requests(result))


def _tracks(result: Result) -> Iterator[Event]:
    """Names of the processes and threads; the router's process is 0, device d's is d + 1."""
    cluster = result.cluster
    yield _name("process_name", 0, 0, f"router ({cluster.profile_kind} profile)")
    yield _name("thread_name", 0, 0, "decisions")
    for device in range(cluster.n_devices):
        yield _name("process_name", device + 1, 0, f"gpu{device}")
    for replica in range(cluster.n_replicas):
        device = int(cluster.replica_device[replica])
        model = cluster.models[cluster.replica_model[replica]]
        yield _name("thread_name", device + 1, replica + 1, model)


def _steps(result: Result, steps: Steps) -> Iterator[Event]:
    """A slice for each step and a counter sample at its start."""
    cluster = result.cluster
    columns = (
        steps.start_ticks, steps.end_ticks, steps.replica, steps.decodes, steps.prefill_tokens,
        steps.kv_tokens, steps.waiting, steps.kv_blocks_used,
    )  # fmt: skip
    for start, end, replica, decodes, prefill, kv, waiting, blocks in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        process, model = int(cluster.replica_device[replica]) + 1, cluster.replica_model[replica]
        name = cluster.models[model]
        args = {"decodes": decodes, "prefill_tokens": prefill, "kv_tokens": kv}
        kind = "decode" if not prefill else ("mixed" if decodes else "prefill")
        yield {"ph": "X", "name": kind, "cat": "step", "pid": process, "tid": replica + 1,
               "ts": start * MICROSECONDS, "dur": (end - start) * MICROSECONDS,
               "args": args}  # fmt: skip
        for counter, value in (("batch", decodes), ("waiting", waiting), ("kv_blocks", blocks)):
            yield {"ph": "C", "name": f"{name} {counter}", "pid": process, "tid": 0,
                   "ts": start * MICROSECONDS, "args": {counter: value}}  # fmt: skip


def _requests(result: Result) -> Iterator[Event]:
    """An instant for each decision; a nestable pair of begin and end for each request placed."""
    workload, cluster = result.workload, result.cluster
    for index, (arrival, leave, replica, code) in enumerate(
        zip(workload.arrival_ticks.tolist(), result.leave_ticks.tolist(), result.replica.tolist(),
            result.outcome.tolist(), strict=True)
    ):  # fmt: skip
        decided = arrival + cluster.overhead_ticks
        if decided > result.end_ticks:
            continue
        outcome = Outcome(code).name.lower()
        place = cluster.replica_name(replica) if replica >= 0 else "shed"
        args = {
            "request": index,
            "task": workload.tasks[workload.task[index]],
            "prompt_tokens": int(workload.prompt_tokens[index]),
            "output_tokens": int(workload.output_tokens[index]),
            "outcome": outcome,
        }
        yield {"ph": "i", "name": place, "cat": "decision", "pid": 0, "tid": 0, "s": "t",
               "ts": decided * MICROSECONDS, "args": args}  # fmt: skip
        if replica < 0:
            continue
        end = leave if leave >= 0 else result.end_ticks
        common = {"cat": "request", "id": index, "pid": int(cluster.replica_device[replica]) + 1,
                  "tid": replica + 1, "name": f"request {index}"}  # fmt: skip
        yield {"ph": "b", "ts": arrival * MICROSECONDS, "args": args, **common}
        first = int(result.first_token_ticks[index])
        if first >= 0:
            yield {"ph": "n", "ts": first * MICROSECONDS, **common}
        yield {"ph": "e", "ts": end * MICROSECONDS, **common}


def _name(kind: str, process: int, thread: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "ts": 0, "args": {"name": name}}
