"""The tokenizer of the embedded model: one token per word, in the file format of the real one.

    python -m minicos.tiny.tokenizer minicos/tiny/weights/google/umt5-xxl/tokenizer.json

writes the file next to the model's weights, in the official layout. A word keeps its id forever:
new words of the puzzles are appended, so older weights keep their rows.
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from minicos import puzzles
from minicos.config import TINY_TEXT
from minicos.runs import replace_file

SPECIAL = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2; the first two as in UMT5
LEXICON = """
    solve the maze mark circle triangle square cross go to red blue goal pass behind wall turn l
    grow continue size sequence of and a left right up down
"""
FIRST = tuple(LEXICON.split())  # ids 3 and up, as in the first release


def words(known: tuple[str, ...] = (*SPECIAL, *FIRST)) -> tuple[str, ...]:
    """All tokens in the order of their ids: `known`, then the words of prompts that it lacks."""
    return tuple(dict.fromkeys((*known, *puzzles.WORDS)))


def tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The tokens of a tokenizer in the order of their ids."""
    ids = tokenizer.get_vocab()
    return tuple(sorted(ids, key=ids.__getitem__))


def build(all_tokens: tuple[str, ...] | None = None) -> Tokenizer:
    """Lower case, split at white space and punctuation, look each word up, append </s>.

    Tokens are `words()` by default. Raises ValueError for more than the embedding has rows.
    """
    all_tokens = all_tokens or words()
    if len(all_tokens) > TINY_TEXT.vocab_size:
        raise ValueError(
            f"{len(all_tokens)} tokens do not fit into the {TINY_TEXT.vocab_size} rows "
            "of the embedding"
        )
    vocabulary = {word: i for i, word in enumerate(all_tokens)}
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
    path = Path(sys.argv[1])
    known = words(tokens(Tokenizer.from_file(str(path)))) if path.exists() else words()
    replace_file(path, lambda temporary: build(known).save(str(temporary)))
