"""The step-time model of rule 12, fitted to timed steps, and how wrong it is on shapes held out.

The coefficients are times per unit of work: none is negative, and each step counts by its relative
error (Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23). What is said of the
error comes from shapes that the fit did not see.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy.interpolate import RBFInterpolator
from scipy.optimize import nnls

from sim.config import Spec
from sim.envelope import Envelope
from sim.profile import StepTime

FOLDS = 10
WEIGHTS = ("prompt_s", "sequence_s", "pair_s", "kv_token_s", "done_token_s", "switch_s")
COEFFICIENTS = ("host_s", *WEIGHTS)


@dataclass(frozen=True, eq=False)
class StepTable:
    """Timed steps, one row for each shape; S rows."""

    sequences: Int64[np.ndarray, " S"]
    prompt_tokens: Int64[np.ndarray, " S"]
    tokens: Int64[np.ndarray, " S"]
    pairs: Int64[np.ndarray, " S"]
    kv_tokens: Int64[np.ndarray, " S"]
    done_tokens: Int64[np.ndarray, " S"]
    switched: Bool[np.ndarray, " S"]
    step_s: Float64[np.ndarray, " S"]  # median
    group: Int64[np.ndarray, " S"]  # rows of one shape have one number

    def __len__(self) -> int:
        return len(self.step_s)

    def rows(self, index: np.ndarray) -> "StepTable":
        """Some of the rows."""
        return StepTable(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


class Errors(Spec):
    """Relative errors of predicted step times, predicted / measured − 1, over held-out shapes."""

    median: float  # of the absolute error
    p95: float  # of the absolute error
    bias: float  # mean, signed
    shapes: int


Predict = Callable[[StepTable], Float64[np.ndarray, " S"]]
Fit = Callable[[StepTable], Predict]


def knots(table: StepTable) -> tuple[int, ...]:
    """Token counts between which the time per tokens is linear: dense where it is least smooth.

    Kernels of matrix products change with the number of rows, most of all where there are few; more
    rows may take less time. A knot has steps near it.
    """
    tokens = np.unique(table.tokens)
    most = int(tokens[-1])
    small = {k for k in range(1, 9) if k in tokens}
    doubled = [first * 2**k for first in (12, 16) for k in range(most.bit_length())]
    large = {k for k in doubled if k < most and (np.abs(np.log2(tokens / k)) < 0.25).any()}
    return tuple(sorted({int(tokens[0]), most, *small, *large}))


def fit_step_time(table: StepTable, scale_s: Float64[np.ndarray, " S"] | None = None) -> StepTime:
    """The non-negative coefficients whose relative errors have the least sum of squares.

    Every step has tokens: of what they take, the least at any count is told as the host's.

    Args:
        table: The steps.
        scale_s: What the errors are relative to; None: the measured times, which must be medians,
            for of single times those that came out short would count most.
    """
    at = knots(table)
    weights = _solve(_features(table, at), table.step_s, scale_s)
    seconds = weights[: len(at)]
    host_s = float(seconds.min())
    coefficients = dict(zip(WEIGHTS, map(float, weights[len(at) :]), strict=True))
    per_tokens = [(0, 0.0), *zip(at, (seconds - host_s).tolist(), strict=True)]
    return StepTime(host_s=host_s, tokens_s=tuple(per_tokens), **coefficients)


def predict(step_time: StepTime, table: StepTable) -> Float64[np.ndarray, " S"]:
    """Seconds of each step by the model."""
    at, seconds = zip(*step_time.tokens_s, strict=True)
    linear = _linear(table) @ [getattr(step_time, name) for name in WEIGHTS]
    return np.asarray(step_time.host_s + np.interp(table.tokens, at, seconds) + linear)


def bootstrap(table: StepTable, count: int, seed: int) -> tuple[StepTime, ...]:
    """Fits to `count` tables of shapes drawn with replacement: what the fit might have been.

    Each goes as far as the table does: where a draw lacks the longest steps, their time per token
    is that of its last two knots.
    """
    rng = np.random.default_rng(seed)
    most = int(table.tokens.max())
    drawn = (table.rows(rng.integers(len(table), size=len(table))) for _ in range(count))
    return tuple(_up_to(most, fit_step_time(each)) for each in drawn)


def held_out(table: StepTable, fits: Mapping[str, Fit], seed: int) -> dict[str, np.ndarray]:
    """Relative error of each row, by each kind of model, fitted to other groups of rows."""
    groups = np.unique(table.group)
    folds = min(FOLDS, len(groups))
    fold = np.empty(groups.max() + 1, int)
    fold[groups] = np.random.default_rng(seed).permutation(len(groups)) % folds
    errors = {name: np.empty(len(table)) for name in fits}
    for number in range(folds):
        out = fold[table.group] == number
        for name, fit in fits.items():
            model = fit(table.rows(np.flatnonzero(~out)))
            rows = table.rows(np.flatnonzero(out))
            errors[name][out] = model(rows) / rows.step_s - 1
    return errors


def summary(errors: np.ndarray) -> Errors:
    """Errors in short."""
    size = np.abs(errors)
    return Errors(
        median=float(np.median(size)), p95=float(np.percentile(size, 95)),
        bias=float(errors.mean()), shapes=len(errors),
    )  # fmt: skip


def envelope(table: StepTable) -> Envelope:
    """The ranges of the counts that were measured."""
    return Envelope(
        **{
            name: (int(getattr(table, name).min()), int(getattr(table, name).max()))
            for name in ("tokens", "sequences", "pairs", "kv_tokens")
        }
    )


def _physical(table: StepTable) -> Predict:
    step_time = fit_step_time(table)
    return lambda rows: predict(step_time, rows)


def _tokens_alone(table: StepTable) -> Predict:
    """A table by the number of tokens, as simulators with a profile per batch have."""
    at = np.unique(table.tokens)
    means = np.array([table.step_s[table.tokens == tokens].mean() for tokens in at])
    return lambda rows: np.interp(rows.tokens, at, means)


def _without_sequences(table: StepTable) -> Predict:
    """Host, tokens, pairs and cached tokens of decodes: what most models of a step have."""
    at = knots(table)
    kept = [*range(len(at)), len(at) + 2, len(at) + 3]

    def features(rows: StepTable) -> np.ndarray:
        return _features(rows, at)[:, kept]

    weights = _solve(features(table), table.step_s)
    return lambda rows: features(rows) @ weights


def _interpolation(table: StepTable) -> Predict:
    """Radial basis functions of the counts' logarithms: no physics, any shape."""

    def place(rows: StepTable) -> np.ndarray:
        names = ("sequences", "prompt_tokens", "pairs", "kv_tokens", "done_tokens", "switched")
        counts = np.stack([getattr(rows, name) for name in names], axis=1)
        return np.asarray(np.log1p(counts.astype(float)))

    interpolate = RBFInterpolator(
        place(table), np.log(table.step_s), kernel="linear", smoothing=0.1, degree=0
    )
    return lambda rows: np.exp(interpolate(place(rows)))


MODEL = "rule 12"
MODELS: Mapping[str, Fit] = {
    MODEL: _physical,
    "host, tokens, pairs, KV tokens": _without_sequences,
    "interpolation": _interpolation,
    "table by tokens": _tokens_alone,
}


def _linear(table: StepTable) -> Float64[np.ndarray, "S 6"]:
    """What the coefficients multiply, in the order of `WEIGHTS`."""
    columns = (
        table.prompt_tokens > 0, table.sequences, table.pairs, table.kv_tokens,
        table.done_tokens, table.switched,
    )  # fmt: skip
    return np.stack([np.asarray(column, float) for column in columns], axis=1)


def _features(table: StepTable, at: tuple[int, ...]) -> Float64[np.ndarray, "S F"]:
    """How near the tokens are to each knot, linearly, then the columns of `_linear`."""
    near = [np.interp(table.tokens, at, unit) for unit in np.eye(len(at))]
    return np.concatenate([np.stack(near, axis=1), _linear(table)], axis=1)


def _solve(
    features: np.ndarray, seconds: np.ndarray, scale_s: np.ndarray | None = None
) -> Float64[np.ndarray, " F"]:
    unit = seconds if scale_s is None else scale_s
    relative = features / unit[:, None]
    scale = relative.max(axis=0)
    scale[scale == 0] = 1.0  # nothing was measured of it
    weights, _ = nnls(relative / scale, seconds / unit, maxiter=100 * features.shape[1])
    return np.asarray(weights / scale)


def _up_to(most: int, step_time: StepTime) -> StepTime:
    """The step time with its table prolonged to `most` tokens."""
    (before, earlier), (last, seconds) = step_time.tokens_s[-2:]
    if last >= most:
        return step_time
    slope = max(seconds - earlier, 0.0) / (last - before)
    further = (most, seconds + slope * (most - last))
    return step_time.model_copy(update={"tokens_s": (*step_time.tokens_s, further)})
