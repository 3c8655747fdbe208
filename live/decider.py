"""Asks a policy where a request goes, and always answers: where the policy fails, by a rule."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from operator import index
from time import perf_counter
from typing import Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Float32

from agent.baselines import ConservativeGreedy
from agent.rule import least, load
from live.limit import OutOfTimeError, TimeLimit
from sim.config import ConfigError
from sim.observation import Array, Observation
from sim.policy import SHED, Policy, PolicyWarning, State
from sim.types import Cluster

Fault = Literal["error", "late", "masked"]
PINNED = "pinned"  # by whom a request goes to the model that the client names


class Explanation(Protocol):
    """What a choice rests on."""

    @property
    def renewed(self) -> bool:
        """Whether the choice in force was made for this very request."""

    @property
    def choice(self) -> int:
        """The one in force."""

    @property
    def values(self) -> Float32[Array, " A"]:
        """Of the choices there were when it was made."""


@runtime_checkable
class ExplainingPolicy(Policy, Protocol):
    """A policy that can tell what its choices rest on."""

    def explain(self, state: State) -> Explanation | None:
        """What the decision that left this state rests on."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes, and by whose choice."""

    choice: int  # a replica, or SHED
    by: str  # the policy and its version, or the rule that stood in
    fault: Fault | None  # why the policy did not choose
    state: State  # of the policy, before it chose
    after: State  # and then
    seconds: float  # that it took


class Decider:
    """A policy with its state, and the rule that stands in for it.

    The rule decides if the policy raises an error, exceeds its time, or picks what the mask does
    not allow. A fault leaves the policy's state as it was.
    """

    def __init__(
        self, policy: Policy, version: str, cluster: Cluster, limit: TimeLimit, strict: bool = False
    ) -> None:
        """Check that the policy suits the cluster.

        Args:
            policy: Whom to ask.
            version: What it is called in headers and logs.
            cluster: What it decides for.
            limit: On the time of one decision.
            strict: Whether a policy that may not suit the cluster is refused, not warned of.

        Raises:
            ConfigError: if it cannot serve the cluster, or `strict` and it may not suit it.
        """
        self.version = version
        self.cluster = cluster
        self._policy, self._limit = policy, limit
        self._explaining = policy if isinstance(policy, ExplainingPolicy) else None
        self._fallback = ConservativeGreedy()
        with warnings.catch_warnings():
            if strict:
                warnings.simplefilter("error", PolicyWarning)
            try:
                self._state = self._begin = policy.init(cluster)
            except PolicyWarning as doubt:
                raise ConfigError("policy", version, f"strict: {doubt}") from None

    def decide(self, observation: Observation, on_fault: Callable[[Fault, str], None]) -> Decision:
        """A replica that the mask allows, or SHED; `on_fault` is told why the policy failed."""
        began, state = perf_counter(), self._state
        fault: Fault | None = None
        reason, choice = "", SHED
        try:
            with self._limit.kept():
                action, after = self._policy.decide(state, observation)
                choice = index(action)  # a fraction is no choice
        except OutOfTimeError:
            fault = "late"
        except Exception as error:
            fault, reason = "error", f"{type(error).__name__}: {error}"
        else:
            if perf_counter() - began > self._limit.limit_s:
                fault = "late"
            elif not allowed(choice, observation.mask):
                fault, reason = "masked", f"picked {choice}"
            else:
                self._state = after
        if fault is None:
            return Decision(choice, self.version, None, state, after, perf_counter() - began)
        on_fault(fault, reason or f"took longer than {self._limit.limit_s} s")
        choice = int(self._fallback.choose(observation))
        return Decision(choice, self._fallback.name, fault, state, state, perf_counter() - began)

    def reset(self) -> None:
        """Let the policy begin anew: the clock that its state was made by is set back."""
        self._state = self._begin

    def explain(self, decision: Decision) -> Explanation | None:
        """What a decision of the policy rests on, if the policy can tell."""
        if decision.fault is not None or decision.by == PINNED or self._explaining is None:
            return None
        return self._explaining.explain(decision.after)


def allowed(choice: int, mask: Bool[Array, " R"]) -> bool:
    """Whether a choice is one: SHED, or a replica that the mask allows."""
    return choice == SHED or (0 <= choice < len(mask) and bool(mask[choice]))


def pinned(observation: Observation) -> Decision:
    """The least loaded of the replicas that the mask allows."""
    began = perf_counter()
    choice = int(least(observation, load(observation), observation.mask))
    return Decision(choice, PINNED, None, (), (), perf_counter() - began)
