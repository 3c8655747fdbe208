"""The paper's claims: what is measured for each, how it is judged, and how it is shown."""

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from rich.console import Console

from agent import evaluation, publish
from agent.claims.__main__ import claims_table, results_of
from agent.claims.grid import Point, Share, by_axis, play_grid, routers_of, shares
from agent.claims.judging import (
    Claim,
    ahead,
    at_ten_times,
    judge,
    on_twice,
    on_unpredictable,
    rates,
)
from agent.claims.limit import Limit, halved, limit_of
from agent.claims.page import write_page_of
from agent.claims.playing import play_all
from agent.claims.record import record_of, times_above, times_earned_per_device
from agent.claims.spec import ClaimsSpec
from agent.comparison import compare
from agent.gather import RECORD
from agent.sweep import JobRecord
from agent.trial import Trial
from sim.config import ConfigError, check
from sim.metrics import Percentiles, Summary

NOTHING = Percentiles(None, None, None)
STATICS = ("small", "large")


@pytest.fixture(scope="module", autouse=True)
def hydra_tree():
    with initialize_config_module("conf", version_base="1.3"):
        yield


def make_trial(policy, earned, *, peak=10.0, on_time=100, scenario="s", rate=1.0, seed=0):
    """A trial with what is earned in each window, of 100 requests."""
    peaks = [peak] * len(earned) if isinstance(peak, float) else peak
    summary = Summary(
        arrivals=100, on_time=on_time, late=100 - on_time, cancelled=0, refused_too_long=0,
        refused_full=0, shed=0, inside=0, preemptions=0, earned=sum(earned), peak=sum(peaks),
        performance=None, attainable=None, asks_impossible=False, availability=on_time / 100,
        windows_above={}, ttft_s=NOTHING, tpot_s=NOTHING, e2e_s=NOTHING, decision_s=NOTHING,
        model_share={}, utility_per_device_s=0.0, utility_per_dollar=None,
    )  # fmt: skip
    return Trial(
        scenario=scenario, rate_rps=rate, seed=seed, policy=policy, static=policy in STATICS,
        summary=summary, duration_s=float(len(earned)), counts={}, earned=earned, peak=peaks,
        timeline_arrivals=[seed], timeline_on_time=[[0]], n_steps=1, n_steps_outside=[0],
        wall_s=0.0,
    )  # fmt: skip


def records(devices=1, **earned):
    return {
        name: record_of([make_trial(name, [*values])], name, devices)
        for name, values in earned.items()
    }


@pytest.mark.parametrize(
    ("availability", "limit"),
    [
        ({1.0: 1.0, 4.0: 0.5, 2.0: 0.99}, Limit(2.0, 4.0)),
        ({1.0: 1.0, 2.0: 0.98, 4.0: 1.0}, Limit(1.0, 2.0)),  # up to the first where it is not
        ({1.0: 1.0, 2.0: 1.0}, Limit(2.0, None)),
        ({1.0: 0.9, 2.0: 1.0}, Limit(None, 1.0)),
    ],
)
def test_a_policy_is_available_up_to_the_first_rate_where_it_is_not(availability, limit):
    assert limit_of(availability) == limit


def test_halving_tells_a_limit_more_closely():
    asked = []

    def available_to_170(rate_rps):
        asked.append(rate_rps)
        return 1.0 if rate_rps <= 170 else 0.9

    found = halved(Limit(100, 200), 4, available_to_170)
    assert found.available_rps <= 170 < found.unavailable_rps
    assert found.unavailable_rps / found.available_rps == pytest.approx(2 ** (1 / 16), rel=0.01)
    assert len(asked) == 4


@pytest.mark.parametrize("limit", [Limit(None, 10.0), Limit(10.0, None)])
def test_a_limit_outside_of_what_was_tried_is_left_so(limit):
    assert halved(limit, 4, lambda _: 1 / 0) == limit


def test_a_limit_is_told_in_plain_digits():
    assert str(Limit(1014.0, 1100.0)) == "1,010/s"
    assert str(Limit(99.95, None)) == "at least 100/s"
    assert str(Limit(None, 22.8)) == "not even at 22.8/s"


def test_windows_are_counted_over_all_cells_and_seeds_but_for_the_empty():
    trials = [
        make_trial("learned", [9.7, 9.9, 0.0], peak=[10.0, 10.0, 0.0]),
        make_trial("learned", [9.0, 9.61], scenario="t", seed=1, on_time=50),
        make_trial("small", [0.0, 0.0, 0.0]),
    ]
    record = record_of(trials, "learned", 4)
    assert record.share_above(0.96).value == pytest.approx(3 / 4)
    assert record.share_above(0.98).value == pytest.approx(1 / 4)
    assert record.performance.value == pytest.approx(38.21 / 40)
    assert record.availability == 0.75
    with pytest.raises(ValueError, match="no trial of large"):
        record_of(trials, "large", 4)


def test_policies_on_other_requests_are_not_compared():
    one = record_of([make_trial("small", [5.0, 5.0])], "small", 1)
    other = record_of([make_trial("large", [5.0, 5.0], peak=9.0)], "large", 1)
    for compared in (one.over, lambda o: times_above(one, o, 0.9, per_device=False)):
        with pytest.raises(ValueError, match="same requests"):
            compared(other)


def test_a_ratio_to_nothing_is_said_as_such():
    found = records(some=[10.0, 5.0], none=[1.0, 1.0])
    some, none = found["some"], found["none"]
    times = times_above(some, none, 0.9, per_device=False)
    assert (times.value, times.low, times.high) == (None, None, None)
    assert times.reaches(1000)
    assert str(times) == "something against nothing"
    nothing = times_above(none, none, 0.9, per_device=False)
    assert not nothing.reaches(1)
    assert str(nothing) == "nothing against nothing"


def test_per_device_is_against_the_devices_of_each():
    one = record_of([make_trial("learned", [9.5] * 4)], "learned", 4)
    twice = record_of([make_trial("large", [9.5, 0.0, 0.0, 0.0])], "large", 8)
    assert times_above(one, twice, 0.9, per_device=False).value == pytest.approx(4)
    assert times_above(one, twice, 0.9, per_device=True).value == pytest.approx(8)
    assert times_earned_per_device(one, twice).value == pytest.approx(8)


def test_the_router_is_held_against_the_static_system_that_is_above_most_often():
    found = records(
        learned=[9.7, 9.7, 9.9, 9.9, 9.7, 9.7, 9.7, 9.7, 5.0, 5.0],
        small=[9.5] * 10,  # earns the most, and is never above 96 %
        large=[9.9, 9.7] + [0.0] * 8,
    )
    often, oftener = on_unpredictable("learned", found, STATICS)
    assert (often.key, often.met) == ("above_96", False)
    assert often.found.startswith("4.00x")
    assert often.found.endswith("80.0% against 20.0% of large")
    assert (oftener.key, oftener.met) == ("above_98", False)
    more = records(learned=[9.9] * 9 + [5.0], small=[9.5] * 10, large=[9.9, 9.7] + [0.0] * 8)
    assert [claim.met for claim in on_unpredictable("learned", more, STATICS)] == [True, True]


def test_twice_the_devices_are_beaten_where_they_fall_behind():
    own = record_of([make_trial("learned", [9.5] * 10)], "learned", 4)
    doubled = records(8, large=[9.5] * 4 + [0.0] * 6, small=[7.0] * 10)
    claims = {claim.key: claim for claim in on_twice("learned", own, doubled)}
    assert {key: claim.met for key, claim in claims.items()} == {
        "twice": True, "per_device_often": True, "per_device": False,
    }  # fmt: skip
    assert "95.0" not in claims["twice"].found
    assert claims["twice"].found.endswith("100.0% against 40.0% of large")
    assert claims["per_device"].found.startswith("2.71x (2.71 to 2.71) of small")
    assert claims["per_device"].found.endswith("all of peak were 2.86x")
    level = on_twice("learned", own, records(8, large=[9.5] * 10))
    assert [claim.met for claim in level] == [False, False, False]
    luck = record_of([make_trial("learned", [9.5] * 6 + [5.0] * 4)], "learned", 4)
    told = on_twice("learned", luck, records(8, large=[5.0] * 5 + [9.5] * 5))[0]
    assert told.found.startswith("1.20x")
    assert not told.met  # its interval holds 1


@pytest.mark.parametrize(
    ("own", "base", "met"),
    [
        (Limit(1000.0, 1100.0), Limit(100.0, 110.0), True),
        (Limit(990.0, 1100.0), Limit(100.0, 110.0), False),
        (Limit(990.0, None), Limit(100.0, 110.0), None),  # further up nothing was tried
        (Limit(1000.0, None), Limit(100.0, 110.0), True),
        (Limit(1000.0, None), Limit(100.0, None), None),
        (Limit(None, 10.0), Limit(100.0, 110.0), False),
        (Limit(50.0, 60.0), Limit(None, 10.0), True),
        (Limit(None, 10.0), Limit(None, 10.0), None),
    ],
)
def test_a_ratio_of_rates_is_judged_where_it_can_be_told(own, base, met):
    assert rates("learned", {"learned": own, "large": base}, "large").met is met


def test_it_is_said_where_even_the_smallest_model_is_not_available():
    trials = [
        make_trial("learned", [6.0, 6.0], on_time=60), make_trial("small", [5.0, 5.0], on_time=70),
    ]  # fmt: skip
    found = {name: record_of(trials, name, 4) for name in ("learned", "small")}
    available, utility = at_ten_times("learned", found, "small", "large")
    assert not available.met
    assert available.found == "60.0%; small 70.0%, which is not available there either"
    assert utility.met
    assert utility.found.startswith("+10.0 points")
    unknown = at_ten_times("learned", None, "small", "large")
    assert [claim.met for claim in unknown] == [None, None]


def test_a_router_that_falls_behind_in_one_cell_is_not_robust():
    def cells(second):
        return compare([
            make_trial(policy, [earned] * 2, rate=rate)
            for rate, learned in ((1.0, 9.0), (2.0, second))
            for policy, earned in (("small", 7.0), ("large", 6.0), ("learned", learned))
        ])  # fmt: skip

    level = ahead("tasks", "tasks", "learned", cells(6.99))
    assert level.met
    assert level.found.startswith("in 2 of 2 cells; at the least −0.1 points")
    behind = ahead("tasks", "tasks", "learned", cells(6.9))
    assert not behind.met
    assert behind.found.startswith("in 1 of 2 cells")


def make_point(deadline, lengths, met):
    claims = tuple(Claim(key, "learned", key, "", "", value) for key, value in met.items())
    return Point(deadline, "together", lengths, "below", "learned", claims)


def test_a_claim_holds_at_a_share_of_the_points_where_it_can_be_told():
    points = [
        make_point("hard", "short", {"rate": True, "twice": True}),
        make_point("hard", "long", {"rate": None, "twice": False}),
        make_point("soft", "short", {"rate": False, "twice": True}),
    ]
    assert shares(points) == {"rate": Share(1, 2), "twice": Share(2, 3)}
    of = by_axis(points)
    assert list(of) == ["deadline", "lengths"]  # the others have one value
    assert of["lengths"]["long"] == {"rate": Share(0, 0), "twice": Share(0, 1)}
    assert of["deadline"]["hard"]["rate"] == Share(1, 1)


def test_published_claims_are_a_table_with_each_router_and_the_grid(tmp_path):
    claims = [
        {"key": key, "router": router, "says": f"says {key}", "wanted": "≥ 2x",
         "found": f"{router} {key}", "met": met}
        for router in ("learned", "paper")
        for key, met in (("rate", True), ("twice", None))
    ]  # fmt: skip
    results = {
        "provenance": {"command": "python -m agent.claims", "profile": "analytic"},
        "config": {"name": "paper"}, "claims": claims, "standings": {},
        "grid": {"shares": {"twice": {"holds": 3, "told": 4}}, "points": []},
    }  # fmt: skip
    kept = publish.claims.keep(results)
    assert kept["grid"] == {"shares": {"twice": {"holds": 3, "told": 4}}}
    (tmp_path / "paper.json").write_text(json.dumps(kept))
    text = publish.update("<!-- results: paper -->\n<!-- end -->", tmp_path)
    assert text.splitlines()[1:5] == [
        "| claim | wanted | learned | met | paper | met | holds at, of the grid |",
        "|---|---|---|---|---|---|---|",
        "| says rate | ≥ 2x | learned rate | yes | paper rate | yes | – |",
        "| says twice | ≥ 2x | learned twice | – | paper twice | – | 3 of 4 points |",
    ]
    assert publish.render(dict(kept, grid=None)).startswith("| claim | wanted | learned | met | p")


def make_spec(*overrides: str) -> ClaimsSpec:
    config = compose("claims", overrides=list(overrides))
    return check(ClaimsSpec, OmegaConf.to_container(config, resolve=True), "")


def test_the_shipped_experiment_is_on_seeds_of_its_own():
    spec = make_spec()
    assert spec.name == "paper"
    assert not {0, 1, 2, 3} & {*spec.seeds}
    assert [*spec.routers] == ["learned"]
    assert [*make_spec("paper_checkpoint=there").routers] == ["learned", "paper"]
    assert (spec.twice.devices, spec.twice.placement) == (8, None)
    assert spec.stable.capacity_grid.high >= 20
    assert {kind.kind for kind in spec.deadlines.values()} == {"hard", "soft"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+speed=1", "speed = 1: unknown key; allowed: arrival_shift, checkpoint"),
        ("statics=[static_small]", "statics = "),
        ("stable.halvings=-1", "stable.halvings = -1"),
        ("grid.ranges.below.low=3", r"grid.ranges.below = .*low must be < high"),
        ("grid.stable_s=0", "grid.stable_s = 0"),
    ],
)
def test_a_wrong_setting_of_the_claims_is_refused_by_name(override, message):
    with pytest.raises(ConfigError, match=message):
        make_spec(override)


def test_the_routers_of_a_sweep_are_a_further_axis(tmp_path):
    for number, (discount, status) in enumerate([(0.9, "done"), (0.99, "failed")]):
        job = tmp_path / f"job{number}"
        (job / "checkpoint").mkdir(parents=True)
        (job / "checkpoint" / "config.json").write_text('{"performance": 0.9}')
        record = JobRecord(
            program="agent.train", overrides=("agent=paper", f"discount={discount}"),
            status=status, reason="",
        )  # fmt: skip
        (job / RECORD).write_text(record.model_dump_json())
    spec = make_spec(f"grid.training={tmp_path}")
    found = routers_of(spec)
    assert found == spec.routers | {"discount=0.9": str(tmp_path / "job0" / "checkpoint")}
    (tmp_path / "job0" / RECORD).unlink()
    with pytest.raises(ConfigError, match="none of its trainings is done"):
        routers_of(spec)


TINY = [
    "cluster.devices=1", "seeds=[4]", "window_s=1", "n_jobs=1", "stable.workload.duration_s=3",
    "stable.capacity_grid={low: 0.5, high: 3, n: 2}", "stable.halvings=1",
    "unpredictable.workload.duration_s=3", "unpredictable.capacity_grid={low: 1, high: 1, n: 1}",
    "~arrival_shift.jumps", "~arrival_shift.wider", "~arrival_shift.replay",
    "arrival_shift.bursts.workload.duration_s=3", "~task_shift.drifting", "~deadlines.soft",
    "arrival_shift.bursts.capacity_grid={low: 1, high: 1, n: 1}", "grid.duration_s=3",
    "grid.stable_s=3", "~grid.deadlines.tight", "~grid.deadlines.loose",
    "~grid.placements.apart", "~grid.lengths.long", "~grid.ranges.below",
    "~grid.ranges.beyond", "sensitivity=true",
]  # fmt: skip


@pytest.mark.slow
def test_all_claims_are_measured_kept_and_shown(tmp_path, monkeypatch):
    second = "paper_checkpoint=pkg://agent.checkpoints/default"
    spec, quiet = make_spec(*TINY, second, f"output_dir={tmp_path}"), Console(quiet=True)
    played, points = play_all(spec, quiet), play_grid(spec, quiet)
    claims = judge(spec, played)
    assert [claim.key for claim in claims] == 2 * [
        "rate", "available", "utility", "above_96", "above_98", "ahead", "twice",
        "per_device_often", "per_device", "arrival_shift", "task_shift", "deadlines",
    ]  # fmt: skip
    assert {claim.key for point in points for claim in point.claims} < {c.key for c in claims}
    assert len(claims_table(claims, points).rows) == len(claims)
    results = results_of(spec, played, claims, points, {"profile": "analytic"})
    json.dumps(results, allow_nan=False)
    assert [point["router"] for point in results["grid"]["points"]] == ["learned", "paper"]
    page = Path(tmp_path, "report.html")
    write_page_of(page, spec=spec, played=played, claims=claims, points=points, origin={})
    text = page.read_text("utf-8")
    assert text.count("<svg") == 9
    assert all(claim.says in text for claim in claims)

    def refuse(job, *_):
        raise AssertionError(f"{job} was played")

    monkeypatch.setattr(evaluation, "run", refuse)
    again = judge(spec, play_all(spec, quiet))
    assert again == claims
