"""The reports of a calibration and of its validation, on measurements made up here."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from tests.calibrate import tiny  # noqa: F401  # skips where there is no engine

# isort: split
from calibrate import bundle as files
from calibrate.bundle import FitRecord, Measured
from calibrate.fit import COEFFICIENTS, MODEL, Errors, envelope
from calibrate.loopback import Played, Requests, Times
from calibrate.record import Record
from calibrate.report import write_report
from calibrate.samples import Sample, name
from calibrate.shapes import Shape
from calibrate.sharing import Sharing
from calibrate.step import Piece, Step
from calibrate.validation import Aims, LoopbackRun, Validation
from calibrate.validation_report import document, tables, verdict
from calibrate.validation_report import write_report as write_validation
from sim.config import ConfigError
from sim.profile import Bundle, BundleMeta, ModelProfile, StepTime, step_seconds

STEP_TIME = StepTime(
    host_s=1.25e-3, tokens_s=((0, 0.0), (64, 6.4e-3)), pair_s=3e-9, kv_token_s=4.5e-8,
    sequence_s=2e-5, prompt_s=3.5e-4, done_token_s=6e-7, switch_s=0.0,
)  # fmt: skip
ERRORS = {
    MODEL: Errors(median=0.0213, p95=0.0871, bias=-0.0064, shapes=20),
    "interpolation": Errors(median=0.0187, p95=0.1402, bias=0.0031, shapes=20),
}
PARTS = {"decodes alone": Errors(median=0.0112, p95=0.0333, bias=0.0021, shapes=12)}
SHAPES = (
    *(Shape(contexts=(c,) * b) for c in (16, 64) for b in (1, 2, 4, 8)),
    *(Shape(chunks=((0, p),)) for p in (4, 16, 64)),
    Shape(contexts=(20, 30), chunks=((0, 8),)),
)
SAMPLES, SLOW = 8, 3.0  # of each shape; the last one of the first shape takes so many times longer
ORIGIN = {"command": "python -m calibrate.validate_bundle profile=here"}


def seconds(shape: Shape) -> float:
    count = shape.counts
    return step_seconds(
        STEP_TIME, count.tokens, count.sequences, count.pairs, count.kv_tokens, count.done_tokens
    )


def samples(shape: Shape, temperature_c: float | None) -> list[Sample]:
    factors = 1 + 0.001 * np.arange(SAMPLES)
    if shape == SHAPES[0]:
        factors[-1] = SLOW
    return [
        Sample(
            round=i // 2, prepare_s=0.1 * seconds(shape) * factor,
            compute_s=0.8 * seconds(shape) * factor, update_s=0.1 * seconds(shape) * factor,
            device_s=temperature_c and 0.5 * seconds(shape), clock_mhz=None,
            temperature_c=temperature_c,
        )
        for i, factor in enumerate(factors.tolist())
    ]  # fmt: skip


def measured_bundle(model: str = "tiny", temperature_c: float | None = None) -> Bundle:
    measured = Measured(SHAPES, {name(s): samples(s, temperature_c) for s in SHAPES})
    table = files.step_table(measured)
    record = FitRecord(
        errors=ERRORS, parts=PARTS, mean_over_median=1.03, host_s=4.2e-4,
        intervals={c: (getattr(STEP_TIME, c) / 2, getattr(STEP_TIME, c) * 2) for c in COEFFICIENTS},
        samples=SAMPLES * len(SHAPES), outliers=1,
    )  # fmt: skip
    profile = ModelProfile(
        weights_bytes=10**7, kv_bytes_per_token=4096, max_context=1024, step_time=STEP_TIME,
        envelope=envelope(table), replicates=(STEP_TIME,),
    )  # fmt: skip
    meta = BundleMeta(
        schema_version=1, kind="measured", device="A Device", memory_bytes=2**34, dtype="float32",
        command="python -m calibrate.run", created="2026-11-21", sources=("timed here",),
        models=(model,), environment={"torch": "2.13.0"},
        settings={
            "engine": {"max_batch": 8, "kv_tokens": {model: 8192}},
            "load_s": {model: 0.25},
            "peak_memory_bytes": 3 * 2**30,
        },
        peaks={"flops_per_s": {"float32": 5e10}, "bandwidth_bytes_per_s": 2e10, "source": "timed"},
    )  # fmt: skip
    errors = np.linspace(-0.05, 0.05, len(SHAPES))
    return Bundle(meta=meta, models={model: profile}, quality={}).attached(
        {
            f"{model}/{files.TABLE}": files.tidy(measured, table, errors),
            f"{model}/{files.SAMPLES}": files.all_samples(measured, table),
            f"{model}/{files.FIT}": files.json_bytes(record),
        }
    )


def times(stretch: float) -> Times:
    arrival = np.arange(20) * 0.1
    first = arrival + stretch * np.linspace(0.01, 0.03, 20)
    tokens = np.full(20, 11, np.int32)
    return Times(arrival, first, first + stretch * 10 * 0.005, tokens)


def played(stretch: float) -> Played:
    """A real run of two steps; each takes `stretch` of what the bundle says of it."""
    decode = Step(
        pieces=(Piece("0", 16, 1, decode=True),), emitted=(), finished=(), begin_s=1.0,
        prepared_s=1.0, computed_s=1.0, end_s=1 + stretch * seconds(SHAPES[0]), device_s=None,
    )  # fmt: skip
    prompt = replace(
        decode,
        pieces=(Piece("1", 0, 64, decode=False),),
        end_s=1 + stretch * seconds(Shape(chunks=((0, 64),))),
    )
    return Played(times(stretch), ((0, decode), (0, prompt)), ((0,), (1,)), np.zeros(20))


def validation(stretch: float, median: float = 0.01, sharing: bool = True) -> Validation:
    """Real runs take `stretch` of the simulated times, and a hundredth more or less."""
    requests = Requests(
        np.arange(20) * 0.1, np.full(20, 5, np.int32), np.full(20, 11, np.int32),
        np.zeros(20, np.int32),
    )  # fmt: skip
    run = LoopbackRun(
        load=0.5, rate_rps=12.5, requests=requests, simulated=times(1.0),
        played=tuple(played(stretch * f) for f in (0.99, 1.0, 1.01)),
        slowness=tuple({"tiny": stretch * f} for f in (0.99, 1.0, 1.01)),
        at_speed=tuple(times(stretch * f * 1.002) for f in (0.99, 1.0, 1.01)),
        unlike_steps=0, steps=6,
        simulated_busy_s=1.5,
    )  # fmt: skip
    shared = Sharing(
        alone_s={"tiny": 2e-3}, turns_s={"tiny": 2.5e-3}, free_s={"tiny": 7e-3},
        turns_steps_per_s=400.0, free_steps_per_s=150.0,
    )  # fmt: skip
    return Validation(
        bundle=measured_bundle(), aims=Aims(median=0.02, p95=0.08, latency=0.05),
        fresh={"tiny": Errors(median=median, p95=0.0456, bias=-0.0034, shapes=40)}, runs=(run,),
        sharing=shared if sharing else None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, measured_bundle(temperature_c=47.0))
    return path.read_text("utf-8")


@pytest.fixture(scope="module")
def validation_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("validation") / "report.html"
    write_validation(path, validation(1.25, median=0.03), ORIGIN)
    return path.read_text("utf-8")


def row(page: str, title: str) -> list[str]:
    """The cells of the first table row of this title."""
    found = re.search(rf"<th scope=row>{re.escape(title)}</th>(.*?)</tr>", page, re.DOTALL)
    assert found, title
    return [re.sub("<[^>]*>", " ", cell).strip() for cell in found[1].split("</td>")[:-1]]


def shown(found: Validation) -> str:
    console = Console(width=120, file=io.StringIO(), record=True)
    for table in tables(found):
        console.print(table)
    return console.export_text()


def test_the_report_has_the_errors_of_the_fit_and_of_its_alternatives(page):
    assert row(page, MODEL) == ["2.1 %", "8.7 %", "−0.6 %", "20"]
    assert row(page, "interpolation") == ["1.9 %", "14.0 %", "+0.3 %", "20"]
    assert row(page, "decodes alone") == ["1.1 %", "3.3 %", "+0.2 %", "12"]


def test_the_report_says_where_an_alternative_is_closer(page):
    assert "For tiny “interpolation” is closer: 1.9 %." in page


def test_the_report_has_the_coefficients_with_unit_and_interval(page):
    assert row(page, "each step") == ["host_s", "1.25 ms", "625.00 µs to 2.50 ms"]
    assert row(page, "each pair of tokens in a prompt")[1] == "3.00 ns"


def test_a_coefficient_of_which_nothing_was_measured_is_called_so(page):
    assert row(page, "a step after another model&#39;s") == ["switch_s", "not measured", ""]
    assert row(page, "each token of a prompt computed before")[1] == "not measured"


def test_the_model_is_drawn_for_the_contexts_and_prompts_that_were_measured(page):
    assert "tokens in the cache, each" in page
    for legend in ("16", "64", "1 prompt"):
        assert re.search(rf"<text[^>]*>{legend}</text>", page), legend


def test_the_report_says_what_was_measured_and_what_is_covered(page):
    cells = row(page, "tiny")
    assert cells[:6] == ["10.00 MB", "8,192", "4.10 kB", "250.00 ms", "12", "96"]
    assert cells[6].split() == ["1", "1.0", "%"]
    assert "1 to 64" in page
    assert "50.00 GFLOP/s" in page
    assert "2.13.0" in page
    assert "3.0 GiB at the most" in page


def test_both_reports_are_one_file_with_their_figures(page, validation_page):
    for text, figures in ((page, 4), (validation_page, 3)):
        assert text.count("<figure><svg") == figures
        outside = re.findall(r"""(?:src|href)=["']?(?!#|data:)[^"' >]+""", text)
        assert not outside
        assert not re.search(r"<script|<link|@import|url\((?!#)", text)


def test_what_the_device_says_of_itself_is_drawn_where_it_says_it(page, tmp_path):
    write_report(tmp_path / "report.html", measured_bundle())
    silent = (tmp_path / "report.html").read_text("utf-8")
    for title in ("temperature, °C", "all that the device did not compute in"):
        assert title in page
        assert title not in silent
    assert "clock, MHz" not in page


def test_every_sample_is_kept_and_an_outlier_is_marked(page):
    found = Record.read(measured_bundle(), "tiny").samples
    assert len(found.relative) == SAMPLES * len(SHAPES)
    assert found.relative[found.outlier] == pytest.approx(SLOW, rel=0.01)
    assert found.outlier.sum() == 1
    assert np.median(found.relative) == pytest.approx(1, rel=0.01)
    assert "outliers: 1" in page
    assert "samples: 95" in page


def test_a_bundle_without_measurements_has_no_report(tmp_path):
    bundle = replace(measured_bundle(), attachments={})
    with pytest.raises(ConfigError, match=r"has no tiny/steps.csv: it was not measured"):
        write_report(tmp_path / "report.html", bundle)


def test_the_tables_have_the_latencies_simulated_and_real():
    text = shown(validation(1.25))
    assert re.search(r"tiny +│ +1.0 % │ +4.6 % │ +−0.3 % │ +40", text)
    assert re.search(r"time per output token │ mean │ +5.00 ms │ +6.25 ms │ −20.0 % │ +1.0 %", text)
    assert re.search(r"2.00 ms │ +2.50 ms │ 7.00 ms │ +\+25.0 % │ +\+0.0 %", text)
    assert "Load 0.5, 12.5 requests/s" in text
    assert "0 of 6 real steps" in text


@pytest.mark.parametrize(("stretch", "n_marked"), [(1.25, 6), (1.0, 0)])
def test_latencies_beyond_their_aim_are_marked_in_the_terminal(stretch, n_marked):
    latencies = tables(validation(stretch))[1]
    assert sum(each.style == "bold red" for each in latencies.rows) == n_marked


def test_the_verdict_says_whether_every_aim_is_met():
    assert verdict(validation(1.0)).endswith("Every aim is met.")
    missed = verdict(validation(1.25, median=0.03))
    assert "off by −20.0 % (time to first token)" in missed
    assert "Beyond the aims: tiny: median of fresh steps 3.0% > 2%" in missed


def test_the_document_is_json_and_says_which_aims_were_missed():
    found = validation(1.25, median=0.03)
    kept = json.loads(json.dumps(document(found, ORIGIN), allow_nan=False))
    assert kept["provenance"] == ORIGIN
    assert kept["missed"] == list(found.missed)
    assert len(kept["missed"]) == 7
    assert kept["fresh"]["tiny"]["p95"] == 0.0456
    (load,) = kept["loads"]
    for key, value in {"load": 0.5, "rate_rps": 12.5, "steps_unlike": 0, "steps": 6}.items():
        assert load[key] == value
    assert load["busy_s"]["simulated"] == 1.5
    assert load["busy_s"]["real"][1] == pytest.approx(found.runs[0].played[1].busy_s)
    assert load["step_time_errors"]["bias"] == pytest.approx(-0.2, abs=0.001)
    latencies = {(each["kind"], each["statistic"]): each for each in load["latencies"]}
    median = latencies["end-to-end latency", "P50"]
    assert median["error"] == pytest.approx(-0.2)
    assert median["spread"] == pytest.approx(0.01)
    assert median["error_at_speed"] == pytest.approx(0.002, rel=0.01)
    assert (median["held_to_the_aim"], median["within"]) == (True, False)
    assert kept["sharing"]["slower_in_turns"]["tiny"] == pytest.approx(0.25)


def test_one_model_shares_with_nobody():
    alone = validation(1.0, sharing=False)
    assert document(alone, ORIGIN)["sharing"] is None
    assert "Sharing" not in shown(alone)


def test_the_validations_page_marks_what_missed_its_aim(validation_page):
    assert validation_page.count("<td class=mark>") == 7
    assert "tiny: median of fresh steps 3.0% &gt; 2%" in validation_page
    assert row(validation_page, "tiny") == ["3.0 % aim 2.0 %", "4.6 % aim 8.0 %", "−0.3 %", "40"]
