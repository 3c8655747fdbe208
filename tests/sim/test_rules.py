"""The rules of docs/simulation.md, one by one, on situations small enough to work out by hand.

Unless said otherwise every step takes one second.
"""

import pytest

from sim.policy import SHED
from sim.types import Outcome
from tests.systems import Send, make_cluster, make_workload, run, seconds

FINISHED, CANCELLED, SHEDDED = Outcome.FINISHED, Outcome.CANCELLED, Outcome.SHED


def test_a_prompt_emits_the_first_token_and_each_decode_one_more():
    result = run(make_cluster(), make_workload([0.0], prompt=10, output=3))
    assert seconds(result.first_token_ticks) == [1]
    assert seconds(result.leave_ticks) == [3]
    assert result.n_steps == 3


def test_an_output_of_one_token_finishes_with_its_prompt():
    result = run(make_cluster(), make_workload([0.0], prompt=10, output=1))
    assert seconds(result.leave_ticks) == seconds(result.first_token_ticks) == [1]


def test_duration_counts_tokens_pairs_and_kv_tokens():
    cluster = make_cluster(step_s=[1.0], token_s=[0.1], pair_s=[0.001], kv_token_s=[0.01])
    result = run(cluster, make_workload([0.0], prompt=10, output=3))
    prefill = 1 + 0.1 * 10 + 0.001 * 55
    decode_1 = 1 + 0.1 + 0.01 * 11
    decode_2 = 1 + 0.1 + 0.01 * 12
    assert seconds(result.leave_ticks)[0] == pytest.approx(prefill + decode_1 + decode_2, abs=1e-9)


def test_every_request_that_takes_part_in_a_step_takes_its_time():
    cluster = make_cluster(sequence_s=[0.25])
    result = run(cluster, make_workload([0, 0, 1.5], prompt=10, output=[3, 2, 2]))
    # two prompts | two decodes and a prompt | the last decodes of the first and the third
    assert seconds(result.steps.end_ticks) == [1.5, 3.25, 4.75]


def test_a_stalled_request_takes_no_part_in_a_step():
    cluster = make_cluster(
        sequence_s=[0.25], kv_blocks=4, block_tokens=4, scheduler="transformers_fifo"
    )
    result = run(cluster, make_workload([0, 0, 0], prompt=[3, 2, 2], output=[5, 4, 4]))
    # three prompts | three decodes | again | the third is reset, the second stalls
    assert seconds(result.steps.end_ticks)[:4] == [1.75, 3.5, 5.25, 6.5]
    assert result.preemptions.tolist() == [0, 0, 1]


def test_a_step_with_prompt_tokens_takes_longer_and_reads_what_is_computed_of_them():
    cluster = make_cluster(prompt_s=[0.5], done_token_s=[0.01], token_budget=6, max_batch=4)
    result = run(cluster, make_workload([0, 0.1], prompt=[5, 8], output=[4, 1]))
    # 5 | 5 beside a decode | 3 after those 5 | a decode
    ends = [1.5, 1.5 + 1.5, 1.5 + 1.5 + 1.55, 1.5 + 1.5 + 1.55 + 1.0]
    assert seconds(result.steps.end_ticks) == pytest.approx(ends)


def test_another_replica_than_the_one_served_last_is_a_switch_however_long_ago_that_was():
    cluster = make_cluster([[0, 1]], step_s=[1.0, 1.0], switch_s=[0.25, 0.5])
    arrivals = [0, 10, 20, 30]
    result = run(cluster, make_workload(arrivals, output=2), Send([0, 0, 1, 0]))
    # the first step of a device is none
    assert seconds(result.leave_ticks) == [2, 12, 22.5, 32.25]


def test_replicas_that_take_turns_switch_at_every_step():
    cluster = make_cluster([[0, 1], [0]], step_s=[1.0, 1.0], switch_s=[0.25, 0.5])
    result = run(cluster, make_workload([0, 0, 0], output=[3, 3, 2]), Send([0, 1, 2]))
    on_first = result.steps.replica != 2
    assert seconds(result.steps.end_ticks[on_first]) == [1, 2.5, 3.75, 5.25, 6.5, 8]
    assert seconds(result.leave_ticks) == [6.5, 8, 2]  # devices switch each for itself


def test_a_split_prompt_attends_to_what_is_done():
    cluster = make_cluster(step_s=[1.0], pair_s=[0.001], token_budget=6, max_batch=4)
    result = run(cluster, make_workload([0.0], prompt=10, output=1))
    expected = (1 + 0.001 * 21) + (1 + 0.001 * (4 * 6 + 10))
    assert seconds(result.leave_ticks)[0] == pytest.approx(expected, abs=1e-9)


def test_requests_count_from_arrival_and_are_routed_after_the_overhead():
    cluster = make_cluster(overhead_s=0.25)
    result = run(cluster, make_workload([0.0]), e2e_s=1.25)
    assert seconds(result.leave_ticks) == [1.25]
    assert result.outcome.tolist() == [FINISHED]


def test_a_request_that_arrives_at_a_boundary_joins_that_step():
    result = run(make_cluster(), make_workload([0.0, 1.0], output=[3, 1]))
    assert seconds(result.leave_ticks) == [3, 2]
    assert result.n_steps == 3


def test_a_request_that_arrives_after_a_boundary_waits_for_the_next():
    result = run(make_cluster(), make_workload([0.0, 1.001], output=[3, 1]))
    assert seconds(result.leave_ticks) == [3, 3]


def test_each_of_several_requests_at_one_instant_sees_the_earlier_ones_placed():
    seen = []

    class Watch(Send):
        def decide(self, state, observation):
            seen.append(observation.waiting.tolist())
            return super().decide(state, observation)

    run(make_cluster(), make_workload([0.0, 0.0, 0.0]), Watch([0]))
    assert seen == [[0], [1], [2]]


def test_a_batch_admits_up_to_its_slots_in_order_of_arrival():
    cluster = make_cluster(max_batch=2)
    result = run(cluster, make_workload([0, 0, 0], output=2))
    assert seconds(result.leave_ticks) == [2, 2, 4]


def test_decodes_take_their_budget_before_a_prompt():
    cluster = make_cluster(token_budget=5, max_batch=4)
    # from the second step on, the first request decodes: 4 tokens a step are left for the prompt
    result = run(cluster, make_workload([0, 0.5], prompt=[5, 8], output=[4, 1]))
    assert seconds(result.first_token_ticks) == [1, 3]


def test_one_prompt_at_a_time_is_split_and_the_next_takes_what_it_leaves():
    cluster = make_cluster(token_budget=6, max_batch=4)
    result = run(cluster, make_workload([0, 0], prompt=[8, 8], output=1))
    # 6 | 2 + 4 | 4
    assert seconds(result.leave_ticks) == [2, 3]
    assert result.steps.prefill_tokens.tolist() == [6, 6, 4]


def test_the_scan_stops_at_the_first_that_does_not_fit():
    cluster = make_cluster(kv_blocks=4, block_tokens=4, max_batch=4)
    workload = make_workload([0, 0, 0], prompt=[8, 12, 4], output=1, max_tokens=2)
    result = run(cluster, workload)
    # the second (3 blocks) does not fit beside the first (2); the third would, but waits behind it
    assert seconds(result.leave_ticks) == [1, 2, 2]


def test_transformers_tries_the_next_where_one_does_not_fit():
    cluster = make_cluster(kv_blocks=6, block_tokens=4, scheduler="transformers_fifo")
    workload = make_workload([0, 0, 0], prompt=[8, 15, 4], output=1, max_tokens=2)
    # blocks asked for: 3, 5, 2 of 6
    assert seconds(run(cluster, workload).leave_ticks) == [1, 2, 1]


def test_transformers_starts_no_prompt_when_few_blocks_are_free():
    cluster = make_cluster(kv_blocks=10, block_tokens=4, scheduler="transformers_fifo")
    workload = make_workload([0, 0], prompt=[34, 2], output=1, max_tokens=2)
    # the first takes 9 of 10 blocks; 1 is under the margin of 15 %
    assert seconds(run(cluster, workload).leave_ticks) == [1, 2]


def test_replicas_of_a_device_take_turns():
    cluster = make_cluster([[0, 1]], step_s=[1.0, 10.0])
    result = run(cluster, make_workload([0, 0], output=[2, 2]), Send([0, 1]))
    # m0 0-1, m1 1-11, m0 11-12, m1 12-22
    assert seconds(result.leave_ticks) == [12, 22]


def test_a_device_remembers_whose_turn_it_is_while_idle():
    cluster = make_cluster([[0, 1]], step_s=[1.0, 10.0])
    result = run(cluster, make_workload([0, 5, 5]), Send([0, 0, 1]))
    # replica 0 was served last, so replica 1 goes first at 5
    assert seconds(result.leave_ticks) == [1, 16, 15]


def test_devices_do_not_wait_for_each_other():
    cluster = make_cluster([[0], [0]])
    result = run(cluster, make_workload([0, 0], output=5), Send([0, 1]))
    assert seconds(result.leave_ticks) == [5, 5]


def test_the_most_recently_admitted_is_preempted_and_computes_its_tokens_again():
    cluster = make_cluster(kv_blocks=4, block_tokens=4, prefix_caching=False)
    # two prompts of 7 take 2 blocks each; the second decode step would need a fifth block
    workload = make_workload([0, 0], prompt=7, output=[6, 4], max_tokens=[6, 4])
    result = run(cluster, workload)
    # 1: both first tokens; 2: decode into place 8; at 2 both need a block: the second is preempted
    # with 2 tokens emitted; the first runs on alone to 6; then 9 tokens are computed again.
    assert result.preemptions.tolist() == [0, 1]
    assert seconds(result.leave_ticks) == [6, 8]
    assert seconds(result.first_token_ticks) == [1, 1]
    assert result.steps.prefill_tokens.tolist() == [14, 0, 0, 0, 0, 0, 9, 0]


def test_with_prefix_caching_only_what_is_not_found_again_is_computed():
    cluster = make_cluster(kv_blocks=4, block_tokens=4, step_s=[1.0], pair_s=[0.001])
    workload = make_workload([0, 0], prompt=7, output=[6, 4], max_tokens=[6, 4])
    result = run(cluster, workload)
    # as above, but of the 2 blocks with 8 tokens the first request takes one, the last: 4 are left
    assert result.steps.prefill_tokens.tolist() == [14, 0, 0, 0, 0, 0, 5, 0]
    steps = result.steps.end_ticks - result.steps.start_ticks
    assert seconds(steps)[6] == pytest.approx(1 + 0.001 * (5 * 4 + 15), abs=1e-9)


def test_what_a_request_computed_is_not_found_by_another():
    cluster = make_cluster(max_batch=1, block_tokens=4)
    result = run(cluster, make_workload([0, 0], prompt=8))
    assert result.steps.prefill_tokens.tolist() == [8, 8]


def test_a_prompt_is_not_begun_before_all_of_it_fits():
    cluster = make_cluster(kv_blocks=4, block_tokens=4, token_budget=6, max_batch=4)
    workload = make_workload([0, 0], prompt=[5, 14], output=[3, 1], max_tokens=[3, 1])
    result = run(cluster, workload)
    # 2 blocks are free, enough for a chunk of 5, but the prompt takes 4: it waits for the first
    assert result.preemptions.tolist() == [0, 0]
    assert seconds(result.leave_ticks) == [3, 6]
    assert result.steps.prefill_tokens.tolist() == [5, 0, 0, 6, 6, 2]


def test_reserving_holds_everything_from_admission_and_never_preempts():
    cluster = make_cluster(kv_blocks=4, block_tokens=4, reserve=True)
    workload = make_workload([0, 0], prompt=7, output=[6, 4], max_tokens=[6, 4])
    result = run(cluster, workload)
    assert result.preemptions.tolist() == [0, 0]
    assert seconds(result.leave_ticks) == [6, 10]


def test_a_starved_request_of_transformers_is_reset_to_the_end_of_the_queue():
    cluster = make_cluster(kv_blocks=6, block_tokens=4, max_batch=2, scheduler="transformers_fifo")
    # two prompts of 7 take ⌊8/4⌋ + 1 = 3 blocks each; at 12 tokens both need another block
    workload = make_workload([0, 0, 0.5], prompt=[7, 7, 1], output=[10, 10, 1])
    result = run(cluster, workload)
    assert result.preemptions.tolist() == [0, 1, 0]
    assert seconds(result.leave_ticks)[0] < seconds(result.leave_ticks)[2]


def test_a_request_too_long_for_context_or_cache_is_refused():
    cluster = make_cluster(max_context=100, kv_blocks=10, block_tokens=4)
    workload = make_workload([0, 0, 0], prompt=[90, 30, 30], output=1, max_tokens=[11, 11, 10])
    assert run(cluster, workload).outcome.tolist() == [
        Outcome.REFUSED_TOO_LONG,
        Outcome.REFUSED_TOO_LONG,
        FINISHED,
    ]


def test_a_request_is_refused_by_a_full_queue():
    cluster = make_cluster(max_queue=2, max_batch=1)
    result = run(cluster, make_workload([0, 0, 0]))
    assert result.outcome.tolist() == [FINISHED, FINISHED, Outcome.REFUSED_FULL]


def test_shedding_is_recorded_at_the_router():
    result = run(make_cluster(overhead_s=0.5), make_workload([1.0]), Send([SHED]))
    assert result.outcome.tolist() == [SHEDDED]
    assert result.replica.tolist() == [-1]
    assert seconds(result.leave_ticks) == [1.5]


def test_finishing_exactly_at_the_bound_is_in_time_and_precedes_cancellation():
    workload = make_workload([0.0], output=3)
    assert run(make_cluster(), workload, e2e_s=3.0).outcome.tolist() == [FINISHED]
    late = run(make_cluster(), workload, e2e_s=2.5)
    assert late.outcome.tolist() == [FINISHED]  # no prediction: it was alive when its step began
    dead = run(make_cluster(), workload, e2e_s=2.0)
    assert dead.outcome.tolist() == [CANCELLED]
    assert seconds(dead.leave_ticks) == [2]
    assert dead.emitted_tokens.tolist() == [2]


def test_a_dead_request_frees_its_slot_at_once():
    cluster = make_cluster(max_batch=1)
    result = run(cluster, make_workload([0, 0], output=[10, 1]), e2e_s=[2.0, 9.0])
    assert result.outcome.tolist() == [CANCELLED, FINISHED]
    assert seconds(result.leave_ticks) == [2, 3]


def test_a_dead_request_leaves_the_queue_when_it_heads_it():
    cluster = make_cluster(max_batch=1)
    result = run(cluster, make_workload([0, 0, 0], output=[3, 1, 1]), e2e_s=[9, 1.5, 9])
    assert result.outcome.tolist() == [FINISHED, CANCELLED, FINISHED]
    assert seconds(result.leave_ticks) == [3, 1 + 1, 4]  # found dead at the boundary at 2


def test_a_partly_prefilled_request_can_be_cancelled():
    cluster = make_cluster(token_budget=4)
    result = run(cluster, make_workload([0], prompt=100), e2e_s=2.5)
    assert result.outcome.tolist() == [CANCELLED]
    assert seconds(result.leave_ticks) == [3]
    assert result.emitted_tokens.tolist() == [0]


def test_without_cancellation_the_dead_are_served():
    cluster = make_cluster(cancel_expired=False)
    result = run(cluster, make_workload([0], output=5), e2e_s=2.0)
    assert result.outcome.tolist() == [FINISHED]


def test_a_late_first_token_kills_at_once_where_bounds_are_hard():
    result = run(make_cluster(), make_workload([0], output=5), ttft_s=0.5)
    assert result.outcome.tolist() == [CANCELLED]
    assert seconds(result.leave_ticks) == [1]
    assert result.emitted_tokens.tolist() == [1]


def test_a_first_token_within_the_grace_keeps_a_request_alive():
    workload = make_workload([0], output=5)
    kept = run(make_cluster(), workload, ttft_s=0.5, grace_s=0.6)
    lost = run(make_cluster(), workload, ttft_s=0.5, grace_s=0.5)
    assert (kept.outcome.tolist(), lost.outcome.tolist()) == ([FINISHED], [CANCELLED])


def test_time_per_token_never_cancels():
    result = run(make_cluster(), make_workload([0], output=5), tpot_s=0.1)
    assert result.outcome.tolist() == [FINISHED]


def test_at_the_horizon_steps_end_and_requests_are_routed_but_no_step_begins():
    workload = make_workload([0, 2.0, 2.5], output=[2, 1, 1])
    result = run(make_cluster(), workload, horizon_s=2.0)
    assert result.outcome.tolist() == [FINISHED, Outcome.INSIDE, Outcome.INSIDE]
    assert result.replica.tolist() == [0, 0, -1]
    assert seconds(result.steps.end_ticks) == [1, 2]
    assert result.end_ticks == 2 * 2**40


def test_requests_inside_at_the_horizon_tell_how_far_they_came():
    result = run(make_cluster(), make_workload([0], output=9), horizon_s=4.5)
    assert result.emitted_tokens.tolist() == [4]
    assert seconds(result.first_token_ticks) == [1]


def test_cached_tokens_are_not_computed():
    cluster = make_cluster(token_s=[0.1])
    result = run(cluster, make_workload([0], prompt=10, cached=6))
    assert seconds(result.leave_ticks) == [1.4]


def test_between_snapshots_a_router_knows_only_what_it_sent():
    seen = []

    class Watch(Send):
        def decide(self, state, observation):
            seen.append((observation.running.tolist(), observation.waiting.tolist()))
            return super().decide(state, observation)

    cluster = make_cluster([[0], [0]], signal_period_s=10.0)
    run(cluster, make_workload([0, 1.5, 2.5, 10.0], output=20), Watch([0, 0, 1, 1]))
    assert seen == [([0, 0], [0, 0]), ([0, 0], [1, 0]), ([0, 0], [2, 0]), ([2, 1], [0, 0])]


def test_stale_signals_let_a_full_queue_refuse():
    cluster = make_cluster(max_queue=1, max_batch=1, kv_blocks=3, signal_period_s=100.0)
    result = run(cluster, make_workload([0, 0.1, 0.2], output=5))
    assert result.outcome.tolist()[2] == Outcome.REFUSED_FULL


def test_a_workload_for_other_tasks_is_refused():
    with pytest.raises(ValueError, match=r"workload.tasks = .*must be"):
        run(make_cluster(), make_workload([0.0], tasks=("other",)))


@pytest.mark.parametrize("scheduler", ["vllm", "transformers_fifo"])
def test_an_empty_workload_ends_at_once(scheduler):
    result = run(make_cluster(scheduler=scheduler), make_workload([]))
    assert result.end_ticks == 0
    assert result.n_steps == 0
