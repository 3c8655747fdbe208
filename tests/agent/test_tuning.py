"""What a search tries, and what it makes of it."""

import pytest
from pydantic import ValidationError

from agent.comparison import Interval, Standing
from agent.evaluation import PolicySpec
from agent.tuning import RangeSpec, judge, spread


def test_settings_are_spread_over_their_ranges():
    search = {
        "window_s": RangeSpec(choices=(0.25, 1.0, 4.0)),
        "cap": RangeSpec(low=4, high=64, log=True, integer=True),
        "shares.0": RangeSpec(low=0, high=1),
        "shares.1": RangeSpec(low=0, high=1),
    }
    tried = spread(search, 63, seed=0)
    assert len(tried) == 63
    assert {each["window_s"] for each in tried} == {0.25, 1.0, 4.0}
    caps = [each["cap"] for each in tried]
    assert all(isinstance(cap, int) and 4 <= cap <= 64 for cap in caps)
    assert sum(cap < 16 for cap in caps) == pytest.approx(32, abs=4)  # evenly by logarithm
    assert all(len(each["shares"]) == 2 for each in tried)
    assert tried == spread(search, 63, seed=0)
    assert tried != spread(search, 63, seed=1)


def test_an_integer_range_reaches_both_ends():
    whole = RangeSpec(low=1, high=3, integer=True)
    assert [whole.at(share) for share in (0.0, 0.5, 0.999)] == [1, 2, 3]


@pytest.mark.parametrize(
    "given",
    [{}, {"low": 1}, {"low": 2, "high": 1}, {"low": 0, "high": 1, "log": True},
     {"choices": [1], "low": 0}],
)  # fmt: skip
def test_a_range_that_is_none_is_refused(given):
    with pytest.raises(ValidationError):
        RangeSpec(**given)


def test_a_score_is_the_mean_over_cells_and_the_best_is_kept():
    def stands(policy: str, rate_rps: float, value: float) -> Standing:
        earned = Interval(value, value, value)
        return Standing("s", rate_rps, policy, False, earned, False, None, None, value, 1.0, {})

    tried = [PolicySpec(policy="p", label=f"p {n}", settings={"n": n}) for n in range(3)]
    scores = [(0.5, 0.7), (0.9, 0.7), (0.2, 0.4)]
    standings = [
        stands(spec.label, rate, value)
        for spec, pair in zip(tried, scores, strict=True)
        for rate, value in zip((1.0, 2.0), pair, strict=True)
    ]
    (found,) = judge({"p": tried}, standings)
    assert found.best.settings == {"n": 1}
    assert found.best.cells == (0.9, 0.7)
    assert found.curve == pytest.approx([0.6, 0.8, 0.8])
