"""Training one size, a step at a time, so that it can be stopped, saved and resumed to the bit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch
from jaxtyping import Int64
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM

from live.models.files import Examples
from live.models.spec import ModelsSpec
from live.models.tasks import Example
from live.models.tokenizer import END_ID, PAD_ID, VOCABULARY, make_tokenizer
from sim.config import ConfigError
from sim.files import whole, whole_folder

WARM_UP_STEPS = 100
DECAY = 0.4  # of the steps, at the end, over which the learning rate falls to zero
IGNORED = -100  # as a target: what is no part of an answer
INIT_STD = 0.08
CLIP = 1.0  # norm of the gradient


@dataclass(frozen=True)
class Progress:
    """What the last step has been like."""

    loss: float  # per token of an answer
    accuracy: float  # share of its examples, new to the model, answered right to the last token


class Trainer:
    """One model in training."""

    def __init__(self, name: str, spec: ModelsSpec, examples: Mapping[str, Examples]) -> None:
        """Begin with random weights; `resume` goes on from what was saved."""
        self.name, self.spec = name, spec
        self.step_count, self.seconds = 0, 0.0
        self._train = [own.train for own in examples.values()]
        self._tokenizer = make_tokenizer(spec.max_context)
        torch.set_num_threads(spec.threads)
        torch.manual_seed(spec.seed)
        self.model = OPTForCausalLM(_config(name, spec))
        self.model.generation_config = GenerationConfig(
            do_sample=False, bos_token_id=END_ID, eos_token_id=END_ID, pad_token_id=PAD_ID
        )
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=spec.training.learning_rate, betas=(0.9, 0.98),
            weight_decay=0.01, fused=True,
        )  # fmt: skip

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step_count >= self.spec.training.steps

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return int(self.model.num_parameters())

    def step(self) -> Progress:
        """Learn from the next batch."""
        begin_s = perf_counter()
        for group in self._optimizer.param_groups:
            group["lr"] = self.spec.training.learning_rate * _schedule(
                self.step_count, self.spec.training.steps
            )
        half = self.spec.training.batch // len(self._train)
        first = self.step_count * half
        rows = [row for train in self._train for row in train[first : first + half]]
        ids, targets = self._encode(rows)
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        counted = targets != IGNORED
        logits = self.model.lm_head(hidden[counted])
        loss = cross_entropy(logits, targets[counted])
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self._optimizer.step()
        right = torch.ones_like(counted)
        right[counted] = logits.argmax(-1) == targets[counted]
        self.step_count += 1
        self.seconds += perf_counter() - begin_s
        return Progress(loss.item(), right.all(dim=1).float().mean().item())

    def save(self, path: Path) -> None:
        """Keep the whole state in a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": self.spec.settings(self.name),
            "step_count": self.step_count,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        with whole(path) as draft:
            torch.save(state, draft)

    def resume(self, path: Path) -> bool:
        """Go on from a file that `save` wrote, if it is there.

        Raises:
            ConfigError: if the file belongs to a training with other settings.
        """
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        if state["settings"] != self.spec.settings(self.name):
            raise ConfigError(
                "resume", str(path), "belongs to a training with other settings; false begins anew"
            )
        self.step_count, self.seconds = state["step_count"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        return True

    def export(self, folder: Path) -> None:
        """Write model and tokenizer as transformers reads them."""
        with whole_folder(folder) as draft:
            self.model.save_pretrained(draft)
            self._tokenizer.save_pretrained(draft)

    def _encode(
        self, rows: Sequence[Example]
    ) -> tuple[Int64[torch.Tensor, "B T"], Int64[torch.Tensor, "B T"]]:
        """Prompts with their answers, and at each place the token to come, if of an answer."""
        tokens = self._tokenizer([row.prompt + row.answer for row in rows]).input_ids
        texts = [[*text, END_ID] for text in tokens]
        longest = max(map(len, texts))
        ids = torch.full((len(rows), longest), PAD_ID)
        targets = torch.full((len(rows), longest), IGNORED)
        for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
            asked = len(row.prompt)  # a token for each character
            ids[i, : len(text)] = torch.tensor(text)
            targets[i, asked - 1 : len(text) - 1] = torch.tensor(text[asked:])
        return ids, targets


def _config(name: str, spec: ModelsSpec) -> OPTConfig:
    size = spec.models[name]
    return OPTConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=size.width,
        word_embed_proj_dim=size.width,
        ffn_dim=2 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=spec.max_context,
        dropout=0.0,
        init_std=INIT_STD,
        pad_token_id=PAD_ID,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )


def _schedule(step: int, steps: int) -> float:
    """The share of the learning rate: a warm-up, a plateau, a fall to zero."""
    return min(1.0, (step + 1) / WARM_UP_STEPS, (1 - step / steps) / DECAY)
