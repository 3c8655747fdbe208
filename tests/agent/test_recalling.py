"""A router that remembers when it sent the latest requests to each replica."""

from dataclasses import replace

import jax
import numpy as np

from agent.architectures import RecallingReplicas, Replicas
from agent.architectures.architecture import Remembering
from agent.architectures.recalling import SENT
from agent.learned import Learned
from sim.cluster import simulate
from sim.observation import Observation, idle
from sim.policy import SHED
from sim.ticks import NEVER, to_ticks
from sim.vector.simulate import simulate as simulate_in_jax
from tests.systems import make_bounds, make_cluster, make_workload

CLUSTER = make_cluster([[0, 1], [1]], step_s=[0.5, 1.0], max_queue=4)
ARCHITECTURE = RecallingReplicas(embedding=(8,), widths=(8,))


def at(now_s: float, slack_s: float | None = 3.0, inside: tuple[int, ...] = (9, 9, 9)):
    return replace(
        idle(CLUSTER, np), now_ticks=np.int64(to_ticks(now_s)), running=np.array(inside),
        e2e_slack_ticks=np.int64(NEVER if slack_s is None else to_ticks(slack_s)),
    )  # fmt: skip


def recalled(memory, observation: Observation) -> np.ndarray:
    """What is seen of each replica for the memory, beside what `replicas` sees."""
    features = ARCHITECTURE.features(np.int32(0), observation)
    seen = ARCHITECTURE.recall(features, memory, observation).replicas
    known = features.replicas.shape[1]
    np.testing.assert_array_equal(seen[:, :known], features.replicas)
    return seen[:, known:]


def test_of_nothing_sent_nothing_is_recalled():
    seen = recalled(ARCHITECTURE.memory(CLUSTER), at(0.0))
    assert (seen == seen[0]).all()
    assert (seen[:, -SENT:] == 0).all()  # nobody has time left


def test_times_are_of_the_replica_that_was_sent_to_in_shortest_steps():
    memory = ARCHITECTURE.remember(ARCHITECTURE.memory(CLUSTER), np.int32(1), at(1.0))
    seen = recalled(memory, at(2.0))
    assert seen[:, 0].tolist() == [0, 1, 0]  # the latest of all
    assert seen[1, 4] == 2 / 4  # a second is two steps of half a second
    assert seen[1, -SENT] == 4 / 4  # of three seconds two are left
    assert seen[0, -SENT] == 0


def test_the_latest_comes_first_and_the_oldest_is_forgotten():
    memory = ARCHITECTURE.memory(CLUSTER)
    for number in range(SENT + 1):
        memory = ARCHITECTURE.remember(memory, np.int32(2), at(float(number)))
    expected = [to_ticks(float(number)) for number in range(SENT, 0, -1)]
    assert memory.at_ticks[:, 2].tolist() == expected


def test_who_has_left_is_not_recalled():
    memory = ARCHITECTURE.memory(CLUSTER)
    for now_s in (1.0, 1.5):
        memory = ARCHITECTURE.remember(memory, np.int32(0), at(now_s))
    both, one = (recalled(memory, at(2.0, inside=(n, 0, 0)))[0, -SENT:] for n in (2, 1))
    assert both.tolist() == [5 / 4, 4 / 4, 0]
    assert one.tolist() == [5 / 4, 0, 0]


def test_a_request_that_is_shed_or_has_no_bound_breaks_nothing():
    before = ARCHITECTURE.memory(CLUSTER)
    shed = ARCHITECTURE.remember(before, np.int32(CLUSTER.n_replicas), at(1.0))
    np.testing.assert_array_equal(shed.at_ticks, before.at_ticks)
    boundless = ARCHITECTURE.remember(before, np.int32(0), at(1.0, slack_s=None))
    seen = recalled(boundless, at(2.0, slack_s=None))
    assert np.isfinite(seen).all()
    assert np.abs(seen).max() <= 4


def test_a_router_that_remembers_decides_alike_in_both_engines():
    rng = np.random.default_rng(0)
    workload = make_workload(np.sort(rng.uniform(0, 60, 150)).tolist(), output=2)
    bounds = make_bounds(workload, e2e_s=4.0)
    observation = idle(CLUSTER, np)
    router = Learned(ARCHITECTURE, CLUSTER.models, {})
    seen, _ = router.look(router.init(CLUSTER), observation)
    weights = ARCHITECTURE.network(()).init(jax.random.key(1), seen)
    router = Learned(ARCHITECTURE, CLUSTER.models, weights)
    one = simulate(CLUSTER, workload, bounds, router)
    two = simulate_in_jax(CLUSTER, workload, bounds, router)
    assert np.mean(one.replica == two.replica) > 0.99
    assert len({*one.replica.tolist()} - {SHED}) > 1


def test_only_this_one_remembers():
    assert isinstance(ARCHITECTURE, Remembering)
    assert not isinstance(Replicas(embedding=(8,), widths=(8,)), Remembering)
