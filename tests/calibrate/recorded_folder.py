"""A recorded run written by a test: a tiny model with operator times that are simple to add up."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DENSE = (
    "layernorm", "qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj",
    "embedding", "final_layernorm",
)  # fmt: skip
CONTEXTS = (0, 256, 512, 1024, 4096)
LAYERS = 2
# microseconds
OPERATOR_US, TOKEN_US = 10.0, 0.5  # of each dense operator, and for each of its tokens
SEQUENCE_US = 4.0  # of lm_head and sampler, for each sequence
KV_TOKEN_US, DECODES_US = 0.003, 7.0  # attention of decodes, and its offset
PAIR_US = 0.0001
MIXED_US = 50.0  # what attention of decodes and prompts together takes beyond both


def attention_us(chunk: int, before: int, decodes: int, context: int) -> float:
    """Microseconds of one layer's attention."""
    pairs = chunk * before + chunk * (chunk + 1) / 2
    alone = PAIR_US * pairs + KV_TOKEN_US * decodes * context
    return alone + (DECODES_US if decodes else 0) + (MIXED_US if decodes and chunk else 0)


CONFIG: Mapping[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
META: Mapping[str, Any] = {
    "model": "someone/tiny",
    "vllm_version": "0.19.0",
    "engine_kwargs": {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "max_model_len": None,
        "tensor_parallel_size": 1,
        "dtype": "bfloat16",
        "kv_cache_dtype": "auto",
    },
}
PROFILE: Mapping[str, Any] = {
    "hardware": "RTXPRO6000",
    "gpu": "a card",
    "skew_fit": {"enabled": True, "per_tp": {1: {"alpha_default": 0.0}, 2: {"alpha_default": 0.1}}},
}


def write_folder(folder: Path, operators: tuple[str, ...] = DENSE) -> Path:
    """Write a run of six requests to `folder`."""
    (folder / "ops").mkdir(parents=True)
    put_json(folder / "config.json", CONFIG)
    put_json(folder / "meta.json", META)
    put_json(folder / "ops/profile_meta.yaml", PROFILE)  # JSON is YAML
    put_requests(folder, [(0.0, 300, 40), (0.0, 300, 40), (0.004, 20, 50), (0.008, 500, 30),
                          (0.009, 600, 25), (0.012, 100, 60)])  # fmt: skip
    counts = [1, 2, 4, 8, 16, 32, 256, 512]
    dense = [f"{o},{n},{OPERATOR_US + TOKEN_US * n}" for o in operators for n in counts]
    (folder / "ops/dense.csv").write_text("\n".join(["layer,tokens,time_us", *dense]))
    sequences = [f"{o},{n},{SEQUENCE_US * n}" for o in ("lm_head", "sampler") for n in (1, 16)]
    (folder / "ops/per_sequence.csv").write_text("\n".join(["layer,sequences,time_us", *sequences]))
    rows = [
        f"{c},{b},{n},{k},{attention_us(c, b, n, k)}"
        for c in (0, 16, 256, 512)
        for b in (CONTEXTS if c else (0,))
        for n in (0, 1, 2, 4, 8)
        for k in (CONTEXTS[1:] if n else (0,))
        if c or n
    ]
    header = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"
    (folder / "ops/attention.csv").write_text("\n".join([header, *rows]))
    return folder


def put_requests(folder: Path, requests: list[tuple[float, int, int]]) -> None:
    """Write `requests.jsonl`: arrival, prompt and output of each, answered at once."""
    put_answers(folder, [(*request, request[0] + 1.0, request[0] + 2.0) for request in requests])


def put_answers(folder: Path, requests: list[tuple[float, int, int, float, float]]) -> None:
    """Write `requests.jsonl`: arrival, prompt, output, first and last token of each.

    The client's clock is 1000 s ahead of the engine's.
    """
    rows = [
        {
            "input_toks": prompt,
            "output_toks": output,
            "arrival_time": 1000.0 + arrival,
            "queued_ts": arrival,
            "first_token_ts": first,
            "last_token_ts": last,
        }
        for arrival, prompt, output, first, last in requests
    ]
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, rows)))


def put_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document."""
    path.write_text(json.dumps(document))


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit a document in place."""
    document = json.loads(path.read_text())
    edit(document)
    put_json(path, document)
