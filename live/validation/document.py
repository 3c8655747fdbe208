"""What is kept of a validation for programs: a JSON document."""

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
from pydantic import JsonValue

from calibrate.latency import HELD_TO
from live.validation.comparison import PERCENTILES, Cell, Comparison
from live.validation.rehearsal import Conditions
from live.validation.session import Stage


def document(
    comparison: Comparison, stage: Stage, found: Conditions, origin: Mapping[str, str]
) -> dict[str, JsonValue]:
    """The whole validation as JSON."""
    return {
        "provenance": dict(origin),
        "config": settings(stage),
        "conditions": found.model_dump(mode="json"),
        "tau": comparison.tau,
        "pairs_differing": len(comparison.differing),
        "pairs": [
            {**asdict(pair), "differs": pair.differs, "agrees": pair.agrees}
            for pair in comparison.pairs
        ],
        "choices": [asdict(choice) for choice in comparison.choices],
        "cells": [_cell(cell) for cell in comparison.cells],
        "aims": comparison.aims.model_dump(mode="json"),
        "missed": list(comparison.missed),
    }


def settings(stage: Stage) -> dict[str, JsonValue]:
    """The settings, without what is a place on one machine."""
    return stage.spec.model_dump(
        mode="json",
        exclude={"output_dir": True, "bundle": True, "models": True, "cluster": {"profile": True}},
    )


def _cell(cell: Cell) -> dict[str, JsonValue]:
    head: dict[str, JsonValue] = {
        "load": cell.load,
        "rate_rps": cell.rate_rps,
        "policy": cell.policy,
        "requests": len(cell.simulated.workload),
        "void": len(cell.live) - len(cell.valid),
        "utility_simulated": cell.performance,
        "goodput_simulated": cell.goodput,
    }
    if not cell.valid:
        return head
    return head | {
        "utility_live": {**asdict(cell.live_performance)},
        "utility_by_answers": [*cell.by_answers] if cell.scored else None,
        "goodput_live": [*cell.live_goodput],
        "goodput_error": cell.goodput_error,
        "goodput_error_at_speed": cell.goodput_error_at_speed,
        "latencies": [
            {
                **row.model_dump(mode="json"),
                "error": row.error,
                "spread": row.spread,
                "error_at_speed": row.error_at_speed,
                "held_to_the_aim": row.statistic in HELD_TO,
            }
            for row in cell.latencies
        ],
        "steps_outside_simulated": int(cell.simulated.n_steps_outside.sum()),
        "steps_simulated": cell.simulated.n_steps,
        "runs": [
            {
                "late_s": _percentiles(run.recording.late_s),
                "decision_s": _percentiles(run.recording.decision_s),
                "gateway_s": _percentiles(run.recording.gateway_s),
                "faults": int(run.recording.fault.sum()),
                "speed_before": run.recording.slow_before.tolist(),
                "speed_after": run.recording.slow_after.tolist(),
                "slowness": {**run.pace.slowness},
                "prompt_s": {**run.pace.prompt_s},
                "gap_s": run.gap_s,
                "steps": len(run.recording.steps),
                "steps_outside": run.outside,
            }
            for run in cell.valid
        ],
    }


def _percentiles(values: np.ndarray) -> dict[str, JsonValue]:
    return {name: float(np.percentile(values, q)) for name, q in PERCENTILES.items()}
