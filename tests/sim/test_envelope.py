"""Steps outside of what a profile measured are counted, told and, if so wished, refused."""

import pytest

from sim.config import ConfigError, SpecError, check
from sim.envelope import Envelope, outside, refuse_outside
from sim.types import Result
from tests.systems import Send, make_cluster, make_workload, run

WIDE = {"tokens": (0, 99), "sequences": (0, 99), "pairs": (0, 999), "kv_tokens": (0, 999)}


def measured(**narrow: tuple[int, int]) -> Envelope:
    return Envelope(**{**WIDE, **narrow})


def played(envelope: Envelope | None) -> Result:
    """A prompt of 5 tokens and three decodes, of 6, 7 and 8 tokens of context."""
    cluster = make_cluster(envelopes=[envelope])
    return run(cluster, make_workload([0.0], prompt=5, output=4))


@pytest.mark.parametrize(
    ("narrow", "count"),
    [
        ({}, 0),
        ({"tokens": (1, 4)}, 1),
        ({"tokens": (2, 9)}, 3),
        ({"sequences": (2, 9)}, 4),
        ({"pairs": (0, 14)}, 1),
        ({"pairs": (1, 15)}, 3),
        ({"kv_tokens": (0, 7)}, 1),
        ({"kv_tokens": (0, 5)}, 3),
        ({"kv_tokens": (7, 7)}, 3),
        ({"tokens": (1, 4), "kv_tokens": (0, 7)}, 2),
        ({"tokens": (1, 4), "pairs": (0, 14)}, 1),
    ],
)
def test_a_step_with_a_count_below_or_above_what_was_measured_is_outside(narrow, count):
    result = played(measured(**narrow))
    assert result.n_steps == 4
    assert result.n_steps_outside.tolist() == [count]


def test_without_an_envelope_no_step_is_outside():
    result = played(None)
    assert result.n_steps_outside.tolist() == [0]
    assert outside(result.cluster, result.n_steps_outside, result.n_steps) is None
    refuse_outside(result)


def test_steps_outside_are_told_by_model_with_what_was_measured():
    cluster = make_cluster(
        [[0, 1, 2]], step_s=[1.0] * 3,
        envelopes=[measured(kv_tokens=(0, 7)), measured(kv_tokens=(3, 1234)), None],
    )  # fmt: skip
    workload = make_workload([0.0, 0.0, 0.0], prompt=5, output=4)
    result = run(cluster, workload, Send([0, 1, 2]))
    assert result.n_steps_outside.tolist() == [1, 1, 0]
    told = outside(cluster, result.n_steps_outside, result.n_steps)
    assert told == (
        "2 of 12 steps lie outside of what the profile's measurements cover: "
        "1 of m0 (measured: tokens 0 to 99, sequences 0 to 99, pairs 0 to 999, kv_tokens 0 to 7), "
        "1 of m1 (measured: tokens 0 to 99, sequences 0 to 99, pairs 0 to 999, "
        "kv_tokens 3 to 1,234)"
    )


def test_who_is_strict_refuses_with_the_model_the_count_and_what_was_measured():
    refuse_outside(played(measured()))
    with pytest.raises(ConfigError, match=r"cluster.strict = True: 3 of 4 .* 3 of m0 .* 7 to 7"):
        refuse_outside(played(measured(kv_tokens=(7, 7))))


def test_an_envelope_whose_low_is_above_its_high_is_refused():
    with pytest.raises(SpecError, match="pairs must go from low to high, got 5 to 4"):
        check(Envelope, {**WIDE, "pairs": (5, 4)}, "envelope")
