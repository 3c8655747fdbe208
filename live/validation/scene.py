"""What every policy is given at one load, simulated and live."""

from collections.abc import Sequence
from dataclasses import dataclass

from agent.capacity import capacity_rps
from live.validation.requests import Question, Questions
from live.validation.spec import ValidateSpec
from sim.config import ConfigError
from sim.deploy import ClusterSpec, build_cluster
from sim.profile import Bundle
from sim.types import Bounds, Cluster, Workload
from sim.utility import bounds_of
from sim.workload import at_rate, generate


@dataclass(frozen=True, eq=False)
class Scene:
    """A workload at one load, its bounds, and what is asked."""

    load: float
    rate_rps: float
    workload: Workload
    bounds: Bounds
    questions: Sequence[Question]


def draw_scene(
    spec: ValidateSpec, cluster: Cluster, questions: Questions, load: float, rate_rps: float,
    seed: int,
) -> Scene:  # fmt: skip
    """A workload at a rate, with its bounds and questions."""
    rate = float(f"{rate_rps:.3g}")
    context = int(cluster.max_context.min())
    drawn = generate(at_rate(spec.workload, rate), spec.tasks, seed, context)
    asked = questions.ask(drawn, seed)
    workload = questions.lengths(drawn, asked)
    return Scene(load, rate, workload, bounds_of(spec.utility, workload), asked)


def capacity(spec: ValidateSpec, own: ClusterSpec, bundle: Bundle, questions: Questions) -> float:
    """Requests/s that the largest model alone sustains on these devices.

    Raises:
        ConfigError: if the workload has too few requests that can be served.
    """
    largest = build_cluster(own, bundle, spec.tasks.names, spec.cluster.models[-1:])
    drawn = generate(spec.workload, spec.tasks, spec.seed, int(largest.max_context.min()))
    workload = questions.lengths(drawn, questions.ask(drawn, spec.seed))
    try:
        return capacity_rps(largest, workload)
    except ValueError as error:
        raise ConfigError("workload", spec.workload.kind, str(error)) from None
