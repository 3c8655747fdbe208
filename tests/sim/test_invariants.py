"""What holds of every run, whatever the system and the workload."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.baselines import ConservativeGreedy, LargestThatFits, LeastLoaded, RoundRobin, Uniform
from sim.cluster import simulate
from sim.types import Bounds, Cluster, Outcome, Result, Workload
from sim.workload import load, save
from tests.systems import make_bounds, make_cluster, make_workload, run

POLICIES = [Uniform(), RoundRobin(), LeastLoaded(), LargestThatFits(), ConservativeGreedy()]


@st.composite
def systems(draw: st.DrawFn) -> tuple[Cluster, Workload, Bounds, object]:
    n_models = draw(st.integers(1, 3))
    models = st.lists(st.integers(0, n_models - 1), min_size=1, unique=True).map(sorted)
    scheduler = draw(st.sampled_from(["vllm", "transformers_fifo"]))
    cluster = make_cluster(
        draw(st.lists(models, min_size=1, max_size=3)),
        step_s=[0.5 + m for m in range(n_models)],
        token_s=[0.01 * (m + 1) for m in range(n_models)],
        kv_token_s=[0.001] * n_models,
        sequence_s=[0.002] * n_models,
        prompt_s=[0.1 * m for m in range(n_models)],
        done_token_s=[0.0005] * n_models,
        switch_s=[0.25] * n_models,
        max_batch=draw(st.integers(1, 4)),
        max_queue=draw(st.integers(1, 6)),
        token_budget=draw(st.integers(4, 12)),
        kv_blocks=draw(st.integers(5, 12)),
        reserve=scheduler == "vllm" and draw(st.booleans()),
        overhead_s=draw(st.sampled_from([0.0, 0.25])),
        signal_period_s=draw(st.sampled_from([0.0, 2.0])),
        cancel_expired=draw(st.booleans()),
        scheduler=scheduler,
    )
    count = draw(st.integers(1, 25))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32)))
    output = numbers.integers(1, 12, count)
    workload = make_workload(
        np.sort(numbers.integers(0, 40, count) / 4).tolist(),
        prompt=numbers.integers(1, 20, count).tolist(),
        output=output.tolist(),
        max_tokens=(output + numbers.integers(0, 8, count)).tolist(),
    )
    bounds = make_bounds(
        workload,
        e2e_s=draw(st.sampled_from([None, 5.0, 20.0])),
        ttft_s=draw(st.sampled_from([None, 3.0])),
        grace_s=draw(st.sampled_from([0.0, 2.0])),
    )
    return cluster, workload, bounds, draw(st.sampled_from(POLICIES))


@settings(max_examples=150, deadline=None)
@given(systems())
def test_requests_are_conserved_and_causes_precede_effects(system):
    cluster, workload, bounds, policy = system
    result = simulate(cluster, workload, bounds, policy, record_steps=True)
    outcome = result.outcome
    assert not np.any(outcome == Outcome.INSIDE)  # a run without a horizon drains
    reached = workload.arrival_ticks + cluster.overhead_ticks
    assert np.all(result.leave_ticks >= reached)
    first = result.first_token_ticks
    assert np.all((first == -1) | ((first > reached) & (first <= result.leave_ticks)))
    finished = outcome == Outcome.FINISHED
    assert np.array_equal(result.emitted_tokens[finished], workload.output_tokens[finished])
    assert np.all(result.emitted_tokens <= workload.output_tokens)
    assert np.all((result.emitted_tokens > 0) == (first >= 0))
    assert np.all((outcome == Outcome.SHED) == (result.replica < 0))
    assert result.end_ticks == result.leave_ticks.max()


@settings(max_examples=150, deadline=None)
@given(systems())
def test_tokens_are_conserved_and_limits_are_kept(system):
    cluster, workload, bounds, policy = system
    result = simulate(cluster, workload, bounds, policy, record_steps=True)
    steps = result.steps
    tokens = steps.decodes + steps.prefill_tokens
    assert np.all(tokens >= 1)
    assert np.all(tokens <= cluster.token_budget[steps.replica])
    assert np.all(steps.decodes <= cluster.max_batch[steps.replica])
    assert np.all(steps.kv_blocks_used <= cluster.kv_blocks[steps.replica])
    # every token comes from a decode or from the prefill that ended before it
    emitted = int(result.emitted_tokens.sum())
    decoded = int(steps.decodes.sum())
    prefills = int((result.emitted_tokens > 0).sum()) + int(result.preemptions.sum())
    assert decoded <= emitted <= decoded + prefills
    for device in range(cluster.n_devices):  # a device runs one step at a time
        mine = cluster.replica_device[steps.replica] == device
        start, end = steps.start_ticks[mine], steps.end_ticks[mine]
        assert np.all(start[1:] >= end[:-1])
        assert np.all(end > start)


@settings(max_examples=60, deadline=None)
@given(systems())
def test_a_run_is_a_function_of_its_arguments(system):
    cluster, workload, bounds, policy = system
    one = simulate(cluster, workload, bounds, policy, seed=3, record_steps=True)
    two = simulate(cluster, workload, bounds, policy, seed=3, record_steps=True)
    assert_same(one, two)


def test_another_seed_routes_at_random_otherwise():
    cluster = make_cluster([[0], [0], [0]])
    workload = make_workload(np.arange(50.0).tolist())
    bounds = make_bounds(workload)
    one, two = (simulate(cluster, workload, bounds, Uniform(), seed=s) for s in (0, 1))
    assert not np.array_equal(one.replica, two.replica)


def test_a_saved_workload_replays_to_the_same_result(tmp_path):
    rng = np.random.default_rng(0)
    workload = make_workload(
        np.sort(rng.uniform(0, 50, 200)).tolist(),
        prompt=rng.integers(1, 50, 200).tolist(),
        output=rng.integers(1, 30, 200).tolist(),
    )
    save(workload, tmp_path / "workload.parquet")
    again = load(tmp_path / "workload.parquet")
    cluster = make_cluster([[0, 1], [0, 1]], step_s=[0.1, 0.3], kv_blocks=40)
    assert_same(
        run(cluster, workload, LargestThatFits(), e2e_s=9.0),
        run(cluster, again, LargestThatFits(), e2e_s=9.0),
    )


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_what_has_not_been_emitted_yet_is_not_observed(policy):
    """Outputs that end after the last arrival may be as long as they like."""
    rng = np.random.default_rng(1)
    arrivals = np.sort(rng.uniform(0, 5, 40)).tolist()
    cluster = make_cluster([[0, 1], [0]], step_s=[0.2, 0.4], signal_period_s=0.0)
    long = rng.integers(60, 80, 40)
    decisions = []
    for output in (long, rng.permutation(long), long + 20):
        workload = make_workload(arrivals, prompt=9, output=output.tolist(), max_tokens=100)
        decisions.append(run(cluster, workload, policy, e2e_s=100.0).replica.tolist())
    assert decisions[0] == decisions[1] == decisions[2]


def assert_same(one: Result, two: Result) -> None:
    """Equal but for the measured time of decisions and the workload's identity."""
    blank: Any = {"decision_s": np.zeros(0), "workload": None, "bounds": None, "steps": None}
    one_steps, two_steps = one.steps, two.steps
    one, two = replace(one, **blank), replace(two, **blank)
    for name in (f.name for f in fields(Result)):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
    for name in (f.name for f in fields(one_steps)):
        np.testing.assert_array_equal(getattr(one_steps, name), getattr(two_steps, name))
