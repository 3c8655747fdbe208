"""What happens when a request reaches the router: observe, decide, place."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Int64

from sim.observation import WINDOW_BITS, Observation, fits_alone
from sim.policy import SHED
from sim.router import SIGNALS
from sim.ticks import NEVER
from sim.types import Cluster, Outcome
from sim.vector import fifo_step, vllm_step
from sim.vector.batch import limits_of
from sim.vector.device import Site, runs, turns_of
from sim.vector.rows import rows_of
from sim.vector.state import CONTEXT, F_MAX, F_PROMPT, Device, Requests, State
from sim.vector.turns import elapsed, passed, steps_of


class Asking(NamedTuple):
    """The request that is at the router."""

    arrival: Int64[Array, ""]
    task: Int32[Array, ""]
    facts: Int32[Array, " 4"]
    deaths: Int64[Array, " 2"]
    e2e: Int64[Array, ""]
    ttft: Int64[Array, ""]
    tpot: Int64[Array, ""]
    random_bits: Int64[Array, ""]
    grace: Int64[Array, ""]


def asking(requests: Requests, lane: Array, index: Array) -> Asking:
    """Request `index` of each lane of a batch."""
    one = {name: getattr(requests, name)[lane, index] for name in Asking._fields[:-1]}
    return Asking(**one, grace=requests.grace[lane])


def steps_passed(
    cluster: Cluster, state: State, device_replicas: Int32[Array, "D K"]
) -> tuple[Int32[Array, " R"], Bool[Array, " R"]]:
    """Steps of what runs on its device that each replica has completed; whether it is in one."""

    def progress(row: Int64[Array, " 11"], replicas: Int32[Array, " K"]) -> tuple[Array, Array]:
        device = Device(*row)
        where = Site(replicas, rows_of(state.ledger[replicas]), state.next_death[replicas])
        turns = turns_of(cluster, where, device)
        since = jnp.where(runs(device), jnp.maximum(state.now - device.started, 0), 0)
        done = jnp.minimum(passed(turns, since), device.steps)
        # a step with chunks shows nothing before its end
        done = jnp.where(runs(device) & (device.steps > 1), done, 0)
        between = (elapsed(turns, done) == since) & (done > 0)
        own = steps_of(turns, done.astype(jnp.int32))
        running = (turns.rank == done % turns.replicas) & runs(device) & ~between
        return jnp.where(runs(device), own, 0), running

    own, running = jax.vmap(progress)(state.devices, device_replicas)
    flat = device_replicas.reshape(-1)
    target = jnp.where(flat >= 0, flat, cluster.n_replicas)
    steps = jnp.zeros(cluster.n_replicas, jnp.int32).at[target].set(own.reshape(-1), mode="drop")
    in_step = jnp.zeros(cluster.n_replicas, bool).at[target].set(running.reshape(-1), mode="drop")
    return steps, in_step


def signals(
    cluster: Cluster, state: State, device_replicas: Int32[Array, "D K"]
) -> Int64[Array, "7 R"]:
    """What the replicas report now, every boundary passed inside a leap included (rule 14)."""
    steps, in_step = steps_passed(cluster, state, device_replicas)
    told = rows_of(state.ledger)
    decodes = jnp.where(told.decoding > 0, steps, 0)
    emitted = decodes * told.decoding
    counts = told.decode_count + decodes + in_step
    replicas = jnp.arange(cluster.n_replicas, dtype=jnp.int32)
    limits = jax.vmap(limits_of, in_axes=(None, 0))(cluster, replicas)
    if cluster.scheduler == "vllm":
        held = jax.vmap(vllm_step.held_blocks)(limits, told, state.slots[:, CONTEXT], counts)
    else:
        held = jnp.sum(jax.vmap(fifo_step.held_blocks)(limits, state.slots, counts), axis=1)
        stalled, context = fifo_step.stalled(state.slots)
        told = told._replace(decoding=told.decoding + stalled, kv_tokens=told.kv_tokens + context)
    rows = [
        told.running, told.decoding, told.waiting, told.prefill_tokens,
        told.decode_tokens - emitted, told.kv_tokens + emitted, held,
    ]  # fmt: skip
    # each for itself, so that XLA sees which of them nobody asks for
    return jnp.stack([row.astype(jnp.int64) for row in rows])


class Counted(NamedTuple):
    """The router's own counts, this arrival included."""

    window: Int64[Array, " S"]
    window_arrivals: Int64[Array, "S T"]
    previous_arrivals: Int64[Array, "S T"]
    last_arrival: Int64[Array, ""]


def observe(
    cluster: Cluster, state: State, request: Asking, device_replicas: Int32[Array, "D K"],
    stale: bool,
) -> tuple[Observation, Counted]:  # fmt: skip
    """Count the arrival of a request and describe it and the system; as `Router.observe`."""
    now, task = state.now, request.task
    bits = jnp.asarray(WINDOW_BITS)
    window = now >> bits
    same, adjacent = window == state.window, window == state.window + 1
    previous = jnp.where(
        same[:, None],
        state.previous_arrivals,
        jnp.where(adjacent[:, None], state.window_arrivals, 0),
    )
    current = jnp.where(same[:, None], state.window_arrivals, 0).at[:, task].add(1)
    known = state.known if stale else signals(cluster, state, device_replicas)
    told = dict(zip(SIGNALS, known, strict=True))
    prompt_tokens, max_tokens = request.facts[F_PROMPT], request.facts[F_MAX]
    mask = cluster.alive & (told["waiting"] < cluster.max_queue)
    mask &= fits_alone(cluster, prompt_tokens, max_tokens)
    waited = now - request.arrival

    def slack(bound: Int64[Array, ""]) -> Int64[Array, ""]:
        return jnp.where(bound == NEVER, bound, bound - waited)

    observation = Observation(
        cluster=cluster,
        now_ticks=now,
        task=task,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        e2e_slack_ticks=slack(request.e2e),
        ttft_slack_ticks=slack(request.ttft),
        tpot_ticks=request.tpot,
        grace_ticks=request.grace,
        random_bits=request.random_bits,
        **told,
        mask=mask,
        window_arrivals=current,
        previous_arrivals=previous,
        since_arrival_ticks=now - state.last_arrival,
        finished_requests=state.finished_requests,
        finished_tokens=state.finished_tokens,
    )
    if cluster.shed_late:
        observation = observation.without_late()
    return observation, Counted(window, current, previous, now)


def verdict(
    cluster: Cluster, request: Asking, waiting: Int32[Array, ""], r: Int32[Array, ""],
    action: Int32[Array, ""],
) -> Int32[Array, ""]:  # fmt: skip
    """The outcome of a request that is shed or refused, INSIDE if it is placed (rules 5 and 6)."""
    too_long = ~fits_alone(cluster, request.facts[F_PROMPT], request.facts[F_MAX])[r]
    code = jnp.where(waiting >= cluster.max_queue[r], int(Outcome.REFUSED_FULL), 0)
    code = jnp.where(too_long, int(Outcome.REFUSED_TOO_LONG), code)
    return jnp.where(action == SHED, int(Outcome.SHED), code)
