"""What happens when a request reaches the router: observe, decide, place."""

from dataclasses import replace
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Int64

from sim.observation import WINDOW_BITS, Observation, fits_alone
from sim.policy import SHED, Policy
from sim.router import SIGNALS
from sim.ticks import NEVER
from sim.types import Cluster, Outcome
from sim.vector.batch import held_blocks, limits_of
from sim.vector.device import interrupt, site, turns_of
from sim.vector.rows import read, write
from sim.vector.state import F_CACHED, F_MAX, F_PROMPT, Device, Replica, Requests, State
from sim.vector.turns import elapsed, passed, steps_of

_WAITING, _PREFILL, _DECODE = (SIGNALS.index(s) for s in SIGNALS[2:5])


def steps_passed(
    cluster: Cluster, state: State, device_replicas: Int32[Array, "D K"]
) -> tuple[Int32[Array, " R"], Bool[Array, " R"]]:
    """Steps of what runs on its device that each replica has completed; whether it is in one."""

    def progress(row: Int64[Array, " 11"], replicas: Int32[Array, " K"]) -> tuple[Array, Array]:
        device, where = Device(*row), site(state, replicas)
        turns = turns_of(cluster, where, device)
        runs = (device.busy_until != NEVER) & (device.forming == 0)
        since = jnp.where(runs, state.now - device.started, 0)
        done = jnp.minimum(passed(turns, since), device.steps)
        # a step with chunks shows nothing before its end
        done = jnp.where(runs & (device.steps > 1), done, 0)
        between = (elapsed(turns, done) == since) & (done > 0)
        own = steps_of(turns, done.astype(jnp.int32))
        running = (turns.rank == done % turns.replicas) & runs & ~between
        return jnp.where(runs, own, 0), running

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
    told = Replica(*state.ledger.T)
    decodes = jnp.where(told.decoding > 0, steps, 0)
    emitted = decodes * told.decoding
    counts = told.decode_count + decodes + in_step
    replicas = jnp.arange(cluster.n_replicas, dtype=jnp.int32)
    limits = jax.vmap(limits_of, in_axes=(None, 0))(cluster, replicas)
    held = jax.vmap(held_blocks)(limits, state.slots, counts)
    return jnp.stack(
        [
            told.running, told.decoding, told.waiting, told.prefill_tokens,
            told.decode_tokens - emitted, told.kv_tokens + emitted, jnp.sum(held, axis=1),
        ]
    ).astype(jnp.int64)  # fmt: skip


def snapshot(
    cluster: Cluster, state: State, device_replicas: Int32[Array, "D K"], on: Bool[Array, ""]
) -> State:
    """Take a snapshot of the signals (rule 15)."""
    known = jnp.where(on, signals(cluster, state, device_replicas), state.known)
    later = state.next_snapshot + cluster.signal_period_ticks
    return replace(state, known=known, next_snapshot=jnp.where(on, later, state.next_snapshot))


def observe(
    cluster: Cluster, requests: Requests, state: State, device_replicas: Int32[Array, "D K"],
    stale: bool,
) -> tuple[Observation, State]:  # fmt: skip
    """Count the arrival of the next request and describe it and the system; as `Router.observe`."""
    index, now = state.next_request, state.now
    task = requests.task[index]
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
    prompt_tokens, max_tokens = requests.facts[index, F_PROMPT], requests.facts[index, F_MAX]
    mask = cluster.alive & (told["waiting"] < cluster.max_queue)
    mask &= fits_alone(cluster, prompt_tokens, max_tokens)
    waited = now - requests.arrival[index]

    def slack(bound: Int64[Array, ""]) -> Int64[Array, ""]:
        return jnp.where(bound == NEVER, bound, bound - waited)

    observation = Observation(
        cluster=cluster,
        now_ticks=now,
        task=task,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        e2e_slack_ticks=slack(requests.e2e[index]),
        ttft_slack_ticks=slack(requests.ttft[index]),
        tpot_ticks=requests.tpot[index],
        grace_ticks=requests.grace,
        random_bits=requests.random_bits[index],
        **told,
        mask=mask,
        window_arrivals=current,
        previous_arrivals=previous,
        since_arrival_ticks=now - state.last_arrival,
        finished_requests=state.finished_requests,
        finished_tokens=state.finished_tokens,
    )
    counted = replace(
        state, window=window, window_arrivals=current, previous_arrivals=previous, last_arrival=now
    )
    return observation, counted


def arrive(
    cluster: Cluster, requests: Requests, state: State, policy: Policy,
    device_replicas: Int32[Array, "D K"], stale: bool, on: Bool[Array, ""],
) -> State:  # fmt: skip
    """Route the next request (rules 4 to 6)."""
    observation, counted = observe(cluster, requests, state, device_replicas, stale)
    action, policy_state = policy.decide(state.policy, observation)
    counted = replace(counted, policy=policy_state)
    state = cast(State, jax.tree.map(lambda new, old: jnp.where(on, new, old), counted, state))

    index, now = state.next_request, state.now
    facts = requests.facts[index]
    sent = action != SHED
    r = jnp.where(sent, action, 0).astype(jnp.int32)
    too_long = ~fits_alone(cluster, facts[F_PROMPT], facts[F_MAX])[r]
    row = Replica(*read(state.ledger, r))
    full = row.waiting >= cluster.max_queue[r]
    code = jnp.where(full, int(Outcome.REFUSED_FULL), 0)
    code = jnp.where(too_long, int(Outcome.REFUSED_TOO_LONG), code)
    code = jnp.where(sent, code, int(Outcome.SHED))
    placed = on & (code == 0)
    refused = on & (code != 0)

    ring = state.queue.shape[1]
    place = jnp.where(placed, (row.head + row.waiting) % ring, ring)
    prefill = facts[F_PROMPT] - facts[F_CACHED]
    row = row._replace(
        waiting=row.waiting + 1,
        prefill_tokens=row.prefill_tokens + prefill,
        decode_tokens=row.decode_tokens + facts[F_MAX],
    )
    record = jnp.stack([now, jnp.int64(-1), code.astype(jnp.int64), jnp.int64(0)])
    heads = jnp.where(placed & (row.waiting == 1), r, cluster.n_replicas)
    known = state.known
    if stale:
        more = jnp.zeros(len(SIGNALS), jnp.int64)
        more = more.at[_WAITING].set(1).at[_PREFILL].set(prefill).at[_DECODE].set(facts[F_MAX])
        known = jnp.where(on & sent, known.at[:, r].add(more), known)
    state = replace(
        state,
        known=known,
        ledger=write(state.ledger, r, jnp.stack(row), placed),
        queue=state.queue.at[r, place].set(index, mode="drop"),
        next_death=state.next_death.at[heads, 1].set(jnp.min(requests.deaths[index]), mode="drop"),
        record=write(state.record, index, record, refused),
        replica=write(state.replica, index, r, on & sent),
        left=state.left + jnp.where(refused, 1, 0),
        next_request=state.next_request + jnp.where(on, 1, 0),
    )
    device = cluster.replica_device[r]
    return interrupt(cluster, state, device, device_replicas[device], placed)
