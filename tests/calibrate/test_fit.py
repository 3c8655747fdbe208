"""The fit finds the coefficients of rule 12, and says how wrong it is where it did not look."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrate import fit
from calibrate.fit import COEFFICIENTS, MODEL, MODELS, StepTable
from sim.profile import StepTime, step_seconds

TRUE = StepTime(
    host_s=1.2e-3, tokens_s=((0, 0.0), (1, 1e-4), (2, 8e-4), (64, 3e-3), (256, 1.5e-2)),
    pair_s=4e-8, kv_token_s=9e-7, sequence_s=9e-5, prompt_s=3e-4, done_token_s=1.3e-6,
    switch_s=6e-4,
)  # fmt: skip


def steps(count: int, seed: int = 0, noise: float = 0.0) -> StepTable:
    """Steps whose times are those of `TRUE`, with relative noise."""
    rng = np.random.default_rng(seed)
    decodes = rng.integers(0, 17, count)
    chunks = np.where(decodes == 0, rng.integers(1, 4, count), rng.integers(0, 4, count))
    tokens = chunks * rng.integers(1, 64, count)
    done = np.where(chunks > 0, rng.integers(0, 500, count) * rng.integers(0, 2, count), 0)
    table = StepTable(
        sequences=decodes + chunks,
        prompt_tokens=tokens,
        tokens=decodes + tokens,
        pairs=tokens * done // np.maximum(chunks, 1) + tokens * (tokens + 1) // 2,
        kv_tokens=decodes * rng.integers(1, 400, count),
        done_tokens=done,
        switched=rng.random(count) < 0.2,
        step_s=np.zeros(count),
        group=np.arange(count),
    )
    exact = fit.predict(TRUE, table)
    return replace(table, step_s=exact * np.exp(noise * rng.standard_normal(count)))


def test_the_prediction_is_that_of_the_simulator() -> None:
    table = steps(50)
    for i, seconds in enumerate(fit.predict(TRUE, table)):
        counts = [int(getattr(table, name)[i]) for name in ("tokens", "sequences", "pairs")]
        context = (int(table.kv_tokens[i]), int(table.done_tokens[i]), bool(table.switched[i]))
        assert seconds == pytest.approx(step_seconds(TRUE, *counts, *context))


def test_without_noise_every_step_is_found_exactly() -> None:
    table = steps(300)
    found = fit.fit_step_time(table)
    assert fit.predict(found, table) == pytest.approx(table.step_s, rel=1e-6)
    for name in ("sequence_s", "kv_token_s", "done_token_s", "switch_s", "pair_s"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-4), name


def test_with_noise_the_intervals_hold_the_coefficients() -> None:
    table = steps(300, noise=0.03)
    drawn = fit.bootstrap(table, 100, seed=1)
    inside = 0
    names = ("sequence_s", "kv_token_s", "done_token_s", "switch_s", "pair_s")
    for name in names:
        low, high = np.percentile([getattr(each, name) for each in drawn], [1, 99])
        inside += low <= getattr(TRUE, name) <= high
    assert inside >= len(names) - 1


def test_a_seed_gives_the_same_draws() -> None:
    table = steps(60, noise=0.03)
    assert fit.bootstrap(table, 3, seed=5) == fit.bootstrap(table, 3, seed=5)
    assert fit.bootstrap(table, 3, seed=5) != fit.bootstrap(table, 3, seed=6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 2))
def test_whatever_was_timed_nothing_is_negative_and_the_table_goes_as_far_as_the_steps(
    seed: int, noise: float
) -> None:
    table = steps(40, seed, noise)
    found = fit.fit_step_time(table)
    assert all(getattr(found, name) >= 0 for name in COEFFICIENTS)
    assert min(s for _, s in found.tokens_s) >= 0
    assert found.tokens_s[-1][0] == table.tokens.max()


def test_more_tokens_may_take_less_time() -> None:
    """Kernels differ by the number of rows: three may take longer than four."""
    table = steps(300)
    three = table.tokens == 3
    assert three.any()
    slower = replace(table, step_s=table.step_s + 2e-3 * three)
    found = dict(fit.fit_step_time(slower).tokens_s)
    assert found[3] - found[4] == pytest.approx(2e-3 + (1 / 31) * 2.2e-3 * -1 / 2, rel=0.05)


def test_every_relative_error_counts_alike() -> None:
    """Steps of a thousand times the length do not drown the short ones."""
    table = steps(200, noise=0.02)
    scaled = replace(table, step_s=table.step_s * 1000)
    a, b = fit.fit_step_time(table), fit.fit_step_time(scaled)
    assert 1000 * a.sequence_s == pytest.approx(b.sequence_s)
    short = table.step_s < np.median(table.step_s)
    error = fit.predict(a, table) / table.step_s - 1
    assert np.median(np.abs(error[short])) < 0.03


def test_held_out_rows_of_a_shape_are_held_out_together() -> None:
    table = steps(80, noise=0.02)
    twice = table.rows(np.repeat(np.arange(80), 2))
    seen = []

    def memory(rows: StepTable) -> fit.Predict:
        seen.append(set(rows.group.tolist()))
        known = dict(zip(rows.group.tolist(), rows.step_s.tolist(), strict=True))
        return lambda asked: np.array([known.get(g, 1e9) for g in asked.group.tolist()])

    errors = fit.held_out(twice, {"memory": memory}, seed=0)["memory"]
    assert (errors > 1e6).all()  # nobody was in the fit and in the test
    assert set.union(*seen) == set(range(80))


def test_what_is_said_of_the_error_is_that_of_steps_not_seen() -> None:
    table = steps(200, noise=0.05)
    errors = fit.held_out(table, MODELS, seed=0)
    own = fit.summary(errors[MODEL])
    fresh = steps(2000, seed=99)
    found = fit.fit_step_time(table)
    true = fit.summary(fit.predict(found, fresh) / fresh.step_s - 1)
    assert own.median > true.median  # the noise of what was held out counts as well
    assert own.shapes == 200
    assert own.median == pytest.approx(0.05 * 0.6745, rel=0.4)


def test_rule_12_beats_what_leaves_out_a_part_of_it() -> None:
    errors = fit.held_out(steps(250, noise=0.01), MODELS, seed=0)
    medians = {kind: fit.summary(error).median for kind, error in errors.items()}
    assert min(medians, key=medians.__getitem__) == MODEL
    assert medians[MODEL] < 0.015


def test_the_envelope_is_what_was_timed() -> None:
    table = steps(100)
    found = fit.envelope(table)
    for name in ("tokens", "sequences", "pairs", "kv_tokens"):
        assert getattr(found, name) == (getattr(table, name).min(), getattr(table, name).max())
