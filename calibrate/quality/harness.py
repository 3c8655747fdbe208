"""lm-evaluation-harness itself: its `hf` model, and the scores that one gets on one task."""

from collections.abc import Callable, Sequence
from math import isfinite
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float, Int
from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import set_seed

from calibrate.quality.models import ALLOWED, Model, refusing
from calibrate.quality.spec import QualitySpec
from calibrate.quality.tasks import Task

SAME = 1e-9  # by which the mean of the scores may differ from what lm-eval makes of them
Scores = dict[str, tuple[float, ...]]  # "<metric>,<filter>" -> one for each document


class QuietLM(HFLM):  # type: ignore[misc]
    """lm-eval's `hf` model, which tells how many rows it has computed and draws no bars."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.told: Callable[[int], None] = lambda rows: None

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text that the model generates for each request."""
        answers: list[str] = super().generate_until(requests, disable_tqdm=True)
        return answers

    def _model_call(
        self, inps: Int[torch.Tensor, "B L"], **settings: object
    ) -> Float[torch.Tensor, "B L V"]:
        logits: torch.Tensor = super()._model_call(inps, **settings)
        self.told(len(inps))
        return logits

    def _model_generate(
        self, context: Int[torch.Tensor, "B L"], **settings: object
    ) -> Int[torch.Tensor, "B G"]:
        tokens: torch.Tensor = super()._model_generate(context, **settings)
        self.told(len(context))
        return tokens


def load_model(model: Model, spec: QualitySpec) -> QuietLM:
    """The model on the device of the settings.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    with refusing(f"models.{model.name}", model.place, ALLOWED):
        return QuietLM(
            pretrained=model.place,
            revision=model.revision or "main",
            device=spec.device,
            dtype=spec.dtype,
            batch_size=spec.batch_size,
        )


def score(lm: QuietLM, task: Task, spec: QualitySpec) -> Scores:
    """What lm-eval gives for each document: of its metrics those that are means of such scores.

    It is asked for no standard errors: for those it resamples every metric of a task, in processes
    of its own, and where all answers are right they are zero.
    """
    set_seed(spec.seed)
    task.harness.set_fewshot_seed(spec.seed)
    results = evaluate(
        lm=lm,
        task_dict={"tasks": {task.name: task.harness}},
        limit=task.documents,
        apply_chat_template=spec.apply_chat_template,
        fewshot_as_multiturn=spec.apply_chat_template,
        bootstrap_iters=0,
    )
    samples: Sequence[dict[str, Any]] = results["samples"][task.name]
    found: dict[str, list[object]] = {}
    for sample in sorted(samples, key=lambda sample: int(sample["doc_id"])):
        for metric in sample["metrics"]:
            found.setdefault(f"{metric},{sample['filter']}", []).append(sample[metric])
    totals = results["results"][task.name]
    return {
        key: tuple(float(value) for value in values if isinstance(value, Real))
        for key, values in found.items()
        if _is_mean(values, totals[key], task.documents)
    }


def _is_mean(values: Sequence[object], total: object, documents: int) -> bool:
    numbers = [float(value) for value in values if isinstance(value, Real)]
    if len(numbers) < documents or not all(map(isfinite, numbers)):
        return False
    return isinstance(total, Real) and abs(sum(numbers) / documents - float(total)) < SAME
