"""The HTML report of a training: how a router learned, and what it came to."""

import json
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from agent.checkpoint import Checkpoint
from agent.plots import WIDTH
from agent.trainer import Trainer
from sim.profile import load_bundle
from sim.report import (
    SERIES,
    Section,
    Value,
    drawn,
    figure,
    folded,
    provenance,
    table,
    write_page,
)

CURVES = {"loss": "loss", "value": "mean value of the choices", "epsilon": "exploration"}


def write_training_report(path: Path, trainer: Trainer, kept: Checkpoint) -> None:
    """Write the page."""
    spec, origin = trainer.spec, kept.spec
    learning = [
        figure(
            learning_curve(trainer),
            "Utility earned as a share of peak: in validation, without exploration (lines, one for "
            "each seed; the ring is what was kept), and in practice, with it (thin). Of "
            "comparisons, validation is of the moving average of the weights.",
            "Performance in validation and in practice over the iterations",
        ),
        figure(
            _curves(trainer),
            "Loss, values and exploration over the iterations, a line for each seed.",
            "Loss, values and exploration over the iterations",
        ),
    ]
    results = [_band_table(kept), *([_seed_table(trainer)] if spec.seeds > 1 else [])]
    entries = {
        "profile": origin.profile,
        "profile hash": origin.profile_hash,
        "rules hash": origin.rules_hash,
        "version": origin.version,
        "command": origin.command,
    }
    write_page(
        path,
        title=f"Training: {spec.name}",
        kicker=f"{trainer.iteration} of {trainer.iterations} iterations, {spec.seeds} "
        f"{'seed' if spec.seeds == 1 else 'seeds'}",
        verdict=f"The router kept earns {origin.performance:.1%} of peak on average over "
        f"{spec.validation} validation workloads; its weights are those of iteration "
        f"{origin.iteration} of seed {origin.seed}.",
        sections=[
            Section("Learning", learning),
            Section("Validation", results),
            Section("Origin", [
                provenance(entries),
                folded("configuration", json.dumps(spec.model_dump(mode="json"), indent=1)),
            ]),
        ],
        profile_kind=load_bundle(spec.cluster.profile).meta.kind,
    )  # fmt: skip


@drawn
def learning_curve(trainer: Trainer) -> Figure:
    """Performance over the iterations."""
    run, spec = trainer.run, trainer.spec
    picture = Figure(figsize=(WIDTH, 4.6))
    axes = picture.subplots()
    done = run.assessed_at >= 0
    for index in range(spec.seeds):
        colour = SERIES[index % len(SERIES)][0]
        practice = run.practice["performance"][: trainer.iteration, index]
        at = np.arange(1, len(practice) + 1)
        axes.plot(at, practice, color=colour, linewidth=0.8, alpha=0.45)
        validation = run.validation[done, index].mean(axis=1)
        axes.plot(run.assessed_at[done], validation, color=colour, linewidth=2, marker="o",
                  markersize=3, label=f"seed {spec.seed + index}")  # fmt: skip
        if done.any():
            axes.plot([run.best_iteration[index]], [run.best_performance[index]], color=colour,
                      marker="o", markersize=11, fillstyle="none")  # fmt: skip
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("utility earned / peak")
    axes.set_xlabel("iteration")
    if spec.seeds > 1:
        axes.legend(ncols=4, fontsize=10)
    return picture


@drawn
def _curves(trainer: Trainer) -> Figure:
    """What tells whether learning is sound."""
    picture = Figure(figsize=(WIDTH, 2.8))
    panels: list[Axes] = list(picture.subplots(1, len(CURVES)))
    for axes, (name, title) in zip(panels, CURVES.items(), strict=True):
        values = trainer.run.practice[name][: trainer.iteration]
        axes.set_title(title)
        for index, curve in enumerate(values.T):
            axes.plot(np.arange(1, len(curve) + 1), curve,
                      color=SERIES[index % len(SERIES)][0], linewidth=1.4)  # fmt: skip
        axes.set_xlabel("iteration")
    panels[0].set_yscale("log")
    return picture


def _band_table(kept: Checkpoint) -> Markup:
    rows: list[list[Value | str]] = [
        [f"{band.low_rps:.3g} to {band.high_rps:.3g}", str(band.workloads),
         f"{100 * band.performance:.1f}"]
        for band in kept.spec.bands
    ]  # fmt: skip
    return table(
        ["mean rate, requests/s", "workloads", "utility, % of peak"],
        rows,
        "The router kept, without exploration, on workloads that it never practised on but was "
        "chosen by.",
    )


def _seed_table(trainer: Trainer) -> Markup:
    run, spec = trainer.run, trainer.spec
    best = int(np.argmax(run.best_performance))
    rows: list[list[Value | str]] = [
        [
            str(spec.seed + index),
            Value(f"{100 * float(run.best_performance[index]):.1f}", mark=index == best),
            str(int(run.best_iteration[index])),
        ]
        for index in range(spec.seeds)
    ]
    return table(["seed", "utility, % of peak", "at iteration"], rows, "The best of each seed.")
