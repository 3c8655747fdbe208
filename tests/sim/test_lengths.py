import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.config import ConfigError, check
from sim.lengths import Empirical, Fixed, LengthSpec, Lognormal, draw
from sim.traces import TraceError


def rng():
    return np.random.default_rng(5)


def test_a_fixed_length_is_the_same_for_all():
    assert draw(Fixed(tokens=7), 3, rng()).tolist() == [7, 7, 7]


@given(
    low=st.integers(1, 50),
    width=st.integers(0, 1000),
    at=st.floats(0, 1),
    sigma=st.floats(0, 10),
    seed=st.integers(0, 2**32),
)
def test_lognormal_lengths_are_whole_tokens_within_their_bounds(low, width, at, sigma, seed):
    spec = Lognormal(median=low + at * width, sigma=sigma, min=low, max=low + width)
    lengths = draw(spec, 50, np.random.default_rng(seed))
    assert lengths.dtype == np.int32
    assert ((lengths >= low) & (lengths <= low + width)).all()


def test_lognormal_lengths_have_the_asked_median_and_spread():
    lengths = draw(Lognormal(median=128, sigma=0.7, max=100_000), 40_000, rng())
    assert np.median(lengths) == pytest.approx(128, rel=0.03)
    assert np.log(lengths).std() == pytest.approx(0.7, rel=0.03)


def test_empirical_lengths_follow_the_weights():
    lengths = draw(Empirical(values=(3, 50, 9), weights=(1, 3, 0)), 20_000, rng())
    assert set(lengths.tolist()) == {3, 50}
    assert (lengths == 50).mean() == pytest.approx(0.75, abs=0.02)


def test_empirical_lengths_without_weights_are_equally_likely():
    lengths = draw(Empirical(values=(3, 50)), 20_000, rng())
    assert (lengths == 50).mean() == pytest.approx(0.5, abs=0.02)


def test_empirical_lengths_can_be_read_from_a_file(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("id,tokens\na,4\nb,6\n")
    assert set(draw(Empirical(path=str(path)), 100, rng()).tolist()) == {4, 6}


def test_a_bad_length_in_a_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("tokens\n4\n0\n")
    with pytest.raises(TraceError, match=r"lengths.csv, line 3: tokens = '0': must be an integer"):
        draw(Empirical(path=str(path)), 1, rng())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "fixed", "tokens": 0}, "prompt.tokens = 0: .*greater than or equal to 1"),
        ({"kind": "fixed", "tokens": 1.5}, "prompt.tokens = 1.5"),
        ({"kind": "lognormal", "median": 5, "sigma": 1, "max": 4}, "median must be within"),
        ({"kind": "lognormal", "median": 5, "sigma": -1, "max": 9}, "prompt.sigma = -1"),
        ({"kind": "empirical"}, "one of values and path must be given"),
        ({"kind": "empirical", "values": [1], "path": "x"}, "one of values and path must be given"),
        ({"kind": "empirical", "values": [1, 2], "weights": [1]}, "weights must be as many"),
        ({"kind": "empirical", "values": [1], "weights": [0]}, "one of weights must be > 0"),
        ({"kind": "empirical", "path": "x", "weights": [1]}, "weights must be as many"),
    ],
)
def test_an_impossible_setting_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        check(LengthSpec, values, "prompt")
