"""A cell in the simulator: the same clients, one step after the other, by the scheduler's rules.

`sim.cluster` plays arrivals that are known beforehand; here a client's next request depends on when
its last was answered, so the loop is closed around a replica. Nothing that was measured of a cell
goes in but when its clients began, and how long its prompts were.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush

import numpy as np
from jaxtyping import Float64

from calibrate.black_box.client import Answer
from calibrate.black_box.sweep import Played
from sim.config import ConfigError
from sim.deploy import ClusterSpec, ReplicaSpec, build_cluster
from sim.profile import Bundle, TaskQuality
from sim.replica import Request
from sim.ticks import NEVER, TICKS_PER_S, to_ticks
from sim.transformers_fifo import TransformersFifoReplica
from sim.types import Cluster, Outcome, Scheduler
from sim.vllm import VllmReplica

TASK = "sweep"
LATENCIES: Mapping[str, Callable[[Answer], float]] = {
    "time to first token": lambda a: a.token_s[0] - a.sent_s,
    "time per output token": lambda a: (a.token_s[-1] - a.token_s[0]) / (len(a.token_s) - 1),
    "end-to-end latency": lambda a: a.token_s[-1] - a.sent_s,
}
STATISTICS: Mapping[str, Callable[[Float64[np.ndarray, " N"]], float]] = {
    "mean": lambda values: float(values.mean()),
    "P95": lambda values: float(np.percentile(values, 95)),
}


def latencies(answers: Sequence[Answer]) -> Iterator[tuple[str, str, float]]:
    """Each statistic of each latency of a cell, in seconds."""
    for latency, of in LATENCIES.items():
        values = np.array([of(answer) for answer in answers if len(answer.token_s) > 1])
        for statistic, reduce in STATISTICS.items():
            yield latency, statistic, reduce(values)


def deploy(bundle: Bundle, server: ReplicaSpec, scheduler: Scheduler, overhead_s: float) -> Cluster:
    """The server as a simulated device with one replica.

    Raises:
        ConfigError: if the bundle cannot say what its steps take.
    """
    (model,) = bundle.models
    quality = {TASK: TaskQuality(metric="none", source="none", values={model: 1.0})}
    settings = server.model_dump() | {"max_queue": 2**20}
    spec = ClusterSpec(
        profile=bundle.meta.device, devices=1, models=(model,), overhead_s=overhead_s,
        cancel_expired=False, scheduler=scheduler, **settings,
    )  # fmt: skip
    return build_cluster(spec, replace(bundle, quality=quality), (TASK,))


def predict(cluster: Cluster, played: Played) -> tuple[Answer, ...]:
    """A cell's answers, by the simulator.

    Raises:
        ConfigError: as `closed_loop`.
    """
    wanted = [(answer.prompt_tokens, len(answer.token_s)) for answer in played.answers]
    clients = played.cell.concurrency
    return closed_loop(cluster, wanted, [a.sent_s for a in played.answers[:clients]])


def closed_loop(
    cluster: Cluster, wanted: Sequence[tuple[int, int]], begin_s: Sequence[float]
) -> tuple[Answer, ...]:
    """Requests of clients that each send the next one when their last is answered.

    A request is on its way for the cluster's `overhead_s`.

    Args:
        cluster: One replica.
        wanted: Prompt and output tokens of each request, in the order in which they are sent.
        begin_s: When each client sends its first.

    Raises:
        ConfigError: if the replica refuses a request.
    """
    finished: list[int] = []

    def leave(request: Request, outcome: Outcome) -> None:
        finished.append(request.index)

    kind = VllmReplica if cluster.scheduler == "vllm" else TransformersFifoReplica
    replica = kind(cluster, 0, hard=True, leave=leave)
    sent = [to_ticks(at) for at in begin_s]
    coming = [(at + cluster.overhead_ticks, index) for index, at in enumerate(sent)]
    heapify(coming)
    tokens: list[list[int]] = [[] for _ in wanted]
    now = 0
    while coming or replica.has_work():
        while coming and coming[0][0] <= now:
            _, index = heappop(coming)
            replica.enqueue(_request(replica, index, wanted[index]))
        step = replica.form_step(now, switches=False) if replica.has_work() else None
        if step is None:
            now = coming[0][0]
            continue
        now += step.ticks
        running = list(replica.running.values())
        replica.end_step(step, now)
        for request in running:
            if replica.emitted(request) > len(tokens[request.index]):
                tokens[request.index].append(now)
        for _ in finished:
            if len(sent) < len(wanted):
                heappush(coming, (now + cluster.overhead_ticks, len(sent)))
                sent.append(now)
        finished.clear()
    return tuple(
        Answer(prompt, at / TICKS_PER_S, tuple(t / TICKS_PER_S for t in of_request))
        for (prompt, _), at, of_request in zip(wanted, sent, tokens, strict=True)
    )


def _request(
    replica: VllmReplica | TransformersFifoReplica, index: int, wanted: tuple[int, int]
) -> Request:
    prompt, output = wanted
    if replica.refusal(prompt, output) is not None:
        raise ConfigError(
            "black_box.server", f"{prompt} + {output} tokens",
            f"max_context = {replica.max_context}, KV cache of "
            f"{replica.kv_blocks * replica.block_tokens}: the server held what this replica cannot",
        )  # fmt: skip
    return Request(index, 0, prompt, output, output, 0, NEVER, NEVER)
