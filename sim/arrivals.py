"""When requests arrive: arrival processes, drawn in seconds."""

from itertools import pairwise
from typing import Annotated, Literal, Self, TypeAlias, assert_never

import numpy as np
from jaxtyping import Float64
from pydantic import BeforeValidator, Field, model_validator

from sim.config import ConfigError, Spec
from sim.traces import MAX_REQUESTS, TraceSource, read

Rng: TypeAlias = np.random.Generator
Rate = Annotated[float, Field(ge=0)]
Cv = Annotated[float, Field(ge=0, le=100)]
Dwell = Annotated[float, Field(ge=1e-3)]


class Poisson(Spec):
    """Independent arrivals at a constant rate."""

    kind: Literal["poisson"] = "poisson"
    rate_rps: float = Field(gt=0)


class Gamma(Spec):
    """Gamma-distributed gaps between arrivals; cv 0 is even, 1 is Poisson, more is bursty."""

    kind: Literal["gamma"] = "gamma"
    rate_rps: float = Field(gt=0)
    cv: Cv


class Mmpp(Spec):
    """Poisson arrivals at a rate that jumps, after exponential dwells, to any other of a list."""

    kind: Literal["mmpp"] = "mmpp"
    rates_rps: tuple[Rate, ...] = Field(min_length=2)
    mean_dwell_s: Annotated[  # one for all states, or one for each
        tuple[Dwell, ...],
        BeforeValidator(lambda value: [value] if isinstance(value, int | float) else value),
    ]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not any(self.rates_rps):
            raise ValueError("one of rates_rps must be > 0")
        if len(self.mean_dwell_s) not in (1, len(self.rates_rps)):
            raise ValueError("mean_dwell_s must be one number or as many as rates_rps")
        return self


class RandomRates(Spec):
    """Poisson arrivals at a rate that is redrawn, log-uniform, after exponential dwells."""

    kind: Literal["random_rates"] = "random_rates"
    low_rps: float = Field(gt=0)
    high_rps: float = Field(gt=0)
    mean_dwell_s: Dwell

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.low_rps >= self.high_rps:
            raise ValueError("low_rps must be < high_rps")
        return self


class Diurnal(Spec):
    """Poisson arrivals at a rate that swings as a sine around its mean."""

    kind: Literal["diurnal"] = "diurnal"
    mean_rate_rps: float = Field(gt=0)
    amplitude: float = Field(ge=0, lt=1)  # of the swing, as a share of the mean
    period_s: float = Field(gt=0)


class WindowedGamma(Spec):
    """Gamma-distributed gaps with a rate and cv for each window; the windows repeat.

    The manner in which Azure Functions traces are replayed by MArk (ATC 2019) and AlpaServe
    (OSDI 2023, section 6.2), which scale the rate and the cv of every window.
    """

    kind: Literal["windowed_gamma"] = "windowed_gamma"
    window_s: float = Field(gt=0)
    rates_rps: tuple[Rate, ...] = Field(min_length=1)
    cvs: tuple[Cv, ...] = Field(min_length=1)
    rate_scale: float = Field(default=1.0, gt=0)
    cv_scale: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.rates_rps) != len(self.cvs):
            raise ValueError("rates_rps and cvs must be equally long")
        if not any(self.rates_rps):
            raise ValueError("one of rates_rps must be > 0")
        return self


class FittedGamma(Spec):
    """A `windowed_gamma` with the rate and cv of each whole window of a recorded trace."""

    kind: Literal["fitted_gamma"] = "fitted_gamma"
    window_s: float = Field(gt=0)
    trace: TraceSource
    rate_scale: float = Field(default=1.0, gt=0)
    cv_scale: float = Field(default=1.0, ge=0)


ArrivalSpec = Annotated[
    Poisson | Gamma | Mmpp | RandomRates | Diurnal | WindowedGamma | FittedGamma,
    Field(discriminator="kind"),
]


def draw(spec: ArrivalSpec, duration_s: float, rng: Rng) -> Float64[np.ndarray, " N"]:
    """Arrival times in seconds, sorted, in [0, duration_s).

    Every process starts in its stationary state, so that its rate holds from the first second.

    Raises:
        ConfigError: if more than MAX_REQUESTS arrivals are to be expected.
        TraceError: if a trace to be fitted cannot be read.
    """
    if isinstance(spec, FittedGamma):
        spec = fit(spec)
    expected = mean_rate_rps(spec) * duration_s
    if expected > MAX_REQUESTS:
        raise ConfigError("mean rate × duration_s", expected, f"must be ≤ {MAX_REQUESTS} requests")
    match spec:
        case Poisson():
            arrival_s = np.sort(rng.uniform(0, duration_s, rng.poisson(expected)))
        case Gamma():
            arrival_s = _renewal(spec.rate_rps, spec.cv, duration_s, rng)
        case Mmpp():
            arrival_s = _piecewise(*_mmpp_rates(spec, duration_s, rng), duration_s, rng)
        case RandomRates():
            arrival_s = _piecewise(*_random_rates(spec, duration_s, rng), duration_s, rng)
        case Diurnal():
            arrival_s = _diurnal(spec, duration_s, rng)
        case WindowedGamma():
            arrival_s = _windows(spec, duration_s, rng)
        case _:
            assert_never(spec)
    return arrival_s[arrival_s < duration_s]  # rounding may reach the end


def mean_rate_rps(spec: ArrivalSpec) -> float:
    """The long-run mean rate in requests/s: over whole periods, over all windows.

    Raises:
        TraceError: if a trace to be fitted cannot be read.
    """
    match spec:
        case Poisson() | Gamma():
            return spec.rate_rps
        case Mmpp():
            return float(np.average(spec.rates_rps, weights=_dwells_s(spec)))
        case RandomRates():
            return (spec.high_rps - spec.low_rps) / float(np.log(spec.high_rps / spec.low_rps))
        case Diurnal():
            return spec.mean_rate_rps
        case WindowedGamma():
            return float(np.mean(spec.rates_rps)) * spec.rate_scale
        case FittedGamma():
            return mean_rate_rps(fit(spec))


def at_rate(spec: ArrivalSpec, rate_rps: float) -> ArrivalSpec:
    """The same process with its mean rate set to `rate_rps`; its shape is kept.

    Raises:
        ConfigError: if `rate_rps` is not a finite number > 0.
        TraceError: if a trace to be fitted cannot be read.
    """
    if not (np.isfinite(rate_rps) and rate_rps > 0):
        raise ConfigError("rate_rps", rate_rps, "must be a finite number > 0")
    if isinstance(spec, FittedGamma):
        spec = fit(spec)
    factor = rate_rps / mean_rate_rps(spec)
    match spec:
        case Poisson() | Gamma():
            return spec.model_copy(update={"rate_rps": rate_rps})
        case Mmpp():
            scaled = tuple(rate * factor for rate in spec.rates_rps)
            return spec.model_copy(update={"rates_rps": scaled})
        case RandomRates():
            low, high = spec.low_rps * factor, spec.high_rps * factor
            return spec.model_copy(update={"low_rps": low, "high_rps": high})
        case Diurnal():
            return spec.model_copy(update={"mean_rate_rps": rate_rps})
        case WindowedGamma():
            return spec.model_copy(update={"rate_scale": spec.rate_scale * factor})


def fit_windows(arrival_s: Float64[np.ndarray, " N"], window_s: float) -> WindowedGamma:
    """The rate and the cv of the gaps in each whole window of recorded arrivals, sorted, from 0.

    Where fewer than two gaps, or only gaps of 0, leave the cv open it is 1, as of Poisson.

    Raises:
        ValueError: if the arrivals do not reach over one window.
    """
    n_windows = int(arrival_s[-1] // window_s) if len(arrival_s) else 0
    if n_windows == 0:
        raise ValueError(f"window_s = {window_s}: the arrivals must reach over one window")
    edges = np.searchsorted(arrival_s, np.arange(n_windows + 1) * window_s)
    rates, cvs = [], []
    for first, stop in pairwise(edges):
        gaps_s = np.diff(arrival_s[first:stop])
        known = len(gaps_s) >= 2 and gaps_s.mean() > 0
        rates.append(float(stop - first) / window_s)
        cvs.append(float(gaps_s.std() / gaps_s.mean()) if known else 1.0)
    return WindowedGamma(window_s=window_s, rates_rps=tuple(rates), cvs=tuple(cvs))


def fit(spec: FittedGamma) -> WindowedGamma:
    """Fit a spec's windows to its trace, whose own draws have a fixed seed: one spec, one fit.

    Raises:
        TraceError: if the trace cannot be read.
        ConfigError: if the trace is shorter than a window.
    """
    recorded = read(spec.trace, np.random.default_rng(0))
    try:
        windows = fit_windows(recorded.arrival_s, spec.window_s)
    except ValueError as error:
        raise ConfigError("window_s", spec.window_s, str(error)) from None
    return windows.model_copy(update={"rate_scale": spec.rate_scale, "cv_scale": spec.cv_scale})


def _renewal(rate_rps: float, cv: float, duration_s: float, rng: Rng) -> Float64[np.ndarray, " N"]:
    """An equilibrium renewal process: the first gap is the rest of a length-biased one."""
    if cv < 1e-6:  # the gaps differ by no more than rounding
        return np.arange(rng.random() / rate_rps, duration_s, 1 / rate_rps)
    shape = 1 / cv**2
    scale_s = 1 / (rate_rps * shape)
    blocks = [np.array([rng.random() * rng.gamma(shape + 1, scale_s)])]
    block = int(1.1 * rate_rps * duration_s) + 16
    while blocks[-1][-1] < duration_s:
        blocks.append(blocks[-1][-1] + np.cumsum(rng.gamma(shape, scale_s, block)))
    return np.concatenate(blocks)


def _dwells_s(spec: Mmpp) -> Float64[np.ndarray, " states"]:
    return np.resize(np.asarray(spec.mean_dwell_s, dtype=np.float64), len(spec.rates_rps))


def _mmpp_rates(spec: Mmpp, duration_s: float, rng: Rng) -> tuple[list[float], list[float]]:
    """Rates, and the times at which each ends, of one path over the states."""
    dwells_s = _dwells_s(spec)
    n = len(dwells_s)
    state = int(rng.choice(n, p=dwells_s / dwells_s.sum()))
    rates, ends_s, now_s = [], [], 0.0
    while now_s < duration_s:
        now_s += rng.exponential(dwells_s[state])
        rates.append(spec.rates_rps[state])
        ends_s.append(now_s)
        state = (state + int(rng.integers(1, n))) % n
    return rates, ends_s


def _random_rates(
    spec: RandomRates, duration_s: float, rng: Rng
) -> tuple[list[float], list[float]]:
    """Rates, and the times at which each ends, of one path."""
    low, high = np.log(spec.low_rps), np.log(spec.high_rps)
    rates, ends_s, now_s = [], [], 0.0
    while now_s < duration_s:
        now_s += rng.exponential(spec.mean_dwell_s)
        rates.append(float(np.exp(rng.uniform(low, high))))
        ends_s.append(now_s)
    return rates, ends_s


def _piecewise(
    rates: list[float], ends_s: list[float], duration_s: float, rng: Rng
) -> Float64[np.ndarray, " N"]:
    """Poisson arrivals at rates constant up to each end, by inverting the expected count."""
    edges_s = np.minimum([0.0, *ends_s], duration_s)
    expected = np.concatenate([[0.0], np.cumsum(np.diff(edges_s) * rates)])
    counts = np.sort(rng.uniform(0, expected[-1], rng.poisson(expected[-1])))
    arrival_s: Float64[np.ndarray, " N"] = np.interp(counts, expected, edges_s)
    return arrival_s


def _diurnal(spec: Diurnal, duration_s: float, rng: Rng) -> Float64[np.ndarray, " N"]:
    """Arrivals at the peak rate, thinned (Lewis and Shedler 1979)."""
    peak = 1 + spec.amplitude
    n = rng.poisson(spec.mean_rate_rps * peak * duration_s)
    arrival_s = np.sort(rng.uniform(0, duration_s, n))
    swing = 1 + spec.amplitude * np.sin(2 * np.pi * arrival_s / spec.period_s)
    return arrival_s[rng.random(n) * peak < swing]


def _windows(spec: WindowedGamma, duration_s: float, rng: Rng) -> Float64[np.ndarray, " N"]:
    """Each window's own renewal process, one after the other."""
    parts = [np.empty(0)]
    for i in range(int(np.ceil(duration_s / spec.window_s))):
        rate_rps = spec.rates_rps[i % len(spec.rates_rps)] * spec.rate_scale
        cv = spec.cvs[i % len(spec.cvs)] * spec.cv_scale
        if rate_rps > 0:
            part = _renewal(rate_rps, cv, spec.window_s, rng)
            parts.append(i * spec.window_s + part[part < spec.window_s])
    return np.concatenate(parts)
