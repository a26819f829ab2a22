"""The token counter: totals, boundaries, the text of each token."""

import json

from reverie.text.count import Count, count
from reverie.text.tokenizer import ClipTokenizer

CLIP = ClipTokenizer.published()
SHORT = ClipTokenizer.published(max_length=6)


def texts(found: Count) -> list[list[list[list[str]]]]:
    """Parts, stages, chunks, tokens."""
    return [
        [[[token.text for token in chunk] for chunk in stage.chunks] for stage in part.stages] for part in found.parts
    ]


def test_a_prompt_of_one_chunk() -> None:
    found = count("a (red:1.2) café", CLIP)
    assert texts(found) == [[[["a", "red", "café"]]]]
    assert [token.weight for token in found.parts[0].stages[0].chunks[0]] == [1.0, 1.2, 1.0]
    assert (found.dialect, found.room, found.tokens, found.chunks, found.until_next) == ("a1111", 75, 3, 1, 72)


def test_chunks_and_breaks() -> None:
    found = count("a b c d e f BREAK g", SHORT, comma_backtrack=0)
    assert texts(found) == [[[["a", "b", "c", "d"], ["e", "f"], ["g"]]]]
    assert (found.tokens, found.chunks, found.until_next) == (7, 3, 3)


def test_the_longest_stage_counts() -> None:
    found = count("[a:b c d e f:0.5] AND g :0.3 <lora:x:1>", SHORT, steps=10, comma_backtrack=0)
    assert texts(found) == [[[["a"]], [["b", "c", "d", "e"], ["f"]]], [[["g"]]]]
    assert [[stage.until for stage in part.stages] for part in found.parts] == [[5, 10], [10]]
    assert [part.weight for part in found.parts] == [1.0, 0.3]
    assert (found.tokens, found.chunks, found.networks) == (5, 2, ("lora:x",))


def test_the_empty_prompt_has_one_chunk_without_tokens() -> None:
    found = count("", CLIP)
    assert (texts(found), found.tokens, found.chunks, found.until_next) == ([[[[]]]], 0, 1, 75)


def test_a_blend_counts_all_that_it_encodes() -> None:
    assert texts(count('("a b", "c").blend(1, 2)', CLIP, dialect="compel")) == [[[["a", "b"], ["c"]]]]


def test_textual_inversions_stand_at_each_of_their_vectors() -> None:
    found = count("a cat", CLIP, sizes={"cat": 3})
    assert texts(found) == [[[["a", "cat", "cat", "cat"]]]]


def test_it_is_plain_data() -> None:
    found = json.loads(json.dumps(count("a (red:2) [b:c:3] :)", CLIP, steps=10).as_dict()))
    assert found["parts"][0]["stages"][0]["chunks"][0][1] == {"id": 736, "text": "red", "weight": 2.0}
    assert found["warnings"] == ["1 closing bracket has no opening one and is read as text"]
