"""Chunks: the frame, where each dialect cuts, textual inversions, and that nothing is lost."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reverie.errors import RequestError
from reverie.text.chunks import SPLITS, Chunk, chunked, room_of
from reverie.text.pieces import Piece, Section
from reverie.text.t5_tokenizer import T5Tokenizer
from reverie.text.tokenizer import ClipTokenizer

CLIP = ClipTokenizer.published()
SD2 = ClipTokenizer.published(pad="!")
COMMA = CLIP.encode(",")[0]
WORDS = ["red", "cat", "astronaut", ",", ".", "7", "donaudampfschiff", ";"]


@cache
def short(length: int) -> ClipTokenizer:
    return ClipTokenizer.published(max_length=length)


def section(*pieces: str | tuple[str, float]) -> Section:
    return Section(tuple(Piece(p) if isinstance(p, str) else Piece(*p) for p in pieces))


def words(chunk: Chunk) -> list[int]:
    return list(chunk.ids[1 : chunk.used + 1])


def counts(chunks: list[Chunk]) -> list[int]:
    return [chunk.used for chunk in chunks]


SECTIONS = st.lists(
    st.tuples(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), st.sampled_from([1.0, 1.5])),
    min_size=1, max_size=5,
).map(lambda pieces: section(*pieces))  # fmt: skip


@pytest.mark.parametrize("split", list(SPLITS))
@settings(deadline=None)
@given(text=SECTIONS, length=st.sampled_from([3, 5, 16, 77]), backtrack=st.sampled_from([None, 0, 2, 20]))
def test_nothing_is_lost_and_every_chunk_is_a_frame(
    split: str, text: Section, length: int, backtrack: int | None
) -> None:
    tokenizer = short(length)
    chunks = chunked(text, tokenizer, split=split, comma_backtrack=backtrack)
    expected = [(i, piece.weight, n) for n, piece in enumerate(text.pieces) for i in tokenizer.encode(piece.text)]
    found = [
        (chunk.ids[at], chunk.weights[at], chunk.pieces[at]) for chunk in chunks for at in range(1, chunk.used + 1)
    ]
    assert found == expected
    for chunk in chunks:
        assert list(chunk.ids) == tokenizer.frame(words(chunk)).ids
        assert len(chunk.weights) == len(chunk.pieces) == length
        framing = [0, *range(chunk.used + 1, length)]
        assert all(chunk.weights[at] == 1 and chunk.pieces[at] == -1 for at in framing)
        assert chunk.used or len(chunks) == 1


@pytest.mark.parametrize("split", list(SPLITS))
@settings(deadline=None)
@given(text=st.text(max_size=80))
def test_a_text_that_fits_has_the_ids_of_the_tokenizer(split: str, text: str) -> None:
    if not any("\ud800" <= letter <= "\udfff" for letter in text) and not CLIP(text).cut:
        (chunk,) = chunked(section(text), CLIP, split=split)
        assert list(chunk.ids) == CLIP(text).ids


def test_padding_is_the_tokenizers() -> None:
    (chunk,) = chunked(section("a cat"), SD2)
    assert chunk.ids[2:5] == (2368, SD2.eos, 0)
    (empty,) = chunked(Section(), SD2)
    assert empty.ids == (SD2.bos, SD2.eos, *[0] * 75)


def test_pieces_are_tokenised_apart() -> None:
    (chunk,) = chunked(section("astro", ("naut", 1.2)), CLIP)
    assert words(chunk) == CLIP.encode("astro") + CLIP.encode("naut") != CLIP.encode("astronaut")
    assert chunk.weights[1:3] == (1.0, 1.2)


@pytest.mark.parametrize(
    ("before", "backtrack", "first"),
    [
        (70, None, 71),  # a comma 5 tokens back: what stands behind it moves
        (55, None, 56),  # 20 tokens from the end, the comma among them
        (54, None, 75),  # too far
        (54, 21, 55),
        (70, 0, 75),
        (74, None, 75),  # the comma is the last that fits
        (75, None, 75),  # the comma does not fit: it begins the next chunk
    ],
)
def test_commas(before: int, backtrack: int | None, first: int) -> None:
    text = "cat " * before + "," + " dog" * 30
    chunks = chunked(section(text), CLIP, comma_backtrack=backtrack)
    assert counts(chunks) == [first, before + 31 - first]


def test_the_last_comma_counts_and_moved_words_keep_their_weights() -> None:
    text = section("cat " * 60 + ",", ("cat " * 5 + ",", 1.3), ("dog " * 20, 0.5))
    first, second = chunked(text, CLIP)
    assert (first.used, second.used) == (67, 20)
    assert first.weights[61:69] == (1.0, 1.3, 1.3, 1.3, 1.3, 1.3, 1.3, 1.0)
    assert set(second.weights[1:21]) == {0.5}


def test_the_default_backtrack_is_in_proportion() -> None:
    # 20 of 75 are 4 of 14.
    assert counts(chunked(section("cat " * 10 + ", a b c d"), short(16))) == [11, 4]
    assert counts(chunked(section("cat " * 9 + ", a b c d e"), short(16))) == [14, 1]


def test_comfy_keeps_short_pieces_together() -> None:
    assert counts(chunked(section("cat " * 72, ("dog " * 7, 1.2)), CLIP, split="words")) == [72, 7]
    assert counts(chunked(section("cat " * 72, ("dog " * 8, 1.2)), CLIP, split="words")) == [75, 5]
    assert counts(chunked(section("cat " * 160), CLIP, split="words")) == [75, 75, 10]
    # A piece that is short, but longer than a chunk, is cut all the same.
    assert counts(chunked(section("cat " * 7), short(6), split="words")) == [4, 3]


def test_compel_cuts_at_sentences() -> None:
    assert counts(chunked(section("cat " * 40 + ". " + "dog " * 50), CLIP, split="sentences")) == [41, 50]
    assert counts(chunked(section("cat " * 40 + ", " + "dog " * 50), CLIP, split="sentences")) == [41, 50]
    assert counts(chunked(section("cat " * 20 + ". " + "a " * 20 + ", " + "dog " * 60), CLIP, split="sentences")) == [
        21, 21, 60,
    ]  # fmt: skip
    assert counts(chunked(section("cat " * 90), CLIP, split="sentences")) == [75, 15]
    # Between words rather than within: the word has several ids.
    ids = CLIP.encode("donaudampfschiff")
    assert counts(chunked(section("cat " * 74 + "donaudampfschiff"), CLIP, split="sentences")) == [74, len(ids)]


def test_textual_inversions_take_the_places_of_their_names() -> None:
    sizes = {"cat toy": 3, "cat": 2, "embedding:bad-hands": 4}
    (chunk,) = chunked(section("a Cat  toy,", ("cat catalogue embedding:bad-hands", 1.5)), CLIP, sizes=sizes)
    # Names are found where their ids are: "catalogue" is another word. The longest name wins.
    a, catalogue = CLIP.encode("a catalogue")
    assert words(chunk) == [a, 0, 0, 0, COMMA, 0, 0, catalogue, 0, 0, 0, 0]
    assert chunk.words == ((2, "cat toy"), (6, "cat"), (9, "embedding:bad-hands"))
    assert chunk.weights[2] == chunk.weights[4] == 1.0
    assert set(chunk.weights[6:13]) == {1.5}


@pytest.mark.parametrize("split", list(SPLITS))
@settings(deadline=None)
@given(before=st.integers(0, 80), size=st.integers(1, 75), comma=st.booleans())
def test_a_textual_inversion_is_never_split(split: str, before: int, size: int, comma: bool) -> None:
    text = section("dog " * before + ("," if comma else "") + " cat" + " dog" * 3)
    chunks = chunked(text, CLIP, split=split, sizes={"cat": size})
    ((chunk, (at, name)),) = ((chunk, word) for chunk in chunks for word in chunk.words)
    assert name == "cat"
    assert chunk.ids[at : at + size] == (0,) * size
    assert sum(counts(chunks)) == before + comma + size + 3


def test_a_textual_inversion_moves_with_its_neighbours() -> None:
    # The comma is 4 tokens back when the chunk is full; the vectors behind it move, and their position with them.
    text = section("dog " * 70 + ", cat dog dog")
    first, second = chunked(text, CLIP, sizes={"cat": 3})
    assert (first.used, second.used) == (71, 5)
    assert (first.words, second.words) == ((), ((1, "cat"),))


@pytest.mark.parametrize("size", [0, 76])
def test_a_textual_inversion_that_no_chunk_holds_is_refused(size: int) -> None:
    with pytest.raises(
        RequestError, match=f"embedding 'cat' has {size} vectors; this text encoder has room for 1 to 75"
    ):
        chunked(Section(), CLIP, sizes={"cat": size})


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown way to split long prompts 'comma'; did you mean 'commas'"):
        chunked(Section(), CLIP, split="comma")


@pytest.mark.parametrize("split", list(SPLITS))
def test_a_tokenizer_that_frames_otherwise(split: str) -> None:
    # T5 has no BOS, and a comma that stands alone has other ids than one behind a word.
    t5 = T5Tokenizer.published(max_length=8)
    first, second = chunked(section("a cat", (", red dog bird fish", 1.5)), t5, split=split, comma_backtrack=4)
    # a (two ids) cat , (two ids) red dog | bird fish
    assert [first.used, second.used] == {"commas": [5, 4], "words": [3, 6], "sentences": [5, 4]}[split]
    for chunk in (first, second):
        assert list(chunk.ids) == t5.frame(chunk.ids[: chunk.used]).ids
        assert chunk.pieces[chunk.used :] == (-1,) * (8 - chunk.used)
    assert first.weights[: first.used].count(1.0) == len(t5.encode("a cat"))


def test_room() -> None:
    assert [room_of(tokenizer) for tokenizer in (CLIP, short(16), T5Tokenizer.published(max_length=8))] == [75, 14, 7]
