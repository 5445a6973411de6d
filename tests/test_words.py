"""The text rows of each word, against the rows that the encoder receives."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicos.config import TINY_TEXT
from minicos.errors import MinicosError
from minicos.text import Tokenizer, clean
from minicos.tiny import tokenizer as tiny
from minicos.words import Word, bare, rows, words

FILE = Path(tiny.__file__).parent / "weights/google/umt5-xxl/tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(FILE, TINY_TEXT.text_len)


def test_each_word_has_its_row(tokenizer):
    assert words(tokenizer, " Mark  the circle ") == [
        Word("Mark", (0,)),
        Word("the", (1,)),
        Word("circle", (2,)),
    ]
    assert rows(tokenizer, "mark the circle", "Circle.") == (2,)
    assert rows(tokenizer, "the maze, the goal", "the") == (0, 3)


@given(text=st.text(alphabet="ab ,.é名 \n", max_size=30))
def test_every_row_but_the_last_belongs_to_one_word(text):
    found = Tokenizer.load(FILE, 16)
    each = words(found, text)
    assert [w.text for w in each] == clean(text).split()
    taken = [row for w in each for row in w.rows]
    _, mask = found([text])
    assert taken == sorted(set(taken)) == [*range(int(mask.sum()) - 1)]


def test_what_a_long_prompt_loses_has_no_rows(tokenizer):
    short = Tokenizer(tokenizer.vocabulary, 3)
    assert [w.rows for w in words(short, "mark the circle")] == [(0,), (1,), ()]
    with pytest.raises(MinicosError, match="'circle' is in the tail that this long prompt loses"):
        rows(short, "mark the circle", "circle")
    with pytest.raises(MinicosError, match="has no word 'cercle'; did you mean circle"):
        rows(tokenizer, "mark the circle", "cercle")


def test_bare_words():
    assert [bare(w) for w in ("Cat,", "'it's'", "...", "red-haired")] == [
        "cat",
        "it's",
        "...",
        "red-haired",
    ]
