"""Models small enough for tests, and the engine on them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a name that is nothing is refused at once

NEEDS = "needs the engine: pip install -c constraints.txt -e '.[live]'"
torch = pytest.importorskip("torch", reason=NEEDS)
pytest.importorskip("transformers", reason=NEEDS)

from calibrate.engine import Engine  # noqa: E402
from calibrate.engine_spec import EngineSpec  # noqa: E402

OPT = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 32, "ffn_dim": 64,
    "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 128, "max_position_embeddings": 256, "do_layer_norm_before": True,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128, "max_position_embeddings": 256,
}  # fmt: skip


def write_config(folder: Path, name: str, config: dict[str, Any] = OPT, **changes: Any) -> str:
    """The path of a config, as a model's source."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config | changes))
    return str(path)


def make_engine(source: str, **changes: Any) -> Engine:
    """An engine on the CPU."""
    settings = {
        "max_batch": 8, "token_budget": 32, "block_tokens": 4, "kv_tokens": 1024,
        "dtype": "float32", "seed": 0,
    }  # fmt: skip
    return Engine(source, torch.device("cpu"), EngineSpec(**settings | changes))


def generated(engine: Engine, prompt: list[int], count: int) -> list[int]:
    """What transformers' own `generate` answers, greedily."""
    model = engine.model
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    model.set_attn_implementation(before)
    return out[0, len(prompt) :].tolist()
