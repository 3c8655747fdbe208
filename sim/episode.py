"""A simulation turned inside out: whoever drives it makes the decisions, one at a time."""

from collections.abc import Generator
from dataclasses import dataclass

from simpy import Event

from sim.cluster import Run
from sim.observation import Observation
from sim.replica import Request
from sim.ticks import NEVER
from sim.types import Bounds, Cluster, Outcome, Result, Workload


@dataclass(frozen=True, eq=False)
class Question:
    """What is to be decided now, and what became of requests since the decision before."""

    observation: Observation
    left: Result  # of those that left


def decisions(
    cluster: Cluster, workload: Workload, bounds: Bounds, *, seed: int = 0
) -> Generator[Question, int, Result]:
    """Play a workload a decision at a time: the run of `simulate`, turned inside out.

    Yields what is to be decided, and is sent the action; returns the result of the whole run.

    Raises:
        ConfigError: as `simulate`.
    """
    run = _Paused(cluster, workload, bounds, seed)
    run.start(NEVER)
    while not run.drained.processed:
        run.env.step()
        if run.asked is not None:
            index, run.asked = run.asked, None
            observation = run.router.observe(index, int(run.env.now))
            left, run.left_since = run.left_since, []
            choice = int((yield Question(observation, run.result(left))))
            run.router.sent(index, choice)
            run.answer.succeed(choice)
    return run.result()


class _Outside:
    """Stands in for a policy where somebody else decides."""

    name = "outside"

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        return models

    def init(self, cluster: Cluster) -> tuple[()]:
        return ()

    def decide(self, state: tuple[()], observation: Observation) -> tuple[int, tuple[()]]:
        raise RuntimeError("this run asks whoever drives it")


class _Paused(Run):
    """A run that waits at every decision."""

    def __init__(self, cluster: Cluster, workload: Workload, bounds: Bounds, seed: int) -> None:
        super().__init__(cluster, workload, bounds, _Outside(), seed, record_steps=False)
        self.asked: int | None = None  # the request that is to be decided on
        self.answer = self.env.event()
        self.left_since: list[int] = []

    def _ask(self, index: int) -> Event:
        self.asked, self.answer = index, self.env.event()
        return self.answer

    def _leave(self, request: Request, outcome: Outcome) -> None:
        super()._leave(request, outcome)
        self.left_since.append(request.index)
