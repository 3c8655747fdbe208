"""From samples to a bundle: medians per shape, the fit and its errors on held-out shapes."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from jaxtyping import Bool, Float64
from pydantic import BaseModel, Field

from calibrate import fit
from calibrate.fit import COEFFICIENTS, Errors, StepTable
from calibrate.samples import Sample, median_interval, name
from calibrate.shapes import Shape
from sim.config import ConfigError, Spec, check
from sim.profile import Bundle, StepTime

OUTLIER = 5.0  # median absolute deviations from the median
REPLICATES = 32  # fits to other draws that a bundle carries
DRAWS = 200  # for the intervals of the coefficients
TABLE = "steps.csv"  # a row for each shape
SAMPLES = "samples.parquet"  # a row for each timed step
FIT = "fit.json"
CONFIG = "config.json"  # of the model


class FitRecord(Spec):
    """What a bundle says of one model's fit."""

    errors: dict[str, Errors]  # by kind of model, on held-out shapes
    parts: dict[str, Errors]  # of rule 12, by kind of step
    intervals: dict[str, tuple[float, float]]  # 95 %, of each coefficient
    mean_over_median: float  # of a shape's samples, the middle shape: how skewed they are
    host_s: float  # between computations: the middle shape's preparation and update
    samples: int = Field(ge=1)
    outliers: int  # samples far from their median; they count as any other


@dataclass(frozen=True, eq=False)
class Measured:
    """What was timed of one model: its shapes, and the samples of each."""

    shapes: Sequence[Shape]
    samples: Mapping[str, Sequence[Sample]]

    def of(self, shape: Shape) -> Sequence[Sample]:
        """A shape's samples."""
        return self.samples[name(shape)]


def step_table(measured: Measured) -> StepTable:
    """A row for each shape, with the median of its samples."""
    groups: dict[Shape, int] = {}
    rows = []
    for shape in measured.shapes:
        plain = Shape(shape.contexts, shape.chunks)
        count = shape.counts
        rows.append(
            (
                count.sequences, count.prompt_tokens, count.tokens, count.pairs, count.kv_tokens,
                count.done_tokens, shape.switched, np.median(_seconds(measured.of(shape))),
                groups.setdefault(plain, len(groups)),
            )
        )  # fmt: skip
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    return StepTable(*columns)


def fit_record(measured: Measured, table: StepTable, seed: int) -> tuple[FitRecord, np.ndarray]:
    """How the fit fares, and its relative error on each shape while that was held out."""
    errors = fit.held_out(table, fit.MODELS, seed)
    own = errors[fit.MODEL]
    drawn = fit.bootstrap(table, DRAWS, seed)
    values = {c: np.array([getattr(draw, c) for draw in drawn]) for c in COEFFICIENTS}
    each = [_seconds(measured.of(shape)) for shape in measured.shapes]
    outliers = sum(int(far(seconds).sum()) for seconds in each)
    host = [
        np.median([sample.prepare_s + sample.update_s for sample in measured.of(shape)])
        for shape in measured.shapes
    ]
    record = FitRecord(
        errors={kind: fit.summary(error) for kind, error in errors.items()},
        parts={part: fit.summary(own[rows]) for part, rows in parts(table).items() if rows.any()},
        intervals={
            c: (float(np.percentile(v, 2.5)), float(np.percentile(v, 97.5)))
            for c, v in values.items()
        },
        mean_over_median=float(np.median([s.mean() / np.median(s) for s in each])),
        host_s=float(np.median(host)),
        samples=sum(map(len, each)),
        outliers=outliers,
    )
    return record, own


def parts(table: StepTable) -> dict[str, Bool[np.ndarray, " S"]]:
    """The rows of each kind of step; one after other models' steps is of another kind as well."""
    prompts = table.prompt_tokens > 0
    mixed = prompts & (table.kv_tokens > 0)
    return {"decodes alone": ~prompts, "prompts alone": prompts & ~mixed, "mixed": mixed,
            "after other models": table.switched}  # fmt: skip


def replicates(table: StepTable, seed: int) -> tuple[StepTime, ...]:
    """The fits to other draws that training may practise on."""
    return fit.bootstrap(table, REPLICATES, seed)


def tidy(measured: Measured, table: StepTable, held_out: np.ndarray) -> bytes:
    """The table of shapes, as CSV: counts, median with its 95 % interval, spread, samples."""
    rows = []
    for i, shape in enumerate(measured.shapes):
        samples = measured.of(shape)
        seconds = _seconds(samples)
        low, high = median_interval(seconds)
        device = [s.device_s for s in samples if s.device_s is not None]
        rows.append(
            {
                "shape": int(table.group[i]),
                "switched": shape.switched,
                **asdict(shape.counts),
                "step_s": float(table.step_s[i]),
                "low_s": low,
                "high_s": high,
                "lower_quartile_s": float(np.percentile(seconds, 25)),
                "upper_quartile_s": float(np.percentile(seconds, 75)),
                "least_s": float(seconds.min()),
                "most_s": float(seconds.max()),
                "mean_s": float(seconds.mean()),
                "samples": len(seconds),
                "outliers": int(far(seconds).sum()),
                "host_s": float(np.median([s.prepare_s + s.update_s for s in samples])),
                "device_s": float(np.median(device)) if device else None,
                "held_out_error": float(held_out[i]),
            }
        )
    sink = io.BytesIO()
    pyarrow.csv.write_csv(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def all_samples(measured: Measured, table: StepTable) -> bytes:
    """Every sample, outliers too, with what its step held, as Parquet."""
    rows = [
        {
            "shape": int(table.group[i]),
            "contexts": list(shape.contexts),
            "chunk_done": [done for done, _ in shape.chunks],
            "chunk_tokens": [tokens for _, tokens in shape.chunks],
            "switched": shape.switched,
            **asdict(sample),
        }
        for i, shape in enumerate(measured.shapes)
        for sample in measured.of(shape)
    ]
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
    return sink.getvalue()


def read_table(bundle: Bundle, model: str) -> pa.Table:
    """The table of shapes of a measured bundle's model.

    Raises:
        ConfigError: if the bundle has none.
    """
    return pyarrow.csv.read_csv(io.BytesIO(_attachment(bundle, f"{model}/{TABLE}")))


def read_samples(bundle: Bundle, model: str) -> pa.Table:
    """Every sample of a measured bundle's model.

    Raises:
        ConfigError: if the bundle has none.
    """
    return pyarrow.parquet.read_table(io.BytesIO(_attachment(bundle, f"{model}/{SAMPLES}")))


def read_step_table(bundle: Bundle, model: str) -> StepTable:
    """The timed shapes of a measured bundle's model.

    Raises:
        ConfigError: if the bundle has none.
    """
    table = read_table(bundle, model)
    names = ("sequences", "prompt_tokens", "tokens", "pairs", "kv_tokens", "done_tokens",
             "switched", "step_s", "shape")  # fmt: skip
    return StepTable(*(table[name].to_numpy() for name in names))


def read_fit(bundle: Bundle, model: str) -> FitRecord:
    """What a measured bundle says of a model's fit.

    Raises:
        ConfigError: if the bundle has none, or not of this form.
    """
    key = f"{model}/{FIT}"
    data = _attachment(bundle, key)
    return check(FitRecord, json.loads(data), key)


def far(seconds: Float64[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Which samples of one shape are outliers."""
    middle = np.median(seconds)
    return np.asarray(np.abs(seconds - middle) > OUTLIER * np.median(np.abs(seconds - middle)))


def json_bytes(document: BaseModel) -> bytes:
    """A document as a file's content."""
    return (document.model_dump_json(indent=2) + "\n").encode()


def _attachment(bundle: Bundle, key: str) -> bytes:
    if key not in bundle.attachments:
        raise ConfigError("profile", bundle.meta.device, f"has no {key}: it was not measured here")
    return bundle.attachments[key]


def _seconds(samples: Sequence[Sample]) -> np.ndarray:
    return np.array([sample.step_s for sample in samples])
