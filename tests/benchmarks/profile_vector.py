"""Prints where the time of an iteration of the JAX engine goes: by stage, then by kernel.

Before it how many times the requests of the SimPy engine it plays, both in processor time, and how
many it would play if the memory that a request cannot do without were all that took time.

`python -m tests.benchmarks.profile_vector [clusters [load]]`, 256 clusters at load 0.9 if not
given, on one core. Bytes are those that a kernel writes; being traced makes small kernels slower.
"""

import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from agent.baselines import Uniform
from sim.cluster import simulate
from sim.types import Cluster
from sim.vector.simulate import engine_for, play
from sim.vector.state import Requests
from tests.benchmarks.test_vector import game

STAGES = ("next_event", "end", "emit", "look", "form", "snapshot", "arrive")  # the first in a path
KERNEL = re.compile(r"%(\S+) = ([a-z]+)(\d*)\[([\d,]*)\].*[{ ]op_name=\"([^\"]*)\"")


def main(clusters: int = 256, load: float = 0.9, most: int = 25) -> None:
    cluster, requests, bounds, workload = game(clusters, load)
    run = jax.jit(lambda requests: play(cluster, lambda _: Uniform(), None, requests))
    run = run.lower(requests).compile()
    jax.block_until_ready(run(requests))
    simpy_s = _seconds(lambda: simulate(cluster, workload, bounds, Uniform()))
    jax_s = _seconds(lambda: jax.block_until_ready(run(requests)))
    routed = int(requests.count.sum())
    print(f"{clusters * simpy_s / jax_s:.1f} times the SimPy engine at load {load}")
    print(
        f"{routed / jax_s:,.0f} requests/s; memory alone: {_most_rps(cluster, requests):,.0f}, "
        f"{_bytes_of_request(cluster, requests):,} bytes a request"
    )
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run(requests))
        (path,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(path))

    spent, calls, stages, kernels = Counter(), Counter(), Counter(), {}
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                spent[event.name] += event.duration_ns / 1000
                calls[event.name] += 1
    for name, _, bits, shape, path in KERNEL.findall(run.as_text()):
        if spent[name] and not name.startswith("while"):
            stage = next((s for s in STAGES if s in path.split("/")), "other")
            size = prod(int(n) for n in shape.split(",") if n) * int(bits or 8) // 8
            kernels[name] = (stage, size, f"{path.split('/')[-1]} [{shape}]")
            stages[stage] += spent[name]
    iterations = max(calls[name] for name in kernels)
    total, console = stages.total(), Console(width=100)

    by_stage = Table("stage", "µs an iteration", "share", "kernels")
    for stage, spent_us in stages.most_common():
        count = sum(kernel[0] == stage for kernel in kernels.values())
        by_stage.add_row(
            stage, f"{spent_us / iterations:.0f}", f"{spent_us / total:.0%}", str(count)
        )
    by_kernel = Table("kernel", "stage", "µs", "share", "bytes", title=f"{iterations} iterations")
    for name in sorted(kernels, key=lambda name: -spent[name])[:most]:
        stage, size, what = kernels[name]
        share = f"{spent[name] / total:.1%}"
        by_kernel.add_row(what, stage, f"{spent[name] / iterations:.1f}", share, f"{size:,}")
    console.print(by_stage, by_kernel)


def _bytes_of_request(cluster: Cluster, requests: Requests) -> int:
    """The least that is read and written for a request, in bytes.

    When it comes, it is read itself, the ledger of all replicas, and the counts of arrivals; the
    counts, and the rows of its replica and device, are written. When it is admitted and when it
    finishes, the slots of its replica are read and written, and those rows again.
    """
    engine = engine_for(cluster, Uniform())
    one = jax.tree.map(lambda leaf: leaf[0], requests)
    state = jax.eval_shape(engine.start, jax.tree.map(jnp.asarray, cluster), one)

    def row(leaf: jax.ShapeDtypeStruct) -> int:
        return prod(leaf.shape[1:]) * leaf.dtype.itemsize

    def whole(leaf: jax.ShapeDtypeStruct) -> int:
        return prod(leaf.shape) * leaf.dtype.itemsize

    itself = sum(row(leaf) for leaf in jax.tree.leaves(one) if leaf.ndim)
    counts = whole(state.window_arrivals) + whole(state.previous_arrivals)
    rows = row(state.ledger) + row(state.devices) + row(state.next_death)
    comes = itself + whole(state.ledger) + 2 * counts + rows + state.queue.dtype.itemsize
    slots = row(state.slots) + row(state.times) + row(state.spare)
    return comes + 2 * (2 * slots + 2 * rows + row(state.record))


def _most_rps(cluster: Cluster, requests: Requests) -> float:
    """Requests per second at the pace at which this core copies a large array."""
    size = 1 << 25
    copy = jax.jit(lambda values: values + 1)
    values = jax.block_until_ready(copy(jnp.zeros(size)))
    pace = 2 * values.nbytes / _seconds(lambda: jax.block_until_ready(copy(values)))
    return pace / _bytes_of_request(cluster, requests)


def _seconds(job: Callable[[], object], rounds: int = 4) -> float:
    """Processor time of the fastest of some rounds."""
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        job()
        spent.append(time.process_time() - start)
    return min(spent)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(*map(int, given[:1]), *map(float, given[1:2]))
