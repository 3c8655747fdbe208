"""The training loop, of Double DQN or on comparisons: collect, remember, learn, again."""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float32, Int32
from pydantic import Field

from agent.dqn import replay as memory
from agent.dqn.environment import (
    Comparisons,
    Environment,
    Experience,
    Features,
    Metrics,
    Params,
)
from agent.dqn.replay import Replay
from agent.dqn.targets import comparison_errors, double_q_error
from sim.config import Spec


class DqnSpec(Spec):
    """Settings of the learner.

    Transitions are learned by the method of arXiv 1509.06461, with a moving average as the target
    network; comparisons by regression on differences, and the moving average is what is kept.
    """

    iterations: int = Field(ge=1)  # of collecting and learning
    updates: int = Field(ge=1)  # gradient steps in each
    batch_size: int = Field(ge=1)
    capacity: int = Field(ge=1)  # rows of experience remembered
    learning_rate: float = Field(gt=0)  # at the start; falls to a tenth along a cosine
    gradient_norm: float = Field(gt=0)  # beyond it gradients are clipped
    huber: float = Field(default=1.0, gt=0)  # error from which on its loss grows linearly
    target_rate: float = Field(gt=0, le=1)  # of the moving average, per update
    epsilon: float = Field(ge=0)  # exploration at the start, in the environment's unit
    epsilon_end: float = Field(ge=0)  # and from `epsilon_share` of the iterations on
    epsilon_share: float = Field(gt=0, le=1)


class Learner(NamedTuple):
    """Everything that changes while a router learns."""

    iteration: Int32[Array, ""]
    key: Array
    params: Params
    target: Params
    optimiser: optax.OptState
    replay: Replay
    diverged: Bool[Array, ""]  # weights became infinite or NaN; those here are of before


@dataclass(frozen=True)
class Loop:
    """A learner of one environment; its methods are pure."""

    environment: Environment
    network: nn.Module
    spec: DqnSpec

    def start(self, key: Array) -> Learner:
        """A learner that knows nothing; the key is consumed."""
        key, weights_key = jax.random.split(key)
        blank = self.environment.blank()
        params = self.network.init(weights_key, blank.features)
        return Learner(
            iteration=jnp.int32(0),
            key=key,
            params=params,
            target=params,
            optimiser=self._optimiser.init(params),
            replay=memory.empty(blank, self.spec.capacity),
            diverged=jnp.bool_(False),
        )

    def train(self, key: Array) -> tuple[Learner, Metrics]:
        """All iterations from nothing; metrics have an axis of iterations. The key is consumed."""
        return jax.lax.scan(
            lambda learner, _: self.iterate(learner), self.start(key), None, self.spec.iterations
        )

    def kept(self, learner: Learner) -> Params:
        """The weights to assess and keep.

        Of comparisons the moving average: single ones swing between policies whose choices are
        worth almost the same.
        """
        compared = isinstance(self.environment.blank(), Comparisons)
        return learner.target if compared else learner.params

    def iterate(self, learner: Learner) -> tuple[Learner, Metrics]:
        """Collect with the present weights, then learn from what is remembered."""
        key, collect_key, learn_key = jax.random.split(learner.key, 3)
        epsilon = self._epsilon(learner.iteration)
        new, there, played = self.environment.collect(collect_key, learner.params, epsilon)
        replay = memory.add(learner.replay, new, there)
        update_keys = jax.random.split(learn_key, self.spec.updates)
        weights = (learner.params, learner.target, learner.optimiser)
        weights, losses = jax.lax.scan(partial(self._update, replay), weights, update_keys)
        leaves = jax.tree.leaves((weights[0], weights[1]))
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
        going = finite & ~learner.diverged
        old = (learner.params, learner.target, learner.optimiser)
        params, target, optimiser = jax.tree.map(partial(jnp.where, going), weights, old)
        metrics = {name: jnp.mean(values) for name, values in losses.items()}
        metrics |= {"epsilon": epsilon, "remembered": replay.filled, **played}
        learned = Learner(
            learner.iteration + 1, key, params, target, optimiser, replay, ~going
        )  # fmt: skip
        return learned, {name: jnp.float32(value) for name, value in metrics.items()}

    def _epsilon(self, iteration: Int32[Array, ""]) -> Float32[Array, ""]:
        spec = self.spec
        steps = max(round(spec.epsilon_share * spec.iterations), 1)
        schedule = optax.linear_schedule(spec.epsilon, spec.epsilon_end, steps)
        epsilon: Float32[Array, ""] = jnp.float32(schedule(iteration))
        return epsilon

    @property
    def _optimiser(self) -> optax.GradientTransformation:
        spec = self.spec
        steps = spec.iterations * spec.updates
        rate = optax.cosine_decay_schedule(spec.learning_rate, steps, alpha=0.1)
        return optax.chain(optax.clip_by_global_norm(spec.gradient_norm), optax.adam(rate))

    def _update(
        self, replay: Replay, weights: tuple[Params, Params, optax.OptState], key: Array
    ) -> tuple[tuple[Params, Params, optax.OptState], Metrics]:
        """One gradient step on a batch from the replay; the key is consumed."""
        params, target, state = weights
        batch = memory.sample(key, replay, self.spec.batch_size)
        (loss, metrics), gradient = jax.value_and_grad(self._loss, has_aux=True)(
            params, target, batch
        )
        change, state = self._optimiser.update(gradient, state, params)
        params = optax.apply_updates(params, change)
        target = optax.incremental_update(params, target, self.spec.target_rate)
        metrics |= {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}
        return (params, target, state), metrics

    def _loss(
        self, params: Params, target: Params, batch: Experience
    ) -> tuple[Float32[Array, ""], Metrics]:
        """Huber loss of the errors of a batch."""

        def values(
            weights: Params, features: Features, method: str | None = None
        ) -> Float32[Array, "B A *n"]:
            return jax.vmap(partial(self.network.apply, weights, method=method))(features)  # type: ignore[return-value]

        if isinstance(batch, Comparisons):
            outcome = batch.outcome
            if hasattr(self.network, "parts"):
                q_tm1 = values(params, batch.features, "parts")
            else:
                q = values(params, batch.features)
                q_tm1 = jnp.take_along_axis(q, batch.choice, axis=1)[..., None]
                outcome = jnp.sum(outcome, axis=-1, keepdims=True)
            error = jax.vmap(comparison_errors)(q_tm1, batch.there, outcome)
            weight = batch.weight[:, None, None]
        else:
            q_tm1 = values(params, batch.features)
            error = jax.vmap(double_q_error)(
                q_tm1,
                batch.choice,
                batch.reward,
                batch.discount,
                values(target, batch.next_features),
                values(params, batch.next_features),
                batch.next_allowed,
            )  # fmt: skip
            weight = jnp.ones(1)
        metrics = {"value": jnp.mean(q_tm1), "error": jnp.mean(jnp.abs(error))}
        loss = optax.losses.huber_loss(error, delta=self.spec.huber) / self.spec.huber
        return jnp.mean(weight * loss), metrics
