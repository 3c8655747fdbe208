"""A workload on workers that are simulated in real time is what the simulator says it is."""

from functools import cache
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="needs pip install -e '.[live]'")

# isort: split
from agent.baselines import LeastLoaded
from live.validation.play import Play, Played, play
from live.validation.recording import Recording
from live.validation.requests import Noise
from live.validation.steps import gap_s, outside
from live.validation.watch import Watch
from sim.cluster import simulate
from sim.ticks import TICKS_PER_S
from sim.types import Outcome
from sim.utility import BoundSpec, UtilitySpec, bounds_of
from tests.live import virtual_time
from tests.live.simulated_workers import SimulatedWorker
from tests.systems import make_cluster, make_workload

CLUSTER = make_cluster(
    [[0, 1], [0, 1]], step_s=[0.004, 0.012], token_s=[0.0001, 0.0004], max_batch=4, max_queue=64,
    token_budget=32, scheduler="transformers_fifo", overhead_s=0.0,
)  # fmt: skip
COUNT = 60
SLACK_S = 1e-3  # looks at the clock take time


@cache
def workload():
    rng = np.random.default_rng(0)
    return make_workload(
        np.cumsum(rng.exponential(0.02, COUNT)).tolist(),
        prompt=rng.integers(4, 60, COUNT).tolist(), output=rng.integers(1, 16, COUNT).tolist(),
        max_tokens=16,
    )  # fmt: skip


def wanted(deadline_s: float) -> Play:
    utility = UtilitySpec(kind="hard", e2e=BoundSpec(base_s=deadline_s))
    return Play(
        workload(), bounds_of(utility, workload()), Noise(100).ask(workload(), 0), LeastLoaded(),
        "least_loaded", 0,
    )  # fmt: skip


async def play_on_simulated(deadline_s: float, slower: float) -> Played:
    watches = [Watch(SimulatedWorker(CLUSTER, d, slower), 2 * d) for d in range(2)]

    class Nobody:
        def __getattr__(self, name: str):
            return lambda *told: None

    for watch in watches:
        await watch.start(Nobody())
    try:
        return await play(watches, CLUSTER, wanted(deadline_s))
    finally:
        for watch in watches:
            await watch.stop(0.0)


@cache
def played(deadline_s: float = 10.0, slower: float = 1.0) -> Played:
    with mock.patch("live.validation.play.DECISION_LIMIT_S", 10.0):
        return virtual_time.run(lambda: play_on_simulated(deadline_s, slower))


def recording(run: Played) -> Recording:
    slow = np.ones(2)
    return Recording(**run.columns, slow_before=slow, slow_after=slow, steps=run.steps)


def test_latencies_are_those_of_the_simulator():
    live = recording(played()).result(CLUSTER, workload(), wanted(10.0).bounds)
    simulated = simulate(CLUSTER, workload(), wanted(10.0).bounds, LeastLoaded())
    assert (live.outcome == Outcome.FINISHED).all()
    np.testing.assert_array_equal(live.emitted_tokens, workload().output_tokens)
    for name in ("first_token_ticks", "leave_ticks"):
        real = getattr(live, name) - workload().arrival_ticks
        expected = getattr(simulated, name) - workload().arrival_ticks
        np.testing.assert_allclose(real, expected, atol=SLACK_S * TICKS_PER_S)


def test_requests_that_are_late_expire_and_count_as_cancelled():
    live = recording(played(0.08)).result(CLUSTER, workload(), wanted(0.08).bounds)
    simulated = simulate(CLUSTER, workload(), wanted(0.08).bounds, LeastLoaded())
    cancelled = (live.outcome == Outcome.CANCELLED).mean()
    assert 0.1 < cancelled < 0.9
    assert cancelled == pytest.approx((simulated.outcome == Outcome.CANCELLED).mean(), abs=0.02)


def test_steps_hold_what_the_simulator_forms():
    steps = played().steps
    simulated = simulate(
        CLUSTER, workload(), wanted(10.0).bounds, LeastLoaded(), record_steps=True
    ).steps
    assert steps.tokens.sum() == workload().prompt_tokens.sum() + (
        workload().output_tokens.sum() - COUNT
    )
    assert len(steps) == pytest.approx(len(simulated.replica), rel=0.02)
    kv = steps.kv_tokens.sum()
    assert kv == pytest.approx(simulated.kv_tokens.sum(), rel=1e-9)
    np.testing.assert_allclose(steps.step_s, predicted(steps), rtol=1e-6)


def predicted(steps) -> np.ndarray:
    model = CLUSTER.replica_model[steps.replica]
    ticks = CLUSTER.host_ticks[model] + CLUSTER.tokens_ticks[model, steps.tokens]
    ticks = ticks + CLUSTER.sequence_ticks[model] * steps.sequences
    ticks = ticks + CLUSTER.kv_token_ticks[model] * steps.kv_tokens
    return ticks / TICKS_PER_S


def test_a_recording_is_the_same_when_it_is_read_again(tmp_path):
    written = recording(played())
    written.save(tmp_path / "runs" / "one.npz")
    read = Recording.load(tmp_path / "runs" / "one.npz")
    np.testing.assert_array_equal(read.leave_s, written.leave_s)
    np.testing.assert_array_equal(read.steps.pairs, written.steps.pairs)


def test_requests_are_sent_on_time_and_decisions_are_timed():
    run = recording(played())
    assert 0 < run.late_p99_s < 1e-4
    assert (run.gateway_s > run.decision_s).all()
    assert not run.fault.any()
    assert outside(run.steps, CLUSTER) == 0
    assert 0 <= gap_s(run.steps, CLUSTER) < 1e-4
