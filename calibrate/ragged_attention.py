"""Attention over sequences of unlike lengths packed in one batch, each attending to itself alone.

transformers' own `paged|sdpa` computes every query against the keys of every sequence and masks
what does not belong together: its cost grows with the product of the two. Here each sequence costs
what it holds, as in the kernels of production engines, so that a step costs what rule 12 of
`docs/simulation.md` says. It is registered with transformers as `paged|ragged`.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.generation.continuous_batching import PagedAttentionCache

NAME = "paged|ragged"
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux")


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cache: PagedAttentionCache,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    read_index: list[Tensor],
    write_index: list[Tensor],
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: object,
) -> tuple[Tensor, None]:
    """Causal attention of packed sequences; the last query of each sees all of its keys.

    Args:
        module: The layer; its `layer_idx` says which part of the cache is its own.
        query: The new tokens' queries, shape (1, heads, Q, head_dim), sequence after sequence.
        key: The new tokens' keys, shape (1, kv_heads, Q, head_dim).
        value: The new tokens' values, as `key`.
        attention_mask: None: lengths say what belongs together.
        cache: The paged KV cache, which is written to and read from.
        cu_seq_lens_q: Where each sequence's queries begin, int32 of shape (sequences + 1,).
        cu_seq_lens_k: Where each sequence's keys, cached and new, begin, as `cu_seq_lens_q`.
        max_seqlen_q: The largest number of queries of a sequence.
        max_seqlen_k: The largest number of keys of a sequence.
        read_index: Per group of layers, where the cache is read.
        write_index: Per group of layers, where the cache is written.
        scaling: Factor of the scores; None: 1/√head_dim.
        dropout: Must be 0.
        others: Further arguments of the layer; those that change attention are refused.

    Returns:
        The output, shape (1, Q, heads, head_dim), and no weights.

    Raises:
        NotImplementedError: for sliding windows, soft-capped scores, sinks, masks and dropout.
    """
    unlike = [name for name in _UNSUPPORTED if others.get(name) is not None]
    if unlike or attention_mask is not None or dropout:
        raise NotImplementedError(f"ragged attention has no {', '.join(unlike) or 'mask, dropout'}")
    keys, values = cache.update(
        key_states=key,
        value_states=value,
        layer_idx=module.layer_idx,
        read_index=read_index,
        write_index=write_index,
    )  # (K, kv_heads, head_dim)
    groups = query.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        packed = _packed_attention()(
            query[0].transpose(0, 1).contiguous(),
            keys.contiguous(),
            values.contiguous(),
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_seqlen_q,
            max_seqlen_k,
            scale=scaling,
            window_size=(-1, 0),  # causal, aligned to the last key
        )
        return packed.unsqueeze(0), None
    return _one_by_one(query, keys, values, cu_seq_lens_q, cu_seq_lens_k, scaling), None


@cache
def _packed_attention() -> Callable[..., Tensor]:
    """PyTorch's kernel for packed sequences; it takes seconds to import and needs a GPU."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn  # type: ignore[no-any-return]


def _one_by_one(
    query: Tensor, keys: Tensor, values: Tensor, ends_q: Tensor, ends_k: Tensor,
    scaling: float | None,
) -> Tensor:  # fmt: skip
    """A call for each sequence: the CPU has no kernel for packed ones."""
    keys, values = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    output = torch.empty_like(query)
    starts_q, starts_k = ends_q.tolist(), ends_k.tolist()
    for i in range(len(starts_q) - 1):
        mine, seen = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        n_q, n_k = mine.stop - mine.start, seen.stop - seen.start
        mask = None
        if 1 < n_q < n_k:  # `is_causal` would align the first query to the first key
            mask = torch.ones(n_q, n_k, dtype=torch.bool, device=query.device).tril(n_k - n_q)
        output[:, :, mine] = scaled_dot_product_attention(
            query[:, :, mine], keys[:, :, seen], values[:, :, seen],
            attn_mask=mask, is_causal=1 < n_q == n_k, scale=scaling,
        )  # fmt: skip
    return output.transpose(1, 2).contiguous()


AttentionInterface.register(NAME, ragged_attention)
