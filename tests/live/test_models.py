"""`live.models` makes models of three sizes, tasks with true answers, and says what it reached."""

import json
import re
import signal
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from rich.console import Console

from live.models import __main__ as program
from live.models.spec import ModelsSpec
from live.models.tasks import Count, Sort, generate, score
from sim.config import ConfigError, check
from tests.calibrate.tiny import generated, make_engine, torch

pytest.importorskip("tokenizers", reason="needs the engine: pip install '.[live]'")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from live.models.accuracy import Standing, complaint, measure
from live.models.files import draw_examples, write_examples
from live.models.tokenizer import END, END_ID
from live.models.training import Trainer

QUIET = Console(quiet=True)
SIZES = ("small", "medium", "large")
TINY = [f"models.{name}={{layers: {n}, width: 16, heads: 2}}" for n, name in enumerate(SIZES, 1)]
SEEDS = st.integers(0, 2**32 - 1)


def settings(out: Path, *overrides: str) -> list[str]:
    return [
        *TINY, "training.steps=4", "training.batch=4", "training.save_every=2", "test=10",
        "sort.numbers=[3,4]", "count.letters=[4,6]", "threads=1", f"out={out}", *overrides,
    ]  # fmt: skip


def make_spec(out: Path, *overrides: str) -> ModelsSpec:
    with initialize_config_module("conf", version_base="1.3"):
        config = compose("models", overrides=settings(out, *overrides))
    return check(ModelsSpec, OmegaConf.to_container(config, resolve=True), "")


@given(SEEDS, st.integers(1, 12), st.integers(0, 12))
def test_sorted_numbers_are_those_of_the_prompt_in_order(seed, fewest, more):
    task = Sort(numbers=(fewest, fewest + more))
    for example in generate(task, np.random.default_rng(seed), 3):
        numbers = example.prompt.removeprefix("sort: ").removesuffix(" =").split(" ")
        answer = example.answer.split(" ")
        assert fewest <= len(numbers) <= fewest + more
        assert Counter(answer) == Counter(numbers)
        assert all(int(a) <= int(b) for a, b in pairwise(answer))


@given(SEEDS, st.integers(1, 20), st.integers(0, 20))
def test_counted_letters_make_up_the_word(seed, fewest, more):
    task = Count(letters=(fewest, fewest + more))
    for example in generate(task, np.random.default_rng(seed), 3):
        word = example.prompt.removeprefix("count: ").removesuffix(" =")
        counted = re.findall(r"([a-z])([0-9]+)", example.answer)
        assert fewest <= len(word) <= fewest + more
        assert "".join(letter * int(number) for letter, number in counted) == "".join(sorted(word))
        assert "".join(map("".join, counted)) == example.answer


@given(SEEDS)
def test_the_same_seed_asks_the_same(seed):
    def drawn(seed):
        return generate(Sort(numbers=(3, 5)), np.random.default_rng(seed), 4)

    assert drawn(seed) == drawn(seed)
    assert drawn(seed) != drawn(seed + 1)


def test_no_prompt_is_drawn_twice_nor_one_that_is_held_out():
    task = Sort(numbers=(1, 1))  # a hundred prompts
    held_out = {example.prompt for example in generate(task, np.random.default_rng(0), 90)}
    assert len(held_out) == 90
    rest = generate(task, np.random.default_rng(0), 8, held_out)
    assert not held_out & {example.prompt for example in rest}
    with pytest.raises(ConfigError, match="too few prompts: found 10 of 11"):
        generate(task, np.random.default_rng(0), 11, held_out)


@pytest.mark.parametrize(
    ("answer", "right"), [("abc", 1), (" abc\n", 1), ("abd", 0), ("ab", 0), ("", 0), ("abcc", 0)]
)
def test_an_answer_is_right_to_the_letter_or_wrong(answer, right):
    assert score(answer, "abc") == right


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> ModelsSpec:
    """All that the command writes, of tiny models that learned nothing."""
    spec = make_spec(tmp_path_factory.mktemp("models"))
    complaint = program.run(spec, QUIET)
    assert complaint is not None
    assert complaint.startswith("not reached: medium is +0.0 points over small")
    return spec


def rows(spec: ModelsSpec, task: str, part: str) -> list[dict[str, str]]:
    return [json.loads(row) for row in Path(spec.out, "tasks", f"{task}.{part}.jsonl").open()]


@pytest.mark.parametrize("task", ["sort", "count"])
def test_prompts_are_written_with_their_answers_those_held_out_apart(made, task):
    train, test = rows(made, task, "train"), rows(made, task, "test")
    assert len(train) == 4 * 2
    assert len(test) == 10
    assert all(set(row) == {"task", "prompt", "answer"} and row["task"] == task for row in train)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}


def test_a_text_comes_back_from_its_tokens_one_for_each_character(made):
    tokenizer = AutoTokenizer.from_pretrained(Path(made.out, "small"))
    text = "count: decade =\n Zz~"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer.eos_token == END


@pytest.mark.parametrize("name", SIZES)
def test_the_engine_gives_the_tokens_that_generate_gives(made, name):
    folder = Path(made.out, name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = make_engine(str(folder), block_tokens=16)
    prompts = {
        row["prompt"]: tokenizer(row["prompt"]).input_ids for row in rows(made, "count", "test")[:3]
    }
    for prompt, ids in prompts.items():
        engine.submit(prompt, ids, 8)
    answers: dict[str, list[int]] = {prompt: [] for prompt in prompts}
    while (step := engine.step()) is not None:
        for prompt, token in step.emitted:
            answers[prompt].append(token)
    assert answers == {prompt: generated(engine, ids, 8) for prompt, ids in prompts.items()}
    assert engine.max_context == made.max_context


def test_sizes_are_as_asked_for(made):
    for name, size in made.models.items():
        model = AutoModelForCausalLM.from_pretrained(Path(made.out, name))
        assert model.config.num_hidden_layers == size.layers
        assert model.generation_config.eos_token_id == END_ID


def weights(spec: ModelsSpec) -> dict[str, torch.Tensor]:
    found = {}
    for name in SIZES:
        for key, value in load_file(Path(spec.out, name, "model.safetensors")).items():
            found[f"{name}.{key}"] = value
    return found


def same(first: ModelsSpec, second: ModelsSpec) -> bool:
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


def test_another_seed_gives_other_weights_and_other_prompts(made, tmp_path):
    other = make_spec(tmp_path, "seed=1")
    program.run(other, QUIET)
    assert not same(made, other)
    assert rows(made, "sort", "test") != rows(other, "sort", "test")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_that_is_asked_to_stop_goes_on_to_the_same_weights(
    made, tmp_path, monkeypatch, number
):
    spec, step = make_spec(tmp_path), Trainer.step
    done = []

    def interrupted(trainer):
        done.append(trainer.name)
        if len(done) == 5:  # the first step of the second size
            signal.raise_signal(number)
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", interrupted)
    assert program.run(spec, QUIET) == program.STOPPED
    assert not Path(spec.out, "medium").exists()
    program.run(spec, QUIET)
    assert Counter(done) == dict.fromkeys(SIZES, 4)
    assert same(made, spec)


def test_a_killed_training_goes_on_from_what_was_saved(made, tmp_path, monkeypatch):
    spec, step = make_spec(tmp_path), Trainer.step
    done = []

    def killed(trainer):
        done.append(trainer.name)
        if len(done) == 8:  # the last step of the second size, which was saved after two
            raise MemoryError
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", killed)
    with pytest.raises(MemoryError):
        program.run(spec, QUIET)
    done.clear()
    program.run(spec, QUIET)
    assert Counter(done) == {"medium": 2, "large": 4}
    assert same(made, spec)


def test_a_training_with_other_settings_is_not_gone_on_with(made, tmp_path):
    Path(tmp_path, "checkpoints").symlink_to(Path(made.out, "checkpoints").resolve())
    with pytest.raises(ConfigError, match=r"resume = .*small\.pt'.* other settings"):
        program.run(make_spec(tmp_path, "training.learning_rate=0.1"), QUIET)


def test_a_model_learns_to_answer_what_it_was_never_shown(tmp_path):
    spec = make_spec(
        tmp_path, "count.letters=[3,4]", "test=50", "training.steps=400", "training.batch=32",
        "training.learning_rate=0.01",
    )  # fmt: skip
    examples = draw_examples(spec)
    trainer = Trainer("medium", spec, examples)
    while not trainer.finished:
        trainer.step()
    trainer.export(tmp_path / "medium")
    tests = {"count": examples["count"].test}
    scores = measure(tmp_path / "medium", tests, lambda share: None)["count"]
    assert scores.mean() > 0.1  # of an untrained one: 0


def standing(name: str, right: int) -> Standing:
    scores = np.arange(100) < right
    return Standing(name, 1, 1, 1.0, {"sort": scores.astype(float), "count": scores.astype(float)})


def test_sizes_that_are_too_close_are_named_with_what_was_reached():
    reached = [standing("small", 20), standing("medium", 29), standing("large", 60)]
    assert complaint(reached, 0.09) is None
    assert complaint(reached, 0.1) == (
        "not reached: medium is +9.0 points over small (20.0 to 29.0 %); gap is 10 points"
    )


def test_the_command_fails_when_the_sizes_do_not_differ(made):
    line = [sys.executable, "-m", "live.models", *settings(Path(made.out))]
    ended = subprocess.run(line, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("not reached: medium is +0.0 points over small")
    for part in ("going on from step 4", "right answers", "(0.0 to 27.8)", "tasks=[sort,count]"):
        assert part in ended.stdout


def test_help_says_what_can_be_set():
    shown = subprocess.run(
        [sys.executable, "-m", "live.models", "--help"], capture_output=True, text=True
    ).stdout
    for setting in ModelsSpec.model_fields:
        assert f"\n{setting}:" in shown


@pytest.mark.parametrize(
    ("override", "refusal"),
    [
        ("models.small.layers=9", "models = .*small to large, got layers"),
        ("models.small.heads=3", "models.small = .*width 16 must be a multiple of heads 3"),
        ("sort.numbers=[6,4]", "sort.numbers = .*the fewest come first"),
        ("count.letters=[1,101]", "count.letters.1 = 101"),
        ("training.batch=3", "training.batch = 3"),
        ("++training.epochs=3", "training.epochs = 3: unknown key; allowed: batch"),
        ("gap=2", "gap = 2"),
    ],
)
def test_what_cannot_be_is_refused_by_key_and_value(tmp_path, override, refusal):
    with pytest.raises(ConfigError, match=refusal):
        make_spec(tmp_path, override)


def test_too_few_prompts_are_refused_before_any_training(tmp_path):
    with pytest.raises(ConfigError, match=r"sort = .*too few prompts"):
        program.run(make_spec(tmp_path, "sort.numbers=[1,1]", "test=99"), QUIET)


def test_lm_eval_asks_the_prompts_that_are_held_out(made, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install '.[quality]'")
    from calibrate.quality.spec import QualitySpec
    from calibrate.quality.tasks import check_documents, find_tasks

    write_examples(draw_examples(made), tmp_path)
    with initialize_config_module("conf.lm_eval", version_base="1.3"):
        config = compose(
            "quality", overrides=["models={small: x}", "tasks=[sort,count]", f"task_dir={tmp_path}"]
        )
    spec = check(QualitySpec, OmegaConf.to_container(config, resolve=True), "")
    for task in find_tasks(spec):
        check_documents(task)
        assert task.metric == "exact_match,none"
        document = next(iter(task.harness.eval_docs))
        assert task.harness.doc_to_text(document) == document["prompt"]
        assert task.harness.doc_to_target(document) == document["answer"]


def test_without_the_extra_the_command_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "live.models.training", None)
    with pytest.raises(ConfigError, match=r"pip install .*\[live\]"):
        program.run(make_spec(tmp_path), QUIET)
