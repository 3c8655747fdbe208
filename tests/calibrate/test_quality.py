"""`calibrate.quality` says how often models are right, goes on after a kill, refuses bad input."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from rich.console import Console

from calibrate.quality.__main__ import main, run
from calibrate.quality.spec import QualitySpec
from sim import command
from sim.config import ConfigError, check
from sim.profile import TaskQuality, load_bundle, save_bundle

NEEDS = "needs lm-eval: pip install -c constraints.txt -e '.[quality]'"
pytest.importorskip("lm_eval", reason=NEEDS)

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from calibrate.quality import harness, measurement, tasks  # noqa: E402
from calibrate.quality.measurement import measurement_key  # noqa: E402
from calibrate.quality.models import find_models  # noqa: E402
from calibrate.quality.tasks import find_tasks  # noqa: E402
from tests.calibrate.quality_folder import put_questions, write_model, write_tasks  # noqa: E402

VAGUE = '\n{"answer": 1}'
WRONG = '\n{"number": "one", "choices": ["one", "two"], "answer": 2}'
SMALL, LARGE = 0.4, 1.0  # of the questions that the two models answer


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module", autouse=True)
def few_tasks_of_lm_eval(tmp_path_factory):
    """A folder in place of lm-eval's own thirteen thousand tasks, which take seconds to read."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "piqa.yaml").write_text("task: piqa\ndataset_path: some/piqa\n")

    def manager(include_path: str | None = None, include_defaults: bool = True) -> TaskManager:
        paths = [str(folder)] * include_defaults + [include_path] * (include_path is not None)
        return TaskManager(include_path=paths, include_defaults=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TaskManager", manager)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with the models `small` and `large` and the folder `tasks`."""
    folder = tmp_path_factory.mktemp("quality")
    write_model(folder / "small", known=4)
    write_model(folder / "large", known=10)
    write_tasks(folder / "tasks")
    return folder


@pytest.fixture
def copied(made, tmp_path) -> Path:
    """The same, to be altered."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def make_spec(folder: Path, out: Path, *overrides: str) -> QualitySpec:
    settings = [
        f"models={{small: {folder / 'small'}, large: {folder / 'large'}}}",
        "tasks=[choose,say]",
        f"task_dir={folder / 'tasks'}",
        f"out={out}",
    ]
    with initialize_config_module("conf.lm_eval", version_base="1.3"):
        config = compose("quality", overrides=[*settings, *overrides])
    return check(QualitySpec, OmegaConf.to_container(config, resolve=True), "")


def told_by(spec: QualitySpec) -> str:
    told = StringIO()
    run(spec, "a command", Console(file=told, width=200))
    return told.getvalue()


def read_table(path: Path) -> dict[str, TaskQuality]:
    return check(dict[str, TaskQuality], json.loads(path.read_text()), "")


@pytest.fixture(scope="module")
def measured(made, tmp_path_factory) -> tuple[QualitySpec, str]:
    """A measurement of three tasks, and what it told."""
    spec = make_spec(made, tmp_path_factory.mktemp("out"), "tasks=[choose,say,graded]")
    return spec, told_by(spec)


def test_a_score_is_the_share_of_questions_that_a_model_answers(measured):
    spec, _ = measured
    table = read_table(Path(spec.out, "quality.json"))
    for task in ("choose", "say"):
        assert table[task].values == {"small": pytest.approx(SMALL), "large": LARGE}
        for model, value in table[task].values.items():
            low, high = table[task].intervals[model]
            assert 0 <= low <= value <= high <= 1
            assert high - low > 0.1  # twenty documents
    assert table["graded"].values["small"] == pytest.approx(0.75 * SMALL + 0.25 * (1 - SMALL))


def test_a_source_names_program_task_documents_and_date(measured):
    spec, _ = measured
    source = read_table(Path(spec.out, "quality.json"))["choose"].source
    task = find_tasks(spec)[0]
    for part in ("lm-evaluation-harness 0.4", "task choose", task.identity[:12], "n = 20", "cpu"):
        assert part in source


def test_the_larger_model_is_found_better_on_the_same_documents(measured):
    _, told = measured
    assert "+0.600" in told
    assert "3 of 3 times better" in told


def test_the_report_shows_every_task_and_where_it_comes_from(measured):
    spec, _ = measured
    page = Path(spec.out, "quality_report.html").read_text()
    for part in ("choose", "say", "graded", "<svg", "0.400", "lm-evaluation-harness", "a command"):
        assert part in page


def test_scores_are_those_of_lm_evals_own_evaluation(measured, monkeypatch):
    spec, _ = measured
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # it is slow
    manager = TaskManager(include_path=spec.task_dir, include_defaults=False)
    monkeypatch.chdir(spec.task_dir)
    settings = f"pretrained={spec.models['small']}"
    own = simple_evaluate(
        model="hf", model_args=settings, tasks=["choose", "say"], device="cpu",
        task_manager=manager, bootstrap_iters=0,
    )["results"]  # fmt: skip
    table = read_table(Path(spec.out, "quality.json"))
    assert table["choose"].values["small"] == own["choose"]["acc,none"]
    assert table["say"].values["small"] == own["say"]["exact_match,none"]


def test_a_second_run_measures_nothing_and_says_what_is_on_file(measured, monkeypatch):
    spec, _ = measured
    before = Path(spec.out, "quality.json").read_text()
    monkeypatch.setattr(measurement, "load_model", refuse)
    told = told_by(spec)
    assert "on file: small on choose, say, graded" in told
    assert Path(spec.out, "quality.json").read_text() == before


def refuse(*_):
    raise AssertionError("a model was loaded")


def test_a_killed_run_goes_on_from_the_pairs_that_have_finished(made, tmp_path, monkeypatch):
    spec = make_spec(made, tmp_path)
    asked = []

    def count(lm, task, spec, *, dies_at=None):
        asked.append((Path(lm.pretrained).name, task.label))
        if len(asked) == dies_at:
            raise KeyboardInterrupt
        return harness.score(lm, task, spec)

    monkeypatch.setattr(measurement, "score", lambda *given: count(*given, dies_at=2))
    with pytest.raises(KeyboardInterrupt):
        told_by(spec)
    assert len(list((tmp_path / "results").iterdir())) == 1
    asked.clear()
    monkeypatch.setattr(measurement, "score", count)
    told = told_by(spec)
    assert "on file: small on choose\n" in told
    assert asked == [("small", "say"), ("large", "choose"), ("large", "say")]
    assert read_table(tmp_path / "quality.json")["choose"].values["large"] == LARGE


def keys(spec: QualitySpec) -> dict[tuple[str, str], str]:
    return {
        (model.name, task.label): measurement_key(model, task, spec)
        for model in find_models(spec)
        for task in find_tasks(spec)
    }


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


@pytest.mark.parametrize(
    ("alter", "pairs"),
    [
        (lambda f: put_questions(f / "tasks", range(10)), "all"),
        (lambda f: append(f / "tasks/choose.yaml", 'description: "Count. "\n'), "choose"),
        (lambda f: append(f / "tasks/credit.py", "\n# other\n"), "all"),
        (lambda f: write_model(f / "small", known=5), "small"),
        (lambda f: append(f / "large/config.json", "\n"), "large"),
    ],
    ids=["documents", "task", "helper", "weights", "model"],
)
def test_what_is_altered_is_measured_again(copied, tmp_path, alter, pairs):
    spec = make_spec(copied, tmp_path)
    before = keys(spec)
    alter(copied)
    changed = {pair for pair, key in keys(spec).items() if key != before[pair]}
    assert changed == {pair for pair in before if pairs in ("all", *pair)}


@pytest.mark.parametrize("setting", ["limit=5", "seed=1", "dtype=float16"])
def test_under_other_settings_all_is_measured_again(made, tmp_path, setting):
    before, after = (keys(make_spec(made, tmp_path, *more)) for more in ((), (setting,)))
    assert not set(before.values()) & set(after.values())


def test_a_copy_of_the_same_models_and_tasks_is_not_measured_again(made, copied, tmp_path):
    assert keys(make_spec(made, tmp_path)) == keys(make_spec(copied, tmp_path))


def test_altered_results_are_refused_by_their_file(measured, tmp_path):
    spec, _ = measured
    shutil.copytree(Path(spec.out, "results"), tmp_path / "results")
    for file in (tmp_path / "results").iterdir():
        file.write_text("{}")
    with pytest.raises(ConfigError, match=r"\.json': the file was altered"):
        told_by(spec.model_copy(update={"out": str(tmp_path)}))


def test_few_shot_examples_a_limit_and_a_label_are_said(made, tmp_path):
    entry = "tasks=[{task: choose, num_fewshot: 2, metric: acc_norm, label: after}]"
    told_by(make_spec(made, tmp_path, entry, "limit=10"))
    table = read_table(tmp_path / "quality.json")
    assert table["after"].metric == "acc_norm"
    assert table["after"].values["small"] == pytest.approx(SMALL)
    assert "2 shots, n = 10, the first of 20 documents" in table["after"].source


def put(path: Path, text: str) -> None:
    path.write_text(text)


@pytest.mark.parametrize(
    ("overrides", "alter", "refusal"),
    [
        (["tasks=[chose]"], None, "tasks = 'chose': in tasks: choose, graded, say; of"),
        (["tasks=[both]"], None, "tasks = 'both': a group of tasks; .*: choose, say"),
        (["tasks=[pica]", "task_dir=null"], None, "tasks = 'pica': of lm-eval's 1: piqa"),
        (["tasks=[choose,piqa]"], None, "tasks = 'piqa': a task that lm-eval can load .*some/piqa"),
        (["tasks=[{task: choose, label: a/b}]"], None, "label"),
        (["tasks=[choose,choose]"], None, "tasks must have different labels"),
        (["tasks=[]"], None, "tasks = "),
        (["tasks=[{task: choose, metric: f1}]"], None, "metric of choose = 'f1': .* acc, acc_norm"),
        (["task_dir=nowhere"], None, "task_dir = 'nowhere': must be a folder"),
        ([], lambda f: (f / "tasks/say.yaml").unlink(), "tasks = 'say': in tasks: choose; files"),
        ([], lambda f: put(f / "tasks/say.yaml", "task: [say"), "cannot be read: graded.yaml, say"),
        ([], lambda f: (f / "tasks/numbers.jsonl").unlink(), "tasks = 'choose': .*numbers.jsonl"),
        ([], lambda f: put(f / "tasks/numbers.jsonl", "{"), "tasks = 'choose': a task that"),
        ([], lambda f: put_questions(f / "tasks", [1]), "1 documents; an interval needs two"),
        ([], lambda f: append(f / "tasks/numbers.jsonl", VAGUE), "tasks = 'choose, document 21'"),
        ([], lambda f: append(f / "tasks/numbers.jsonl", WRONG), "document 21': .*its 2 choices"),
        (["++models._x=y"], None, "models._x"),
        (["models.small=nowhere/at/all"], None, "models.small = 'nowhere/at/all': .*no such"),
        (["models.small=no/body"], None, "models.small = 'no/body': a causal language model"),
        ([], lambda f: (f / "small/config.json").unlink(), "models.small = .*a causal"),
        ([], lambda f: (f / "small/tokenizer.json").unlink(), "models.small = .*a causal"),
        ([], lambda f: (f / "small/model.safetensors").unlink(), "models.small = .*no .safetens"),
        ([], lambda f: put(f / "small/model.safetensors", "?"), "models.small = .*a causal"),
        (["apply_chat_template=true"], None, "apply_chat_template = True: .* no chat template"),
        (["limit=1"], None, "limit = 1"),
        (["device=tpu"], None, "device = 'tpu'"),
        (["device=cuda:99"], None, r"device = 'cuda:99': PyTorch finds here: cpu"),
        (["dtype=int4"], None, "dtype = 'int4'.*'float32'"),
        (["batch_size=0"], None, "batch_size"),
        (["++shots=3"], None, "shots = 3: unknown key; allowed: .*models"),
        (["bundle=nowhere"], None, "profile = 'nowhere': not a complete bundle"),
        (["bundle=pkg://calibrate.profiles/a100-80gb-analytic"], None, "a folder of your own"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_key_and_value(copied, tmp_path, overrides, alter, refusal):
    if alter is not None:
        alter(copied)
    with pytest.raises(ConfigError, match=refusal):
        told_by(make_spec(copied, tmp_path, *overrides))


def test_a_metric_that_is_no_mean_of_scores_is_refused_and_another_needs_no_new_run(
    made, tmp_path, monkeypatch
):
    entry = "tasks=[{{task: choose, metric: {}}}]".format
    with pytest.raises(ConfigError, match=r"metric of choose = 'brier_score,none': .*acc,none"):
        told_by(make_spec(made, tmp_path, entry("brier_score"), "models.large=${models.small}"))
    monkeypatch.setattr(measurement, "load_model", refuse)
    told_by(make_spec(made, tmp_path, entry("acc"), "models.large=${models.small}"))


@pytest.fixture
def bundle(tmp_path) -> Callable[..., Path]:
    """Writes a bundle whose models have these names."""

    def write(*names: str) -> Path:
        shipped = load_bundle("pkg://calibrate.profiles/a100-80gb-analytic")
        mine = replace(
            shipped,
            meta=shipped.meta.model_copy(update={"models": names}),
            models=dict.fromkeys(names, shipped.models["opt-125m"]),
        )
        save_bundle(mine, tmp_path / "mine")
        return tmp_path / "mine"

    return write


def test_a_bundle_gets_the_measured_tasks_and_keeps_the_others(measured, bundle):
    spec, _ = measured
    folder = bundle("large")
    before = load_bundle(str(folder))
    told_by(spec.model_copy(update={"bundle": str(folder)}))
    after = load_bundle(str(folder))
    assert after.quality["choose"].values == {"large": LARGE}
    assert after.quality["choose"].intervals["large"][0] < LARGE
    assert after.quality["piqa"] == before.quality["piqa"]
    assert after.content_hash != before.content_hash


def test_a_bundle_with_a_model_that_is_not_measured_is_refused_at_once(
    measured, bundle, monkeypatch
):
    spec, _ = measured
    monkeypatch.setattr(measurement, "measure", refuse)
    with pytest.raises(ConfigError, match=r"models = 'small, large': .*large, huge"):
        told_by(spec.model_copy(update={"bundle": str(bundle("large", "huge"))}))


def test_a_model_of_the_hub_is_known_by_its_commit(made, tmp_path, monkeypatch):
    cache, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--some--large"
    shutil.copytree(made / "large", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    spec = make_spec(made, tmp_path / "out", "models.large=some/large", "tasks=[choose]")
    assert [model.revision for model in find_models(spec)] == [None, commit]
    told_by(spec)
    assert read_table(tmp_path / "out/quality.json")["choose"].values["large"] == LARGE


def test_the_command_runs_from_a_shells_settings(made, tmp_path, monkeypatch, capsys):
    arguments = [
        f"models={{only: {made / 'large'}}}", "tasks=[say]", f"task_dir={made / 'tasks'}",
        f"out={tmp_path}",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["quality", *arguments])
    monkeypatch.setenv("TQDM_DISABLE", "1")  # or the command would set it for all tests
    try:
        command.run(main)
    finally:
        GlobalHydra.instance().clear()
    assert "there is none to compare it with" in capsys.readouterr().out
    assert read_table(tmp_path / "quality.json")["say"].values == {"only": LARGE}


def run_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "calibrate.quality", *arguments]
    return subprocess.run(line, capture_output=True, text=True)


def test_help_says_what_can_be_set():
    text = run_module("--help").stdout
    for setting in QualitySpec.model_fields:
        assert f"\n{setting}:" in text


def test_without_models_the_command_is_refused():
    refused = run_module()
    assert refused.returncode == 1
    assert refused.stderr.strip() == "refused: models is missing"


def test_without_the_extra_the_command_says_how_to_get_it(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "calibrate.quality.measurement", None)
    with pytest.raises(ConfigError, match=r"pip install .*\[quality\]"):
        told_by(make_spec(made, tmp_path))
