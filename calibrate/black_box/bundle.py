"""From a sweep to a bundle: the fit, its errors on held-out cells, and what was measured."""

import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from jaxtyping import Float64
from pydantic import Field
from rich.table import Table

from calibrate import fit
from calibrate.black_box.estimate import Estimate, bootstrap, estimate, held_out
from calibrate.black_box.prediction import deploy, latencies, predict
from calibrate.black_box.spec import BlackBoxSpec
from calibrate.black_box.steps import Seen, step_table
from calibrate.black_box.sweep import Played
from calibrate.fit import COEFFICIENTS, Errors
from calibrate.quality_source import QualitySource, assigned_quality, source_line
from sim.config import ConfigError, Spec, check
from sim.profile import SCHEMA_VERSION, Bundle, BundleMeta, ModelProfile

UNLIKE = 0.2  # of the steps; if more have too many prompt tokens, the token budget is another
DRAWS = 200  # for the intervals of the coefficients
REPLICATES = 32  # of them that the bundle carries
USABLE = 0.9  # of a device's memory that weights and KV cache may take: conf/cluster's default
CELLS = "cells.csv"  # a row for each statistic of each cell
STEPS = "steps.parquet"  # a row for each step that was found
REQUESTS = "requests.parquet"  # a row for each request, with the times of its tokens
FIT = "fit.json"


class BlackBoxRun(Spec):
    """What the command is asked for, where it is given a URL."""

    url: str
    out: str = Field(min_length=1)
    resume: bool
    seed: int
    quality: QualitySource
    black_box: BlackBoxSpec


class BlackBoxFit(Spec):
    """What a bundle says of a fit from outside."""

    latencies: dict[str, Errors]  # of held-out cells, each simulated: by latency and statistic
    steps: Errors  # of held-out cells' steps
    intervals: dict[str, tuple[float, float]]  # 95 %, of each coefficient
    overhead_s: float  # of a request's way to the server and its first token's way back
    overhead_interval: tuple[float, float]  # 95 %
    cells: int
    requests: int
    steps_seen: int
    steps_unlike: int  # with more prompt tokens than the token budget
    steps_unclear: int  # whose begin, or whose prompts, cannot be told


@dataclass(frozen=True)
class CellRow:
    """One statistic of a latency of a cell that was held out."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int
    requests: int
    latency: str
    statistic: str
    measured_s: float
    predicted_s: float
    error: float  # predicted / measured − 1


@dataclass(frozen=True, eq=False)
class Found:
    """The sweep of a server's model, and the steps of its cells."""

    name: str  # of the model, in the bundle
    max_context: int
    played: tuple[Played, ...]
    seen: tuple[Seen, ...]


def make_bundle(spec: BlackBoxRun, found: Found, command: str) -> Bundle:
    """Fit, play held-out cells in the simulator, and put together.

    Raises:
        ConfigError: if the server's steps are not those of the settings.
    """
    budget = spec.black_box.server.token_budget
    _refuse_unlike(spec.black_box, found.seen)
    fitted = estimate(found.seen, budget)
    drawn = bootstrap(found.seen, budget, DRAWS, spec.seed)
    profile = ModelProfile(
        weights_bytes=1,
        kv_bytes_per_token=1,
        max_context=found.max_context,
        step_time=fitted.step_time,
        envelope=fit.envelope(step_table(found.seen)),
        replicates=tuple(each.step_time for each in drawn[:REPLICATES]),
    )
    bundle = Bundle(
        meta=_meta(spec, found, command),
        models={found.name: profile},
        quality=assigned_quality(spec.quality, (found.name,)),
    )
    rows, step_errors = _hold_out(spec, found, bundle)
    kinds: dict[str, list[float]] = {}
    for row in rows:
        kinds.setdefault(f"{row.latency}, {row.statistic}", []).append(row.error)
    values = {c: [getattr(each.step_time, c) for each in drawn] for c in COEFFICIENTS}
    record = BlackBoxFit(
        latencies={kind: fit.summary(np.array(errors)) for kind, errors in kinds.items()},
        steps=fit.summary(step_errors),
        intervals={name: _interval(of_name) for name, of_name in values.items()},
        overhead_s=fitted.overhead_s,
        overhead_interval=_interval([each.overhead_s for each in drawn]),
        cells=len(found.played),
        requests=sum(len(each.answers) for each in found.played),
        steps_seen=sum(len(each.steps) for each in found.seen),
        steps_unlike=sum(each.unlike for each in found.seen),
        steps_unclear=sum(each.unclear for each in found.seen),
    )
    return bundle.attached(
        {
            f"{found.name}/{FIT}": (record.model_dump_json(indent=2) + "\n").encode(),
            f"{found.name}/{CELLS}": _csv([asdict(row) for row in rows]),
            f"{found.name}/{STEPS}": _parquet(_step_rows(found)),
            f"{found.name}/{REQUESTS}": _parquet(_request_rows(found.played)),
        }
    )


def read_fit(bundle: Bundle) -> BlackBoxFit:
    """What a bundle says of its fit from outside.

    Raises:
        ConfigError: if it was not made so.
    """
    (model, *_) = bundle.meta.models
    data = bundle.attachments.get(f"{model}/{FIT}")
    if bundle.meta.kind != "black-box" or data is None:
        raise ConfigError("profile", bundle.meta.device, "was not calibrated from outside")
    return check(BlackBoxFit, json.loads(data), f"{model}/{FIT}")


def error_table(bundle: Bundle) -> Table:
    """How wrong the bundle is on held-out cells."""
    record = read_fit(bundle)
    low, high = record.overhead_interval
    table = Table(
        title=f"{bundle.meta.models[0]}: cells held out, simulated", title_justify="left",
        caption=f"{record.requests} requests, {record.steps_seen} steps; {record.steps_unlike} "
        f"beyond the token budget, {record.steps_unclear} not clear. To the server and back "
        f"{1e3 * record.overhead_s:.2f} ms ({1e3 * low:.2f} to {1e3 * high:.2f}), in no step.",
        caption_justify="left",
    )  # fmt: skip
    for column in ("error of", "median", "95th percentile", "bias", "number"):
        table.add_column(column, justify="left" if column == "error of" else "right")
    for kind, errors in {**record.latencies, "a step": record.steps}.items():
        table.add_row(
            kind, f"{errors.median:.1%}", f"{errors.p95:.1%}", f"{errors.bias:+.1%}",
            str(errors.shapes),
        )  # fmt: skip
    return table


def _refuse_unlike(spec: BlackBoxSpec, seen: Sequence[Seen]) -> None:
    """Refuse a sweep whose steps held more prompt tokens than the settings say they can."""
    unlike = sum(each.unlike for each in seen)
    prompts = unlike + sum(step.chunks > 0 for each in seen for step in each.steps)
    if unlike > UNLIKE * prompts:
        raise ConfigError(
            "black_box.server.token_budget", spec.server.token_budget,
            f"{unlike} of {prompts} steps with prompts computed more: must be the server's own, "
            "and most of black_box.prompt_tokens below it",
        )  # fmt: skip


def _hold_out(
    spec: BlackBoxRun, found: Found, bundle: Bundle
) -> tuple[list[CellRow], Float64[np.ndarray, " E"]]:
    """Every cell by the fit to others: its latencies, and the relative errors of its steps."""
    rows: list[CellRow] = []
    step_errors = []
    own, profile = spec.black_box, bundle.models[found.name]

    def use(number: int, fitted: Estimate) -> None:
        played = found.played[number]
        blind = profile.model_copy(update={"step_time": fitted.step_time, "replicates": ()})
        as_fitted = replace(bundle, models={found.name: blind})
        cluster = deploy(as_fitted, own.server, own.scheduler, fitted.overhead_s)
        simulated = latencies(predict(cluster, played))
        for (latency, statistic, measured_s), (_, _, predicted_s) in zip(
            latencies(played.answers), simulated, strict=True
        ):
            rows.append(
                CellRow(
                    **asdict(played.cell), requests=len(played.answers), latency=latency,
                    statistic=statistic, measured_s=measured_s, predicted_s=predicted_s,
                    error=predicted_s / measured_s - 1,
                )
            )  # fmt: skip
        table = step_table([found.seen[number]])
        whole = fitted.step_time.model_copy(update={"switch_s": fitted.overhead_s})
        step_errors.append(fit.predict(whole, table) / table.step_s - 1)

    held_out(found.seen, own.server.token_budget, spec.seed, use)
    return rows, np.concatenate(step_errors)


def _meta(spec: BlackBoxRun, found: Found, command: str) -> BundleMeta:
    """Bytes are not seen from outside: the memory is such that the KV cache is the server's."""
    server = spec.black_box.server
    capacity = server.kv_tokens or server.max_batch * found.max_context
    known = "as the settings say" if server.kv_tokens else "not known: enough for a full batch"
    return BundleMeta(
        schema_version=SCHEMA_VERSION,
        kind="black-box",
        device=urlsplit(spec.url).netloc,
        memory_bytes=math.ceil((capacity + 1) / USABLE),
        dtype="unknown",
        command=command,
        created=datetime.now(UTC).date().isoformat(),
        sources=(
            "timed from outside by calibrate.run: steps and fit are of the server as a whole",
            f"memory: counted in KV tokens instead of bytes; KV capacity {known}",
            source_line(spec.quality, (found.name,)),
        ),
        models=(found.name,),
        environment={
            "client": f"aiohttp {version('aiohttp')}, Python {platform.python_version()}",
            "system": f"{platform.system()} {platform.release()}",
        },
        settings={"black_box": spec.black_box.model_dump(mode="json"), "seed": spec.seed},
    )


def _interval(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _step_rows(found: Found) -> list[dict[str, object]]:
    return [
        {**asdict(played.cell), **asdict(step)}
        for played, seen in zip(found.played, found.seen, strict=True)
        for step in seen.steps
    ]


def _request_rows(played: Sequence[Played]) -> list[dict[str, object]]:
    return [
        {
            **{f"cell_{name}": value for name, value in asdict(each.cell).items()},
            "prompt_tokens": answer.prompt_tokens,
            "sent_s": answer.sent_s,
            "token_s": list(answer.token_s),
        }
        for each in played
        for answer in each.answers
    ]


def _csv(rows: Sequence[Mapping[str, object]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.csv.write_csv(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


def _parquet(rows: Sequence[Mapping[str, object]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows)), sink, compression="zstd")
    return sink.getvalue()
