"""What is asked of workers: prompts of the lengths that were drawn, or examples with answers."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="needs pip install -e '.[live]'")

# isort: split
from live.validation.requests import FIRST_TOKEN_ID, Examples, Noise
from live.workers.tokenizer import ByteTokenizer
from sim.config import ConfigError
from tests.systems import make_workload

TASKS = ("sort", "add")
WORKLOAD = make_workload(
    [0.1, 0.2, 0.3, 0.4], prompt=[3, 5, 7, 9], output=[1, 2, 3, 4], max_tokens=20,
    task=[0, 1, 1, 0], tasks=TASKS,
)  # fmt: skip


def folder_of(path: Path) -> Path:
    (path / "tasks").mkdir()
    for task, answers in (("sort", ("abc", "b")), ("add", ("12345",))):
        rows = [
            {"task": task, "prompt": f"{task}: {n}", "answer": a} for n, a in enumerate(answers)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (path / "tasks" / f"{task}.test.jsonl").write_text(lines)
    return path


def test_noise_has_the_lengths_that_were_drawn_and_is_the_same_for_the_same_seed():
    asked = Noise(50).ask(WORKLOAD, 1)
    assert [len(question.prompt) for question in asked] == [3, 5, 7, 9]
    assert [question.forced_tokens for question in asked] == [1, 2, 3, 4]
    tokens = [token for question in asked for token in question.prompt]
    assert min(tokens) >= FIRST_TOKEN_ID
    assert max(tokens) < 50
    assert Noise(50).ask(WORKLOAD, 1) == asked != Noise(50).ask(WORKLOAD, 2)
    assert Noise(50).lengths(WORKLOAD, asked) is WORKLOAD


def test_examples_are_of_the_requests_task_and_give_it_their_lengths(tmp_path):
    examples = Examples(folder_of(tmp_path), TASKS, ByteTokenizer())
    asked = examples.ask(WORKLOAD, 0)
    assert [question.answer for question in asked[1:3]] == ["12345", "12345"]
    assert {question.answer for question in (asked[0], asked[3])} <= {"abc", "b"}
    assert all(question.forced_tokens is None for question in asked)
    played = examples.lengths(WORKLOAD, asked)
    assert played.prompt_tokens.tolist() == [len(question.prompt) for question in asked]
    assert played.output_tokens[1] == 6  # the answer and its end
    np.testing.assert_array_equal(played.arrival_ticks, WORKLOAD.arrival_ticks)


def test_an_answer_longer_than_may_be_is_cut(tmp_path):
    examples = Examples(folder_of(tmp_path), TASKS, ByteTokenizer())
    short = replace(WORKLOAD, max_tokens=np.full(4, 4, np.int32))
    assert examples.lengths(short, examples.ask(short, 0)).output_tokens[1] == 4


def test_a_folder_without_a_tasks_examples_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"tasks/mul.test.jsonl"):
        Examples(folder_of(tmp_path), ("mul",), ByteTokenizer())
