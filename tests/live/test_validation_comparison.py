"""What is said of simulated and real runs, on runs whose truth is known."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from agent.baselines import Static
from agent.comparison import Interval
from live.validation.comparison import Cell, Comparison, LiveRun, Pair, scored
from live.validation.spec import AimsSpec
from sim.cluster import simulate
from sim.types import Result
from sim.utility import BoundSpec, UtilitySpec, bounds_of
from tests.systems import make_cluster, make_workload

CLUSTER = make_cluster([[0, 1]], step_s=[0.05, 0.4], quality=[[0.6], [1.0]], max_queue=50)
UTILITY = UtilitySpec(kind="hard", e2e=BoundSpec(base_s=2.0))
AIMS = AimsSpec(tau=1.0, pairs=1, goodput=0.01, latency=0.05)
NAMES = ("small", "large")
ANY: Any = None


@cache
def result(policy: int, load: float) -> Result:
    """The large model keeps up with a light load alone."""
    workload = make_workload((np.arange(60) / (4 * load)).tolist(), output=2)
    bounds = bounds_of(UTILITY, workload)
    return simulate(CLUSTER, workload, bounds, Static(policy, NAMES[policy], alone=False))


def live(run: Result) -> LiveRun:
    return LiveRun(ANY, run, {}, None, run, 0)


def cell(policy: int, load: float, real: int, voids: int = 0) -> Cell:
    """A policy that does on real workers what policy `real` does in the simulator."""
    runs = (None,) * voids + (live(result(real, load)),) * (2 - voids)
    simulated = result(policy, load)
    return Cell(load, 4 * load, NAMES[policy], simulated, runs, UTILITY, 1.0, scored=True)


def comparison(*cells: Cell) -> Comparison:
    return Comparison(cells, AIMS)


def test_where_real_workers_do_as_simulated_the_ranks_agree_and_nothing_is_missed():
    told = comparison(*(cell(p, load, p) for load in (0.5, 2.0) for p in (0, 1)))
    assert told.tau == 1.0
    assert [pair.differs for pair in told.pairs] == [True, True]
    assert [choice.simulated for choice in told.choices] == ["large", "small"]
    assert [choice.regret for choice in told.choices] == [0.0, 0.0]
    assert [choice.tau for choice in told.choices] == [1.0, 1.0]
    assert told.missed == ()


def test_where_the_real_order_is_the_other_tau_is_minus_one_and_the_choice_costs():
    told = comparison(cell(0, 0.5, 1), cell(1, 0.5, 0))
    assert told.tau == -1.0
    (choice,) = told.choices
    assert (choice.simulated, choice.live) == ("large", "small")
    assert choice.regret == pytest.approx(0.4)
    assert "Kendall's τ -1.00 < 1" in told.missed


def test_policies_that_cannot_be_told_apart_have_no_order_to_get_wrong():
    told = comparison(cell(0, 0.5, 0), cell(1, 0.5, 0))
    assert told.differing == ()
    assert told.tau is None
    assert "0 of 1 pairs differ, 1 are needed" in told.missed
    assert Pair(0.5, "a", "b", 0.0, Interval(0.1, 0.05, 0.2)).agrees == 0


def test_goodput_and_latencies_that_are_off_are_missed_by_their_names():
    told = comparison(cell(0, 2.0, 0), cell(1, 2.0, 0))
    (missed,) = [text for text in told.missed if "goodput" in text]
    assert missed.startswith("large at load 2: goodput -")
    error = told.cells[1].goodput_error
    assert error == pytest.approx(told.cells[1].goodput - 1.0)
    assert any("large at load 2: P50 end-to-end latency +" in text for text in told.missed)


def test_a_void_run_counts_for_nothing_but_is_told():
    told = comparison(cell(0, 0.5, 0, voids=1), cell(1, 0.5, 1, voids=2))
    assert told.pairs == ()
    assert told.choices == ()
    assert "small at load 0.5: 1 of 2 runs are void" in told.missed
    assert "large at load 0.5: 2 of 2 runs are void" in told.missed
    assert told.cells[0].live_performance.value == pytest.approx(0.6)


def test_answers_are_scored_by_whether_they_are_right_and_in_time():
    run = live(result(0, 0.5))
    right = np.arange(60) % 2 == 0
    some = replace(run, recording=type("Recording", (), {"right": right})())
    assert scored(some, 0.0) == pytest.approx(0.5)
    whole = replace(cell(0, 0.5, 0), live=(some, some))
    assert whole.by_answers == [pytest.approx(0.5)] * 2
    assert replace(whole, scored=False).by_answers == []
