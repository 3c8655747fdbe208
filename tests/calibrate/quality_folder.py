"""Tiny models and tasks written by a test: models that know which number comes after which."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "after", "comes", *NUMBERS]
FIRST = WORDS.index("zero")


def write_model(folder: Path, known: int) -> Path:
    """An OPT that continues `known` of the ten numbers by the next one, the others wrongly.

    Its layers add nothing, so that the last word alone decides, by a table in the output layer.
    """
    size = len(WORDS)
    config = OPTConfig(
        vocab_size=size, hidden_size=size, word_embed_proj_dim=size, ffn_dim=8,
        num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=64,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    decoder = model.model.decoder
    with torch.no_grad():
        for part in (decoder.embed_positions, decoder.layers[0].self_attn.out_proj,
                     decoder.layers[0].fc2, model.lm_head):  # fmt: skip
            for weights in part.parameters():
                weights.zero_()
        decoder.embed_tokens.weight.copy_(torch.eye(size))
        for number in range(10):
            answer = number + (1 if number < known else 2)
            model.lm_head.weight[FIRST + answer % 10, FIRST + number] = 10.0
    model.save_pretrained(folder)
    words = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(WORDS)},
            "unk_token": "<unk>",
        },
    }
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(words))
    PreTrainedTokenizerFast(
        tokenizer_file=str(file), pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(folder)  # fmt: skip
    return folder


CHOOSE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: numbers.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "after {{number}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: true}
"""
SAY = """
task: say
dataset_path: json
dataset_kwargs: {data_files: {test: numbers.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "after {{number}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["</s>"], max_gen_toks: 1, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
GRADED = """
include: say.yaml
task: graded
process_results: !function credit.credit
metric_list: [{metric: credit, aggregation: mean, higher_is_better: true}]
"""
CREDIT = """
def credit(doc, results):
    return {"credit": 0.75 if results[0] == doc["choices"][doc["answer"]] else 0.25}
"""
GROUP = "group: both\ntask: [choose, say]\n"


def write_tasks(folder: Path) -> Path:
    """The tasks `choose`, `say` and `graded` about twenty questions, two for each number."""
    folder.mkdir(parents=True)
    put_questions(folder, [*range(10), *range(10)])
    for name, text in (("choose", CHOOSE), ("say", SAY), ("graded", GRADED), ("both", GROUP)):
        (folder / f"{name}.yaml").write_text(text)
    (folder / "credit.py").write_text(CREDIT)
    return folder


def put_questions(folder: Path, numbers: Sequence[int]) -> None:
    """Write `numbers.jsonl`: which number comes after each of these."""
    rows = [{"number": NUMBERS[n], "choices": NUMBERS, "answer": (n + 1) % 10} for n in numbers]
    (folder / "numbers.jsonl").write_text("\n".join(map(json.dumps, rows)))
