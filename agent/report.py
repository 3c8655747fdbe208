"""What is particular to an evaluation's report: the verdict, and a section for each scenario."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from omegaconf import OmegaConf

from agent import plots
from agent.comparison import Standing, cell_name, cells_of, policies_of, rate_text
from agent.evaluation import EvaluationSpec
from agent.report_tables import (
    available_table,
    cell_table,
    difference_by_rate,
    performance_by_rate,
    regret_by_rate,
)
from agent.trial import Trial
from agent.winning import LEVEL, Win
from agent.winning_report import winning_section
from sim.metrics import AVAILABLE, LEAST_ATTAINABLE
from sim.report import Section, figure, folded, provenance, write_page
from sim.workload import TraceSpec

NEGLIGIBLE = -LEVEL  # of peak: a deficit that does not count


def write_report(
    path: Path,
    *,
    spec: EvaluationSpec,
    trials: Sequence[Trial],
    standings: Sequence[Standing],
    capacities_rps: Mapping[str, float],
    origin: Mapping[str, str],
    profile_kind: str,
    win: Win | None = None,
    exceeded: Sequence[str] = (),
) -> None:
    """Write an evaluation's report as one HTML file.

    Args:
        path: the file.
        spec: the evaluation.
        trials: all of its trials.
        standings: what `comparison.compare` made of them.
        capacities_rps: scenario -> measured capacity of the largest model, in requests/s.
        origin: names and values that say where the numbers come from.
        profile_kind: the kind of the profile bundle.
        win: how the challenger did, if there is one.
        exceeded: trials that earned more than their bound, in words.
    """
    static = {standing.policy: standing.static for standing in standings}
    look = plots.looks(policies_of(standings), static)
    sections = [
        _scenario(name, spec, trials, standings, look, capacities_rps[name])
        for name in spec.scenarios
    ]
    if win is not None:
        sections.insert(0, winning_section(win))
    config = OmegaConf.to_yaml(OmegaConf.create(spec.model_dump(mode="json")))
    sections.append(
        Section("Where this comes from", [provenance(origin), folded("Configuration", config)])
    )
    cells = cells_of(standings)
    write_page(
        path,
        title=f"Evaluation: {spec.name}",
        kicker=(
            f"{len(policies_of(standings))} policies · {_count(len(cells), 'cell')} · "
            f"{_count(len(spec.seeds), 'workload seed')} · {spec.cluster.devices} devices · "
            f"{', '.join(spec.cluster.models)}"
        ),
        verdict=" ".join([*told_exceeded(exceeded), verdict(standings)]),
        sections=sections,
        profile_kind=profile_kind,
    )


def told_exceeded(exceeded: Sequence[str]) -> list[str]:
    """That the bound is wrong, if any trial earned more; the first ones by name."""
    if not exceeded:
        return []
    return [
        f"THE BOUND IS WRONG: {_count(len(exceeded), 'trial')} earned more than the most that is "
        f"said to be possible, which is an error of this program: {'; '.join(exceeded[:3])}."
    ]


def verdict(standings: Sequence[Standing]) -> str:
    """Who earns most on average, and where it is ahead of the best static policy and where not."""
    n_cells = len(cells_of(standings))
    over = f"over {_count(n_cells, 'cell')}"
    mean = {
        policy: sum(s.performance.value for s in standings if s.policy == policy) / n_cells
        for policy in policies_of(standings)
    }
    winner = max(mean, key=mean.__getitem__)
    statics = {s.policy for s in standings if s.static}
    text = f"{winner} earns most: {mean[winner]:.1%} of peak on average {over}."
    if not statics:
        return text
    if winner in statics:
        return f"{text} No policy that chooses among the models does better."
    best_static = max(statics, key=mean.__getitem__)
    text += f" The best static policy, {best_static}, earns {mean[best_static]:.1%}."
    duels = [s for s in standings if s.policy == winner and s.difference is not None]
    ahead = [s for s in duels if s.difference and s.difference.low > 0]
    behind = [s for s in duels if s.difference and s.difference.high < -NEGLIGIBLE]
    where = f" ({', '.join(map(cell_name, behind))})" if 0 < len(behind) <= 3 else ""
    return (
        f"{text} Against the best static policy of each cell, on the same requests, it is ahead "
        f"in {len(ahead) or 'none'}, more than {100 * NEGLIGIBLE:g} points behind in "
        f"{len(behind) or 'none'}{where}, and level or not told apart in "
        f"{n_cells - len(ahead) - len(behind) or 'none'}."
    )


def _scenario(
    name: str,
    spec: EvaluationSpec,
    trials: Sequence[Trial],
    standings: Sequence[Standing],
    look: Mapping[str, plots.Look],
    capacity_rps: float,
) -> Section:
    own = [s for s in standings if s.scenario == name]
    rates = [rate for _, rate in cells_of(own)]
    parts: list[Markup] = []
    if len(rates) > 1:
        parts += [*sweep(own, look, capacity_rps), available_table(own)]
    swept = [len(cells_of([s for s in standings if s.scenario == n])) > 1 for n in spec.scenarios]
    if len(rates) == 1 or all(swept):  # one close look for each, or at what is not swept
        focus = min(rates, key=lambda rate: abs((rate or capacity_rps) - capacity_rps))
        parts += _close_look(
            [s for s in own if s.rate_rps == focus],
            [t for t in trials if (t.scenario, t.rate_rps) == (name, focus)],
            look,
            spec,
        )
    first = next(t for t in trials if (t.scenario, t.seed) == (name, spec.seeds[0]))
    text = f"{_introduction(own, capacity_rps)}{_fitting(spec, first)}"
    return Section(name.replace("_", " ").capitalize(), parts, text)


def _introduction(standings: Sequence[Standing], capacity_rps: float) -> str:
    text = f"The largest model alone can sustain {capacity_rps:.3g} of these requests a second."
    impossible = {s.rate_rps: s.mean["attainable"] for s in standings if s.mean["asks_impossible"]}
    for rate, attainable in impossible.items():
        at = "" if rate is None else f" at {rate_text(rate)} requests/s"
        text += (
            f" Mind{at}: even alone on an idle cluster these requests would earn only "
            f"{attainable:.1%} of peak, under {LEAST_ATTAINABLE:.0%}."
        )
    return text


def _fitting(spec: EvaluationSpec, trial: Trial) -> str:
    """What was done to a workload's requests to make them playable, with counts."""
    workload = spec.scenarios[trial.scenario].workload
    transform = workload.length_transform if isinstance(workload, TraceSpec) else ""
    told = {
        "over_context": f"exceeded the models' context (length transform: {transform})",
        "truncated": "had an answer longer than max_tokens, cut there",
        "bad_rows": "more were malformed rows, left out",
    }
    parts = [f"{trial.counts[key]:,} {text}" for key, text in told.items() if trial.counts.get(key)]
    return f" Of {trial.counts['requests']:,} requests {'; '.join(parts)}." if parts else ""


def sweep(
    standings: Sequence[Standing], look: Mapping[str, plots.Look], capacity_rps: float
) -> list[Markup]:
    """Figures and tables of one scenario over its rates."""
    bound = standings[0].bound
    bounded = "" if bound is None else " Dotted: the clairvoyant bound, which nobody can exceed."
    return [
        figure(
            plots.performance_by_rate(standings, look, capacity_rps),
            "Utility earned as a share of peak, what the most accurate model would earn with no "
            "deadline missed. Bands: 95 % bootstrap over windows of arrival. Static policies are "
            f"dashed.{bounded}",
            "Performance of each policy against the rate of arrivals",
        ),
        figure(
            plots.availability_by_rate(standings, look, capacity_rps),
            f"Share of requests answered in time; a system counts as available above "
            f"{AVAILABLE:.0%}, the dotted line.",
            "Availability of each policy against the rate of arrivals",
        ),
        performance_by_rate(standings),
        difference_by_rate(standings),
        *([regret_by_rate(standings)] if standings[0].bound is not None else []),
    ]


def _close_look(
    standings: Sequence[Standing],
    trials: Sequence[Trial],
    look: Mapping[str, plots.Look],
    spec: EvaluationSpec,
) -> list[Markup]:
    """Figures of one cell; the mix over time is of the first workload seed."""
    where = cell_name(standings[0])
    first = [trial for trial in trials if trial.seed == spec.seeds[0]]
    return [
        cell_table(standings),
        figure(
            plots.windows_above(standings, look),
            f"Share of {spec.window_s:g} s windows in which a policy earned more than 90, 96 and "
            f"98 % of peak; {where}.",
            "Share of windows above three thresholds of peak",
        ),
        figure(
            plots.mix_over_time(first, spec.cluster.models),
            f"The line is what arrived; below it, what each model answered in time; {where}, "
            f"workload seed {spec.seeds[0]}.",
            "Answers in time by model over time, under the rate of arrivals",
        ),
        figure(
            plots.latencies(standings, look),
            f"Latency of finished requests: P50 (dot), P95 (ring) and P99 (bar); {where}. Late "
            "requests that were cancelled have none.",
            "Latency percentiles of each policy",
        ),
        figure(
            plots.outcomes(standings),
            f"What became of the requests; {where}.",
            "Outcomes of the requests of each policy",
        ),
    ]


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
