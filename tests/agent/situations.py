"""Situations made by hand, for rules to decide on.

Two devices host a small and a large model each: replicas 0 and 2 are small, 1 and 3 large. A step
takes 0.1 s and 1 s; the small model's quality is 0.5, the large one's 1.
"""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from sim.observation import WINDOWS_S, Observation, idle
from sim.ticks import NEVER, to_ticks
from tests.systems import make_cluster

ZEROS = np.zeros(4, np.int64)
NO_ARRIVALS = np.zeros((len(WINDOWS_S), 1), np.int64)
TWO_DEVICES = make_cluster([[0, 1], [0, 1]], step_s=[0.1, 1.0])


def situation(**changes) -> Observation:
    """An idle cluster and a request of 10 prompt tokens and at most 10 output tokens."""
    cluster = make_cluster([[0, 1], [0, 1]], step_s=[0.1, 1.0], max_batch=2)
    nothing = Observation(
        cluster=cluster, now_ticks=0, task=0, prompt_tokens=10, max_tokens=10,
        e2e_slack_ticks=to_ticks(100), ttft_slack_ticks=NEVER, tpot_ticks=NEVER, grace_ticks=0,
        random_bits=0, running=ZEROS, decoding=ZEROS, waiting=ZEROS, prefill_tokens=ZEROS,
        decode_tokens=ZEROS, kv_tokens=ZEROS, kv_blocks_used=ZEROS, mask=np.ones(4, bool),
        window_arrivals=NO_ARRIVALS, previous_arrivals=NO_ARRIVALS,
        since_arrival_ticks=0, finished_requests=np.zeros(1, np.int64),
        finished_tokens=np.zeros(1, np.int64),
    )  # fmt: skip
    return replace(nothing, **changes)


def choose(policy, observation: Observation) -> int:
    return int(policy.decide(policy.init(observation.cluster), observation)[0])


def arriving(rate_rps: int) -> dict[str, np.ndarray]:
    """What is observed at the end of windows that had so many arrivals per second."""
    per_window = np.array(WINDOWS_S)[:, None] * rate_rps
    now_ticks = to_ticks(WINDOWS_S[-1] - 1e-4)
    return {"window_arrivals": per_window.astype(np.int64), "now_ticks": now_ticks}


def of_one_token(**changes) -> Observation:
    """Those devices idle, and a request of one token: it takes as long as a step."""
    return replace(idle(TWO_DEVICES, np), **changes)


def only(*replicas: int) -> np.ndarray:
    return np.isin(np.arange(4), replicas)


def at(**requests: int) -> np.ndarray:
    """Counts at replicas: at(r1=3) is three at replica 1."""
    return np.array([requests.get(f"r{r}", 0) for r in range(4)])


def moved(leaf):
    """Weights thrice as large, and none that are 0, as the ends of some networks are."""
    return 3.0 * leaf + 0.1 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape)
