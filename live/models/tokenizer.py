"""The tokenizer of all sizes: a token for every printable character of ASCII."""

import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, END, UNKNOWN = SPECIAL = ("<pad>", "</s>", "<unk>")
VOCABULARY = (*SPECIAL, *string.printable)
PAD_ID, END_ID = VOCABULARY.index(PAD), VOCABULARY.index(END)


def make_tokenizer(max_context: int) -> PreTrainedTokenizerFast:
    """A tokenizer that adds nothing to a text; what is no printable ASCII is unknown."""
    model = models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=UNKNOWN)
    characters = Tokenizer(model)
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=PAD,
        bos_token=END,
        eos_token=END,
        unk_token=UNKNOWN,
        padding_side="left",  # answers are generated at the right
        model_max_length=max_context,
        clean_up_tokenization_spaces=False,
    )
