import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.metrics import alone_result, alone_utility, summarise, windows
from sim.types import Outcome
from sim.utility import BoundSpec, UtilitySpec
from tests.systems import Send, make_bounds, make_cluster, make_workload, run

TASKS = ("a", "b")
QUALITY = [[0.5, 0.6], [1.0, 0.8]]  # of m0 and m1


def hard(e2e_s, miss_penalty=0.0):
    return UtilitySpec(kind="hard", e2e=BoundSpec(base_s=e2e_s), miss_penalty=miss_penalty)


def two_models(**settings):
    """One device with m0 and one with m1; a step takes one second on either."""
    return make_cluster(((0,), (1,)), step_s=(1.0, 1.0), quality=QUALITY, tasks=TASKS, **settings)


def test_performance_is_utility_over_that_of_the_most_accurate_model_on_each_task():
    workload = make_workload([0, 20, 40], task=[0, 1, 1], tasks=TASKS)
    result = run(two_models(), workload, Send([0, 0, 1]), e2e_s=5)
    summary = summarise(result, hard(5))
    assert summary.earned == pytest.approx(0.5 + 0.6 + 0.8)
    assert summary.peak == pytest.approx(1.0 + 0.8 + 0.8)
    assert summary.performance == pytest.approx(1.9 / 2.6)
    assert summary.availability == 1
    assert summary.model_share == pytest.approx({"m0": 2 / 3, "m1": 1 / 3})


def test_late_requests_are_misses_and_pay_the_penalty():
    workload = make_workload([0, 20], output=[1, 9], tasks=TASKS)
    result = run(two_models(cancel_expired=False), workload, Send([1]), e2e_s=5)
    summary = summarise(result, hard(5, miss_penalty=-0.25))
    assert (summary.on_time, summary.late, summary.availability) == (1, 1, 0.5)
    assert summary.earned == pytest.approx(1.0 - 0.25)


def test_requests_still_inside_count_neither_as_earned_nor_as_peak():
    workload = make_workload([0, 10, 11], output=[1, 50, 50], tasks=TASKS)
    result = run(two_models(), workload, Send([1]), horizon_s=15)
    summary = summarise(result, hard(100))
    assert (summary.arrivals, summary.inside, summary.on_time) == (3, 2, 1)
    assert summary.peak == summary.earned == 1
    assert summary.attainable == 1
    assert summary.availability == 1


def test_utility_belongs_to_the_window_of_the_arrival():
    workload = make_workload([9, 11, 12, 25], output=[4, 1, 1, 1], tasks=TASKS)
    sums = windows(run(two_models(), workload, Send([1, 0, 1, 1])), hard(100), window_s=10)
    assert sums.arrivals.tolist() == [1, 2, 1]
    assert sums.earned.tolist() == [1.0, 1.5, 1.0]
    assert sums.peak.tolist() == [1.0, 2.0, 1.0]
    assert sums.on_time_by_model.tolist() == [[0, 1], [1, 1], [0, 1]]


def test_windows_without_arrivals_are_no_windows_below_a_threshold():
    workload = make_workload([0, 35], tasks=TASKS)
    sums = windows(run(two_models(), workload, Send([1, 0])), hard(100), window_s=10)
    assert len(sums.peak) == 4
    assert sums.share_above(0.9) == 0.5
    assert sums.share_above(0.5) == 0.5  # the second earns 0.5 of peak: not above it


def test_latencies_are_those_of_finished_requests_and_tokens_after_the_first():
    workload = make_workload([0.0, 0.0, 100.0], output=[1, 5, 3], max_tokens=5, tasks=TASKS)
    summary = summarise(run(two_models(), workload, Send([0, 0, 1])), hard(100))
    assert summary.ttft_s.p50 == 1
    assert summary.tpot_s.p99 == 1  # the request of one token has none
    assert summary.e2e_s.p50 == 3
    assert summary.e2e_s.p99 == pytest.approx(np.percentile([1, 3, 5], 99))


def test_utility_is_counted_per_device_and_per_dollar():
    workload = make_workload([0, 99], tasks=TASKS)  # lasts 100 s
    cluster = replace(two_models(), price_per_device_hour=18.0)
    summary = summarise(run(cluster, workload, Send([1])), hard(100))
    assert summary.utility_per_device_s == pytest.approx(2 / (2 * 100))
    assert summary.utility_per_dollar == pytest.approx(2 / (2 * 18 * 100 / 3600))
    assert summarise(run(two_models(), workload, Send([1])), hard(9)).utility_per_dollar is None


def test_a_horizon_ends_the_devices_time_and_the_decisions():
    workload = make_workload([0, 1, 99], tasks=TASKS)  # lasts 100 s
    result = run(two_models(), workload, Send([1]), horizon_s=10)
    summary = summarise(result, hard(100))
    assert summary.utility_per_device_s == pytest.approx(2 / (2 * 10))
    assert summary.decision_s.p50 == pytest.approx(np.median(result.decision_s[:2]))


def test_a_run_in_which_nothing_finishes_is_still_json():
    workload = make_workload([0, 1], output=20, tasks=TASKS)
    result = run(two_models(), workload, Send([1]), e2e_s=3)
    summary = summarise(result, hard(3))
    assert summary.cancelled == 2
    assert summary.e2e_s.p50 is None
    assert json.loads(json.dumps(asdict(summary), allow_nan=False))["performance"] == 0


def test_a_workload_that_asks_the_impossible_is_flagged():
    workload = make_workload([0, 20], output=[2, 9], tasks=TASKS)
    result = run(two_models(), workload, Send([0]), e2e_s=5)
    summary = summarise(result, hard(5))
    assert (summary.attainable, summary.asks_impossible) == (0.5, True)
    assert summarise(run(two_models(), workload, Send([0])), hard(10)).asks_impossible is False


def test_what_is_attainable_is_a_matter_of_the_models_on_offer_not_of_those_hosted():
    both = make_cluster(((0, 1),), step_s=(1.0, 4.0), quality=[[0.5], [1.0]])
    small = make_cluster(((0,),), step_s=(1.0, 4.0), quality=[[0.5], [1.0]])
    result = run(small, make_workload([0, 20], output=2), e2e_s=9)
    assert summarise(result, hard(9)).attainable == 0.5
    assert summarise(result, hard(9), offered=both).attainable == 1


def test_a_request_alone_takes_the_largest_model_that_is_in_time():
    cluster = make_cluster(((0, 1),), step_s=(1.0, 4.0), quality=[[0.5], [1.0]])
    workload = make_workload([0, 0, 0], output=[2, 4, 12])
    bounds = make_bounds(workload, e2e_s=10)
    assert alone_utility(cluster, workload, bounds, hard(10)).tolist() == [1.0, 0.5, 0.0]


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(1, 90),
    output=st.integers(1, 40),
    spare=st.integers(0, 20),
    cached=st.integers(0, 89),
    budget=st.integers(1, 64),
    blocks=st.integers(1, 40),
    reserve=st.booleans(),
    costs=st.tuples(*[st.integers(0, 50)] * 8),
)
def test_a_request_alone_fares_as_the_engine_says(
    prompt, output, spare, cached, budget, blocks, reserve, costs
):
    step, token, kv, sequence, prompts, done, switch, pair = np.array(costs) / ([1e3] * 7 + [1e7])
    cluster = make_cluster(
        step_s=[step], token_s=[token], pair_s=[pair], kv_token_s=[kv], sequence_s=[sequence],
        prompt_s=[prompts], done_token_s=[done], switch_s=[switch],
        token_budget=budget, max_batch=1, kv_blocks=blocks, reserve=reserve, overhead_s=0.125,
    )  # fmt: skip
    workload = make_workload(
        [0.5], prompt=prompt, output=output, max_tokens=output + spare,
        cached=min(cached, prompt - 1),
    )  # fmt: skip
    alone = alone_result(cluster, workload, make_bounds(workload), 0)
    played = run(cluster, workload)
    for name in ("outcome", "first_token_ticks", "leave_ticks", "emitted_tokens"):
        assert getattr(alone, name) == getattr(played, name)


@settings(max_examples=40, deadline=None)
@given(
    gaps=st.lists(st.floats(0, 5), min_size=1, max_size=30),
    outputs=st.lists(st.integers(1, 30), min_size=30, max_size=30),
    to=st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=7),
    e2e_s=st.floats(1, 60),
    cancel=st.booleans(),
    horizon_s=st.none() | st.floats(1, 100),
)
def test_outcomes_exclude_each_other_and_windows_add_up(
    gaps, outputs, to, e2e_s, cancel, horizon_s
):
    workload = make_workload(
        np.cumsum(gaps).tolist(), output=outputs[: len(gaps)], max_tokens=30, tasks=TASKS
    )
    cluster = two_models(max_batch=2, max_queue=2, max_context=31, cancel_expired=cancel)
    result = run(cluster, workload, Send(to), e2e_s=e2e_s, horizon_s=horizon_s)
    summary = summarise(result, hard(e2e_s))
    counts = (
        summary.on_time, summary.late, summary.cancelled, summary.refused_too_long,
        summary.refused_full, summary.shed, summary.inside,
    )  # fmt: skip
    assert sum(counts) == summary.arrivals == len(gaps)
    assert summary.inside == (result.outcome == Outcome.INSIDE).sum()
    sums = windows(result, hard(e2e_s), window_s=3)
    assert sums.earned.sum() == pytest.approx(summary.earned)
    assert sums.peak.sum() == pytest.approx(summary.peak)
    assert sums.on_time_by_model.sum() == summary.on_time
    assert 0 <= summary.earned <= summary.peak + 1e-9
