"""The real engine answers as its model does, and forms the steps that it says it forms."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.calibrate import tiny
from tests.calibrate.tiny import OPT, QWEN3, generated, make_engine, write_config

# isort: split
from calibrate.engine import Engine
from calibrate.microbench import time_step
from calibrate.ragged_attention import ragged_attention
from calibrate.shapes import GridSpec, Limits, Shape, shapes
from calibrate.step import counts
from calibrate.turns import Turns
from calibrate.weights import shipped_models
from sim.config import ConfigError

torch = tiny.torch


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return make_engine(write_config(tmp_path_factory.mktemp("model"), "tiny"))


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    return [rng.integers(4, 128, n).tolist() for n in lengths]


def drained(engine: Engine) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}
    while (step := engine.step()) is not None:
        for request, token in step.emitted:
            answers.setdefault(request, []).append(token)
    return answers


@pytest.mark.parametrize("config", [OPT, QWEN3], ids=["opt", "qwen3, grouped queries"])
def test_answers_are_those_of_generate_token_by_token(config: dict, tmp_path: Path) -> None:
    engine = make_engine(write_config(tmp_path, "model", config))
    asked = prompts(10, 90)  # longer than a step: prompts are split
    for i, prompt in enumerate(asked):
        engine.submit(str(i), prompt, 9)
    answers = drained(engine)
    assert answers == {str(i): generated(engine, prompt, 9) for i, prompt in enumerate(asked)}


def test_answers_stay_right_when_the_cache_runs_out_and_requests_start_anew(tmp_path: Path) -> None:
    engine = make_engine(write_config(tmp_path, "model"), kv_tokens=160)
    asked = prompts(8, 40, seed=3)
    resets = 0
    for i, prompt in enumerate(asked):
        engine.submit(str(i), prompt, 40)
    answers: dict[str, list[int]] = {}
    while (step := engine.step()) is not None:
        resets += any(not p.decode and p.request_id in answers for p in step.pieces)
        for request, token in step.emitted:
            answers.setdefault(request, []).append(token)
    assert resets > 0
    assert answers == {str(i): generated(engine, prompt, 40) for i, prompt in enumerate(asked)}


def test_a_stop_token_ends_an_answer(engine: Engine) -> None:
    prompt = [7, 9, 11]
    whole = generated(engine, prompt, 12)
    stop = whole[-1]
    engine.submit("a", prompt, 12, stop)
    assert drained(engine)["a"] == whole[: whole.index(stop) + 1]


def test_a_cancelled_request_frees_its_place_and_its_cache(engine: Engine) -> None:
    free = engine.cache.get_num_free_blocks()
    engine.submit("stays", [5] * 30, 5)
    engine.submit("goes", [5] * 40, 5)
    engine.step()
    engine.cancel("goes")
    assert set(drained(engine)) == {"stays"}
    assert engine.cache.get_num_free_blocks() == free
    assert not engine.has_requests


def test_a_step_that_is_formed_says_who_is_admitted_and_who_starts_anew(tmp_path: Path) -> None:
    engine = make_engine(write_config(tmp_path, "model"), kv_tokens=160)
    for i, prompt in enumerate(prompts(8, 40, seed=3)):
        engine.submit(str(i), prompt, 40)
    inside: set[str] = set()
    came: list[str] = []
    resets = 0
    while (formed := engine.form()) is not None:
        inside.difference_update(formed.reset)
        inside.update(formed.admitted)
        came.extend(formed.admitted)
        resets += len(formed.reset)
        assert inside == set(engine.scheduler.active_requests)
        assert engine.blocks_used > 0
        inside.difference_update(engine.run(formed).finished)
    assert resets > 0
    assert len(came) == 8 + resets
    assert engine.blocks_used == 0


def test_who_waits_is_admitted_where_all_that_ran_were_cancelled_after_a_reset(
    tmp_path: Path,
) -> None:
    engine = make_engine(write_config(tmp_path, "model"), kv_tokens=160)
    for i, prompt in enumerate(prompts(8, 40, seed=3)):
        engine.submit(str(i), prompt, 40)
    while not (formed := engine.form()).reset:
        engine.run(formed)
    engine.run(formed)
    for name in [*engine.scheduler.active_requests]:
        engine.cancel(name)
    assert engine.has_requests
    assert drained(engine)


@pytest.mark.parametrize(
    ("prompt", "most"), [([], 4), ([5], 0), ([5] * 200, 57)], ids=["empty", "no token", "long"]
)
def test_a_request_that_can_never_be_served_is_refused(
    engine: Engine, prompt: list[int], most: int
) -> None:
    with pytest.raises(ValueError, match="together at most 256"):
        engine.submit("a", prompt, most)


@pytest.mark.parametrize("prompt", [[5, 128], [-1, 5]])
def test_tokens_that_the_model_does_not_know_are_refused(engine: Engine, prompt: list[int]) -> None:
    with pytest.raises(ValueError, match="below 128"):
        engine.submit("a", prompt, 4)


def test_an_id_in_use_is_refused(engine: Engine) -> None:
    engine.submit("twice", [5], 2)
    with pytest.raises(ValueError, match="here already"):
        engine.submit("twice", [5], 2)
    drained(engine)


@settings(max_examples=60, deadline=None)
@given(
    contexts=st.lists(st.integers(1, 120), max_size=6),
    chunks=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=2),
)
def test_a_step_of_any_shape_can_be_had(
    engine: Engine, contexts: list[int], chunks: list[tuple[int, int]]
) -> None:
    shape = Shape(tuple(contexts), tuple(chunks))
    if not contexts and not chunks:
        return
    free = engine.cache.get_num_free_blocks()
    step = time_step(engine, shape)
    assert counts(step.pieces) == shape.counts
    assert sorted(p.done for p in step.pieces if p.decode) == sorted(contexts)
    assert sorted((p.done, p.tokens) for p in step.pieces if not p.decode) == sorted(chunks)
    assert step.begin_s <= step.prepared_s <= step.computed_s <= step.end_s
    assert engine.cache.get_num_free_blocks() == free


def test_a_placed_request_computes_what_a_real_one_would(engine: Engine) -> None:
    """The step after a placed context attends to as many tokens as the real one."""
    engine.submit("real", [5] * 50, 3)
    engine.step()
    engine.step()
    real = engine.step()
    engine.clear()
    placed = time_step(engine, Shape(contexts=(50,)))
    assert real is not None
    assert counts(real.pieces) == counts(placed.pieces)


def test_engines_take_turns_and_those_without_work_are_passed_over(tmp_path: Path) -> None:
    engines = [make_engine(write_config(tmp_path, name)) for name in ("a", "b", "c")]
    turns = Turns(engines)
    assert turns.step() is None
    engines[1].submit("x", [5, 6], 4)
    engines[2].submit("y", [5, 6], 2)
    served = [turns.step() for _ in range(4)]
    engines[0].submit("z", [5, 6], 2)
    while (one := turns.step()) is not None:
        served.append(one)
    assert [number for number, _ in served if served] == [1, 2, 1, 2, 0, 1, 0, 1]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2)])
def test_each_sequence_attends_to_its_own_past_alone(heads: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    lengths = [(1, 1), (1, 9), (5, 5), (3, 8), (2, 2)]  # queries, keys
    n_q, n_k = (sum(each) for each in zip(*lengths, strict=True))
    query = torch.randn(1, heads, n_q, 8)
    keys, values = torch.randn(n_k, kv_heads, 8), torch.randn(n_k, kv_heads, 8)
    ends = [torch.tensor([0, *np.cumsum(each)], dtype=torch.int32) for each in zip(*lengths)]  # noqa: B905
    output, _ = ragged_attention(
        SimpleNamespace(layer_idx=0), query, torch.zeros(0), torch.zeros(0), None,
        cache=SimpleNamespace(update=lambda **_: (keys, values)), cu_seq_lens_q=ends[0],
        cu_seq_lens_k=ends[1], max_seqlen_q=5, max_seqlen_k=9, read_index=[], write_index=[],
    )  # fmt: skip
    for i, (queries, seen) in enumerate(lengths):
        begin_q, begin_k = int(ends[0][i]), int(ends[1][i])
        for j in range(queries):
            past = slice(begin_k, begin_k + seen - queries + j + 1)
            for head in range(heads):
                at = head * kv_heads // heads
                scores = keys[past, at] @ query[0, head, begin_q + j] / 8**0.5
                expected = torch.softmax(scores, 0) @ values[past, at]
                assert torch.allclose(output[0, begin_q + j, head], expected, atol=1e-5)


@pytest.mark.parametrize("given", [{"softcap": 30.0}, {"s_aux": 1}, {"sliding_window": 4}])
def test_attention_of_another_kind_is_refused(given: dict) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(given))):
        ragged_attention(
            SimpleNamespace(layer_idx=0), torch.zeros(1), torch.zeros(1), torch.zeros(1), None,
            cache=None, cu_seq_lens_q=None, cu_seq_lens_k=None, max_seqlen_q=1, max_seqlen_k=1,
            read_index=[], write_index=[], **given,
        )  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_answers_on_a_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    from calibrate.engine_spec import EngineSpec

    source = write_config(tmp_path, "model", head_dim=16)
    spec = EngineSpec(
        max_batch=8, token_budget=32, block_tokens=16, kv_tokens=1024, dtype="bfloat16", seed=0
    )
    engine = Engine(source, torch.device("cuda"), spec)
    asked = prompts(6, 90)
    for i, prompt in enumerate(asked):
        engine.submit(str(i), prompt, 2)
    answers = drained(engine)
    engine.model.to("cpu")
    same = sum(answers[str(i)] == generated(engine, p, 2) for i, p in enumerate(asked))
    assert same >= 5  # bfloat16 may break a tie otherwise


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        (QWEN3, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "full"),
        (OPT, {"model_type": "no-such-model"}, "transformers config"),
    ],
    ids=["sliding window", "unknown type"],
)
def test_a_model_that_cannot_be_served_right_is_refused(
    config: dict, changes: dict, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        make_engine(write_config(tmp_path, "model", config, **changes))


def test_a_source_that_is_nothing_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="opt-125m, opt-1m"):
        make_engine(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="no such config"):
        make_engine(str(tmp_path / "nothing.json"))
    with pytest.raises(ConfigError, match="max_batch = 64"):
        make_engine("opt-1m", max_batch=64)


def test_a_saved_folder_is_served_with_its_own_weights(tmp_path: Path) -> None:
    first = make_engine(write_config(tmp_path, "model"), seed=11)
    first.model.set_attn_implementation("sdpa")
    first.model.save_pretrained(tmp_path / "saved")
    first.model.set_attn_implementation("paged|ragged")
    second = make_engine(str(tmp_path / "saved"))
    for each in (first, second):
        each.submit("a", [9, 8, 7], 10)
    assert drained(first) == drained(second)


def test_random_weights_depend_on_the_seed_alone(tmp_path: Path) -> None:
    source = write_config(tmp_path, "model")
    one, two, other = (make_engine(source, seed=seed) for seed in (1, 1, 2))
    sums = [sum(float(p.double().sum()) for p in e.model.parameters()) for e in (one, two, other)]
    assert sums[0] == sums[1] != sums[2]


def test_memory_is_counted_from_what_is_there(engine: Engine) -> None:
    assert engine.kv_bytes_per_token == 2 * 2 * 32 * 4  # keys and values, layers, width, bytes
    assert engine.kv_capacity_tokens == 1024
    parameters = {id(p): p for p in engine.model.parameters()}.values()
    assert engine.weights_bytes == sum(4 * p.numel() for p in parameters)


def test_shipped_configs_are_of_the_sizes_that_their_names_say() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from calibrate.weights import SHIPPED

    for name in shipped_models():
        config = AutoConfig.from_pretrained(str(SHIPPED.joinpath(f"{name}.json")))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        size = sum(p.numel() for p in model.parameters())
        number, unit = float(name[4:-1]), {"m": 1e6, "b": 1e9}[name[-1]]
        assert size / unit == pytest.approx(number, rel=0.2), name


def test_the_grid_has_each_shape_once_and_none_that_does_not_fit() -> None:
    grid = GridSpec(
        decodes=(1, 4, 99), contexts=(8, 100), prompts=(1, 16, 99), done=(20,), random=30,
        switched=5,
    )  # fmt: skip
    limits = Limits(max_batch=8, token_budget=32, max_context=128, kv_tokens=600)
    found = shapes(grid, limits, seed=1, others=True)
    assert len(set(found)) == len(found)
    assert all(limits.hold(shape) for shape in found)
    assert sum(shape.switched for shape in found) == 5
    assert found == shapes(grid, limits, seed=1, others=True)
    assert any(len(set(shape.contexts)) > 1 for shape in found)
    assert not any(shape.switched for shape in shapes(grid, limits, seed=1, others=False))
