"""A search for the settings of rules: what is tried, and what came of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
from pydantic import Field, JsonValue, model_validator
from scipy.stats import qmc

from agent.comparison import Cell, Standing
from agent.evaluation import EvaluationSpec, PolicySpec, ScenarioSpec
from sim.config import ConfigError, Spec, check
from sim.deploy import ClusterSpec
from sim.metrics import WindowWidth
from sim.tasks import TasksSpec
from sim.utility import UtilitySpec


class RangeSpec(Spec):
    """The values of a setting: `choices`, or from `low` to `high`."""

    choices: tuple[JsonValue, ...] | None = Field(None, min_length=1)
    low: float | None = None
    high: float | None = None
    log: bool = False  # evenly by logarithm
    integer: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.choices is not None:
            if (self.low, self.high, self.log, self.integer) != (None, None, False, False):
                raise ValueError("choices have no low, high, log or integer")
        elif self.low is None or self.high is None or not self.low < self.high:
            raise ValueError("choices, or low < high, must be given")
        elif self.log and self.low <= 0:
            raise ValueError("low must be > 0 with log")
        return self

    def at(self, share: float) -> JsonValue:
        """The value at a share of the way through the range, 0 to 1."""
        if self.choices is not None:
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        assert self.low is not None
        assert self.high is not None
        low, high = self.low, self.high + 1 if self.integer else self.high
        value = low * (high / low) ** share if self.log else low + (high - low) * share
        return min(int(value), int(self.high)) if self.integer else float(f"{value:.4g}")


class TuneSpec(Spec):
    """All that `python -m agent.tune` is told."""

    name: str
    output_dir: str
    cluster: ClusterSpec
    tasks: TasksSpec
    utility: UtilitySpec
    searches: dict[str, Annotated[dict[str, RangeSpec], Field(min_length=1)]] = Field(min_length=1)
    policies: tuple[str, ...] | None = Field(min_length=1)  # of the searches; null: all
    budget: int = Field(ge=2)  # configurations of each policy, the one in conf/policy included
    scenarios: dict[str, ScenarioSpec] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    window_s: WindowWidth
    search_seed: int = Field(ge=0)
    n_jobs: int = Field(ge=-1)
    resume: bool

    def candidates(self) -> dict[str, list[PolicySpec]]:
        """What is tried of each policy, the configuration in conf/policy first.

        Raises:
            ConfigError: if a policy has no search.
        """
        for policy in self.policies or ():
            if policy not in self.searches:
                raise ConfigError("policies", policy, f"one of {', '.join(self.searches)}")
        return {
            policy: [
                PolicySpec(policy=policy, label=f"{policy} {number}", settings=settings)
                for number, settings in enumerate(
                    [{}, *spread(self.searches[policy], self.budget - 1, self.search_seed)]
                )
            ]
            for policy in self.policies or self.searches
        }

    def evaluation(self) -> EvaluationSpec:
        """The evaluation that plays all of them."""
        shared = self.model_dump(
            include={"name", "output_dir", "window_s", "n_jobs", "resume", "seeds"}
        )
        policies = [each for tried in self.candidates().values() for each in tried]
        given = {name: getattr(self, name) for name in ("cluster", "tasks", "utility", "scenarios")}
        return check(EvaluationSpec, {**shared, **given, "policies": policies}, "")


@dataclass(frozen=True)
class Tried:
    """One configuration and what it earned."""

    settings: Mapping[str, JsonValue]  # that differ from conf/policy
    score: float  # mean over cells of utility earned / peak
    cells: tuple[float, ...]


@dataclass(frozen=True)
class Tuned:
    """A policy's search, in the order in which configurations were drawn."""

    policy: str
    tried: tuple[Tried, ...]

    @property
    def best(self) -> Tried:
        """The highest score; the first of equals."""
        return max(self.tried, key=lambda tried: tried.score)

    @property
    def curve(self) -> list[float]:
        """The best score after each configuration."""
        best = np.maximum.accumulate([tried.score for tried in self.tried])
        return [float(score) for score in best]


def spread(search: Mapping[str, RangeSpec], count: int, seed: int) -> list[dict[str, JsonValue]]:
    """Settings spread evenly over the ranges: points of a scrambled Sobol sequence.

    A setting `name.0`, `name.1`, … is one list of values.
    """
    sampler = qmc.Sobol(len(search), rng=np.random.default_rng(seed))
    points = sampler.random_base2(max(count - 1, 0).bit_length())[:count]
    found = []
    for point in points:
        settings: dict[str, JsonValue] = {}
        for (name, values), share in zip(search.items(), point, strict=True):
            key, dot, _ = name.partition(".")
            value = values.at(float(share))
            if dot:
                vector = settings.setdefault(key, [])
                assert isinstance(vector, list)
                vector.append(value)
            else:
                settings[key] = value
        found.append(settings)
    return found


def judge(
    candidates: Mapping[str, Sequence[PolicySpec]], standings: Sequence[Standing]
) -> list[Tuned]:
    """The searches, each configuration with its score."""
    earned: dict[str, dict[Cell, float]] = {}
    for each in standings:
        cell = (each.scenario, each.rate_rps)
        earned.setdefault(each.policy, {})[cell] = each.performance.value
    return [
        Tuned(
            policy,
            tuple(
                Tried(
                    spec.settings,
                    float(np.mean([*earned[spec.label].values()])),
                    tuple(earned[spec.label].values()),
                )
                for spec in tried
            ),
        )
        for policy, tried in candidates.items()
    ]
