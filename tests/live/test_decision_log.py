"""Decisions are written down whole, whatever the disk does, and read again as they were."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path
from time import monotonic, sleep

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

from live.records import decision_log
from live.records.decision_lines import Decisions, LogError, restored
from live.records.decision_log import DecisionLog, LogFile
from live.records.records import Records
from sim.config import ConfigError
from sim.observation import Observation
from sim.types import Cluster
from tests.live.logged import LoggedStage, accepting, learned_plan

ROOT = Path(__file__).parents[2]


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


class Witness(Records):
    """Keeps what is decided, copied."""

    def __init__(self):
        self.seen = []

    def decided(self, call, observation, decision, shadow):
        copied = {
            item.name: np.copy(getattr(observation, item.name))
            for item in fields(Observation)
            if item.name != "cluster"
        }
        self.seen.append((copied, decision))


def test_what_is_read_again_is_what_was_decided_on(tmp_path):
    at = LoggedStage(learned_plan("policy@policy.shadow=round_robin"), tmp_path / "log")
    witness = Witness()
    at.records._listeners["decided"].append(("witness", witness.decided))
    at.play(60)
    at.log.close()
    read = list(Decisions(tmp_path / "log"))
    assert len(read) == len(witness.seen) == 60
    for logged, (seen, decision) in zip(read, witness.seen, strict=True):
        for name, value in seen.items():
            again = np.asarray(getattr(logged.observation, name))
            assert again.dtype == value.dtype
            assert np.array_equal(again, value), name
        assert (logged.choice, logged.by, logged.fault) == (
            decision.choice, decision.by, decision.fault,
        )  # fmt: skip
        state = jax.tree.leaves(restored(decision.state, logged.state))
        was = jax.tree.leaves(decision.state)
        assert all(np.array_equal(a, b) for a, b in zip(state, was, strict=True))
        assert logged.shadow is not None
        for item in fields(Cluster):
            ours = getattr(at.plan.cluster, item.name)
            again = getattr(logged.observation.cluster, item.name)
            assert np.array_equal(ours, again)
            assert getattr(ours, "dtype", None) == getattr(again, "dtype", None)


def test_the_header_says_who_decides_where(tmp_path):
    at = LoggedStage(learned_plan(), tmp_path / "log")
    at.play(1)
    at.log.close()
    header = lines(tmp_path / "log")[0]["header"]
    assert header["replicas"] == list(at.plan.replicas)
    assert header["active"]["node"]["checkpoint"] == "pkg://agent.checkpoints/default"
    assert re.fullmatch(r"gears@[0-9a-f]{12}", header["active"]["version"])
    assert header["cluster"]["profile_hash"] == at.plan.cluster.profile_hash
    assert header["shadow"] is None


def test_what_a_choice_rests_on_is_logged_where_the_policy_can_tell(tmp_path, monkeypatch):
    class Told:
        renewed, choice, values = True, 2, np.array([0.25, 1.5], np.float32)

    at = LoggedStage(learned_plan(), tmp_path / "log")
    monkeypatch.setattr(at.log._decider, "explain", lambda decision: Told)
    at.play(1)
    at.log.close()
    told = lines(tmp_path / "log")[1]["decision"]["explanation"]
    assert told == {"renewed": True, "choice": 2, "values": [0.25, 1.5]}


def test_after_a_reload_decisions_have_another_header(tmp_path):
    at = LoggedStage(accepting(), tmp_path / "log")
    at.play(3)
    at.replace(accepting("policy@policy.active=round_robin"))
    at.play(2)
    at.log.close()
    versions = [logged.header.active.version for logged in Decisions(tmp_path / "log")]
    assert versions == ["conservative_greedy"] * 3 + ["round_robin"] * 2
    assert [next(iter(line)) for line in lines(tmp_path / "log")] == [
        "header", *["decision"] * 3, "header", *["decision"] * 2,
    ]  # fmt: skip


def test_full_files_are_put_aside_and_each_can_be_read(tmp_path):
    at = LoggedStage(accepting(), tmp_path / "log", limit_bytes=2**16)
    at.play(200)
    at.log.close()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["log", *(f"log.{n}" for n in range(1, len(names)))]
    assert len(names) > 2
    assert all(path.stat().st_size <= 2**16 for path in tmp_path.iterdir())
    told = [
        logged.request_id
        for n in [*range(1, len(names)), None]
        for logged in Decisions(tmp_path / (f"log.{n}" if n else "log"))
    ]
    assert told == [f"r{n}" for n in range(200)]


def test_a_file_that_is_there_is_continued_behind_a_torn_line(tmp_path):
    path = tmp_path / "log"
    for _ in range(2):
        at = LoggedStage(accepting(), path)
        at.play(4)
        at.log.close()
        with path.open("ab") as file:
            file.write(b'{"decision": {"time": 17')
    decisions = Decisions(path)
    assert len(list(decisions)) == 8
    assert decisions.torn == 2


WRITER = """
from pathlib import Path
from tests.live.logged import LoggedStage, accepting
at = LoggedStage(accepting(), Path("log"), limit_bytes=2**30)
at.play(50)
print("played", flush=True)
while True:
    at.play(1)
"""


def test_a_log_whose_gateway_was_killed_can_be_read(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = [sys.executable, "-c", textwrap.dedent(WRITER)]
    with subprocess.Popen(script, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"played\n"
        try:
            until = monotonic() + 60
            while (tmp_path / "log").stat().st_size < 50_000:
                assert monotonic() < until
                sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
    decisions = Decisions(tmp_path / "log")
    assert len(list(decisions)) >= 10
    assert decisions.torn <= 1


def test_nothing_waits_for_a_disk_that_does_not_keep_up(tmp_path, monkeypatch):
    monkeypatch.setattr(decision_log, "KEPT", 20)
    monkeypatch.setattr(decision_log, "PAUSE_S", 60.0)
    at = LoggedStage(accepting(), tmp_path / "log")
    at.play(50)
    assert at.log.dropped >= 20
    at.log.close()
    assert len(list(Decisions(tmp_path / "log"))) + at.log.dropped == 50
    assert at.records.failures["decisions"] == 0


def test_decisions_that_cannot_be_written_are_counted_and_the_log_goes_on(tmp_path, monkeypatch):
    file = LogFile(tmp_path / "log", 2**20)
    log = DecisionLog(str(tmp_path / "log"), 2**20)
    log._file, whole = file, file.write
    monkeypatch.setattr(file, "write", lambda lines: (_ for _ in ()).throw(OSError("full")))
    log._lines.extend([(b"header\n", b"one\n"), (b"header\n", b"two\n")])
    log._visit()
    monkeypatch.setattr(file, "write", whole)
    log._lines.append((b"header\n", b"three\n"))
    log.close()
    assert log.dropped == 2
    assert (tmp_path / "log").read_bytes() == b"header\nthree\n"


def test_a_file_that_failed_in_the_midst_of_a_line_goes_on_with_another(tmp_path):
    file = LogFile(tmp_path / "log", 2**20)
    file.write([(b"header\n", b"one\n")])

    class Half:
        def __init__(self, inner):
            self.inner, self.written = inner, 0

        def write(self, data):
            if self.written:
                raise OSError("full")
            self.written = self.inner.write(data[:2])
            return self.written

        def close(self):
            self.inner.close()

    file._file = Half(file._file)
    with pytest.raises(OSError, match="full"):
        file.write([(b"header\n", b"two\n")])
    file.write([(b"header\n", b"three\n")])
    file.close()
    assert (tmp_path / "log").read_bytes() == b"header\none\ntw\nheader\nthree\n"


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"log\.decisions = .*nowhere"):
        DecisionLog(str(tmp_path / "nowhere" / "log"), 2**20)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no decisions"),
        (b"{}\n", "neither a header nor a decision"),
        (b'{"decision": {}}\n', "a decision before any header"),
        (b'{"header": {}}\n', "header.schema_version is missing"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(LogError, match=message):
        list(Decisions(tmp_path / "log"))


@pytest.mark.parametrize("name", ["schema_version", "observation_schema"])
def test_a_log_of_another_schema_is_refused(tmp_path, name):
    at = LoggedStage(accepting(), tmp_path / "log")
    at.play(1)
    at.log.close()
    header = lines(tmp_path / "log")[0]
    header["header"][name] = 99
    (tmp_path / "log").write_text(json.dumps(header) + "\n")
    with pytest.raises(LogError, match=f"{name} = 99: this release reads"):
        list(Decisions(tmp_path / "log"))
