"""A Markov decision process per rate: which model to add to how much backlog.

Source: RAMSIS (Mendoza et al., "Model selection for latency-critical inference serving", EuroSys
2024), which solves one for queue length and least slack by value iteration, per arrival rate, and
looks the model up. Here devices take requests at once: the state is the device time that those
inside still need, an arrival adds a model's share, and the time to the next arrival takes away.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array as JaxArray
from jaxtyping import Bool, Float, Float32, Int, Int64

from agent.holder import Holder
from agent.rule import least, scale_of, tightest
from agent.service_plans import fluid
from sim.config import ConfigError
from sim.observation import Array, Observation
from sim.policy import SHED
from sim.ticks import TICKS_PER_S, to_ticks
from sim.types import Cluster

CELLS = 96  # of backlog, up to twice the slack
ROUNDS = 200  # of value iteration
QUANTILES = 16  # of the time to the next arrival
LONGEST_S = 60.0  # of slack
SHARE = 0.2  # of the slack at a solution in the running mean


class Values(NamedTuple):
    """The solution in force."""

    after: Float32[Array, " CELLS"]  # value of each backlog right after a decision
    cell_s: Float32[Array, ""]  # backlog of a cell
    slack_s: Float32[Array, ""]  # that requests have, a running mean
    until: Int64[Array, ""]  # the tick from which on there is another


class BacklogMdp(Holder[Values]):
    """Takes the replica whose reward and backlog are worth most; sheds where none is worth it.

    Devices are alike and independent, each with its share of the arrivals. The process is solved
    for the arrival rates, lengths and slack that are observed, again and again.
    """

    name = "backlog_mdp"

    def __init__(
        self, interval_s: float = 1.0, discount: float = 0.98, window_s: float = 1.0,
        margin: float = 1.0,
    ) -> None:  # fmt: skip
        """Settings of the rule.

        Args:
            interval_s: Between two solutions.
            discount: Of the value of the next arrival.
            window_s: Time scale of the arrival rate estimate, one of `WINDOWS_S`.
            margin: Times the estimated rate.
        """
        if not interval_s > 0:
            raise ConfigError("policy.interval_s", interval_s, "must be above 0")
        if not 0 <= discount < 1:
            raise ConfigError("policy.discount", discount, "must be ≥ 0 and below 1")
        if not margin > 0:
            raise ConfigError("policy.margin", margin, "must be above 0")
        super().__init__(interval_s)
        self._interval_ticks, self._scale = to_ticks(interval_s), scale_of(window_s)
        self._discount, self._margin = discount, margin

    def init(self, cluster: Cluster) -> Values:
        """Values that are due to be found."""
        return Values(np.zeros(CELLS, np.float32), np.float32(1), np.float32(1), np.int64(0))

    def due(self, state: Values, now_ticks: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether the solution has been in force for long enough."""
        return now_ticks >= state.until

    def renew(self, state: Values, observation: Observation) -> Values:
        """The values at what is observed now."""
        xp, cluster = observation.xp, observation.cluster
        slack_s = xp.clip(tightest(observation) / TICKS_PER_S, 0.01, LONGEST_S)
        # the slack of one request may be unlike the others'
        known = state.until > 0
        slack_s = xp.where(known, (1 - SHARE) * state.slack_s + SHARE * slack_s, slack_s)
        rates = self._margin * observation.arrival_rate_rps[self._scale] / cluster.n_devices
        most = xp.max(cluster.max_batch)
        process = (
            rates, fluid.capacity_rps(observation), fluid.alone_s(observation), most, slack_s,
            fluid.quality_of(observation),
        )  # fmt: skip
        after, cell_s = solve(*process, self._discount)
        until = observation.now_ticks + self._interval_ticks
        slack = xp.asarray(slack_s, dtype=xp.float32)
        return Values(xp.asarray(after), xp.asarray(cell_s), slack, xp.asarray(until))

    def act(self, state: Values, observation: Observation) -> Int[Array, ""]:
        """See the class."""
        xp, cluster = observation.xp, observation.cluster
        capacity = fluid.capacity_rps(observation)
        busy_s = cluster.same_device @ fluid.drains_s(capacity, observation)
        added_s = 1 / xp.maximum(capacity, 1e-9)[cluster.replica_model]
        cells = xp.arange(CELLS) * state.cell_s
        before = xp.interp(busy_s, cells, state.after)
        after = xp.interp(busy_s + added_s, cells, state.after)
        score = observation.quality * observation.predicted_on_time + after - before
        choice = least(observation, -score, observation.mask)
        worth = xp.where(observation.mask, score, -1.0).max() > 0
        return xp.where(worth, choice, SHED)


@jax.jit
def solve(
    rates_rps: Float[Array, " T"], capacity_rps: Float[Array, " M"], alone_s: Float[Array, " M"],
    max_batch: Int[Array, ""], slack_s: Float[Array, ""], quality: Float[Array, "M T"],
    discount: float,
) -> tuple[Float32[JaxArray, " CELLS"], Float32[JaxArray, ""]]:  # fmt: skip
    """Value of each backlog right after a decision, by value iteration, and a cell's width.

    A request that joins a backlog takes the time that it takes alone, stretched up to that of a
    full batch as the backlog fills one, and waits for what is beyond. It earns its quality if that
    is within the slack. Backlog of a model without capacity cannot be added.
    """
    given = (rates_rps, capacity_rps, alone_s, slack_s, quality)
    rates_rps, capacity_rps, alone_s, slack_s, quality = (
        jnp.asarray(part, jnp.float32) for part in given
    )
    per_cell = 2 * slack_s / (CELLS - 1)
    backlog = (jnp.arange(CELLS) * per_cell).astype(jnp.float32)
    added = 1 / jnp.maximum(capacity_rps, 1e-9)
    full = max_batch * added
    fill = jnp.minimum(backlog[:, None] / full, 1.0)
    waits = jnp.maximum(backlog[:, None] - full, 0)
    takes = alone_s + fill * jnp.maximum(full - alone_s, 0) + waits
    reward = (takes <= slack_s)[:, :, None] * quality  # [CELLS, M, T]
    total = jnp.maximum(jnp.sum(rates_rps), 1e-9)
    mix = rates_rps / total
    gaps = -jnp.log1p(-(jnp.arange(QUANTILES) + 0.5) / QUANTILES) / total
    able = (capacity_rps > 0)[:, None]

    def after(values: JaxArray) -> JaxArray:
        left = jnp.maximum(backlog[:, None] - gaps, 0.0)
        found: JaxArray = discount * jnp.interp(left, backlog, values).mean(axis=1)
        return found

    def improve(_: int, values: JaxArray) -> JaxArray:
        later = after(values)
        then = jnp.interp(backlog[:, None] + added, backlog, later)  # [CELLS, M]
        each = jnp.where(able, reward + then[:, :, None], -jnp.inf)
        best = jnp.maximum(each.max(axis=1), later[:, None])
        mean: JaxArray = best @ mix
        return mean

    values = jax.lax.fori_loop(0, ROUNDS, improve, jnp.zeros(CELLS))
    return after(values).astype(jnp.float32), per_cell.astype(jnp.float32)
