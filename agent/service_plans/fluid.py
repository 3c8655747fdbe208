"""What a service plan comes to if requests were a fluid: loads, losses and work in the way.

P plans, D devices, M models, R replicas, T tasks, S time scales.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from agent.rule import SPREAD_OF_TIMES, likely, short_enough, with_grace
from agent.service_plans.plan import Table
from sim.observation import Array, Observation
from sim.ticks import TICKS_PER_S

PRIOR = 8  # requests inside
LEVELS = 4  # of the gain for which a larger model is used
BATCHES = np.array([1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1])  # of the largest batch
HEADROOM = 0.85  # share of a device's capacity that it is to be loaded with at the most


def capacity_rps(observation: Observation) -> Float[Array, " M"]:
    """Requests that a device could answer in time per second with one model alone.

    0 for a model that has no replica. In each step of a batch every request decodes a token, and as
    many prompts are computed as requests leave: less than one in a step is one in a share of the
    steps. A device with one model alone never switches. Larger batches serve more, but each request
    in them more slowly: of some sizes the one of the most answers in time counts. Requests have the
    mean prompt of those that wait or decode now, in which the one observed counts as `PRIOR` of
    them.
    """
    xp, cluster = observation.xp, observation.cluster
    output = observation.expected_output_tokens
    decoding, inside = xp.sum(observation.decoding), xp.sum(observation.inside)
    prompts = xp.sum(observation.kv_tokens) - decoding * output / 2
    prompts = prompts + xp.sum(observation.prefill_tokens) + PRIOR * observation.prompt_tokens
    prompt = xp.maximum(prompts / (inside + PRIOR), 1.0)
    model = cluster.replica_model
    in_cache = cluster.kv_blocks * cluster.block_tokens / (prompt + output)
    most = xp.clip(in_cache, 1, cluster.max_batch)
    batch = xp.maximum(most * xp.asarray(BATCHES)[:, None], 1.0)  # [B, R]
    tokens = xp.minimum(batch * (1 + prompt / output), cluster.token_budget)
    cost = cluster.coefficients
    step = cost.host_ticks + cluster.tokens_ticks[model, xp.astype(tokens, int)]
    step = step + cost.kv_token_ticks * batch * (prompt + output / 2)
    step = step + cost.sequence_ticks * batch * (1 + 1 / output)
    step = step + xp.minimum(batch / output, 1.0) * cost.prompt_ticks
    rate_rps = tokens / (prompt + output) * TICKS_PER_S / step
    token_ticks = batch * TICKS_PER_S / (rate_rps * output)  # Little's law
    left_ticks = with_grace(observation.e2e_slack_ticks, observation)
    in_time = short_enough(left_ticks / token_ticks, observation)
    in_time = xp.minimum(in_time, likely(token_ticks / observation.tpot_ticks, SPREAD_OF_TIMES))
    goodput_rps = xp.max(rate_rps * in_time, axis=0)
    of_model = model == xp.arange(len(cluster.models))[:, None]
    return xp.max(xp.where(of_model, goodput_rps, 0.0), axis=1)


def alone_s(observation: Observation) -> Float[Array, " M"]:
    """Time that a request like this one takes of each model with a device to itself.

    Infinite for a model that has no replica.
    """
    xp, cluster = observation.xp, observation.cluster
    cost, model, prompt = cluster.coefficients, cluster.replica_model, observation.prompt_tokens
    output = observation.expected_output_tokens
    fixed = cost.host_ticks + cost.sequence_ticks
    decode = fixed + cluster.tokens_ticks[model, 1] + cost.kv_token_ticks * (prompt + output / 2)
    chunk = xp.minimum(prompt, cluster.token_budget)
    prefill = fixed + cost.prompt_ticks + cluster.tokens_ticks[model, chunk]
    ticks = prefill * xp.ceil(prompt / cluster.token_budget) + (output - 1) * decode
    of_model = model == xp.arange(len(cluster.models))[:, None]
    return xp.min(xp.where(of_model, ticks / TICKS_PER_S, xp.inf), axis=1)


def prospects(
    table: Table, rate_rps: Float[Array, " S"], mix: Float[Array, " T"],
    capacity: Float[Array, " M"], observation: Observation,
) -> tuple[Float[Array, "P S"], Float[Array, "P S"], Float[Array, "P S"]]:  # fmt: skip
    """Load of the larger models of each plan, of its smallest, and regret per request.

    What the larger models cannot serve goes to the smallest; what that cannot serve is lost.
    """
    xp, quality = observation.xp, quality_of(observation)
    n_models = quality.shape[0]
    models = xp.arange(n_models)
    count = (table.model[:, :, None] == models).sum(axis=1)  # [P, M] devices
    base = table.model.min(axis=1)
    floor = quality[base]  # [P, T]
    eligible = (count > 0)[:, :, None] & (
        (quality[None] - floor[:, None] >= table.price[:, None, None])
        | (models == base[:, None])[:, :, None]
    )
    target = xp.argmax(xp.where(eligible, quality[None], -1.0), axis=1)  # [P, T]
    goes = target[:, None, :] == models[:, None]  # [P, M, T]
    share = xp.sum(goes * mix, axis=2)  # [P, M]
    room = HEADROOM * count * capacity  # [P, M]
    is_base = models == base[:, None]
    demand = rate_rps[:, None] * share[:, None]  # [P, S, M]
    upper = xp.where(is_base[:, None], 0.0, demand)
    served = xp.minimum(upper, room[:, None])
    spilt = xp.where(is_base[:, None], demand, upper - served)  # what the base is to serve
    to_base = xp.sum(spilt, axis=2)
    base_room = xp.sum(xp.where(is_base, room, 0.0), axis=1)[:, None]
    upper_room = xp.sum(xp.where(is_base | (share == 0), 0.0, room), axis=1)[:, None]
    upper_load = xp.sum(upper, axis=2) / xp.maximum(upper_room, 1e-9)
    base_load = to_base / xp.maximum(base_room, 1e-9)
    # mean quality of the requests of each target, from the target and from the base in its place
    best = xp.sum(mix * xp.max(quality, axis=0))
    each = xp.maximum(share, 1e-9)
    by_target = xp.sum(goes * mix * quality[None], axis=2) / each  # [P, M]
    by_base = xp.sum(goes * mix * floor[:, None], axis=2) / each
    gained = xp.sum(served * by_target[:, None], axis=2)
    reached = xp.minimum(1.0, base_room / xp.maximum(to_base, 1e-9))
    kept = reached * xp.sum(spilt * by_base[:, None], axis=2)
    total = xp.maximum(rate_rps, 1e-9)
    regret = best - (gained + kept) / total
    return upper_load, base_load, regret


def best_prospects(
    model: Int[Array, "P D"], rate_rps: Float[Array, " S"], mix: Float[Array, " T"],
    capacity: Float[Array, " M"], observation: Observation,
) -> tuple[Float[Array, "P S"], Float[Array, "P S"], Float[Array, "P S"]]:  # fmt: skip
    """As `prospects` of partitions, with the least gain for a larger model that is best at a rate.

    The gains of the tasks are what there is to choose from, `LEVELS` of them at the most.
    """
    xp, quality = observation.xp, quality_of(observation)
    n_plans, n_tasks = model.shape[0], quality.shape[1]
    count = (model[:, :, None] == xp.arange(quality.shape[0])).sum(axis=1)
    most = xp.max(xp.where((count > 0)[:, :, None], quality[None], -xp.inf), axis=1)  # [P, T]
    gains = xp.sort(most - quality[model.min(axis=1)], axis=1)
    levels = np.unique(np.linspace(0, n_tasks - 1, LEVELS).astype(int))
    price = gains[:, levels]  # [P, L]
    table = Table(
        xp.repeat(model, len(levels), axis=0), price.reshape(-1), xp.zeros(0, dtype=xp.int32)
    )
    of_all = prospects(table, rate_rps, mix, capacity, observation)
    upper, base, regret = (part.reshape(n_plans, len(levels), -1) for part in of_all)
    best = xp.argmin(regret, axis=1)[:, None]
    return tuple(xp.take_along_axis(part, best, axis=1)[:, 0] for part in (upper, base, regret))


def quality_of(observation: Observation) -> Float[Array, "M T"]:
    """Quality of each model on each task."""
    quality: Float[Array, "M T"] = observation.xp.asarray(observation.cluster.quality)
    return quality


def drains_s(capacity: Float[Array, " M"], observation: Observation) -> Float[Array, " R"]:
    """Device time that the requests inside each replica still take, the running half done."""
    xp, model = observation.xp, observation.cluster.replica_model
    work = observation.waiting + observation.running / 2
    return work / xp.maximum(xp.asarray(capacity)[model], 1e-9)


def in_the_way(
    model: Int[Array, "P D"], drain_s: Float[Array, " R"], observation: Observation
) -> tuple[Float[Array, " P"], Float[Array, " P"], Float[Array, " P"]]:
    """Work in seconds per device that a plan finds before it.

    On the devices of its smallest model, on the others, and, all devices together, of models that
    it does not serve where they are.
    """
    xp, cluster = observation.xp, observation.cluster
    on_device = cluster.replica_device == xp.arange(cluster.n_devices)[:, None]  # [D, R]
    per_device = xp.sum(on_device * drain_s, axis=1)
    is_base = model == model.min(axis=1)[:, None]  # [P, D]
    n_base, n_upper = is_base.sum(axis=1), (~is_base).sum(axis=1)
    base = xp.sum(is_base * per_device, axis=1) / xp.maximum(n_base, 1)
    upper = xp.sum(~is_base * per_device, axis=1) / xp.maximum(n_upper, 1)
    foreign: Bool[Array, "P R"] = model[:, cluster.replica_device] != cluster.replica_model
    other = xp.sum(foreign * drain_s, axis=1) / cluster.n_devices
    return base, upper, other


def squashed(values: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Loads and times on a scale from 0 to 1: x / (1 + x)."""
    return values / (1 + values)
