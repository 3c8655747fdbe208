import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.arrivals import (
    ArrivalSpec,
    Diurnal,
    FittedGamma,
    Gamma,
    Mmpp,
    Poisson,
    RandomRates,
    WindowedGamma,
    at_rate,
    draw,
    fit_windows,
    mean_rate_rps,
)
from sim.config import ConfigError, check
from sim.traces import TraceSource

KINDS = [
    Poisson(rate_rps=10),
    Gamma(rate_rps=10, cv=0),
    Gamma(rate_rps=10, cv=0.5),
    Gamma(rate_rps=10, cv=4),
    Mmpp(rates_rps=(2, 6, 30), mean_dwell_s=(3, 2, 1)),
    RandomRates(low_rps=1, high_rps=30, mean_dwell_s=1),
    Diurnal(mean_rate_rps=10, amplitude=0.9, period_s=50),
    WindowedGamma(window_s=5, rates_rps=(0, 8, 20), cvs=(1, 2, 0.5), rate_scale=1.5),
]
kinds = pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec.kind)


def draws(spec, duration_s, n):
    return [draw(spec, duration_s, np.random.default_rng(seed)) for seed in range(n)]


@kinds
@given(seed=st.integers(0, 2**32), duration_s=st.floats(0.01, 50))
@settings(max_examples=20, deadline=None)
def test_arrivals_are_sorted_and_fall_inside_the_run(spec, seed, duration_s):
    arrival_s = draw(spec, duration_s, np.random.default_rng(seed))
    assert arrival_s.dtype == np.float64
    assert (np.diff(arrival_s) >= 0).all()
    assert ((arrival_s >= 0) & (arrival_s < duration_s)).all()


@kinds
def test_one_seed_reproduces_and_another_differs(spec):
    first, again = (draw(spec, 30, np.random.default_rng(3)) for _ in range(2))
    other = draw(spec, 30, np.random.default_rng(4))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@kinds
def test_the_mean_rate_is_kept_from_the_first_second_on(spec):
    duration_s = 150.0  # whole periods and windows
    counts = np.array([len(arrival_s) for arrival_s in draws(spec, duration_s, 300)])
    error = counts.std(ddof=1) / np.sqrt(len(counts)) / duration_s
    assert counts.mean() / duration_s == pytest.approx(mean_rate_rps(spec), abs=4 * error + 1e-2)


@kinds
@given(rate_rps=st.floats(0.01, 1e4))
@settings(max_examples=20, deadline=None)
def test_any_kind_can_be_set_to_any_mean_rate_and_stays_valid(spec, rate_rps):
    faster = at_rate(spec, rate_rps)
    assert mean_rate_rps(faster) == pytest.approx(rate_rps)
    assert check(ArrivalSpec, faster.model_dump(), "arrivals") == faster
    assert mean_rate_rps(at_rate(faster, mean_rate_rps(spec))) == pytest.approx(mean_rate_rps(spec))


@pytest.mark.parametrize("rate_rps", [0, -1, float("nan"), float("inf")])
def test_an_impossible_rate_is_refused(rate_rps):
    with pytest.raises(ConfigError, match=r"rate_rps = .*must be a finite number > 0"):
        at_rate(Poisson(rate_rps=1), rate_rps)


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 4.0])
def test_gamma_gaps_have_the_asked_mean_and_cv(cv):
    gaps_s = np.diff(draw(Gamma(rate_rps=5, cv=cv), 20_000, np.random.default_rng(1)))
    assert gaps_s.mean() == pytest.approx(0.2, rel=0.05)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(cv, rel=0.05, abs=1e-6)


def test_poisson_counts_have_equal_mean_and_variance():
    counts, _ = np.histogram(
        draw(Poisson(rate_rps=8), 5000, np.random.default_rng(2)), np.arange(5001)
    )
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.1)


def test_mmpp_and_random_rates_are_burstier_than_poisson():
    for spec in (KINDS[4], KINDS[5]):
        counts, _ = np.histogram(draw(spec, 2000, np.random.default_rng(2)), np.arange(2001))
        assert counts.var() / counts.mean() > 3


def test_mmpp_is_silent_in_a_state_of_rate_zero():
    spec = Mmpp(rates_rps=(0, 1000), mean_dwell_s=(5, 5))
    arrival_s = draw(spec, 200, np.random.default_rng(0))
    gaps_s = np.diff(arrival_s)
    assert 0.3 < gaps_s[gaps_s > 0.1].sum() / 200 < 0.7


def test_one_dwell_serves_all_states_of_an_mmpp():
    one = check(Mmpp, {"kind": "mmpp", "rates_rps": [1, 9], "mean_dwell_s": 2}, "arrivals")
    each = Mmpp(rates_rps=(1, 9), mean_dwell_s=(2, 2))
    assert np.array_equal(
        draw(one, 50, np.random.default_rng(0)), draw(each, 50, np.random.default_rng(0))
    )


def test_diurnal_arrivals_follow_the_sine():
    spec = Diurnal(mean_rate_rps=200, amplitude=0.5, period_s=40)
    arrival_s = draw(spec, 400, np.random.default_rng(0)) % 40
    counts, edges = np.histogram(arrival_s, 8)
    middle_s = (edges[:-1] + edges[1:]) / 2
    expected = 200 * 400 / 8 * (1 + 0.5 * np.sin(2 * np.pi * middle_s / 40))
    assert counts == pytest.approx(expected, rel=0.06)


def test_windows_repeat_when_the_run_is_longer():
    spec = WindowedGamma(window_s=10, rates_rps=(0, 50), cvs=(1, 1))
    counts, _ = np.histogram(draw(spec, 60, np.random.default_rng(0)), 6, (0, 60))
    assert (counts[::2] == 0).all()
    assert (counts[1::2] > 300).all()


def test_fitting_recovers_the_windows_that_made_a_record():
    truth = WindowedGamma(window_s=1000, rates_rps=(5, 20, 10), cvs=(0.5, 3, 1))
    fitted = fit_windows(draw(truth, 3000.5, np.random.default_rng(6)), 1000)
    assert fitted.rates_rps[:2] == pytest.approx(truth.rates_rps[:2], rel=0.1)
    assert fitted.cvs[:2] == pytest.approx(truth.cvs[:2], rel=0.1)


def test_a_fit_leaves_out_the_last_window_if_it_is_cut_short():
    fitted = fit_windows(np.array([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10.5, 12]), 5)
    assert fitted.rates_rps == (1.0, 1.0)
    assert fitted.cvs == (0.0, 0.0)


def test_a_window_with_too_few_gaps_is_fitted_as_poisson():
    fitted = fit_windows(np.array([0.0, 1.0, 10.0, 20.0, 20.0, 20.0, 30.0]), 10)
    assert fitted.cvs == (1.0, 1.0, 1.0)


def test_a_record_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="must reach over one window"):
        fit_windows(np.array([0.0, 1.0]), 60)


def test_a_trace_is_fitted_replayed_and_set_to_a_rate(tmp_path):
    path = tmp_path / "trace.jsonl"
    recorded_s = draw(Gamma(rate_rps=20, cv=2), 100, np.random.default_rng(0))
    path.write_text(
        "".join(
            f'{{"timestamp": {t * 1000}, "input_length": 5, "output_length": 5}}\n'
            for t in recorded_s
        )
    )
    source = TraceSource(path=str(path), format="mooncake")
    spec = FittedGamma(window_s=10, trace=source, rate_scale=2)
    assert mean_rate_rps(spec) == pytest.approx(40, rel=0.2)
    assert mean_rate_rps(at_rate(spec, 7)) == pytest.approx(7)
    assert len(draw(at_rate(spec, 7), 900, np.random.default_rng(0))) == pytest.approx(
        6300, rel=0.2
    )
    with pytest.raises(ConfigError, match=r"window_s = 1000.0: .*must reach over one window"):
        mean_rate_rps(FittedGamma(window_s=1000, trace=source))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "poisson", "rate_rps": 0}, r"arrivals.rate_rps = 0: .*greater than 0"),
        ({"kind": "poisson"}, "arrivals.rate_rps is missing"),
        ({"kind": "poisson", "rate_rps": 1, "cv": 2}, r"arrivals.cv = 2: unknown key.*rate_rps"),
        ({"kind": "gamma", "rate_rps": 1, "cv": -1}, "arrivals.cv = -1"),
        ({"kind": "mmpp", "rates_rps": [1], "mean_dwell_s": 1}, "arrivals.rates_rps"),
        ({"kind": "mmpp", "rates_rps": [0, 0], "mean_dwell_s": 1}, "one of rates_rps must be > 0"),
        ({"kind": "mmpp", "rates_rps": [1, 2], "mean_dwell_s": [1, 2, 3]}, "as many as rates_rps"),
        (
            {"kind": "random_rates", "low_rps": 5, "high_rps": 5, "mean_dwell_s": 1},
            "low_rps must be < high_rps",
        ),
        (
            {"kind": "diurnal", "mean_rate_rps": 1, "amplitude": 1, "period_s": 1},
            "arrivals.amplitude = 1: .*less than 1",
        ),
        (
            {"kind": "windowed_gamma", "window_s": 1, "rates_rps": [1, 2], "cvs": [1]},
            "rates_rps and cvs must be equally long",
        ),
        ({"kind": "bursts"}, "arrivals = .*'poisson', 'gamma', 'mmpp'"),
    ],
)
def test_an_impossible_setting_is_refused_with_its_key_and_what_is_allowed(values, message):
    with pytest.raises(ConfigError, match=message):
        check(ArrivalSpec, values, "arrivals")


def test_more_arrivals_than_fit_in_memory_are_refused():
    with pytest.raises(ConfigError, match="must be ≤ 20000000 requests"):
        draw(Poisson(rate_rps=1e9), 1e6, np.random.default_rng(0))
