"""The vocabulary of T5 in the package."""

import pytest

from reverie.text.t5_tokenizer import T5Tokenizer

# The ids that the documentation of transformers gives for the published T5 models.
KNOWN = {
    "translate English to German: That is good.": [13959, 1566, 12, 2968, 10, 466, 19, 207, 5],
    "translate English to German: The house is wonderful.": [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5],
}


@pytest.mark.parametrize("text", list(KNOWN))
def test_published_ids(text: str) -> None:
    tokenizer = T5Tokenizer.published()
    assert tokenizer.encode(text) == KNOWN[text]
    assert tokenizer(text).ids == [*KNOWN[text], 1, *[0] * (255 - len(KNOWN[text]))]
    assert tokenizer.vocab_size == 32100


def test_it_is_read_once() -> None:
    assert T5Tokenizer.published() is T5Tokenizer.published()
    assert T5Tokenizer.published(max_length=77).max_length == 77
