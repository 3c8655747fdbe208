"""The parts of the bound that carry long workloads: charges under preemption, and prices."""

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.sparse import csr_array, vstack

from agent.baselines import ConservativeGreedy, LargestThatFits
from agent.clairvoyant import bound
from agent.clairvoyant.charges import Work, charges_of, kv_share
from agent.clairvoyant.prices import Priced
from sim.cluster import simulate
from sim.utility import utility
from tests.systems import make_bounds, make_cluster, make_workload, run, seconds

SETTINGS = {
    "short of memory": {"kv_blocks": 90},
    "nothing is found again": {"kv_blocks": 90, "prefix_caching": False},
    "enough": {"kv_blocks": 2000},
    "long steps": {"kv_blocks": 90, "token_s": [0.01]},
    "small batch": {"kv_blocks": 62, "max_batch": 4, "token_budget": 20},
}


def tight_cluster(**settings):
    defaults = {
        "step_s": [0.1], "token_s": [0.002], "kv_token_s": [0.0005], "sequence_s": [0.001],
        "max_batch": 12, "token_budget": 40, "block_tokens": 4, "max_context": 200,
    }  # fmt: skip
    return make_cluster([[0]], **(defaults | settings))


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_a_run_takes_is_at_least_what_its_requests_are_charged(setting):
    rng = np.random.default_rng(3)
    cluster = tight_cluster(**SETTINGS[setting])
    count = 60
    prompt, output = rng.integers(1, 60, count), rng.integers(1, 40, count)
    workload = make_workload(
        [0.0] * count, prompt=prompt.tolist(), output=output.tolist(), max_tokens=40
    )
    result = run(cluster, workload)
    assert (result.emitted_tokens == output).all()
    share = kv_share(cluster, 0, prompt + 40, count)
    assert (result.preemptions.sum() > 0) == (share < 1)
    assert share > 0
    work = Work(float(prompt.mean()), float(output.mean()))
    charges = charges_of(cluster, 0, count, work)
    chunks, later = np.ceil(prompt / cluster.token_budget[0]), output - 1
    charged = (
        (charges.request_s + charges.sequence_s) * (chunks + later)
        + charges.token_s * (prompt - chunks)
        + share * charges.kv_token_s * later * (prompt + output / 2)
    ).sum()
    (end,) = seconds([result.end_ticks])
    assert 0.5 * end < charged <= end


def test_a_share_of_the_context_is_not_charged_where_nothing_is_known_of_preemption():
    need = np.full(20, 100)
    fifo = {"scheduler": "transformers_fifo", "kv_blocks": 90}
    assert kv_share(tight_cluster(**fifo), 0, need, 20) == 0
    assert kv_share(tight_cluster(kv_blocks=60), 0, need, 20) == 0  # one may hold nearly all
    assert kv_share(tight_cluster(kv_blocks=60, reserve=True), 0, need, 20) == 1


@pytest.mark.parametrize("policy", [LargestThatFits(), ConservativeGreedy()])
@pytest.mark.parametrize("grace_s", [0.0, 2.0])
def test_no_policy_exceeds_the_bound_where_requests_are_preempted(policy, grace_s):
    rng = np.random.default_rng(5)
    cluster = make_cluster(
        [[0, 1]], step_s=[0.02, 0.1], token_s=[0.0005, 0.002], kv_token_s=[0.0001, 0.0005],
        quality=[[0.6], [1.0]], max_batch=12, token_budget=40, block_tokens=4, max_context=200,
        kv_blocks=90,
    )  # fmt: skip
    count = 300
    preempted = 0
    for rate_rps in (3.0, 10.0, 40.0):
        workload = make_workload(
            np.cumsum(rng.exponential(1 / rate_rps, count)).tolist(),
            prompt=rng.integers(1, 60, count).tolist(),
            output=rng.integers(1, 40, count).tolist(),
            max_tokens=40,
        )
        bounds = make_bounds(workload, e2e_s=12.0, grace_s=grace_s)
        result = simulate(cluster, workload, bounds, policy)
        assert utility(result, 0.0).sum() <= bound(cluster, workload, bounds)
        preempted += result.preemptions.sum()
    assert preempted > 0


def drawn_program(seed: int) -> tuple[np.ndarray, np.ndarray, csr_array]:
    """Requests of up to three options each, and limits that bind."""
    rng = np.random.default_rng(seed)
    request = np.repeat(np.arange(80), rng.integers(1, 4, 80))
    takes = rng.uniform(0, 0.15, (12, len(request))) * (rng.random((12, len(request))) < 0.4)
    return request, rng.uniform(0.1, 1.0, len(request)), csr_array(takes)


@pytest.mark.parametrize("seed", range(5))
def test_prices_bound_a_program_as_closely_as_solving_it(seed):
    request, earns, takes = drawn_program(seed)
    once = csr_array((np.ones(len(request)), (request, np.arange(len(request)))))
    limits = vstack([once, takes])
    solved = linprog(-earns, A_ub=limits, b_ub=np.ones(limits.shape[0]), bounds=(0, 1))
    assert -solved.fun < 0.8 * earns.sum()  # some limit binds
    found = Priced(request, earns, takes).bound()
    assert -solved.fun - 1e-9 <= found <= 1.005 * -solved.fun


def test_any_prices_bound_it():
    request, earns, takes = drawn_program(0)
    priced = Priced(request, earns, takes)
    least = priced.bound()
    for prices in np.random.default_rng(0).uniform(0, 2, (50, 12)):
        assert priced.at(prices) >= 0.995 * least
