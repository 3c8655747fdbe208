"""What a router can tell from its signals."""

import hashlib
from dataclasses import fields, replace
from functools import cached_property

import numpy as np
import pytest

from agent.baselines import LeastLoaded
from sim.observation import OBSERVATION_SCHEMA, WINDOWS_S, Observation, fits_alone, idle
from sim.router import Router, draw_random_bits
from sim.ticks import to_ticks
from sim.types import Outcome
from tests.systems import Send, make_bounds, make_cluster, make_workload, run


def observations(cluster, workload, to, **bounds):
    seen = []

    class Watch(Send):
        def decide(self, state, observation):
            seen.append(
                {
                    "rate_rps": observation.arrival_rate_rps.copy(),
                    "ttft_s": observation.predicted_ttft_ticks / 2**40,
                    "finish_s": observation.predicted_finish_ticks / 2**40,
                    "expected": int(observation.expected_output_tokens),
                    "slack_s": observation.e2e_slack_ticks / 2**40,
                    "since_s": observation.since_arrival_ticks / 2**40,
                    "mask": observation.mask.tolist(),
                }
            )
            return super().decide(state, observation)

    return run(cluster, workload, Watch(to), **bounds), seen


def test_random_bits_depend_on_seed_and_index_alone():
    assert draw_random_bits(7, 100).tolist()[:10] == draw_random_bits(7, 10).tolist()
    assert draw_random_bits(7, 10).tolist() != draw_random_bits(8, 10).tolist()


@pytest.mark.parametrize("prompt", [1, 10, 35])
def test_a_request_alone_is_predicted_exactly_but_for_the_prompts_of_those_to_come(prompt):
    cluster = make_cluster(step_s=[0.1], token_s=[0.01], pair_s=[0.0001], token_budget=40)
    workload = make_workload([0.0], prompt=prompt, output=8)
    result, (seen,) = observations(cluster, workload, [0])
    share_s = 0.01 * prompt / 8  # of a prompt, beside each of the seven decodes
    expected = result.leave_ticks[0] / 2**40 + 7 * share_s
    assert seen["finish_s"][0] == pytest.approx(expected, abs=1e-6)
    assert seen["ttft_s"][0] == pytest.approx(result.first_token_ticks[0] / 2**40, abs=1e-6)


@pytest.mark.parametrize("prompt", [1, 35, 50])
def test_the_time_that_sequences_and_prompts_take_is_predicted(prompt):
    cluster = make_cluster(step_s=[0.1], sequence_s=[0.05], prompt_s=[0.2], token_budget=40)
    workload = make_workload([0.0], prompt=prompt, output=8)
    result, (seen,) = observations(cluster, workload, [0])
    expected = result.leave_ticks[0] / 2**40 + 7 * 0.2 / 8
    assert seen["finish_s"][0] == pytest.approx(expected, abs=1e-6)
    assert seen["ttft_s"][0] == pytest.approx(result.first_token_ticks[0] / 2**40, abs=1e-6)


@pytest.mark.parametrize(
    ("decoding", "prompt", "output", "round_s"),
    [
        (0, 20, 4, 0.1 + 0.01 + 0.2 / 4),  # alone: its decode, and a quarter of a prompt
        (3, 20, 4, 0.1 + 0.04 + 4 * 0.2 / 4),  # four decode, so that one prompt comes in a step
        (9, 20, 4, 0.1 + 0.04 + 4 * 0.2 / 4),  # no more than four at once
        (3, 30, 4, 0.1 + 0.04 + 4 * 0.3 / 4),
        (3, 72, 4, 0.1 + 0.04 + 4 * 0.72 / 4),  # in two steps: four decode beside 36 tokens of it
        (3, 30, 60, 0.1 + 0.04 + 4 * 0.3 / 60),  # long outputs: hardly anybody leaves
    ],
)
def test_rounds_take_longer_by_the_prompts_of_those_to_come(decoding, prompt, output, round_s):
    cluster = make_cluster(step_s=[0.1], token_s=[0.01], token_budget=40, max_batch=4)
    seen = replace(
        idle(cluster, np), running=np.array([decoding]), decoding=np.array([decoding]),
        prompt_tokens=np.int64(prompt), max_tokens=np.int64(output),
    )  # fmt: skip
    assert seen.predicted_round_ticks / 2**40 == pytest.approx([round_s], abs=1e-6)


def test_on_a_busy_replica_tokens_come_as_fast_as_predicted():
    cluster = make_cluster(step_s=[0.1], token_s=[0.01], max_batch=4)
    arrivals = [0.0, 0.15, 0.45, 0.8, *np.arange(1.0, 9.0, 0.25)]  # one for each that leaves
    result = run(cluster, make_workload(arrivals, prompt=20, output=4))
    took_s = (result.leave_ticks - result.first_token_ticks)[10:20] / 2**40
    assert took_s / 3 == pytest.approx(0.1 + 0.03 + 0.2, rel=0.02)  # three decode beside a prompt
    busy = replace(
        idle(cluster, np), running=np.array([3]), decoding=np.array([3]),
        prompt_tokens=np.int64(20), max_tokens=np.int64(4),
    )  # fmt: skip
    assert busy.predicted_round_ticks / 2**40 == pytest.approx([took_s.mean() / 3], rel=0.05)


# A request of 5 and at most 5 tokens, at a memory of 40; a step takes a second.
@pytest.mark.parametrize(
    ("busy", "wait_s", "for_slots_s"),
    [
        ({"running": 3, "decoding": 3, "kv_tokens": 30}, 0, 0),  # four of 40 / 4 tokens fit
        ({"running": 3, "decoding": 3, "kv_tokens": 50}, 2 * 5 // 2, 0),  # of 60 / 4, two fit
        ({"waiting": 3, "prefill_tokens": 50}, 2 * 5 // 2, 0),  # those in the queue count as well
        ({"running": 1, "decoding": 1, "kv_tokens": 39}, 1 * 5 // 1, 0),  # one of 49 / 2
        ({"running": 1, "decoding": 1, "kv_tokens": 90}, 1 * 5 // 1, 0),  # there is room for one
        ({"running": 4, "decoding": 4, "kv_tokens": 20}, 1 * 5 // 4, 1 * 5 // 4),  # 4 slots, 6 fit
    ],
)
def test_a_full_memory_keeps_a_request_waiting(busy, wait_s, for_slots_s):
    counts = {name: np.array([count]) for name, count in busy.items()}
    for kv_blocks, expected_s in ((10, wait_s), (1000, for_slots_s)):
        cluster = make_cluster(max_batch=4, kv_blocks=kv_blocks, block_tokens=4)
        asked = {"prompt_tokens": np.int64(5), "max_tokens": np.int64(5)}
        seen = replace(idle(cluster, np), **asked, **counts)
        assert seen.predicted_ttft_ticks / 2**40 == pytest.approx([expected_s + 1])
        assert seen.longer_wait_ticks / 2**40 == pytest.approx([expected_s / 2])


def test_the_wait_for_memory_is_until_who_holds_it_leaves():
    cluster = make_cluster(kv_blocks=5, block_tokens=4)  # of 20 tokens: one request of 18
    workload = make_workload([0.0, 0.0], prompt=10, output=8)
    result, seen = observations(cluster, workload, [0])
    assert result.first_token_ticks / 2**40 == pytest.approx([1.0, 9.0])
    assert [s["ttft_s"][0] for s in seen] == pytest.approx([1.0, 9.0])


def test_a_round_of_replicas_that_take_turns_is_predicted_with_its_switches():
    rounds = []

    class Watch(Send):
        def decide(self, state, observation):
            rounds.append((observation.predicted_round_ticks / 2**40).tolist())
            return super().decide(state, observation)

    cluster = make_cluster([[0, 1], [0]], step_s=[1.0, 2.0], switch_s=[0.25, 0.5])
    run(cluster, make_workload([0.0, 2.5], output=[9, 1]), Watch([0, 1]))
    assert rounds[0] == [1.0, 2.0, 1.0]  # alone there is none
    assert rounds[1] == [1.0, 3.0 + 0.25 + 0.5, 1.0]


def test_predictions_rank_replicas_by_how_soon_they_would_answer():
    cluster = make_cluster([[0], [0], [0]], step_s=[0.1], max_batch=2)
    workload = make_workload([0] * 8, output=20)
    _, seen = observations(cluster, workload, [0, 0, 0, 0, 1, 1, 1, 2])
    finish = seen[-1]["finish_s"]
    assert finish[2] < finish[1] < finish[0]


def test_rates_are_estimated_at_every_time_scale():
    cluster = make_cluster([[0]], step_s=[0.001], tasks=("a", "b"))
    arrivals = np.arange(0, 150, 0.02)
    tasks = np.arange(len(arrivals)) % 2
    workload = make_workload(arrivals.tolist(), task=tasks.tolist(), tasks=("a", "b"))
    _, seen = observations(cluster, workload, [0])
    late = np.mean([s["rate_rps"] for s in seen[-200:]], axis=0)
    assert late == pytest.approx(np.full((len(WINDOWS_S), 2), 25.0), rel=0.06)


@pytest.mark.parametrize("at_s", [0.3, 0.8, 3.0])
def test_rates_are_near_the_truth_from_the_start(at_s):
    arrivals = np.arange(0.0, 4.0, 0.005)
    _, seen = observations(make_cluster(step_s=[0.001]), make_workload(arrivals.tolist()), [0])
    for s in (seen[np.searchsorted(arrivals, at_s)], seen[np.searchsorted(arrivals, at_s) + 7]):
        assert s["rate_rps"][:, 0] == pytest.approx(np.full(len(WINDOWS_S), 200.0), rel=0.03)


def test_before_the_shortest_window_has_passed_rates_are_over_that():
    _, seen = observations(make_cluster(), make_workload([0.0, 0.01, 0.02]), [0])
    assert seen[2]["rate_rps"][:, 0] == pytest.approx([3 / WINDOWS_S[0]] * len(WINDOWS_S))


def test_rates_fall_to_this_arrival_alone_after_a_long_silence():
    _, seen = observations(make_cluster(), make_workload([*np.arange(0, 5, 0.1), 200.0]), [0])
    assert seen[-1]["rate_rps"][:, 0] == pytest.approx([1 / w for w in WINDOWS_S])


def test_expected_output_starts_at_max_tokens_and_moves_to_what_came_back():
    workload = make_workload(np.arange(0.0, 200, 10).tolist(), output=4, max_tokens=100)
    _, seen = observations(make_cluster(), workload, [0])
    assert seen[0]["expected"] == 100
    assert seen[1]["expected"] == (100 + 4) // 2
    assert seen[-1]["expected"] < 10


def test_slack_counts_from_arrival_and_time_between_arrivals_from_the_last():
    cluster = make_cluster(overhead_s=0.5)
    _, seen = observations(cluster, make_workload([1.0, 3.0]), [0], e2e_s=5.0)
    assert [s["slack_s"] for s in seen] == [4.5, 4.5]
    assert seen[1]["since_s"] == 2.0


def test_the_mask_tells_full_queues_long_requests_and_the_dead():
    cluster = make_cluster([[0], [0]], max_queue=1, max_batch=1, max_context=50)
    _, seen = observations(cluster, make_workload([0, 0, 0.5], prompt=[1, 1, 60]), [0, 1, 0])
    assert [s["mask"] for s in seen] == [[True, True], [False, True], [False, False]]
    cluster.alive[1] = False
    _, seen = observations(cluster, make_workload([0]), [0])
    assert seen[0]["mask"] == [True, False]


def test_replicas_predicted_too_late_are_masked_unless_their_device_is_idle():
    workload = make_workload([0, 0, 0, 0], output=4)  # each takes 4 s alone, one at a time
    for grace_s, late in ((0.0, [False, True]), (1.0, [False, True]), (6.0, [True, True])):
        cluster = make_cluster([[0], [0]], max_batch=1, shed_late=True)
        _, seen = observations(cluster, workload, [0, 0], e2e_s=5.0, grace_s=grace_s)
        assert [s["mask"] for s in seen[:2]] == [[True, True], late]
    cluster = make_cluster([[0]], max_batch=1, shed_late=True)
    _, seen = observations(cluster, workload, [0], e2e_s=3.0)
    assert [s["mask"] for s in seen[:2]] == [[True], [False]]  # too late even at once
    for bound in ("ttft_s", "tpot_s"):
        cluster = make_cluster([[0, 1]], step_s=[1.0, 1.0], shed_late=True)
        _, seen = observations(cluster, workload, [0, 1], **{bound: 1.5})
        assert [s["mask"] for s in seen[:2]] == [[True, True], [True, False]]


def test_under_too_much_load_shedding_what_is_late_keeps_the_rest_in_time():
    workload = make_workload(np.arange(0, 60, 0.5).tolist(), output=4, max_tokens=4)
    kept, lost = (
        run(make_cluster(max_batch=1, shed_late=shed), workload, LeastLoaded(), e2e_s=10.5)
        for shed in (True, False)
    )
    on_time = [
        int(np.sum((r.outcome == Outcome.FINISHED) & (r.leave_ticks <= deadline(r))))
        for r in (kept, lost)
    ]
    assert on_time[0] > 2 * on_time[1]
    assert set(kept.outcome.tolist()) == {Outcome.FINISHED, Outcome.SHED}


def deadline(result):
    return result.workload.arrival_ticks + result.bounds.e2e_ticks


def test_what_fits_alone_is_what_a_replica_does_not_refuse():
    for scheduler in ("vllm", "transformers_fifo"):
        cluster = make_cluster(kv_blocks=5, block_tokens=4, max_context=30, scheduler=scheduler)
        for need in range(2, 35):
            workload = make_workload([0], prompt=need - 1, output=1)
            fits = bool(fits_alone(cluster, need - 1, 1)[0])
            assert fits == (run(cluster, workload).emitted_tokens[0] == 1)


def test_a_router_can_be_driven_by_anything_that_reports():
    """The live gateway has no SimPy: it says what time it is and what its workers report."""
    cluster = make_cluster([[0], [0]])
    workload = make_workload([0.0, 1.0])
    busy = np.array([[4, 0], [4, 0], [2, 0], [0, 0], [8, 0], [9, 0], [3, 0]])
    router = Router(cluster, workload, make_bounds(workload), Send([1, 0]), 0, lambda: busy)
    observation = router.observe(0, to_ticks(0.25))
    assert observation.inside.tolist() == [6, 0]
    assert router.decide(1, to_ticks(1.0)) == 1


def test_the_schema_has_another_number_whenever_something_else_is_observed():
    names = [field.name for field in fields(Observation) if field.name != "cluster"]
    derived = [name for name, value in vars(Observation).items()
               if isinstance(value, cached_property)]  # fmt: skip
    names += [name for name in derived if name != "xp" and not name.startswith("_")]
    digest = hashlib.sha256()

    class Watch(Send):
        def decide(self, state, observation):
            for name in names:
                value = np.asarray(getattr(observation, name), np.float64)
                digest.update(f"{name} {np.round(value, 6).tolist()}".encode())
            return super().decide(state, observation)

    rng = np.random.Generator(np.random.Philox(0))
    cluster = make_cluster(
        [[0, 1], [1]], step_s=[0.1, 0.2], token_s=[0.01, 0.02], pair_s=[0.001, 0.002],
        kv_token_s=[0.001, 0.001], tasks=("a", "b"), token_budget=40,
    )  # fmt: skip
    workload = make_workload(
        np.sort(rng.uniform(0, 30, 60)).tolist(), prompt=rng.integers(1, 30, 60).tolist(),
        output=rng.integers(1, 20, 60).tolist(), max_tokens=20, tasks=("a", "b"),
        task=rng.integers(0, 2, 60).tolist(),
    )  # fmt: skip
    run(cluster, workload, Watch([0, 1, 2]), e2e_s=6.0, ttft_s=3.0, tpot_s=1.0)
    # where this fails, raise OBSERVATION_SCHEMA: routers trained before would misread
    assert (OBSERVATION_SCHEMA, digest.hexdigest()[:16]) == (4, "7716dc2735bd9e9f")
