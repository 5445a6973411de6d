"""The text rows of each word of a prompt."""

from dataclasses import dataclass

from minicos.errors import MinicosError, suggest
from minicos.text import Tokenizer, clean


@dataclass(frozen=True)
class Word:
    """A word of a prompt, as written (after `text.clean`), and its rows of the text: one for each
    token, none if the word was cut off.
    """

    text: str
    rows: tuple[int, ...]


def words(tokenizer: Tokenizer, prompt: str) -> list[Word]:
    """The words of a prompt in order, split at white space. The row after the last word is the end
    token's; all later rows are padding.
    """
    text = clean(prompt)
    spans = tokenizer.vocabulary.encode(text).offsets[:-1]  # without the end token
    spans = spans[: tokenizer.text_len - 1]
    found: list[Word] = []
    end = 0
    for part in text.split():
        begin = text.index(part, end)
        end = begin + len(part)
        # tokens that end within the word: one may begin with the space before it
        found.append(Word(part, tuple(i for i, span in enumerate(spans) if begin < span[1] <= end)))
    return found


def rows(tokenizer: Tokenizer, prompt: str, word: str) -> tuple[int, ...]:
    """All rows of a word, wherever it occurs; punctuation around it and case are ignored.

    Raises:
        MinicosError: the word is not in the prompt, or is in the part that is cut off.
    """
    each = words(tokenizer, prompt)
    found = [w for w in each if bare(w.text) == bare(word)]
    if not found:
        known = [bare(w.text) for w in each]
        raise MinicosError(f"the prompt {prompt!r} has no word {word!r}{suggest(word, known)}")
    if not all(w.rows for w in found):
        raise MinicosError(f"{word!r} is in the tail that this long prompt loses")
    return tuple(row for w in found for row in w.rows)


def bare(word: str) -> str:
    """A word in lower case, without punctuation around it."""
    ends = [i for i, letter in enumerate(word) if letter.isalnum()]
    return word[ends[0] : ends[-1] + 1].lower() if ends else word
