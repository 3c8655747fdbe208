"""What is shown and kept of a prediction: a table, a JSON document and an HTML page."""

from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup
from pydantic import JsonValue
from rich.table import Table

from calibrate.recorded import plots
from calibrate.recorded.comparison import KINDS, Latencies, Row, latencies, replayed
from calibrate.recorded.constants import GIB
from calibrate.recorded.prediction import Prediction
from sim.report import Section, Value, figure, provenance, signed, table, write_page


def document(prediction: Prediction, origin: Mapping[str, str]) -> dict[str, JsonValue]:
    """The whole comparison as JSON."""
    blocks, played = prediction.capacity, prediction.replay
    return {
        "provenance": dict(origin),
        "run": prediction.run.name,
        "requests": len(prediction.run.requests),
        "preemptions": int(played.result.preemptions.sum()),
        "errors": [row.document() for row in prediction.rows],
        "kv_blocks": {
            "stated": blocks.stated_blocks,
            "predicted": blocks.predicted_blocks,
            "error": blocks.error,
            "tokens_each": blocks.block_tokens,
        },
        "step_time": {
            "pair_s": played.step_time.pair_s,
            "kv_token_s": played.step_time.kv_token_s,
            "prompt_excess_s": played.prompt_excess_s,
            "replays": played.rounds,
        },
        "constants": [
            {"name": c.name, "value": c.value, "unit": c.unit, "source": c.source}
            for c in prediction.constants
        ],
    }


def verdict(prediction: Prediction) -> str:
    """The errors that matter most, and which aims were missed."""
    error = {(row.kind, row.statistic): row.error for row in prediction.rows}
    means = ", ".join(
        f"{signed(error[kind, 'mean'])} {what}"
        for kind, (what, _) in KINDS.items()
        if (kind, "mean") in error
    )
    missed = ", ".join(f"{row.statistic} {KINDS[row.kind][0]}" for row in prediction.missed)
    aims = f"Beyond its aim: {missed}." if missed else "Every error is within its aim."
    return f"Mean latencies are off by {means}. {aims}"


def tables(prediction: Prediction) -> list[Table]:
    """The tables of the terminal: errors, memory, constants."""
    errors = Table(title=f"{prediction.run.name}: recorded and simulated", title_justify="left")
    for column in ("", "", "recorded", "simulated", "error", "LLMServingSim's"):
        errors.add_column(column, justify="left" if not column else "right")
    for row in prediction.rows:
        style = "bold red" if row.missed else None
        errors.add_row(*_cells(row), style=style, end_section=row.statistic == "P99")
    constants = Table(title="What the operators do not hold", title_justify="left")
    for column in ("constant", "value", "source"):
        constants.add_column(column)
    for constant in prediction.constants:
        constants.add_row(constant.name, f"{constant.value:.6g} {constant.unit}", constant.source)
    return [errors, constants]


def memory_line(prediction: Prediction) -> str:
    """The KV capacity in a sentence."""
    blocks = prediction.capacity
    size = f"of {blocks.block_tokens} tokens"
    if blocks.predicted_blocks is None:
        return f"KV cache: {blocks.stated_blocks:,} blocks {size} stated, none predicted"
    predicted = f"KV cache: {blocks.predicted_blocks:,} blocks {size} predicted"
    if blocks.stated_blocks is None or blocks.error is None:
        return f"{predicted}, none stated"
    return f"{predicted}, {blocks.stated_blocks:,} stated and used ({signed(blocks.error)})"


def write_report(path: Path, prediction: Prediction, origin: Mapping[str, str]) -> None:
    """Write the comparison as one HTML file."""
    run, result = prediction.run, prediction.replay.result
    recorded, simulated = latencies(run.requests), replayed(run.requests, result)
    arguments = run.meta.engine_kwargs
    gpus, constants = arguments.tensor_parallel_size, prediction.constants
    write_page(
        path,
        title=f"Recorded run: {run.name}",
        kicker=(
            f"{len(run.requests)} requests · vLLM {run.meta.vllm_version} · {gpus} "
            f"{'GPU' if gpus == 1 else 'GPUs'} · {int(result.preemptions.sum())} preemptions "
            "in the simulation"
        ),
        verdict=verdict(prediction),
        sections=[
            Section("Latencies", [_errors(prediction), *_figures(prediction, recorded, simulated)]),
            Section("Step times", _steps(prediction), prediction.beyond or ""),
            Section(
                "What the operators do not hold",
                [provenance({c.name: f"{c.value:.6g} {c.unit} · {c.source}" for c in constants})],
                "Figures from documents, the same for every run; the skew is the profile's own.",
            ),
            Section("Memory", [_memory(prediction)], memory_line(prediction) + "."),
            Section("Where this comes from", [provenance(origin)]),
        ],
        profile_kind="measured",
    )


def _cells(row: Row) -> list[str]:
    scale, unit = (1e3, "ms") if row.kind == "tpot_s" else (1.0, "s")
    return [
        KINDS[row.kind][0] if row.statistic == "mean" else "",
        row.statistic,
        f"{scale * row.recorded_s:,.2f} {unit}",
        f"{scale * row.simulated_s:,.2f} {unit}",
        signed(row.error),
        signed(row.llmservingsim_error),
    ]


def _errors(prediction: Prediction) -> Markup:
    rows: list[list[Value | str]] = []
    for row in prediction.rows:
        kind, statistic, recorded, simulated, error, theirs = _cells(row)
        aim = "" if row.aim is None else f"aim ±{100 * row.aim:g} %"
        rows.append([kind, statistic, recorded, simulated, Value(error, aim, row.missed), theirs])
    return table(
        ["", "", "recorded", "simulated", "error", "LLMServingSim's error"],
        rows,
        "Latencies from arrival; an error beyond its aim is marked. LLMServingSim counts from the "
        "moment a request was queued, a little later.",
    )


def _figures(prediction: Prediction, recorded: Latencies, simulated: Latencies) -> list[Markup]:
    return [
        figure(
            plots.distributions(recorded, simulated),
            "Share of the requests under each latency.",
            "Cumulative distributions of the three latencies, recorded and simulated",
        ),
        figure(
            plots.by_arrival(prediction, recorded, simulated),
            "Each request by the time of its arrival.",
            "Time to the first and last token of each request, recorded and simulated",
        ),
        figure(
            plots.load(prediction),
            "How many requests run and wait.",
            "Requests running and waiting over time, recorded and simulated",
        ),
    ]


def _steps(prediction: Prediction) -> list[Markup]:
    played = prediction.replay
    entries = {
        "per pair of tokens in a prompt": f"{1e9 * played.step_time.pair_s:.4g} ns",
        "per KV token that decodes read": f"{1e9 * played.step_time.kv_token_s:.4g} ns",
        "steps with a prompt, beyond these": (
            f"{1e3 * played.prompt_excess_s:.2f} ms on average, after {played.rounds} replays "
            f"(the steps of the last one would be given {signed(played.change)})"
        ),
    }
    return [
        figure(
            plots.step_times(prediction),
            "A step by its tokens, from the measured operators: without what attention takes for "
            "each pair and each KV token.",
            "Milliseconds of a step by its tokens",
        ),
        provenance(entries),
    ]


def _memory(prediction: Prediction) -> Markup:
    blocks = prediction.capacity
    parts = {
        "memory of a GPU": blocks.memory_bytes,
        "weights on it": blocks.weight_bytes,
        "activations of the largest step": blocks.activation_bytes,
        "KV cache": blocks.blocks * blocks.kv_block_bytes,
    }
    return table(
        ["", "GiB"],
        [[name, "not known" if b is None else f"{b / GIB:.2f}"] for name, b in parts.items()],
        f"{prediction.run.meta.engine_kwargs.gpu_memory_utilization:.0%} of the memory are for "
        "the engine.",
    )
