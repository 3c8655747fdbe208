"""The linear program: which options, so that what they are charged fits into each interval."""

from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy.optimize import Bounds as Box
from scipy.optimize import LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array

from agent.clairvoyant.charges import Line, line_of
from agent.clairvoyant.intervals import charged_inside, meeting
from agent.clairvoyant.options import Options
from sim.types import Cluster

TINY = 1e-12


Host = tuple[int, int]  # kind, model
# columns, their values, and the most that their sum may be
Limit = tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, " n"], float]


class Program:
    """A linear program in the making: variables between 0 and 1, and others beside them."""

    def __init__(self, n_options: int) -> None:
        self.n_options = self.n_variables = n_options
        self._rows: list[np.ndarray] = []
        self._columns: list[np.ndarray] = []
        self._values: list[np.ndarray] = []
        self._limits: list[float] = []

    def variable(self) -> int:
        """Another variable, ≥ 0."""
        self.n_variables += 1
        return self.n_variables - 1

    def limit(
        self, columns: Int64[np.ndarray, " n"], values: Float64[np.ndarray, " n"], most: float
    ) -> None:
        """The sum of values times variables is at most so much."""
        self._rows.append(np.full(len(columns), len(self._limits)))
        self._columns.append(columns)
        self._values.append(values)
        self._limits.append(most)

    def solve(self, costs: Float64[np.ndarray, " O"], whole: bool) -> OptimizeResult:
        """The least cost of the options."""
        entries = (np.concatenate(self._rows), np.concatenate(self._columns))
        shape = (len(self._limits), self.n_variables)
        matrix = coo_array((np.concatenate(self._values), entries), shape=shape).tocsr()
        others = self.n_variables - self.n_options
        return milp(
            np.append(costs, np.zeros(others)),
            constraints=LinearConstraint(matrix, -np.inf, np.array(self._limits)),
            integrality=np.append(np.full(self.n_options, int(whole)), np.zeros(others)),
            bounds=Box(0, np.append(np.ones(self.n_options), np.full(others, np.inf))),
        )


def lines_of(cluster: Cluster, kinds: list[dict[int, int]], together: int) -> dict[Host, Line]:
    """The lines below the steps of each model on each kind of device."""
    return {
        (kind, model): line_of(cluster, replica, together)
        for kind, hosted in enumerate(kinds)
        for model, replica in hosted.items()
    }


def loads(
    options: Options, begin: float, end: float, counts: Int64[np.ndarray, " K"]
) -> Iterator[Limit]:
    """Options, what each is charged in an interval at the least, and the time that devices have.

    Once for each kind of device that may be overloaded.
    """
    near, before, after = meeting(options, begin, end)
    inside = charged_inside(options.prefill, options.decode, near, before, after)
    for kind, count in enumerate(counts):
        room = float(count * (end - begin))
        own: Bool[np.ndarray, " n"] = (options.kind[near] == kind) & (inside > TINY)
        if inside[own].sum() > room:
            yield near[own], inside[own], room


def limit_steps(
    program: Program, options: Options, begin: float, end: float, lines: Mapping[Host, Line]
) -> None:
    """The same on each device, with the steps that each model makes in the interval.

    They are at least those of any request chosen, and those of all over the size of a batch. A step
    that lasts beyond the interval counts by the share of it that is inside.
    """
    near, before, after = meeting(options, begin, end)
    steps = options.steps[near] - (before + after) / options.step_s[near]
    beyond = charged_inside(options.line_prefill, options.line_decode, near, before, after)
    made_by = [line.step_s for line in lines.values()]
    most = beyond + max(made_by, default=0.0) * np.maximum(steps, 0.0)
    for kind in np.unique(options.kind[near]):
        on_device = (options.kind[near] == kind) & (steps > TINY)
        if most[on_device].sum() <= end - begin:
            continue
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for model in np.unique(options.model[near[on_device]]):
            own = on_device & (options.model[near] == model)
            line = lines[int(kind), int(model)]
            made = program.variable()
            for option, count in zip(near[own], steps[own], strict=True):
                program.limit(np.array([option, made]), np.array([count, -1.0]), 0.0)
            columns = np.append(near[own], made)
            program.limit(columns, np.append(steps[own], -float(line.batch)), 0.0)
            parts.append((columns, np.append(beyond[own], line.step_s)))
        columns, values = (np.concatenate(part) for part in zip(*parts, strict=True))
        program.limit(columns, values, end - begin)
