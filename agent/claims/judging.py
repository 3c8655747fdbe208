"""The claims, each judged by what was measured: pure functions of records, limits and standings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from agent.claims.limit import RATE, Limit
from agent.claims.playing import Played
from agent.claims.record import (
    Record,
    Times,
    record_of,
    times_above,
    times_earned_per_device,
)
from agent.claims.spec import ClaimsSpec
from agent.comparison import Interval, Standing, compare
from agent.report import NEGLIGIBLE
from sim.metrics import AVAILABLE

OFTEN = {0.96: 4.1, 0.98: 2.3}  # share of peak -> times as often as the best static system
PER_DEVICE = 3.94  # times the performance of twice the devices
TWICE_ABOVE = 0.90  # of peak: what is exceeded more often than by twice the devices


@dataclass(frozen=True)
class Claim:
    """A claim, and what came of it for one router."""

    key: str
    router: str
    says: str
    wanted: str
    found: str
    met: bool | None  # None: it cannot be told


def judge(spec: ClaimsSpec, played: Played) -> list[Claim]:
    """All claims, for one router after the other."""
    statics, devices = spec.statics, spec.cluster.devices
    small, large = statics[0], statics[-1]
    there = [*statics, *spec.routers]
    ten = (
        {name: record_of(played.at_ten_times, name, devices) for name in there}
        if played.at_ten_times
        else None
    )
    records = {name: record_of(played.unpredictable, name, devices) for name in there}
    doubled = doubled_records(spec, played)
    unpredictable = compare(played.unpredictable)
    arrivals = compare(played.arrival_shift)
    tasks = [s for trials in played.task_shift.values() for s in compare(trials)]
    deadlines = [s for trials in played.deadlines.values() for s in compare(trials)]
    return [
        claim
        for router in spec.routers
        for claim in (
            rates(router, played.limits, large),
            *at_ten_times(router, ten, small, large),
            *on_unpredictable(router, records, statics),
            ahead("ahead", "unpredictable rates", router, unpredictable),
            *on_twice(router, records[router], doubled),
            ahead("arrival_shift", "other arrivals than practised on", router, arrivals),
            ahead("task_shift", "other mixes of tasks", router, tasks),
            ahead("deadlines", "hard and soft deadlines", router, deadlines),
        )
    ]


def doubled_records(spec: ClaimsSpec, played: Played) -> dict[str, Record]:
    """What each static system did on twice the devices."""
    devices = 2 * spec.cluster.devices
    return {name: record_of(played.twice, name, devices) for name in spec.doubled.values()}


def rates(router: str, limits: Mapping[str, Limit], large: str) -> Claim:
    """How far up the router is available, against the largest model alone."""
    own, base = limits[router], limits[large]
    found = f"{own} against {base}"
    met: bool | None
    if base.available_rps is None:  # anything is any number of times nothing
        met = None if own.available_rps is None else True
    else:
        times = (own.available_rps or 0.0) / base.available_rps
        told = not base.open and (not own.open or times >= RATE)
        met = times >= RATE if told else None
        found = f"{times:.1f}x: {found}"
    says = f"highest rate at which it is available, against {large}"
    return Claim("rate", router, says, f"≥ {RATE:g}x", found, met)


def at_ten_times(
    router: str, records: Mapping[str, Record] | None, small: str, large: str
) -> list[Claim]:
    """What is answered and earned at RATE times the highest rate of the largest model alone.

    Args:
        router: what it is called.
        records: of all policies there; None: the largest model alone is available at no rate.
        small: the static system of the smallest model.
        large: that of the largest.
    """
    where = f"at {RATE:g}x the highest rate of {large}"
    says = (f"answered in time {where}", f"utility over that of {small} {where}")
    keys, wanted = ("available", "utility"), (f"≥ {AVAILABLE:.0%}", "> 0 points")
    if records is None:
        unknown = "it has none"
        return [
            Claim(key, router, text, want, unknown, None)
            for key, text, want in zip(keys, says, wanted, strict=True)
        ]
    own, base = records[router], records[small]
    answered = f"{own.availability:.1%}; {small} {base.availability:.1%}"
    if base.availability < AVAILABLE:
        answered += ", which is not available there either"
    over = own.over(base)
    return [
        Claim(keys[0], router, says[0], wanted[0], answered, own.availability >= AVAILABLE),
        Claim(keys[1], router, says[1], wanted[1], points(over), over.low > 0),
    ]


def on_unpredictable(
    router: str, records: Mapping[str, Record], statics: Sequence[str]
) -> list[Claim]:
    """How much more often the router is above a share of peak than the best static system."""
    claims = []
    for threshold, wanted in OFTEN.items():
        best = often_above(records, statics, threshold)
        times = times_above(records[router], records[best], threshold, per_device=False)
        claims.append(
            Claim(
                f"above_{100 * threshold:.0f}",
                router,
                f"how often above {threshold:.0%} of peak, against the best static system",
                f"≥ {wanted:g}x",
                f"{times}: {_shares(times)} of {best}",
                times.reaches(wanted),
            )
        )
    return claims


def on_twice(router: str, own: Record, doubled: Mapping[str, Record]) -> list[Claim]:
    """The router against static systems on twice the devices, the best of them each time."""
    often = often_above(doubled, [*doubled], TWICE_ABOVE)
    most = max(doubled, key=lambda name: doubled[name].earned.sum())
    above = times_above(own, doubled[often], TWICE_ABOVE, per_device=False)
    above_each = times_above(own, doubled[often], TWICE_ABOVE, per_device=True)
    earned = times_earned_per_device(own, doubled[most])
    bound = doubled[most].devices / own.devices * doubled[most].peak.sum()
    bound /= doubled[most].earned.sum()
    return [
        Claim(
            "twice",
            router,
            f"how often above {TWICE_ABOVE:.0%} of peak, against twice the devices",
            "> 1x",
            f"{above}: {_shares(above)} of {often}",
            above.part > above.whole if above.low is None else above.low > 1.0,
        ),
        Claim(
            "per_device_often",
            router,
            f"how often above {TWICE_ABOVE:.0%} of peak per device, against twice the devices",
            f"≥ {PER_DEVICE:g}x",
            f"{above_each} of {often}",
            above_each.reaches(PER_DEVICE),
        ),
        Claim(
            "per_device",
            router,
            "utility per device, against twice the devices",
            f"≥ {PER_DEVICE:g}x",
            f"{earned} of {most}; all of peak were {bound:.2f}x",
            earned.reaches(PER_DEVICE),
        ),
    ]


def ahead(key: str, where: str, router: str, standings: Sequence[Standing]) -> Claim:
    """Whether the router is nowhere behind the best static system of the cell."""
    own = [s for s in standings if s.policy == router]
    differences = [s.difference for s in own if s.difference is not None]
    level = sum(d.low >= -NEGLIGIBLE for d in differences)
    least = min(differences, key=lambda d: d.low)
    return Claim(
        key,
        router,
        f"utility over the best static system: {where}",
        f"≥ −{100 * NEGLIGIBLE:g} points everywhere",
        f"in {level} of {len(differences)} cells; at the least {points(least)}",
        level == len(differences),
    )


def often_above(records: Mapping[str, Record], names: Sequence[str], threshold: float) -> str:
    """Who is most often above a share of peak; of equals, the one that earns more."""
    return max(names, key=lambda n: (records[n].above(threshold).mean(), records[n].earned.sum()))


def points(interval: Interval) -> str:
    """A difference in points of peak, with the ends of its interval."""
    value, low, high = (100 * end for end in (interval.value, interval.low, interval.high))
    return f"{value:+.1f} points ({low:.1f} to {high:.1f})".replace("-", "−")


def _shares(times: Times) -> str:
    return f"{times.part:.1%} against {times.whole:.1%}"
