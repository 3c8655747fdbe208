import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest

from sim.config import ConfigError, check
from sim.traces import TraceError, TraceSource, read

AZURE_2023 = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:51.6805900,5,1
"""
AZURE_2024 = """TIMESTAMP,ContextTokens,GeneratedTokens
2024-05-10 00:00:00.009930+00:00,2162,5
2024-05-10 00:00:02+00:00,10,6
"""
BURST_SIX = """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,GPT-4,1087,230,1317,API log
"""
BURST_EIGHT = """\
Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
19440110.0,1722ac82,43,GPT-4,472,18,490,Conversation log
19440150.0,,2,ChatGPT,1087,230,1317,API log
"""
MOONCAKE = """{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}
{"timestamp": 3500, "input_length": 7322, "output_length": 490, "hash_ids": [0, 14]}
"""
FUNCTIONS_2021 = """app,func,end_timestamp,duration
a,f,10.5,0.5
a,g,11.0,7.0
b,f,14.0,0.0
"""
RNG = np.random.default_rng


@pytest.fixture
def record(tmp_path):
    """Read a hand-written file."""

    def read_text(text, trace_format, seed=0, **settings):
        path = tmp_path / "record"
        path.write_text(text)
        source = TraceSource(path=str(path), format=trace_format, **settings)
        return read(source, RNG(seed))

    return read_text


def functions_2019(**counts):
    """A day of per-minute counts: function name to {minute: count}."""
    lines = ["HashOwner,HashApp,HashFunction,Trigger," + ",".join(map(str, range(1, 1441)))]
    for function, minutes in counts.items():
        row = [str(minutes.get(minute, 0)) for minute in range(1, 1441)]
        lines.append(f"o,a,{function},http," + ",".join(row))
    return "\n".join(lines) + "\n"


def test_azure_llm_2023_is_read(record):
    recorded = record(AZURE_2023, "azure_llm")
    assert recorded.arrival_s == pytest.approx([0, 4.314579, 5.0], abs=1e-6)
    assert recorded.prompt_tokens.tolist() == [374, 396, 5]
    assert recorded.output_tokens.tolist() == [44, 109, 1]
    assert recorded.counts == {"rows": 3, "bad_rows": 0, "out_of_order": 0, "outside_window": 0}


def test_azure_llm_2024_with_and_without_fraction_is_read(record):
    recorded = record(AZURE_2024, "azure_llm")
    assert recorded.arrival_s == pytest.approx([0, 1.99007], abs=1e-6)


@pytest.mark.parametrize("text", [BURST_SIX, BURST_EIGHT], ids=["six columns", "eight columns"])
def test_burstgpt_is_read(record, text):
    recorded = record(text, "burstgpt")
    assert recorded.arrival_s.tolist() == [0, 40]
    assert recorded.prompt_tokens.tolist() == [472, 1087]
    assert recorded.output_tokens.tolist() == [18, 230]


def test_mooncake_is_read(record):
    recorded = record(MOONCAKE, "mooncake")
    assert recorded.arrival_s.tolist() == [0, 3.5]
    assert recorded.prompt_tokens.tolist() == [6758, 7322]
    assert recorded.output_tokens.tolist() == [500, 490]


def test_functions_2021_arrive_at_end_minus_duration_in_order(record):
    recorded = record(FUNCTIONS_2021, "azure_functions_2021")
    assert recorded.arrival_s.tolist() == [0, 6, 10]
    assert recorded.prompt_tokens is None
    assert recorded.output_tokens is None
    assert recorded.counts["out_of_order"] == 1


def test_functions_2021_of_one_function_are_read(record):
    recorded = record(FUNCTIONS_2021, "azure_functions_2021", function="f")
    assert recorded.arrival_s.tolist() == [0, 4]
    assert recorded.counts["rows"] == 3


@pytest.mark.parametrize("within_minute", ["uniform", "even"])
def test_functions_2019_arrive_inside_their_minutes(record, within_minute):
    text = functions_2019(f={1: 3, 1440: 2}, g={2: 4})
    recorded = record(text, "azure_functions_2019", within_minute=within_minute)
    minutes = (recorded.arrival_s // 60).astype(int)
    assert np.bincount(minutes).nonzero()[0].tolist() == [0, 1, 1439]
    assert np.bincount(minutes)[[0, 1, 1439]].tolist() == [3, 4, 2]
    assert recorded.duration_s == 86_400
    assert (np.diff(recorded.arrival_s) >= 0).all()


def test_functions_2019_evenly_spread_are_evenly_spread(record):
    text = functions_2019(f={2: 3})
    recorded = record(text, "azure_functions_2019", within_minute="even")
    assert recorded.arrival_s == pytest.approx([70, 90, 110])


def test_functions_2019_uniform_draws_depend_on_the_seed_alone(record):
    text = functions_2019(f={2: 50})
    first, again, other = (
        record(text, "azure_functions_2019", within_minute="uniform", seed=s) for s in (1, 1, 2)
    )
    assert np.array_equal(first.arrival_s, again.arrival_s)
    assert not np.array_equal(first.arrival_s, other.arrival_s)


def test_functions_2019_of_one_function_are_read(record):
    text = functions_2019(f={1: 3}, g={2: 4})
    settings = {"within_minute": "even", "function": "g"}
    assert len(record(text, "azure_functions_2019", **settings).arrival_s) == 4
    with pytest.raises(TraceError, match="function = 'h': no row has this HashFunction"):
        record(text, "azure_functions_2019", within_minute="even", function="h")


def test_a_share_of_the_counts_is_kept_before_arrivals_are_drawn(record):
    text = functions_2019(f=dict.fromkeys(range(1, 1441), 1_000_000))
    settings = {"within_minute": "even", "start_s": 600, "duration_s": 90}
    kept = record(text, "azure_functions_2019", keep=0.001, **settings)
    assert len(kept.arrival_s) == pytest.approx(1500, rel=0.1)
    with pytest.raises(TraceError, match="at most 20000000 are allowed; name one function"):
        record(text, "azure_functions_2019", within_minute="even")


def test_a_share_of_the_requests_is_kept(record):
    text = "".join(
        json.dumps({"timestamp": i, "input_length": i + 1, "output_length": 1}) + "\n"
        for i in range(4000)
    )
    recorded = record(text, "mooncake", keep=0.25)
    assert len(recorded.arrival_s) == pytest.approx(1000, rel=0.15)
    assert recorded.counts["dropped"] == 4000 - len(recorded.arrival_s)
    assert recorded.prompt_tokens == pytest.approx(recorded.arrival_s * 1000 + 1)


def test_requests_out_of_order_are_sorted_with_their_lengths_and_counted(record):
    lines = AZURE_2023.splitlines()
    recorded = record("\n".join([lines[0], lines[3], lines[1], lines[2]]), "azure_llm")
    assert recorded.prompt_tokens.tolist() == [374, 396, 5]
    assert recorded.arrival_s[0] == 0
    assert recorded.counts["out_of_order"] == 1


def test_the_record_ends_one_mean_gap_after_its_last_arrival(record):
    assert record(AZURE_2023, "azure_llm").duration_s == pytest.approx(7.5)


def test_a_window_is_cut_out_in_recorded_time_before_rescaling(record):
    recorded = record(AZURE_2023, "azure_llm", start_s=4, duration_s=2, time_scale=10)
    assert recorded.arrival_s == pytest.approx([3.14579, 10])
    assert recorded.prompt_tokens.tolist() == [396, 5]
    assert recorded.duration_s == 20
    assert recorded.counts["outside_window"] == 1


def test_a_rate_rescales_time(record):
    recorded = record(AZURE_2023, "azure_llm", rate_rps=100)
    assert recorded.duration_s == pytest.approx(0.03)
    assert recorded.arrival_s[-1] == pytest.approx(0.02)


def test_a_window_beyond_the_record_is_refused(record):
    with pytest.raises(TraceError, match=r"start_s = 4.0 to 104.0 s must lie within .* 0 to 7.5"):
        record(AZURE_2023, "azure_llm", start_s=4, duration_s=100)


def test_a_window_without_requests_is_refused(record):
    with pytest.raises(TraceError, match=r"no request in the window 1.0 to 2.0 s"):
        record(AZURE_2023, "azure_llm", start_s=1, duration_s=1)


def test_a_record_stretched_beyond_the_clock_is_refused(record):
    with pytest.raises(TraceError, match="at most 8380800 s are allowed: raise rate_rps"):
        record(AZURE_2023, "azure_llm", rate_rps=1e-7)


BROKEN = {
    "a time that is none": ("azure_llm", AZURE_2023.replace("2023-11-16 18:15:50", "yesterday"),
        r"line 3: TIMESTAMP = 'yesterday.9951690': must be a date and time, ISO 8601"),
    "zero tokens": ("azure_llm", AZURE_2023.replace(",44", ",0"),
        r"line 2: GeneratedTokens = '0': must be an integer from 1 to 1000000"),
    "a fraction of a token": ("azure_llm", AZURE_2023.replace(",396", ",39.6"),
        r"line 3: ContextTokens = '39.6': must be an integer"),
    "a row too short": ("azure_llm", AZURE_2023.replace(",396,109", ",396"),
        r"line 3: row = '2023-11-16 18:15:50.9951690,396': must be 3 values"),
    "a failed request": ("burstgpt", BURST_SIX.replace(",18,", ",0,"),
        r"line 2: Response tokens = '0': must be an integer from 1"),
    "a time not finite": ("burstgpt", BURST_SIX.replace("45,", "nan,"),
        r"line 3: Timestamp = 'nan': must be a finite number of seconds ≥ 0"),
    "a negative time": ("burstgpt", BURST_SIX.replace("45,", "-45,"),
        r"line 3: Timestamp = '-45'"),
    "no JSON": ("mooncake", MOONCAKE.replace("}\n{", "\n{"),
        r"line 1: line = .*must be JSON"),
    "no JSON object": ("mooncake", MOONCAKE + "[1]\n", r"line 3: line = \[1\]: must be a JSON obj"),
    "a missing key": ("mooncake", MOONCAKE.replace("output_length", "length"),
        r"line 1: output_length = None: must be an integer from 1"),
    "a length as text": ("mooncake", MOONCAKE.replace("7322", '"7322"'),
        r"line 2: input_length = '7322': must be an integer"),
    "a length that is true": ("mooncake", MOONCAKE.replace("7322", "true"),
        r"line 2: input_length = True: must be an integer"),
    "a time as text": ("mooncake", MOONCAKE.replace("3500", '"x"'),
        r"line 2: timestamp = 'x': must be a number of milliseconds"),
    "a negative duration": ("azure_functions_2021", FUNCTIONS_2021.replace("0.5\n", "-0.5\n"),
        r"line 2: duration = '-0.5': must be a finite number of seconds"),
    "a negative count": ("azure_functions_2019", functions_2019(f={}, g={7: -2}),
        r"line 3: minute 7 = '-2': must be a count"),
}  # fmt: skip
broken = pytest.mark.parametrize(
    ("trace_format", "text", "message"), BROKEN.values(), ids=BROKEN.keys()
)


def options(trace_format):
    return {"within_minute": "even"} if trace_format == "azure_functions_2019" else {}


@broken
def test_a_malformed_row_is_refused_with_file_line_column_and_value(
    record, trace_format, text, message
):
    with pytest.raises(TraceError, match=f"record, {message}"):
        record(text, trace_format, **options(trace_format))


@pytest.mark.parametrize(
    "name", ["a time that is none", "a row too short", "a length as text", "no JSON object"]
)
def test_malformed_rows_can_be_skipped_with_a_warning_and_a_count(record, caplog, name):
    trace_format, text, message = BROKEN[name]
    good = {"azure_llm": AZURE_2023.splitlines()[3], "mooncake": MOONCAKE.splitlines()[1]}
    text += good[trace_format] + "\n"
    with caplog.at_level(logging.WARNING):
        recorded = record(text, trace_format, bad_rows="skip")
    assert recorded.counts["bad_rows"] == 1
    assert len(recorded.arrival_s) == recorded.counts["rows"] - 1
    assert "skipped 1 malformed rows" in caplog.text
    assert message.split(":")[0] in caplog.text


def test_a_missing_file_is_refused_with_the_folder_looked_from():
    source = TraceSource(path="nowhere/trace.csv", format="azure_llm")
    with pytest.raises(TraceError, match=f"nowhere/trace.csv: no such file .*{Path.cwd()}"):
        read(source, RNG(0))


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(TraceError, match="not a readable text file"):
        read(TraceSource(path=str(tmp_path), format="azure_llm"), RNG(0))


def test_a_missing_column_is_named(record):
    with pytest.raises(TraceError, match="lacks the column GeneratedTokens; it has TIMESTAMP"):
        record("TIMESTAMP,ContextTokens\n", "azure_llm")


@pytest.mark.parametrize("trace_format", ["azure_llm", "mooncake", "azure_functions_2021"])
def test_an_empty_file_is_refused(record, trace_format):
    with pytest.raises(TraceError, match=r"the file is empty|holds no usable row"):
        record("", trace_format)


def test_a_file_with_a_header_alone_is_refused(record):
    with pytest.raises(TraceError, match="holds no usable row"):
        record(AZURE_2023.splitlines()[0], "azure_llm")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "record"
    path.write_bytes(AZURE_2023.encode() + b"\xff\xfe\n")
    with pytest.raises(TraceError, match="not a readable text file"):
        read(TraceSource(path=str(path), format="azure_llm"), RNG(0))


def test_a_single_instant_is_refused(record):
    with pytest.raises(TraceError, match="1 requests at one instant"):
        record("\n".join(AZURE_2023.splitlines()[:2]), "azure_llm")


def test_a_byte_order_mark_and_blank_lines_do_no_harm(record):
    text = "\ufeff" + AZURE_2023.replace("109\n", "109\n\n")
    assert len(record(text, "azure_llm").arrival_s) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "azure"}, r"trace.format = 'azure': .*'azure_llm', .*'azure_functions_2021'"),
        ({"format": "azure_llm", "function": "f"}, "function must be null with format: azure_llm"),
        ({"format": "azure_llm", "within_minute": "even"}, "null with any other"),
        ({"format": "azure_functions_2019"}, "within_minute must be uniform or even"),
        ({"format": "azure_llm", "rate_rps": 1, "time_scale": 1}, "one of rate_rps and time_scale"),
        ({"format": "azure_llm", "keep": 0}, "trace.keep = 0"),
    ],
)
def test_an_impossible_setting_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        check(TraceSource, {"path": "x", **values}, "trace")


@pytest.mark.parametrize("settings", [{}, {"bad_rows": "skip"}])
def test_a_row_takes_few_calls_however_many_there_are(record, settings):
    """Twenty thousand are then read in some tenths of a second; calls do not depend on the load."""
    rows, calls = 20_000, 0

    def count(*_):
        nonlocal calls
        calls += 1

    text = AZURE_2023 + "2023-11-16 18:16:50.9951690,396,109\n" * rows
    sys.setprofile(count)
    try:
        found = record(text, "azure_llm", **settings)
    finally:
        sys.setprofile(None)
    assert len(found.arrival_s) == rows + 3
    assert calls < 60 * rows
