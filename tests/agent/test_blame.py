"""Lateness is paid by those who were on the device meanwhile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.blame import shared

jax.config.update("jax_enable_x64", True)  # as the engine has it

SECOND = 1 << 40


def pay(loss, stays, device=None, there=None):
    """What requests with stays (from, until) in seconds pay, on two devices."""
    n = len(loss)
    come, leave = (
        jnp.asarray([int(t * SECOND) for t in column]) for column in zip(*stays, strict=True)
    )
    devices = jnp.asarray([0] * n if device is None else device, jnp.int32)
    on = jnp.asarray([True] * n if there is None else there)
    return np.asarray(shared(jnp.asarray(loss, float), on, devices, come, leave, 2))


def test_alone_a_request_pays_for_itself():
    assert pay([3.0, 5.0], [(0, 2), (2, 7)]) == pytest.approx([3, 5])


def test_those_who_were_there_all_the_time_pay_alike():
    assert pay([6.0, 0.0, 0.0], [(1, 3), (0, 4), (1, 3)]) == pytest.approx([2, 2, 2])


def test_a_share_is_for_the_time_spent_together():
    # alone for 3 s of 4, then together with the other
    assert pay([4.0, 0.0], [(0, 4), (3, 9)]) == pytest.approx([3.5, 0.5])


def test_another_device_has_no_part_in_it():
    assert pay([4.0, 0.0, 0.0], [(0, 4)] * 3, device=[0, 1, 0]) == pytest.approx([2, 0, 2])


def test_a_request_that_was_not_there_pays_its_own_alone():
    paid = pay([4.0, 7.0], [(0, 4), (0, 4)], there=[True, False])
    assert paid == pytest.approx([4, 7])


def test_a_request_that_is_dead_on_arrival_pays_its_own_alone():
    assert pay([4.0, 7.0], [(0, 4), (2, 2)]) == pytest.approx([4, 7])


REQUEST = st.tuples(
    st.floats(0, 1), st.integers(0, 9), st.integers(0, 9), st.integers(0, 1), st.booleans()
)


@settings(deadline=None)
@given(st.lists(REQUEST, min_size=6, max_size=6))
def test_the_sum_of_losses_is_paid_on_each_device(requests):
    loss, come, stay, device, there = map(np.array, zip(*requests, strict=True))
    paid = pay(loss, list(zip(come, come + stay, strict=True)), device, there)
    for d in range(2):
        assert paid[device == d].sum() == pytest.approx(loss[device == d].sum(), abs=1e-9)
