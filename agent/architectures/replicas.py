"""A router that scores every replica for each request, with one set of weights for any cluster."""

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Annotated, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32, Int, Int32
from pydantic import Field

from agent.architectures.network import Mlp
from sim.config import Spec, check
from sim.observation import Array, Observation
from sim.policy import SHED
from sim.types import Cluster

MOST = 4.0  # ratios beyond it look the same


class ReplicasSpec(Spec):
    """Settings of the architecture."""

    embedding: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)  # of each replica
    widths: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)  # of the heads


class Sight(NamedTuple):
    """What the network is shown: each replica, the whole cluster, and who shares a device."""

    replicas: Float32[Array, "R F"]
    whole: Float32[Array, " G"]
    device: Int32[Array, " R"]


class Replicas:
    """Sends a request to the replica of the highest value, or sheds it: R + 1 choices.

    A replica is described by what it would do for this request and by what is in it, a model by
    its step times and quality alone: nothing depends on how many replicas, devices or models
    there are, or on their order. Shedding, the last choice, is always allowed: a request that
    would be late takes steps from those that would not, until it is cancelled.
    """

    name = "replicas"
    schema = 2
    alone = False
    any_models = True
    hold_s = 0.0
    hysteresis = 0.0

    def __init__(self, embedding: Sequence[int], widths: Sequence[int]) -> None:
        """Settings as of `ReplicasSpec`."""
        self._spec = check(ReplicasSpec, {"embedding": embedding, "widths": widths}, "agent")

    def n_choices(self, cluster: Cluster) -> int:
        """One for each replica, and shedding."""
        return cluster.n_replicas + 1

    def network(self, models: tuple[str, ...]) -> nn.Module:
        """The same for all models."""
        return Scores(self._spec.embedding, self._spec.widths)

    def features(self, held: Int[Array, ""], observation: Observation) -> Sight:
        """Times relative to the request's bounds, loads to limits, arrivals to capacities."""
        xp = observation.xp
        replicas = [*_service(observation), *_load(observation), *_demand(observation)]
        return Sight(
            xp.stack([xp.asarray(column, dtype=xp.float32) for column in replicas], axis=-1),
            xp.stack([xp.asarray(value, dtype=xp.float32) for value in _whole(observation)]),
            xp.asarray(observation.cluster.replica_device, dtype=xp.int32),
        )

    def allowed(self, observation: Observation) -> Bool[Array, " A"]:
        """Replicas that would take the request, and shedding."""
        xp = observation.xp
        return xp.concatenate([observation.mask, xp.ones(1, dtype=bool)])

    def act(self, choice: Int[Array, ""], observation: Observation) -> Int[Array, ""]:
        """The replica of that number; the last choice is to shed."""
        return observation.xp.where(choice < observation.mask.shape[0], choice, SHED)

    def label(self, choice: int, cluster: Cluster) -> str:
        """The replica, or `shed`."""
        return cluster.replica_name(choice) if choice < cluster.n_replicas else "shed"


class Scores(nn.Module):
    """Values of the replicas and of shedding, equivariant in the replicas (arXiv 1703.06114).

    Each replica is embedded by itself, then valued together with the mean of its device and the
    mean and the maximum of all.
    """

    embedding: Sequence[int]
    widths: Sequence[int]

    @nn.compact
    def __call__(self, sight: Sight) -> Float32[Array, " A"]:
        """Values of the choices."""
        n_replicas = sight.replicas.shape[0]

        def for_each(value: Float32[Array, " H"]) -> Float32[Array, "R H"]:
            return jnp.broadcast_to(value, (n_replicas, *value.shape))

        seen = jnp.concatenate([sight.replicas, for_each(sight.whole)], axis=-1)
        each = nn.relu(Mlp(self.embedding[:-1], self.embedding[-1])(seen))
        same_device = jnp.float32(sight.device[:, None] == sight.device[None, :])
        device = same_device @ each / jnp.sum(same_device, axis=1, keepdims=True)
        pooled = jnp.concatenate([jnp.mean(each, axis=0), jnp.max(each, axis=0), sight.whole])
        values = Mlp(self.widths, 1)(jnp.concatenate([each, device, for_each(pooled)], axis=-1))
        return jnp.concatenate([values[:, 0], Mlp(self.widths, 1)(pooled)])


def _service(observation: Observation) -> list[Float[Array, " R"]]:
    """What each replica would do for this request."""
    xp, mask = observation.xp, observation.mask
    ratio = partial(_ratio, xp)
    late, finish = observation.e2e_slack_ticks, observation.predicted_finish_ticks
    on_time, quality = observation.predicted_on_time & mask, observation.quality
    same_model = observation.cluster.same_model > 0
    first = xp.min(xp.where(same_model & mask, finish, xp.iinfo(finish.dtype).max), axis=1)
    best_on_time = xp.max(xp.where(on_time, quality, -1.0))
    return [
        mask,
        on_time,
        ratio(finish, late),
        ratio(observation.predicted_service_ticks, late),
        ratio(observation.predicted_ttft_ticks, xp.minimum(observation.ttft_slack_ticks, late)),
        ratio(observation.predicted_round_ticks, observation.tpot_ticks),
        mask & (finish == first),  # of its model the earliest
        on_time & (quality == best_on_time),
        quality,
        quality - xp.max(quality),
        quality - xp.min(quality),
    ]


def _load(observation: Observation) -> list[Float[Array, " R"]]:
    """How busy each replica and its device are."""
    xp, cluster = observation.xp, observation.cluster
    ratio = partial(_ratio, xp)
    inside, max_batch = observation.inside, cluster.max_batch
    elsewhere = cluster.same_device @ inside - inside
    waiting_elsewhere = cluster.same_device @ observation.waiting - observation.waiting
    steps = observation.prefill_tokens / cluster.token_budget
    answers = observation.decode_tokens / xp.maximum(observation.max_tokens, 1)
    round_ticks = observation.predicted_round_ticks
    fastest = xp.min(round_ticks)
    return [
        inside > 0,
        elsewhere > 0,
        ratio(observation.running, max_batch),
        ratio(observation.decoding, max_batch),
        ratio(observation.waiting, max_batch),
        ratio(elsewhere, max_batch),
        ratio(waiting_elsewhere, max_batch),
        xp.log1p(inside) / 4,
        xp.log1p(elsewhere) / 4,
        xp.minimum(steps / 4, MOST),
        ratio(answers, max_batch),
        ratio(observation.kv_blocks_used, cluster.kv_blocks),
        xp.log1p(ratio(round_ticks, fastest)),
    ]


def _demand(observation: Observation) -> list[Float[Array, " R"]]:
    """Arrivals against what the replicas of each model could serve, and who else wants them."""
    xp, cluster = observation.xp, observation.cluster
    capacity_rps = cluster.same_model @ observation.capacity_rps
    rates_rps = xp.sum(observation.arrival_rate_rps, axis=1)
    usual = (cluster.quality @ _mix(observation))[cluster.replica_model]
    gain, usual_gain = observation.quality - xp.min(observation.quality), usual - xp.min(usual)
    return [
        *(xp.log1p(xp.minimum(rate_rps / capacity_rps, 50.0)) for rate_rps in rates_rps),
        gain - usual_gain,  # of this model to this task more than to the others
    ]


def _whole(observation: Observation) -> list[Float[Array, ""]]:
    """The stream of arrivals and the state of the cluster."""
    xp, cluster = observation.xp, observation.cluster
    rates_rps = xp.sum(observation.arrival_rate_rps, axis=1)
    ratio = partial(_ratio, xp)
    busy = cluster.same_device @ observation.inside > 0
    rise = xp.log((rates_rps[:-1] + 1) / (rates_rps[1:] + 1))
    mix = _mix(observation)
    return [
        *(xp.clip(value, -MOST, MOST) for value in rise),
        ratio(observation.since_arrival_ticks, observation.e2e_slack_ticks),
        xp.mean(xp.asarray(busy, dtype=xp.float32)),
        xp.mean(xp.asarray(observation.predicted_on_time, dtype=xp.float32)),
        -xp.sum(mix * xp.log(xp.maximum(mix, 1e-9))),
        xp.log1p(observation.prompt_tokens / xp.min(cluster.token_budget)),
        ratio(observation.expected_output_tokens, observation.max_tokens),
    ]


def _mix(observation: Observation) -> Float[Array, " T"]:
    """Shares of the tasks in the arrivals of the last seconds."""
    xp = observation.xp
    rate_rps = observation.arrival_rate_rps[2]
    return rate_rps / xp.maximum(xp.sum(rate_rps), 1e-6)


def _ratio(xp: ModuleType, part: Array, whole: Array) -> Float[Array, "..."]:
    """A ratio between 0 and `MOST`; where there is no whole left, all of `MOST`."""
    whole = xp.asarray(whole)
    return xp.where(whole > 0, xp.clip(part / xp.maximum(whole, 1), 0.0, MOST), MOST)
