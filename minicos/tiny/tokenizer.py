"""The tokenizer of the embedded model: one word, one token, in the file format of the real one.

    python -m minicos.tiny.tokenizer minicos/tiny/weights/google/umt5-xxl/tokenizer.json

writes the file that lies beside the model's weights, in the official layout.
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from minicos.config import TINY_TEXT
from minicos.runs import replace_file

SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2; the first two as in UMT5
LEXICON = """
    solve the maze mark circle triangle square cross go to red blue goal pass behind wall turn l
    grow continue size sequence of and a left right up down
"""
WORDS = LEXICON.split()  # ids 3 and up


def build() -> Tokenizer:
    """Lower case, split at white space and punctuation, look each word up, append </s>."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    if len(vocabulary) > TINY_TEXT.vocab_size:
        raise ValueError(
            f"{len(vocabulary)} tokens do not fit into the {TINY_TEXT.vocab_size} rows of the embedding"
        )
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    replace_file(Path(sys.argv[1]), lambda temporary: build().save(str(temporary)))
