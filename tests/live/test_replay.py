"""Logged decisions are made again to the same choices, and what differs is found."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from live import replay
from live.records.decision_lines import Decisions, LogError
from live.replay import Repeated, compare, doubts, is_tie, repeat
from tests.live.logged import LoggedStage, accepting, learned_plan

ROOT = Path(__file__).parents[2]
REQUESTS = 200


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """What the shipped router decided, with a pinned request and a fault."""
    path = tmp_path_factory.mktemp("replay") / "log"
    at = LoggedStage(learned_plan(), path, compiled=True)
    at.play(REQUESTS)
    at.play(1, model="opt-1.3b")
    policy = at.log._decider._policy
    policy.decide = lambda state, observation: 1 / 0
    at.now_s += 1.0  # past the hold: it is asked
    at.play(1)
    del policy.decide
    at.log.close()
    return path


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A few decisions of a rule."""
    path = tmp_path_factory.mktemp("short") / "log"
    at = LoggedStage(accepting(), path, compiled=True)
    at.play(20)
    at.log.close()
    return path


@pytest.fixture
def altered(short, tmp_path):
    """The short log after a change to its decisions."""

    def alter(**change):
        told = [json.loads(line) for line in short.read_bytes().splitlines()]
        told[8]["decision"].update(change)  # of r7
        path = tmp_path / "altered"
        path.write_text("".join(json.dumps(line) + "\n" for line in told))
        return path

    return alter


def command(*arguments, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "live.replay", *arguments],
        cwd=cwd, env={"PYTHONPATH": str(ROOT), "PATH": "", "COLUMNS": "120"},
        capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_every_decision_is_made_again_to_the_same_choice(log):
    done = repeat(Decisions(log))
    assert (done.same, done.ties, done.different) == (REQUESTS + 2, 0, [])
    assert done.by.keys() == {learned_version(log), "pinned", "conservative_greedy"}
    assert not done.warnings
    held = {logged.state for logged in Decisions(log)}
    assert len(held) > 5  # plans were chosen anew


def learned_version(log):
    return json.loads(log.read_bytes().splitlines()[0])["header"]["active"]["version"]


@pytest.mark.parametrize("policy", ["conservative_greedy", "round_robin", "random"])
def test_rules_decide_again_as_they_did(policy, tmp_path):
    plan = accepting(f"policy@policy.active={policy}")
    at = LoggedStage(plan, tmp_path / "log", compiled=True)
    at.play(80)
    at.log.close()
    done = repeat(Decisions(tmp_path / "log"))
    assert (done.same, done.different) == (80, [])


def test_a_choice_among_values_that_differ_by_rounding_alone_is_a_tie():
    class Now:
        renewed, choice, values = True, 1, np.array([0.5, 0.500001, 0.1], np.float32)

    then = {"renewed": True, "choice": 0, "values": [0.500001, 0.5, 0.1]}
    assert is_tie(then, Now)
    assert not is_tie({**then, "values": [0.6, 0.5, 0.1]}, Now)
    assert not is_tie({**then, "choice": 1}, Now)  # the same choice, but for what it is carried out
    assert not is_tie({**then, "values": [0.5]}, Now)
    assert not is_tie(None, Now)


def test_a_state_of_another_policy_is_refused(altered):
    with pytest.raises(LogError, match="a state of"):
        repeat(Decisions(altered(state=["AAAA"])))


def test_another_checkpoint_and_another_profile_are_named(log, monkeypatch):
    logged = next(iter(Decisions(log)))
    (told,) = doubts(logged.header, "plans@another")
    assert told == f"policy: {logged.header.active.version} decided, plans@another is here now"
    other = logged.header.model_copy(
        update={"cluster": {**logged.header.cluster, "profile_hash": "0" * 64}}
    )
    (told,) = doubts(other, logged.header.active.version)
    assert "has another content now" in told
    gone = logged.header.model_copy(update={"profile": "pkg://calibrate.profiles/gone"})
    (told,) = doubts(gone, logged.header.active.version)
    assert "is not here" in told


def test_another_policy_decides_on_the_same_observations(log):
    done = compare(Decisions(log), {"_target_": "agent.baselines.ConservativeGreedy"})
    assert done.version == "conservative_greedy"
    assert done.tasks.total() == done.moves.total() == REQUESTS + 1
    assert done.pinned == 1
    assert 0 < done.replicas <= done.agreed.total() < REQUESTS
    assert done.agreed.total() == sum(n for (went, would), n in done.moves.items() if went == would)


def test_the_policy_of_the_log_agrees_with_itself(log):
    node = {"_target_": "agent.checkpoint.Trained", "checkpoint": "pkg://agent.checkpoints/default"}
    done = compare(Decisions(log), node)
    assert done.agreed.total() >= REQUESTS  # but perhaps for the one that the rule made


def test_the_command_ends_with_0_if_all_are_the_same(short, tmp_path):
    status, told = command(f"log={short}", cwd=tmp_path)
    assert status == 0, told
    assert re.search(r"same +│ 20 ", told)


def test_the_command_ends_with_1_and_says_which_if_one_differs(short, altered, tmp_path):
    was = json.loads(short.read_bytes().splitlines()[8])["decision"]["choice"]
    status, told = command(f"log={altered(choice=was + 1)}", cwd=tmp_path)
    assert status == 1
    assert re.search(r"same +│ 19 ", told)
    assert f"r7: conservative_greedy chose {was + 1}, now {was}" in told


def test_the_command_shows_where_another_policy_would_have_sent_requests(log, tmp_path):
    status, told = command(f"log={log}", "policy=least_loaded", cwd=tmp_path)
    assert status == 0, told
    assert re.search(r"where least_loaded would have sent\s+201\s+requests", told)
    assert "opt-125m" in told
    assert "piqa" in told
    assert "pinned" in told


def test_the_command_refuses_a_log_that_is_not_there(tmp_path):
    status, told = command("log=nowhere", cwd=tmp_path)
    assert status == 1
    assert "refused: log = 'nowhere': no such file" in told


def test_what_is_shown_of_a_replay_is_what_came_of_it():
    shown = replay.show_repeated(Repeated(same=7, ties=2, by=Counter({"rule": 9})), torn=3)
    assert [*shown.columns[1].cells] == ["7", "2, with values within 1e-05", "0", "rule 9", "3"]
