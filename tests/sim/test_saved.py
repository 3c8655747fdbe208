import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sim.arrivals import Poisson
from sim.config import ConfigError
from sim.lengths import Empirical, Fixed, Lognormal
from sim.saved import WorkloadError, content_hash, load, save, validate
from sim.tasks import TasksSpec
from sim.workload import SavedSpec, SyntheticSpec, generate

COLUMNS = (
    "arrival_ticks",
    "task",
    "prompt_tokens",
    "output_tokens",
    "max_tokens",
    "cached_tokens",
    "priority",
)
TASKS = TasksSpec(names=("piqa", "hellaswag"))
SYNTHETIC = SyntheticSpec(
    duration_s=20,
    arrivals=Poisson(rate_rps=10),
    prompt=Lognormal(median=100, sigma=1, max=1000),
    output=Lognormal(median=50, sigma=1, max=500),
    max_tokens=Fixed(tokens=100),
)


def same(first, second):
    """Whether two workloads are identical in every field."""
    return (
        (first.tasks, first.duration_ticks, first.provenance)
        == (second.tasks, second.duration_ticks, second.provenance)
    ) and all(
        getattr(first, name).dtype == getattr(second, name).dtype
        and np.array_equal(getattr(first, name), getattr(second, name))
        for name in COLUMNS
    )


def test_a_workload_read_back_is_identical(tmp_path):
    spec = SYNTHETIC.model_copy(update={"prompt": Empirical(values=(2, 3), weights=(1, 2))})
    workload = generate(spec, TASKS, 5, 2048)
    save(workload, tmp_path / "workload.parquet")
    assert same(load(tmp_path / "workload.parquet"), workload)
    assert same(generate(SavedSpec(path=str(tmp_path / "workload.parquet")), TASKS, 9, 2), workload)
    assert [entry.name for entry in tmp_path.iterdir()] == ["workload.parquet"]


def test_a_saved_workload_of_other_tasks_is_refused(tmp_path):
    save(generate(SYNTHETIC, TASKS, 5, 2048), tmp_path / "workload.parquet")
    with pytest.raises(ConfigError, match=r"tasks.names = \('arc',\).*is of \('piqa', 'hellaswag'"):
        generate(
            SavedSpec(path=str(tmp_path / "workload.parquet")), TasksSpec(names=("arc",)), 0, 2048
        )


def test_a_failed_save_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "workload.parquet"
    workload = generate(SYNTHETIC, TASKS, 5, 2048)
    save(workload, path)

    def full_disk(table, draft):
        draft.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save(generate(SYNTHETIC, TASKS, 6, 2048), path)
    monkeypatch.undo()
    assert same(load(path), workload)
    assert list(tmp_path.iterdir()) == [path]


def rewritten(path, edit_header=None, edit_table=None):
    """The saved file at `path` with its header or its columns edited."""
    table = pq.read_table(path)
    ((key, text),) = table.schema.metadata.items()
    header = json.loads(text)
    if edit_table:
        table = edit_table(table)
    if edit_header:
        edit_header(header)
    pq.write_table(table.replace_schema_metadata({key: json.dumps(header).encode()}), path)
    return path


def with_column(name, change):
    def edit(table):
        values = table[name].to_numpy().copy()
        change(values)
        return table.set_column(table.column_names.index(name), name, pa.array(values))

    return edit


def one_more(values):
    values[3] += 1


def backwards(values):
    values[:] = values[::-1]


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"edit_table": with_column("prompt_tokens", one_more)}, "altered since it was saved"),
        ({"edit_header": lambda h: h["provenance"].update(seed=6)}, "altered since it was saved"),
        ({"edit_header": lambda h: h.update(duration_ticks=2**60)}, "altered since it was saved"),
        ({"edit_header": lambda h: h.update(schema_version=2)}, "schema_version = 2: must be 1"),
        ({"edit_header": lambda h: h.pop("sha256")}, "its metadata lack 'sha256'"),
        ({"edit_table": lambda t: t.drop_columns(["task"])}, "columns .*: must be arrival_ticks"),
        (
            {"edit_table": with_column("arrival_ticks", backwards)},
            "arrival_ticks of request 1 = .*not before the request ahead",
        ),
        (
            {"edit_table": lambda t: t.set_column(1, "task", t["task"].cast(pa.int64()))},
            r"task: int64.*must be int32",
        ),
    ],
)
def test_a_file_that_is_not_as_it_was_saved_is_refused(tmp_path, edits, message):
    path = tmp_path / "workload.parquet"
    save(generate(SYNTHETIC, TASKS, 5, 2048), path)
    with pytest.raises(WorkloadError, match=f"workload.parquet: {message}"):
        load(rewritten(path, **edits))


def test_a_file_that_is_no_workload_is_refused(tmp_path):
    with pytest.raises(WorkloadError, match="no such file"):
        load(tmp_path / "missing.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(WorkloadError, match="not a saved workload"):
        load(tmp_path / "text.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(WorkloadError, match="not a saved workload"):
        load(tmp_path / "other.parquet")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("arrival_ticks", 2**62, r"arrival_ticks of request 3 = .* must be < duration_ticks"),
        ("task", 2, "task of request 2 = 2: must be an index into the 2 tasks"),
        ("task", -1, "task of request 2 = -1"),
        ("prompt_tokens", 0, "prompt_tokens of request 2 = 0: must be ≥ 1"),
        ("output_tokens", 0, "output_tokens of request 2 = 0: must be ≥ 1"),
        ("max_tokens", 0, "max_tokens of request 2 = 0: must be ≥ output_tokens"),
        ("cached_tokens", -1, "cached_tokens of request 2 = -1: must be ≥ 0 and < prompt_tokens"),
        ("cached_tokens", 5000, "cached_tokens of request 2 = 5000"),
        ("priority", 1, "priority of request 2 = 1: .*not supported yet"),
    ],
)
def test_a_broken_rule_is_named_with_its_request_and_value(name, value, message):
    workload = generate(SYNTHETIC, TASKS, 5, 2048)
    column = getattr(workload, name).copy()
    column[3 if name == "arrival_ticks" else 2] = value
    if name == "arrival_ticks":
        column[3:] = value
    with pytest.raises(WorkloadError, match=message):
        validate(replace(workload, **{name: column}))


def test_columns_of_other_lengths_and_repeated_tasks_are_refused():
    workload = generate(SYNTHETIC, TASKS, 5, 2048)
    with pytest.raises(WorkloadError, match=r"task: int32\[3\], must be int32"):
        validate(replace(workload, task=workload.task[:3]))
    with pytest.raises(WorkloadError, match="must be names that differ"):
        validate(replace(workload, tasks=("a", "a")))


def test_the_content_hash_changes_with_any_part():
    workload = generate(SYNTHETIC, TASKS, 5, 2048)
    changed = [
        replace(workload, tasks=("a", "b")),
        replace(workload, duration_ticks=workload.duration_ticks + 1),
        replace(workload, provenance={}),
        *(replace(workload, **{name: getattr(workload, name) + 1}) for name in COLUMNS),
    ]
    assert len({content_hash(each) for each in [workload, *changed]}) == len(changed) + 1


def test_cached_tokens_below_the_prompt_are_allowed():
    workload = generate(SYNTHETIC, TASKS, 5, 2048)
    validate(replace(workload, cached_tokens=workload.prompt_tokens - 1))
