"""The engine, configured down to systems that queueing theory has solved.

Waiting times are averaged over independent runs; the theory has to lie in the confidence interval
of that average.
"""

import numpy as np
import pytest
from scipy import stats

from sim.types import Result, Workload
from tests.systems import Send, make_cluster, make_workload, run

RUNS, REQUESTS, WARM_UP = 16, 2500, 250
CONFIDENCE = 0.999


def poisson_arrivals(rate_rps: float, rng: np.random.Generator) -> list[float]:
    return np.cumsum(rng.exponential(1 / rate_rps, REQUESTS)).tolist()


def mean_wait_s(result: Result, service_s: np.ndarray) -> float:
    spent = (result.leave_ticks - result.workload.arrival_ticks) / 2**40
    return float((spent - service_s)[WARM_UP:].mean())


def assert_contains(samples: list[float], theory: float, slack: float = 0.0) -> None:
    low, high = stats.t.interval(CONFIDENCE, len(samples) - 1, np.mean(samples), stats.sem(samples))
    assert low - slack <= theory <= high + slack
    assert high - low < 0.5 * theory  # an interval that says something


def one_server(service_s: np.ndarray, rate_rps: float, rng: np.random.Generator) -> float:
    """Mean wait where a request is one step, as long as its prompt, and the batch is one."""
    tokens = np.rint(service_s * 1000).astype(int)
    cluster = make_cluster(
        step_s=[0.0], token_s=[0.001], max_batch=1, token_budget=20_000, max_queue=10**6,
        max_context=10**6, kv_blocks=10**6,
    )  # fmt: skip
    workload = make_workload(poisson_arrivals(rate_rps, rng), prompt=tokens.tolist())
    return mean_wait_s(run(cluster, workload), tokens * 0.001)


@pytest.mark.parametrize("utilisation", [0.4, 0.7])
def test_waiting_in_m_m_1(utilisation):
    samples = []
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        service_s = np.maximum(rng.exponential(1.0, REQUESTS), 0.001)
        samples.append(one_server(service_s, utilisation, rng))
    assert_contains(samples, utilisation / (1 - utilisation))


@pytest.mark.parametrize("utilisation", [0.4, 0.7])
def test_waiting_in_m_d_1(utilisation):
    samples = [
        one_server(np.ones(REQUESTS), utilisation, np.random.default_rng(seed))
        for seed in range(RUNS)
    ]
    assert_contains(samples, utilisation / (2 * (1 - utilisation)))


def erlang_c(servers: int, offered: float) -> float:
    """Probability of waiting in M/M/c (Erlang, 1917)."""
    blocking = 1.0
    for k in range(1, servers + 1):
        blocking = offered * blocking / (k + offered * blocking)
    return blocking / (1 - offered / servers * (1 - blocking))


def test_waiting_in_m_m_c():
    """A batch of c slots whose steps are short and as long for one as for c is c servers."""
    servers, utilisation, steps_per_request = 3, 0.7, 50
    samples = []
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        outputs = rng.geometric(1 / steps_per_request, REQUESTS)
        workload = make_workload(
            poisson_arrivals(utilisation * servers, rng), output=outputs.tolist()
        )
        cluster = make_cluster(
            step_s=[1 / steps_per_request], max_batch=servers, max_queue=10**6, kv_blocks=10**6
        )
        samples.append(mean_wait_s(run(cluster, workload), outputs / steps_per_request))
    wait_s = erlang_c(servers, utilisation * servers) / (servers * (1 - utilisation))
    assert_contains(samples, wait_s, slack=1 / steps_per_request)  # a step is joined at its start


def test_arrivals_see_what_littles_law_says():
    """The mean number inside, as Poisson arrivals observe it, is the rate times the mean stay."""
    differences = []
    for seed in range(RUNS):
        rng = np.random.default_rng(seed)
        inside: list[int] = []

        class Count(Send):
            def decide(self, state, observation, inside=inside):
                inside.append(int(observation.inside.sum()))
                return super().decide(state, observation)

        cluster = make_cluster([[0, 1], [0]], step_s=[0.01, 0.03], max_batch=4, max_queue=10**6)
        workload: Workload = make_workload(
            poisson_arrivals(4.0, rng), prompt=20, output=rng.geometric(0.05, REQUESTS).tolist()
        )
        result = run(cluster, workload, Count([0, 1, 2]))
        stay_s = (result.leave_ticks - workload.arrival_ticks) / 2**40
        rate_rps = REQUESTS / (workload.arrival_ticks[-1] / 2**40)
        differences.append(float(np.mean(inside)) / (rate_rps * stay_s.mean()))
    assert_contains(differences, 1.0)
