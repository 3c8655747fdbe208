"""The ledger observes what the simulator's router would, and its books balance."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.baselines import ConservativeGreedy, LargestThatFits, LeastLoaded
from agent.checkpoint import Trained
from agent.compiled import deciding_fast
from live.backend import Delta, Progress
from live.ledger import Account, Ledger
from sim.deploy import ClusterSpec, build_cluster
from sim.observation import WINDOW_BITS
from sim.policy import ValuingPolicy
from sim.profile import load_bundle
from sim.router import SIGNALS, Asked
from sim.ticks import NEVER, TICKS_PER_S
from tests.live.one_stream import compare
from tests.sim.side_by_side import SHAPES, Any1, draw_case
from tests.systems import make_bounds, make_cluster, make_workload

TASKS = ("piqa", "winogrande", "hellaswag", "openbookqa")
SHIPPED = "pkg://calibrate.profiles/a100-80gb-analytic"

# What must have happened somewhere in the cases: else agreement says nothing about it.
EVERYWHERE = (
    "queued", "masked", "refused", "split prompt", "finished", "expired running",
    "expired waiting", "reset", "reset of a partly prefilled", "recomputed",
)  # fmt: skip


@pytest.mark.parametrize("scheduler", ["vllm", "transformers_fifo"])
def test_simulator_and_ledger_observe_the_same_of_one_event_stream(scheduler):
    """Where nothing is found again in the cache: a worker has prefix sharing off."""
    seen: Counter[str] = Counter()
    for seed in range(40):
        case = draw_case(SHAPES["shared"], False, seed, scheduler)
        cluster = replace(case.cluster, prefix_caching=np.zeros(case.cluster.n_replicas, bool))
        workload = replace(case.workload, cached_tokens=np.zeros_like(case.workload.cached_tokens))
        compared = compare(cluster, workload, case.bounds, Any1(), seed=seed)
        assert compared.same == compared.decisions == len(workload)
        seen += compared.seen
    assert set(EVERYWHERE) <= seen.keys()


def offered(rate_rps, seconds, seed):
    """A shipped cluster and the requests that come to it."""
    spec = ClusterSpec(profile=SHIPPED, devices=4, models=("opt-125m", "opt-1.3b", "opt-6.7b"),
                       prefix_caching=False)  # fmt: skip
    cluster = build_cluster(spec, load_bundle(SHIPPED), TASKS)
    rng = np.random.default_rng(seed)
    count = int(rate_rps * seconds)
    output = rng.integers(1, 60, count)
    workload = make_workload(
        np.sort(rng.uniform(0, seconds, count)).tolist(),
        prompt=rng.integers(10, 900, count).tolist(), output=output.tolist(),
        max_tokens=(output + rng.integers(0, 30, count)).tolist(),
        task=rng.integers(0, 4, count).tolist(), tasks=TASKS,
    )  # fmt: skip
    return cluster, workload, make_bounds(workload, e2e_s=1.5, ttft_s=0.8)


@pytest.mark.parametrize(
    "policy",
    [Trained("pkg://agent.checkpoints/default"), ConservativeGreedy(), LargestThatFits(),
     LeastLoaded()],
    ids=lambda policy: policy.name,
)  # fmt: skip
def test_a_gateway_decides_on_its_ledger_as_the_simulator_does(policy):
    """A gateway compiles its policies, but for rules; the simulator compiles none."""
    compared = compare(*offered(150, 3.0, seed=0), policy, deciding_fast(policy))
    assert compared.decisions == 450
    assert compared.seen["split prompt"] > 0
    assert compared.seen["queued"] > 0
    ties = [apart for apart in compared.apart if is_tie(policy, *apart[:2])]
    assert compared.same + len(ties) == compared.decisions
    print(f"{policy.name}: {compared.same} of {compared.decisions} the same, {len(ties)} ties")


def is_tie(policy, state, observation):
    """Whether the best values are within rounding of each other."""
    if not isinstance(policy, ValuingPolicy) or not policy.due(state, observation.now_ticks):
        return False
    _, (_, values) = policy.weigh(state, observation)
    second, best = np.sort(values)[-2:]
    return best - second <= 1e-5


ASKED = Asked(0, 7, 5, 0, NEVER, NEVER, NEVER, 0)

jobs = st.integers(0, 5)  # some of them unknown, some gone
some = st.lists(jobs, max_size=3)
each = st.lists(st.tuples(jobs, st.integers(1, 9)), max_size=3)
events = st.one_of(
    st.builds(lambda job: ("send", job), jobs),
    st.builds(lambda job: ("leave", job), jobs),
    st.builds(lambda ids, blocks: ("begin", ids, blocks), some, st.none() | st.integers(0, 9)),
    st.builds(
        lambda chunks, emitted, finished, cancelled, expired, reset, blocks, prompts: (
            "apply",
            Progress(
                chunks, [(job, Delta(n, "")) for job, n in emitted],
                [(job, "stop") for job in finished], cancelled, expired, reset, blocks, prompts,
            ),
        ),
        each, each, some, some, some, some, st.none() | st.integers(0, 9), each,
    ),
)  # fmt: skip


def recounted(account):
    """The signals but that of the blocks, from the jobs inside."""
    inside = account.entries.values()
    running = [entry for entry in inside if entry.running]
    decoding = [entry for entry in running if not entry.prefill_left]
    return (
        len(running), len(decoding), len(inside) - len(running),
        sum(entry.prefill_left for entry in inside),
        sum(max(entry.max_tokens - entry.emitted, 0) for entry in inside),
        sum(entry.prompt_tokens + entry.emitted for entry in decoding),
    )  # fmt: skip


def estimated(account, block_tokens):
    """Blocks that the running jobs take by what they have computed."""
    inside = account.entries.values()
    computed = [e.prompt_tokens + e.emitted - e.prefill_left for e in inside if e.running]
    return sum(-(-tokens // block_tokens) for tokens in computed)


@settings(max_examples=200, deadline=None)
@given(st.lists(events, max_size=25))
def test_books_balance_whatever_comes_late_twice_or_out_of_order(happening):
    account, sent, reported = Account(block_tokens=4), set(), None
    for event, *what in happening:
        if event == "send":
            if what[0] not in sent:  # a number is never used again
                account.send(what[0], ASKED)
            sent.add(what[0])
        elif event == "leave":
            reported = reported if account.leave(what[0]) is None else None
        elif event == "begin":
            account.begin(*what)
            reported = what[1]
        else:
            account.apply(what[0])
            reported = what[0].blocks_used
        assert account.signals[:-1] == recounted(account)
        assert account.blocks_used == (estimated(account, 4) if reported is None else reported)
        assert min(account.signals) >= 0
    for job in range(6):
        account.leave(job)
    account.begin([], None)
    assert account.signals == (0,) * len(SIGNALS)


def test_a_job_that_leaves_unreported_takes_its_blocks_along():
    account = Account(block_tokens=4)
    account.send(0, ASKED)
    account.begin([0], 2)
    assert account.blocks_used == 2
    account.leave(0)
    assert account.blocks_used == 0


def test_blocks_are_estimated_where_nobody_reports_them():
    account = Account(block_tokens=4)
    account.send(0, ASKED)
    account.begin([0], None)
    assert account.blocks_used == 0
    account.apply(Progress(emitted=[(0, Delta(1, ""))]))
    assert account.blocks_used == 2  # 7 of the prompt and one more


def test_a_server_may_say_how_long_a_prompt_is_before_and_after_it_was_computed():
    account = Account(block_tokens=4)
    account.send(0, ASKED)
    account.apply(Progress(prompt_tokens=[(0, 9)]))
    assert account.prefill_tokens == 9
    account.apply(Progress(emitted=[(0, Delta(1, ""))], prompt_tokens=[(0, 12)]))
    assert (account.prefill_tokens, account.kv_tokens) == (0, 13)


def ledger_of(cluster):
    ledger = Ledger(cluster, [f"r{i}" for i in range(cluster.n_replicas)], 0)
    for account in ledger.accounts.values():
        account.alive = True
    return ledger


def test_replicas_that_are_down_or_passed_over_are_masked():
    ledger = ledger_of(make_cluster([[0], [0], [0]]))
    ledger.accounts["r1"].alive = False
    ledger.note_arrival(ASKED, 0)
    allowed = np.array([True, True, False])
    assert ledger.observe(ASKED, 0, allowed).mask.tolist() == [True, False, False]


def test_a_ledger_that_takes_over_knows_jobs_and_counts():
    older = ledger_of(make_cluster([[0], [0]]))
    older.note_arrival(ASKED, 0)
    older.accounts["r1"].send(3, ASKED)
    older.note_finished(0, 4)
    newer = ledger_of(make_cluster([[0], [0], [0]]))
    newer.succeed(older)
    newer.note_arrival(ASKED, TICKS_PER_S // 8)
    observation = newer.observe(ASKED, TICKS_PER_S // 8, np.ones(3, bool))
    assert observation.waiting.tolist() == [0, 1, 0]
    assert observation.window_arrivals[:, 0].tolist() == [2] * len(WINDOW_BITS)
    assert observation.since_arrival_ticks == TICKS_PER_S // 8
    assert observation.finished_tokens.tolist() == [4]
    assert newer.jobs == 1
