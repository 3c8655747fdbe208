"""A server is calibrated from outside: what it does is found, what it does not do is said."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from calibrate import run
from calibrate.black_box import prediction
from calibrate.black_box.bundle import CELLS, REPLICATES, read_fit
from calibrate.black_box.client import Answer
from calibrate.black_box.estimate import estimate, find, held_out
from calibrate.black_box.spec import BlackBoxSpec
from calibrate.black_box.steps import Seen, find_steps, step_table
from calibrate.black_box.sweep import Cell, Played, cells, lengths
from sim.deploy import ReplicaSpec
from sim.profile import Bundle, StepTime, load_bundle, save_bundle
from sim.types import Scheduler
from tests.calibrate.openai_server import application, in_background
from tests.calibrate.served_replica import ServedReplica

BUDGET = 512
STEP_TIME = StepTime(
    host_s=1e-3, tokens_s=((0, 0.0), (64, 2e-4), (BUDGET, 4e-3)), pair_s=6e-10, kv_token_s=1e-7,
    sequence_s=2e-5, prompt_s=2e-4, done_token_s=1e-8,
)  # fmt: skip
SLOW = StepTime(host_s=4e-3, tokens_s=((0, 0.0), (256, 8e-3)), pair_s=0.0, kv_token_s=0.0)
SMALL = [
    "black_box.concurrency=[1,4]", "black_box.prompt_tokens=[8,64]", "black_box.requests=8",
    "black_box.output_tokens=[6,16]", "black_box.warm_up=4", "black_box.vocabulary=128",
    "black_box.server.max_batch=8", "black_box.server.token_budget=256",
    "quality.models=[opt-125m]",
]  # fmt: skip


def bundle_of(step_time: StepTime) -> Bundle:
    """The shipped medium model with other step times."""
    shipped = load_bundle("pkg://calibrate.profiles/a100-80gb-analytic")
    profile = shipped.models["opt-1.3b"].model_copy(update={"step_time": step_time})
    meta = shipped.meta.model_copy(update={"models": ("opt-1.3b",)})
    return Bundle(meta, {"opt-1.3b": profile}, {})


def swept(scheduler: Scheduler, seed: int, late_s: float = 0.0) -> list[Played]:
    """A sweep that the simulator answers; each token comes late by `late_s`, on average."""
    server = ReplicaSpec(max_batch=32, token_budget=BUDGET)
    spec = BlackBoxSpec(
        model=None, api_key_env=None, timeout_s=1, prompts="token_ids", vocabulary=100,
        concurrency=(1, 2, 4, 8, 16), prompt_tokens=(32, 128, 300), output_tokens=(16, 64),
        requests=24, warm_up=0, server=server, scheduler=scheduler,
    )  # fmt: skip
    cluster = prediction.deploy(bundle_of(STEP_TIME), server, scheduler, overhead_s=0.002)
    rng = np.random.default_rng(seed)
    found = []
    for cell in cells(spec, 2048, seed):
        begin_s = [3e-4 * i for i in range(cell.concurrency)]
        wanted = lengths(cell, spec.requests, seed)
        answers = prediction.closed_loop(cluster, wanted, begin_s)
        found.append(Played(cell, delayed(answers, rng, late_s)))
    return found


def delayed(
    answers: tuple[Answer, ...], rng: np.random.Generator, late_s: float
) -> tuple[Answer, ...]:
    """Tokens that come late; whoever was answered late sends its next request late."""
    came = [
        np.maximum.accumulate(np.array(a.token_s) + late_s * rng.exponential(size=len(a.token_s)))
        for a in answers
    ]
    ends: dict[float, float] = {}
    for answer, times in zip(answers, came, strict=True):
        ends[answer.token_s[-1]] = max(ends.get(answer.token_s[-1], 0.0), float(times[-1]))
    return tuple(
        Answer(answer.prompt_tokens, ends.get(answer.sent_s, answer.sent_s), tuple(times.tolist()))
        for answer, times in zip(answers, came, strict=True)
    )


def errors_of_held_out(played: list[Played], scheduler: Scheduler) -> dict[str, list[float]]:
    """Relative errors of the means of cells that the fit did not see."""
    server = ReplicaSpec(max_batch=32, token_budget=BUDGET)
    seen = find(played, 32, BUDGET)
    errors: dict[str, list[float]] = {}

    def use(number: int, fitted) -> None:
        cluster = prediction.deploy(
            bundle_of(fitted.step_time), server, scheduler, fitted.overhead_s
        )
        simulated = prediction.predict(cluster, played[number])
        for (latency, statistic, own), (_, _, real) in zip(
            prediction.latencies(simulated), prediction.latencies(played[number].answers),
            strict=True,
        ):  # fmt: skip
            if statistic == "mean":
                errors.setdefault(latency, []).append(abs(own / real - 1))

    held_out(seen, BUDGET, 0, use)
    return errors


@pytest.mark.parametrize("scheduler", ["vllm", "transformers_fifo"])
def test_what_a_simulated_server_shows_predicts_what_it_has_not_shown(scheduler: Scheduler) -> None:
    errors = errors_of_held_out(swept(scheduler, seed=0), scheduler)
    assert len(errors) == 3
    for latency, of_latency in errors.items():
        assert max(of_latency) < 0.02, latency


def test_the_coefficients_that_a_sweep_can_tell_are_found() -> None:
    played = swept("vllm", seed=1)
    fitted = estimate(find(played, 32, BUDGET), BUDGET)
    assert fitted.overhead_s == pytest.approx(0.002, rel=0.02)
    assert fitted.step_time.sequence_s == pytest.approx(STEP_TIME.sequence_s, rel=0.1)
    assert fitted.step_time.kv_token_s == pytest.approx(STEP_TIME.kv_token_s, rel=0.1)
    assert fitted.step_time.switch_s == 0
    assert fitted.step_time.tokens_s[-1][0] >= BUDGET


def test_tokens_that_come_late_do_not_mislead_the_fit() -> None:
    """Late by an eighth of a step, every token for itself."""
    errors = errors_of_held_out(swept("vllm", seed=0, late_s=1.5e-4), "vllm")
    assert max(errors["time per output token"]) < 0.03
    assert np.median(errors["time to first token"]) < 0.03


def test_steps_are_those_that_the_scheduler_formed() -> None:
    """Two requests: the second is computed beside the first, then they decode together."""
    first = Answer(10, 0.0, (1.0, 2.0, 4.0, 5.0, 6.0))
    second = Answer(7, 1.5, (4.01, 5.01, 6.01, 7.0))
    steps = find_steps([first, second], 8, 100, 0.1).steps
    assert [(s.decodes, s.chunks, s.prompt_tokens) for s in steps] == [
        (0, 1, 10), (1, 0, 0), (1, 1, 7), (2, 0, 0), (2, 0, 0), (1, 0, 0),
    ]  # fmt: skip
    assert [s.kv_tokens for s in steps] == [0, 11, 12, 13 + 8, 14 + 9, 10]
    assert [s.pairs for s in steps] == [55, 0, 28, 0, 0, 0]
    assert [s.step_s for s in steps] == pytest.approx([1.0, 1.0, 2.0, 1.0, 1.0, 0.99])
    assert [s.from_idle for s in steps] == [True, False, False, False, False, False]


def test_a_prompt_beyond_the_budget_is_split_as_the_scheduler_splits_it() -> None:
    decoding = Answer(5, 0.0, (1.0, 2.0, 3.0, 4.0, 5.0))
    split = Answer(25, 0.9, (4.0, 5.0))  # with 9 tokens beside a decode: 9, 9 and 7
    steps = find_steps([decoding, split], 8, 10, 0.01).steps
    assert [(s.chunks, s.prompt_tokens, s.done_tokens) for s in steps] == [
        (1, 5, 0), (1, 9, 0), (1, 9, 9), (1, 7, 18), (0, 0, 0),
    ]  # fmt: skip


def test_a_step_beyond_the_token_budget_is_counted_and_left_out() -> None:
    decoding = Answer(5, 0.0, (1.0, 2.0, 3.0, 4.0))
    big = Answer(50, 1.5, (3.0, 4.0))
    seen = find_steps([decoding, big], 8, 20, 0.1)
    assert seen.unlike == 1
    assert all(step.prompt_tokens <= 20 for step in seen.steps)


def test_a_row_counts_as_often_as_its_step_was_seen() -> None:
    answer = Answer(4, 0.0, tuple(map(float, range(1, 10))))
    table = step_table([find_steps([answer], 8, 100, 0.1), Seen((), 0, 0)])
    assert len(table) == 1 + 8
    assert set(table.group.tolist()) == {0}


def arguments(url: str, folder: Path, *more: str) -> list[str]:
    return [f"url={url}", f"out={folder / 'bundle'}", *SMALL, *more]


@contextmanager
def server(fault: str = "", key: str = "", step_time: StepTime = SLOW) -> Iterator[str]:
    """The URL of a server with these step times, which fails in this way."""
    settings = ReplicaSpec(max_batch=8, token_budget=256)
    cluster = prediction.deploy(bundle_of(step_time), settings, "vllm", 0.0)

    async def make() -> web.Application:
        replica = ServedReplica(cluster)
        return application(replica.submit, "tiny", 256, fault, key)

    with in_background(make) as url:
        yield url


def command(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["calibrate.run", *("++" + word for word in words)])
    run.main()


def test_a_killed_sweep_goes_on_and_its_bundle_says_how_wrong_it_is(tmp_path: Path) -> None:
    journal = tmp_path / "bundle.run" / "tiny.jsonl"
    with server() as url:
        words = [sys.executable, "-m", "calibrate.run", *arguments(url, tmp_path)]
        killed = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        ends = time.monotonic() + 180
        while not journal.exists() or len(journal.read_text().splitlines()) < 3:
            assert time.monotonic() < ends
            assert killed.poll() is None
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        before = journal.read_text().rpartition("\n")[0].splitlines()
        shipped = bundle_of(SLOW)
        inside = shipped.meta.model_copy(update={"models": ("tiny",), "device": "inside"})
        save_bundle(Bundle(inside, {"tiny": shipped.models["opt-1.3b"]}, {}), tmp_path / "inside")
        done = subprocess.run(
            [*words, f"beside={tmp_path / 'inside'}"], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr
    rows = journal.read_text().splitlines()
    assert rows[: len(before)] == before
    assert len(rows) == 1 + 8
    bundle = load_bundle(str(tmp_path / "bundle"))
    record = read_fit(bundle)
    assert bundle.meta.kind == "black-box"
    assert record.cells == 8
    assert record.requests == 8 * 8
    assert record.latencies["time per output token, mean"].shapes == 8
    assert len(bundle.attachments[f"tiny/{CELLS}"].splitlines()) == 1 + 8 * 6
    profile = bundle.models["tiny"]
    assert profile.max_context == 256
    assert profile.envelope is not None
    assert profile.envelope.sequences[1] >= 4
    assert len(profile.replicates) == REPLICATES
    assert "against those of inside" in done.stdout
    assert bundle.content_hash[:12] in done.stdout


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", "url = .*/v1/completions': answered 500: .* said 'out of order for None'"),
        ("no stream", "must answer stream=true with text/event-stream, .* application/json"),
        ("early", r"stopped after \d+ of \d+ tokens: it must know ignore_eos"),
        ("cut", r"ended the stream after \d+ of \d+ tokens"),
        ("garbage", "must stream completions as OpenAI's servers do, said '{]'"),
        ("error", "failed: .*out of memory"),
        ("no usage", "must know stream_options.include_usage"),
        ("pairs", r"sent \d+ events for \d+ tokens"),
        ("at once", r"must stream token by token: \d+ of \d+ answers came in one piece"),
        ("text alone", "answered 400: must take completions with prompts of token_ids"),
        ("two models", "black_box.model = None: .* lists: org/tiny, another"),
        ("context unknown", "black_box.server.max_context = None: .* does not say"),
        ("no list", "must list its models as OpenAI's servers do, said '<html>hello</html>'"),
    ],
)
def test_a_server_that_does_not_do_what_is_needed_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    with server(fault) as url, pytest.raises(SystemExit) as ended:
        command(monkeypatch, arguments(url, tmp_path))
    assert re.match(f"refused: .*{said}", str(ended.value)), ended.value
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["url=http://127.0.0.1:9"], "url = 'http://127.0.0.1:9/v1/models': must be a server"),
        (["url=localhost"], r"url = 'localhost': must be http\(s\)://host:port"),
        (["url=http://me:secret@host"], "url = '…@host': a key goes into black_box.api_key_env"),
        (["black_box.api_key_env=NO_SUCH_KEY"], "black_box.api_key_env = 'NO_SUCH_KEY': no such"),
        (["black_box.concurrency=[4]"], r"black_box.concurrency = \[4\]: must hold 1 and"),
        (["black_box.colour=red"], "black_box.colour = 'red': unknown key"),
        (["black_box.model=other"], "black_box.model = 'other': .* lists: org/tiny"),
        (["black_box.prompt_tokens=[300]"], "must fit a context of 256 tokens"),
        (["quality.models=[]"], r"quality.models = \[\]: one for each of tiny"),
        (["black_box.server.token_budget=16"], "token_budget = 16: .* must be the server's own"),
        (["beside=nowhere"], "profile = 'nowhere': not a complete bundle"),
    ],
)
def test_bad_settings_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    with server() as url, pytest.raises(SystemExit) as ended:
        command(monkeypatch, [*arguments(url, tmp_path), *words])
    assert re.match(f"refused: .*{said}", str(ended.value)), ended.value


def test_the_key_is_sent_and_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-0123456789")
    with server(key="sk-0123456789") as url:
        with pytest.raises(SystemExit, match="answered 401: needs a key"):
            command(monkeypatch, arguments(url, tmp_path))
        command(monkeypatch, arguments(url, tmp_path, "black_box.api_key_env=MY_KEY"))
    with server("500", key="sk-0123456789") as url, pytest.raises(SystemExit) as ended:
        command(monkeypatch, arguments(url, tmp_path / "other", "black_box.api_key_env=MY_KEY"))
    assert "out of order for Bearer …" in str(ended.value)
    assert (tmp_path / "bundle" / "meta.json").is_file()
    assert "0123456789" not in capsys.readouterr().out
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"0123456789" not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("fault", "setting"),
    [("text alone", "black_box.prompts=text"), ("counted pairs", "black_box.prompts=token_ids")],
)
def test_prompts_may_be_text_and_an_event_may_hold_several_tokens_if_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, setting: str
) -> None:
    with server(fault) as url:
        command(monkeypatch, arguments(url, tmp_path, setting))
    rows = [json.loads(row) for row in (tmp_path / "bundle.run" / "tiny.jsonl").open()][1:]
    assert len(rows) == 8
    for row in rows:
        wanted = lengths_of(row)
        more = fault == "text alone"  # the server's token at the beginning of a text
        assert [(a["prompt_tokens"], len(a["token_s"])) for a in row["answers"]] == [
            (prompt + more, output) for prompt, output in wanted
        ]


def lengths_of(row: dict) -> list[tuple[int, int]]:
    return lengths(Cell(**row["cell"]), 8, 0)


def test_pytorch_is_not_needed(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules.update(torch=None, transformers=None); "
    code = hidden + "import runpy; runpy.run_module('calibrate.run', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments("http://127.0.0.1:9", tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert "must be a server that answers" in done.stderr
