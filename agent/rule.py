"""What the rules share: a base for those without state, and choosing among allowed replicas."""

from abc import ABC, abstractmethod
from typing import Any

from jaxtyping import Bool, Float, Int, Num

from sim.config import ConfigError
from sim.observation import WINDOWS_S, Array, Observation
from sim.policy import SHED
from sim.ticks import NEVER
from sim.types import Cluster

MEDIAN = 0.8  # length of an answer, of the mean
SPREAD_OF_LENGTHS = 0.45  # of its logarithm, and of the times until a token over those predicted
SPREAD_OF_TIMES = 0.1


class Rule(ABC):
    """A policy without state that hosts every model."""

    name: str

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        """All of the models on offer."""
        return models

    def init(self, cluster: Cluster) -> tuple[()]:
        """No state."""
        return ()

    def decide(self, state: tuple[()], observation: Observation) -> tuple[Any, tuple[()]]:
        """The rule's choice."""
        return self.choose(observation), state

    @abstractmethod
    def choose(self, observation: Observation) -> Int[Array, ""]:
        """A replica that the mask allows, or SHED."""


def least(
    observation: Observation, score: Num[Array, " R"], allowed: Bool[Array, " R"]
) -> Int[Array, ""]:
    """The allowed replica with the least score, the first of equals; SHED if none is allowed."""
    xp = observation.xp
    top = xp.inf if xp.isdtype(score.dtype, "real floating") else xp.iinfo(score.dtype).max
    best = xp.where(allowed, score, top).argmin()
    return xp.where(allowed.any(), best, SHED)


def load(observation: Observation) -> Int[Array, " R"]:
    """How busy each replica is: requests inside its device, then inside itself."""
    inside = observation.inside
    on_device = observation.cluster.same_device @ inside
    return on_device * (1 + inside.sum()) + inside


def serve_from(observation: Observation, model: Int[Array, ""]) -> Int[Array, ""]:
    """The least loaded replica of a model; of any where none of its own is allowed."""
    own = observation.mask & (observation.cluster.replica_model == model)
    return least(observation, load(observation), own | (observation.mask & ~own.any()))


def pressed(observation: Observation) -> Int[Array, ""]:
    """The choice where no replica is predicted to be in time: the earliest predicted finish."""
    return least(observation, observation.predicted_finish_ticks, observation.mask)


def tightest(observation: Observation) -> Int[Array, ""]:
    """Ticks from now to the first of the request's bounds on its last and first token; ≥ 1."""
    xp = observation.xp
    first = xp.minimum(observation.e2e_slack_ticks, observation.ttft_slack_ticks)
    return xp.maximum(first, 1)


def likelihood(observation: Observation, spread: float) -> Float[Array, " R"]:
    """How likely each replica is to meet every bound of the request.

    That of its tightest bound, where the time taken is that predicted times a log-logistic error:
    1 / (1 + (predicted / allowed)^(1 / spread)).
    """
    return likely(share_of_bounds(observation), spread)


def likely(share: Float[Array, " R"], spread: float) -> Float[Array, " R"]:
    """As `likelihood`, of the share of what is allowed that is predicted to be taken."""
    # beyond a hundred times what is allowed it makes no difference
    return 1 / (1 + share.clip(0.0, 100.0) ** (1 / spread))


def share_of_bounds(
    observation: Observation, later_ticks: Int[Array, " R"] | int = 0
) -> Float[Array, " R"]:
    """What each replica is predicted to take of the request's bounds, of that where it is most.

    `later_ticks` are added to the times predicted until the first and the last token.
    """
    xp = observation.xp
    share = xp.zeros(len(observation.running))
    for predicted, allowed in (
        (observation.predicted_finish_ticks + later_ticks, observation.e2e_slack_ticks),
        (observation.predicted_ttft_ticks + later_ticks, observation.ttft_slack_ticks),
        (observation.predicted_round_ticks, observation.tpot_ticks),
    ):
        of_bound = xp.where(allowed > 0, predicted / xp.maximum(allowed, 1), xp.inf)
        share = xp.maximum(share, of_bound)
    return share


def likely_in_time(observation: Observation) -> Float[Array, " R"]:
    """How likely each replica is to answer in time, where the length of the answer is not known.

    That the answer is no longer than the tokens that the replica is predicted to emit in time.
    Waiting counts half as long again as predicted, and half of a grace is given. The bounds on the
    first token and between tokens are met as of `likely`.
    """
    xp = observation.xp
    first_ticks = observation.predicted_ttft_ticks + observation.longer_wait_ticks
    left_ticks = with_grace(observation.e2e_slack_ticks, observation) - first_ticks
    tokens = 1 + xp.maximum(left_ticks, 0) / xp.maximum(observation.predicted_round_ticks, 1)
    last = short_enough(tokens, observation) * (left_ticks >= 0)
    share = xp.zeros(len(observation.running))
    for predicted, allowed in (
        (first_ticks, with_grace(observation.ttft_slack_ticks, observation)),
        (observation.predicted_round_ticks, observation.tpot_ticks),
    ):
        of_bound = xp.where(allowed > 0, predicted / xp.maximum(allowed, 1), xp.inf)
        share = xp.maximum(share, of_bound)
    return xp.minimum(last, likely(share, SPREAD_OF_TIMES))


def with_grace(slack_ticks: Int[Array, ""], observation: Observation) -> Int[Array, ""]:
    """The time left until a bound has been missed by half of the grace; NEVER if there is none."""
    grace_ticks = observation.grace_ticks // 2
    return observation.xp.minimum(slack_ticks, NEVER - grace_ticks) + grace_ticks


def short_enough(tokens: Float[Array, "*n"], observation: Observation) -> Float[Array, "*n"]:
    """How likely the answer is to have no more than so many tokens.

    Its length is taken to be log-logistic about the mean of finished requests, and at most
    `max_tokens`.
    """
    xp = observation.xp
    typical = MEDIAN * observation.expected_output_tokens
    likely_enough = likely(typical / xp.maximum(tokens, 1e-9), SPREAD_OF_LENGTHS)
    return xp.where(tokens >= observation.max_tokens, 1.0, likely_enough)


def scale_of(window_s: float) -> int:
    """Which of the estimates of the arrival rate is over so many seconds.

    Raises:
        ConfigError: if none is.
    """
    if window_s not in WINDOWS_S:
        raise ConfigError("policy.window_s", window_s, f"one of {', '.join(map(str, WINDOWS_S))}")
    return WINDOWS_S.index(window_s)
