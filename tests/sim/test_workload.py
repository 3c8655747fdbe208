import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sim.arrivals import Poisson, mean_rate_rps
from sim.config import ConfigError, check
from sim.lengths import Empirical, Fixed, Lognormal
from sim.tasks import DirichletMix, TasksSpec
from sim.ticks import TICKS_PER_S
from sim.workload import (
    AnyOfSpec,
    SavedSpec,
    SyntheticSpec,
    TraceSpec,
    WorkloadError,
    WorkloadSpec,
    at_rate,
    content_hash,
    generate,
    validate,
)

REPOSITORY = Path(__file__).parents[2]
TRACES = Path(os.environ.get("BESTEFFORT_TRACES", REPOSITORY / "../shared/traces"))
TASKS = TasksSpec(names=("piqa", "hellaswag"))
SYNTHETIC = SyntheticSpec(
    duration_s=20,
    arrivals=Poisson(rate_rps=10),
    prompt=Lognormal(median=100, sigma=1, max=1000),
    output=Lognormal(median=50, sigma=1, max=500),
    max_tokens=Fixed(tokens=100),
)


def trace(path, **changes):
    values = {"path": str(path), "format": "mooncake", "max_tokens": Fixed(tokens=100)}
    return TraceSpec(**{**values, **changes})


def mooncake(path, *lengths):
    """A trace with one request a second of the given (prompt, output) tokens."""
    rows = [
        {"timestamp": 1000 * i, "input_length": prompt, "output_length": output}
        for i, (prompt, output) in enumerate(lengths)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@given(
    seed=st.integers(0, 2**40),
    rate_rps=st.floats(5, 50),
    duration_s=st.floats(5, 20),
    cap=st.integers(1, 600),
)
@settings(max_examples=30, deadline=None)
def test_every_drawn_workload_obeys_the_rules(seed, rate_rps, duration_s, cap):
    changes = {
        "arrivals": Poisson(rate_rps=rate_rps),
        "duration_s": duration_s,
        "max_tokens": Empirical(values=(cap, 2 * cap)),
    }
    workload = generate(SYNTHETIC.model_copy(update=changes), TASKS, seed, 2048)
    validate(workload)
    assert workload.arrival_ticks[-1] <= duration_s * TICKS_PER_S
    assert workload.provenance["counts"]["requests"] == len(workload)


def test_one_seed_reproduces_and_another_differs():
    one, again = (content_hash(generate(SYNTHETIC, TASKS, 1, 2048)) for _ in range(2))
    assert one == again
    first, second = (generate(SYNTHETIC, TASKS, seed, 2048) for seed in (1, 2))
    assert not np.array_equal(first.arrival_ticks[:50], second.arrival_ticks[:50])


@pytest.mark.parametrize(
    ("changes", "unmoved"),
    [
        (
            {"prompt": Fixed(tokens=5)},
            ("arrival_ticks", "task", "output_tokens", "max_tokens"),
        ),
        (
            {"output": Lognormal(median=9, sigma=1, max=10)},
            ("arrival_ticks", "task", "prompt_tokens", "max_tokens"),
        ),
        (
            {"max_tokens": Lognormal(median=600, sigma=0.1, min=550, max=900)},
            ("arrival_ticks", "task", "prompt_tokens"),
        ),
    ],
)
def test_changing_one_length_law_leaves_the_other_draws(changes, unmoved):
    before = generate(SYNTHETIC, TASKS, 3, 2048)
    after = generate(SYNTHETIC.model_copy(update=changes), TASKS, 3, 2048)
    for name in unmoved:
        assert np.array_equal(getattr(before, name), getattr(after, name))


def test_changing_the_task_mix_leaves_arrivals_and_lengths():
    shifted = TASKS.model_copy(update={"mix": DirichletMix(concentration=0.1, window_s=1)})
    before, after = generate(SYNTHETIC, TASKS, 3, 2048), generate(SYNTHETIC, shifted, 3, 2048)
    assert np.array_equal(before.arrival_ticks, after.arrival_ticks)
    assert np.array_equal(before.output_tokens, after.output_tokens)
    assert not np.array_equal(before.task, after.task)


def test_an_output_longer_than_its_cap_is_cut_there_and_counted():
    uncut = generate(SYNTHETIC.model_copy(update={"max_tokens": Fixed(tokens=500)}), TASKS, 0, 2048)
    cut = generate(SYNTHETIC, TASKS, 0, 2048)
    assert np.array_equal(cut.output_tokens, np.minimum(uncut.output_tokens, 100))
    assert cut.provenance["counts"]["truncated"] == (uncut.output_tokens > 100).sum() > 0
    assert uncut.provenance["counts"]["truncated"] == 0


def test_the_cap_tells_nothing_about_the_output():
    spec = SYNTHETIC.model_copy(
        update={"max_tokens": Empirical(values=(600, 900)), "duration_s": 500}
    )
    workload = generate(spec, TASKS, 0, 2048)
    assert abs(np.corrcoef(workload.max_tokens, workload.output_tokens)[0, 1]) < 0.05


def test_a_run_without_requests_is_refused():
    idle = at_rate(SYNTHETIC, 1e-9)
    with pytest.raises(WorkloadError, match="has no requests: raise its rate"):
        generate(idle, TASKS, 0, 2048)


def test_a_trace_replays_its_times_and_lengths(tmp_path):
    path = mooncake(tmp_path / "trace", (10, 5), (20, 6), (30, 200))
    workload = generate(trace(path), TASKS, 0, 2048)
    assert workload.arrival_ticks.tolist() == [0, TICKS_PER_S, 2 * TICKS_PER_S]
    assert workload.duration_ticks == 3 * TICKS_PER_S
    assert workload.prompt_tokens.tolist() == [10, 20, 30]
    assert workload.output_tokens.tolist() == [5, 6, 100]
    assert workload.max_tokens.tolist() == [100, 100, 100]
    counts = workload.provenance["counts"]
    assert (counts["requests"], counts["truncated"], counts["over_context"]) == (3, 1, 0)


def test_a_trace_can_have_its_lengths_drawn_instead(tmp_path):
    path = mooncake(tmp_path / "trace", (10, 5), (20, 6))
    workload = generate(trace(path, prompt=Fixed(tokens=7)), TASKS, 0, 2048)
    assert workload.prompt_tokens.tolist() == [7, 7]
    assert workload.output_tokens.tolist() == [5, 6]


def test_a_trace_without_lengths_needs_length_laws(tmp_path):
    path = tmp_path / "trace"
    path.write_text("app,func,end_timestamp,duration\na,f,1,1\na,f,4,1\n")
    laws = {"prompt": Fixed(tokens=7), "output": Fixed(tokens=3)}
    workload = generate(trace(path, format="azure_functions_2021", **laws), TASKS, 0, 2048)
    assert workload.prompt_tokens.tolist() == [7, 7]
    values = {"kind": "trace", "path": "x", "format": "azure_functions_2021"}
    with pytest.raises(ConfigError, match="azure_functions_2021 records no lengths"):
        check(
            WorkloadSpec,
            {**values, "max_tokens": {"kind": "fixed", "tokens": 1}},
            "workload",
        )


def test_the_scale_transform_shrinks_what_exceeds_the_context_by_one_factor(tmp_path):
    path = mooncake(tmp_path / "trace", (100, 50), (300, 50))
    workload = generate(trace(path), TASKS, 0, 200)
    assert workload.prompt_tokens.tolist() == [100, 150]
    assert workload.max_tokens.tolist() == [100, 50]
    assert workload.output_tokens.tolist() == [50, 25]
    assert workload.provenance["counts"]["over_context"] == 1


def test_the_clip_transform_cuts_the_prompt(tmp_path):
    path = mooncake(tmp_path / "trace", (100, 50), (300, 50))
    workload = generate(trace(path, length_transform="clip"), TASKS, 0, 200)
    assert workload.prompt_tokens.tolist() == [100, 100]
    assert workload.max_tokens.tolist() == [100, 100]
    assert workload.output_tokens.tolist() == [50, 50]
    assert workload.provenance["counts"]["over_context"] == 1


def test_the_refuse_transform_leaves_the_lengths_and_counts(tmp_path):
    path = mooncake(tmp_path / "trace", (100, 50), (300, 50))
    workload = generate(trace(path, length_transform="refuse"), TASKS, 0, 200)
    assert workload.prompt_tokens.tolist() == [100, 300]
    assert workload.provenance["counts"]["over_context"] == 1


@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 100_000), st.integers(1, 5000)), min_size=2, max_size=20
    ),
    cap=st.integers(1, 5000),
    max_context=st.integers(2, 3000),
    transform=st.sampled_from(["scale", "clip"]),
)
@settings(max_examples=60, deadline=None)
def test_transformed_requests_fit_any_context_and_obey_the_rules(
    tmp_path_factory, lengths, cap, max_context, transform
):
    path = mooncake(tmp_path_factory.getbasetemp() / "transformed", *lengths)
    spec = trace(path, max_tokens=Fixed(tokens=cap), length_transform=transform)
    workload = generate(spec, TASKS, 0, max_context)
    validate(workload)
    assert (workload.prompt_tokens + workload.max_tokens <= max_context).all()
    fitted = np.array([prompt + cap <= max_context for prompt, _ in lengths])
    recorded = np.array([prompt for prompt, _ in lengths])
    assert np.array_equal(workload.prompt_tokens[fitted], recorded[fitted])
    assert (workload.max_tokens[fitted] == cap).all()


@pytest.mark.parametrize(("key", "seed", "context"), [("seed", -1, 9), ("max_context", 0, 1)])
def test_an_impossible_seed_or_context_is_refused(key, seed, context):
    with pytest.raises(ConfigError, match=f"{key} = {seed if key == 'seed' else context}: must be"):
        generate(SYNTHETIC, TASKS, seed, context)


def test_a_trace_set_to_a_rate_keeps_its_requests_and_their_order(tmp_path):
    path = mooncake(tmp_path / "trace", (10, 5), (20, 6), (30, 7))
    faster = generate(at_rate(trace(path, time_scale=3), 50), TASKS, 0, 2048)
    assert faster.prompt_tokens.tolist() == [10, 20, 30]
    assert len(faster) / (faster.duration_ticks / TICKS_PER_S) == pytest.approx(50)


def test_a_synthetic_workload_is_set_to_a_rate():
    faster = generate(at_rate(SYNTHETIC, 100), TASKS, 0, 2048)
    assert len(faster) == pytest.approx(2000, rel=0.1)
    for rate_rps in (0, float("nan")):
        with pytest.raises(ConfigError, match=r"rate_rps = .*must be a finite number > 0"):
            at_rate(SYNTHETIC, rate_rps)


def test_any_of_several_workloads_is_one_of_them_by_the_seed():
    slow = SYNTHETIC.model_copy(update={"duration_s": SYNTHETIC.duration_s / 2})
    several = AnyOfSpec(of={"usual": SYNTHETIC, "slow": slow})
    drawn = [generate(several, TASKS, seed, 2048) for seed in range(40)]
    shorter = 0
    for seed, workload in enumerate(drawn):
        assert content_hash(workload) == content_hash(generate(several, TASKS, seed, 2048))
        alone = [generate(one, TASKS, seed, 2048) for one in (SYNTHETIC, slow)]
        assert content_hash(workload) in map(content_hash, alone)
        shorter += content_hash(workload) == content_hash(alone[1])
    assert 8 < shorter < 32  # each as likely as the other


def test_any_of_several_workloads_is_set_to_a_rate():
    several = AnyOfSpec(of={"usual": SYNTHETIC, "same": SYNTHETIC})
    faster = generate(at_rate(several, 100), TASKS, 0, 2048)
    assert content_hash(faster) == content_hash(generate(at_rate(SYNTHETIC, 100), TASKS, 0, 2048))


def test_any_of_several_workloads_comes_at_so_many_times_its_rates():
    several = AnyOfSpec(of={"usual": SYNTHETIC}, rate_scale=3.0)
    mean_rps = mean_rate_rps(SYNTHETIC.arrivals)
    assert mean_rate_rps(several.one(0).arrivals) == pytest.approx(3 * mean_rps)
    assert mean_rate_rps(at_rate(several, 7).one(0).arrivals) == pytest.approx(7)
    recorded = trace("x", format="azure_llm", max_tokens=Fixed(tokens=5))
    assert AnyOfSpec(of={"x": recorded}, rate_scale=4.0).one(0).time_scale == 0.25
    paced = recorded.model_copy(update={"rate_rps": 2.0})
    assert AnyOfSpec(of={"x": paced}, rate_scale=4.0).one(0).rate_rps == 8.0


def test_a_saved_workload_cannot_be_set_to_a_rate():
    with pytest.raises(ConfigError, match=r"workload.kind = 'saved': must not be saved"):
        at_rate(SavedSpec(path="x"), 5)


@pytest.mark.parametrize("name", ["conv", "code"])
@pytest.mark.parametrize("transform", ["scale", "clip"])
def test_the_azure_traces_become_workloads_that_fit_the_context(name, transform):
    path = TRACES / f"AzureLLMInferenceTrace_{name}.csv"
    if not path.is_file():
        pytest.skip(f"the recorded trace {path.name} is not at hand (set BESTEFFORT_TRACES)")
    spec = trace(path, format="azure_llm", max_tokens=Fixed(tokens=512), length_transform=transform)
    workload = generate(spec, TASKS, 0, 2048)
    assert len(workload) == {"conv": 19366, "code": 8819}[name]
    assert (workload.prompt_tokens + workload.max_tokens <= 2048).all()
    counts = workload.provenance["counts"]
    share = {"conv": 0.169, "code": 0.485}[name]
    assert counts["over_context"] / len(workload) == pytest.approx(share, abs=0.001)
    assert counts["bad_rows"] == counts["out_of_order"] == 0
    assert len(generate(at_rate(spec, 40), TASKS, 0, 2048)) == len(workload)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "conf/workload").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_workload_is_a_valid_setting(path, monkeypatch):
    monkeypatch.setenv("BESTEFFORT_TRACES", "/records")
    node = OmegaConf.load(path)
    if path.stem == "saved":
        node.path = "workload.parquet"
    values = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    spec = check(WorkloadSpec, values, "workload")
    if isinstance(spec, TraceSpec):
        assert spec.path.startswith("/records/")
    for part in spec.of.values() if isinstance(spec, AnyOfSpec) else [spec]:
        if isinstance(part, SyntheticSpec) and part.arrivals.kind != "fitted_gamma":
            workload = generate(part, TASKS, 0, 2048)
            assert workload.provenance["counts"]["truncated"] < 0.01 * len(workload)
            assert (workload.prompt_tokens + workload.max_tokens <= 2048).all()


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "conf/tasks").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_task_mix_is_a_valid_setting(path):
    tasks = check(TasksSpec, OmegaConf.to_container(OmegaConf.load(path)), "tasks")
    assert generate(SYNTHETIC, tasks, 0, 2048).tasks == tasks.names
