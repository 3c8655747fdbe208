"""Rule 12 and a request's way to the server, fitted to the steps that a sweep has shown.

What is said of the error comes from cells that the fit did not see: each is played in the simulator
with the fit to the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from calibrate import fit
from calibrate.black_box.steps import Seen, find_steps, step_table
from calibrate.black_box.sweep import Played
from sim.profile import StepTime

FOLDS = 5
ROUNDS = 3  # of weighting; it has settled by then
LIMIT = 3.0  # times what the fit says: beyond, a step was held up
LEAST = 0.01  # of the median step: what errors are relative to at the least


@dataclass(frozen=True)
class Estimate:
    """A server's steps, and what a request and its first token are on their way besides."""

    step_time: StepTime
    overhead_s: float


def find(played: Sequence[Played], max_batch: int, token_budget: int) -> tuple[Seen, ...]:
    """The steps of each cell; a first fit says how long requests are on their way."""

    def steps(overhead_s: float | None) -> tuple[Seen, ...]:
        return tuple(
            find_steps(cell.answers, max_batch, token_budget, overhead_s) for cell in played
        )

    return steps(estimate(steps(None), token_budget).overhead_s)


def estimate(cells: Sequence[Seen], token_budget: int) -> Estimate:
    """The fit to the steps of these cells, for steps of up to `token_budget` tokens.

    Steps are seen once or a few times, so errors count relative to what the fit before says (Green,
    Iteratively reweighted least squares, JRSS B 46, 1984), and a step that took far longer than
    that, because of something that is no step, counts as one at the limit. What a fit makes of odd
    steps may be near nothing: they count as a small part of a usual step.
    """
    table = step_table(cells)
    fitted = fit.fit_step_time(table)
    for _ in range(ROUNDS):
        scale_s = np.maximum(fit.predict(fitted, table), LEAST * np.median(table.step_s))
        usual = replace(table, step_s=np.minimum(table.step_s, LIMIT * scale_s))
        fitted = fit.fit_step_time(usual, scale_s)
    # `step_table` marks the steps from idle as switches: what they take more is the way
    step_time = fitted.model_copy(
        update={"switch_s": 0.0, "tokens_s": _extended(fitted, token_budget)}
    )
    return Estimate(step_time, fitted.switch_s)


def bootstrap(
    cells: Sequence[Seen], token_budget: int, count: int, seed: int
) -> tuple[Estimate, ...]:
    """Fits to `count` draws of the cells with replacement."""
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(len(cells), size=len(cells)) for _ in range(count))
    return tuple(estimate([cells[i] for i in draw], token_budget) for draw in drawn)


def held_out(
    cells: Sequence[Seen], token_budget: int, seed: int, use: Callable[[int, Estimate], None]
) -> None:
    """Tell `use` of each cell's number the fit to cells of which it is none."""
    folds = min(FOLDS, len(cells))
    fold = np.random.default_rng(seed).permutation(len(cells)) % folds
    for number in range(folds):
        fitted = estimate(
            [c for c, f in zip(cells, fold, strict=True) if f != number], token_budget
        )
        for cell in np.flatnonzero(fold == number):
            use(int(cell), fitted)


def _extended(step_time: StepTime, token_budget: int) -> tuple[tuple[int, float], ...]:
    """The times by tokens, on as over the upper half of what was seen, but never falling."""
    at, seconds = zip(*step_time.tokens_s, strict=True)
    if at[-1] >= token_budget:
        return step_time.tokens_s
    half = at[-1] / 2
    rise = max(seconds[-1] - float(np.interp(half, at, seconds)), 0.0)
    beyond = seconds[-1] + rise / (at[-1] - half) * (token_budget - at[-1])
    return (*step_time.tokens_s, (token_budget, beyond))
