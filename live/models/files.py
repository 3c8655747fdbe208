"""The examples on disk: JSON lines for training and load generators, a YAML file for lm-eval."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from live.models.spec import ModelsSpec
from live.models.tasks import Example, generate
from live.models.tokenizer import END
from sim.files import whole

HARNESS = """\
# for lm-evaluation-harness: python -m calibrate.quality tasks=[{name}] task_dir=<this folder>
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.test.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["{end}"], max_gen_toks: {tokens}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@dataclass(frozen=True)
class Examples:
    """Those of one task; no prompt is in both parts."""

    train: Sequence[Example]
    test: Sequence[Example]


def draw_examples(spec: ModelsSpec) -> dict[str, Examples]:
    """The examples of each task, which depend on the seed alone.

    Raises:
        ConfigError: if a task has too few prompts.
    """
    drawn = {}
    for index, task in enumerate(spec.tasks):
        held_out, own = (np.random.default_rng((spec.seed, index, part)) for part in (0, 1))
        test = generate(task, held_out, spec.test)
        wanted = spec.training.steps * spec.training.batch // len(spec.tasks)
        train = generate(task, own, wanted, {example.prompt for example in test})
        drawn[task.name] = Examples(train, test)
    return drawn


def write_examples(examples: dict[str, Examples], folder: Path) -> None:
    """Write, for each task, `<task>.train.jsonl`, `<task>.test.jsonl` and `<task>.yaml`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, own in examples.items():
        for part, rows in (("train", own.train), ("test", own.test)):
            with whole(folder / f"{name}.{part}.jsonl") as draft:
                draft.write_text("".join(f"{row.model_dump_json()}\n" for row in rows), "utf-8")
        longest = max(len(row.answer) for row in own.test)
        with whole(folder / f"{name}.yaml") as draft:
            draft.write_text(HARNESS.format(name=name, end=END, tokens=longest + 1), "utf-8")
