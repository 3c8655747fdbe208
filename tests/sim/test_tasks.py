import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.config import ConfigError, check
from sim.tasks import DirichletMix, DriftingMix, FixedMix, TasksSpec, draw

ARRIVAL_S = np.linspace(0, 100, 40_000, endpoint=False)


def shares(task, n_tasks):
    return np.bincount(task, minlength=n_tasks) / len(task)


def drawn(mix, seed=0, names=("a", "b", "c")):
    return draw(TasksSpec(names=names, mix=mix), ARRIVAL_S, 100.0, np.random.default_rng(seed))


def test_without_weights_tasks_come_in_equal_parts():
    task = drawn(FixedMix())
    assert task.dtype == np.int32
    assert shares(task, 3) == pytest.approx([1 / 3] * 3, abs=0.01)


@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda w: max(w) > 1e-3),
    seed=st.integers(0, 2**32),
)
def test_a_task_of_weight_zero_never_comes(weights, seed):
    names = tuple(f"task{i}" for i in range(len(weights)))
    spec = TasksSpec(names=names, mix=FixedMix(weights=tuple(weights)))
    task = draw(spec, np.zeros(200), 1.0, np.random.default_rng(seed))
    assert ((task >= 0) & (task < len(weights))).all()
    assert all(weights[i] > 0 for i in set(task.tolist()))


def test_fixed_weights_need_not_add_up_to_one():
    assert shares(drawn(FixedMix(weights=(6, 3, 1))), 3) == pytest.approx(
        [0.6, 0.3, 0.1], abs=0.015
    )


def test_a_dirichlet_mix_holds_for_a_window_and_changes_at_its_end():
    task = drawn(DirichletMix(concentration=0.5, window_s=50))
    first, second = shares(task[:20_000], 3), shares(task[20_000:], 3)
    assert np.abs(first - second).max() > 0.1
    assert shares(task[:10_000], 3) == pytest.approx(shares(task[10_000:20_000], 3), abs=0.03)


def test_a_dirichlet_mix_without_window_holds_for_the_run():
    task = drawn(DirichletMix(concentration=0.5), seed=1)
    assert shares(task[:20_000], 3) == pytest.approx(shares(task[20_000:], 3), abs=0.03)
    assert np.abs(shares(task, 3) - 1 / 3).max() > 0.05


def test_a_drifting_mix_moves_evenly_from_start_to_end():
    task = drawn(DriftingMix(start=(4, 0, 0), end=(0, 0, 2)))
    assert shares(task[:400], 3) == pytest.approx([1, 0, 0], abs=0.03)
    assert shares(task[19_000:21_000], 3) == pytest.approx([0.5, 0, 0.5], abs=0.05)
    assert shares(task[-400:], 3) == pytest.approx([0, 0, 1], abs=0.03)


def test_one_seed_reproduces():
    mix = DirichletMix(concentration=1, window_s=7)
    assert np.array_equal(drawn(mix, seed=3), drawn(mix, seed=3))
    assert not np.array_equal(drawn(mix, seed=3), drawn(mix, seed=4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"names": []}, "tasks.names"),
        ({"names": [""]}, "tasks.names.0 = ''"),
        ({"names": ["a", "a"]}, "names must differ"),
        ({"names": ["a"], "mix": {"kind": "fixed", "weights": [1, 2]}}, "must hold 1 weights"),
        ({"names": ["a"], "mix": {"kind": "fixed", "weights": [0]}}, "mix.weights must be > 0"),
        ({"names": ["a"], "mix": {"kind": "fixed", "weights": [-1]}}, "tasks.mix.weights.0 = -1"),
        (
            {"names": ["a", "b"], "mix": {"kind": "drifting", "start": [1, 1], "end": [1]}},
            "mix.end must hold 2 weights",
        ),
        ({"names": ["a"], "mix": {"kind": "dirichlet", "concentration": 0}}, "concentration = 0"),
    ],
)
def test_an_impossible_setting_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        check(TasksSpec, values, "tasks")
