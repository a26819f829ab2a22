"""The CLIP tokenizer by itself: its frame of 77, its data, and what it says about broken folders."""

import hashlib
import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie.errors import CheckpointError, InputError
from reverie.text.tokenizer import BOS, EOS, LENGTH, MERGES, ClipTokenizer

CLIP = ClipTokenizer.published()
WORDS = st.lists(st.sampled_from(["red", "apple", "face", "oil", "7", "painting", "sun", "café"]), max_size=20)


@given(st.text())
def test_any_text_gives_exactly_one_frame(text: str) -> None:
    got = CLIP(text)
    words = CLIP.encode(text)
    assert len(got.ids) == LENGTH
    assert got.ids[0] == CLIP.bos
    assert all(0 <= i < CLIP.vocab_size for i in got.ids)
    kept = words[: LENGTH - 2]
    assert got.ids[1 : len(kept) + 2] == [*kept, CLIP.eos]
    assert set(got.ids[len(kept) + 2 :]) <= {CLIP.pad}
    assert got.cut == len(words) - len(kept)
    assert got == CLIP(text)


@given(st.lists(st.integers(-5, 60_000)))
def test_decoding_never_fails(ids: list[int]) -> None:
    assert isinstance(CLIP.decode(ids), str)


@given(WORDS)
def test_plain_words_come_back(words: list[str]) -> None:
    text = " ".join(words)
    # Single digits are words of their own, so the spaces are the same.
    assert CLIP.decode(CLIP(text).ids) == text


def test_case_and_spaces_make_no_difference() -> None:
    assert CLIP.encode("A  RED\n\tApple ") == CLIP.encode("a red apple")


def test_known_ids() -> None:
    # The ids of this prompt are those that the published models were trained with.
    assert CLIP.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    assert (CLIP.vocab_size, CLIP.bos, CLIP.eos, CLIP.pad) == (49_408, 49_406, 49_407, 49_407)


def test_the_end_of_a_word_is_known() -> None:
    # Three ids for the one, one for the other.
    ids = CLIP.encode("donaudampf red")
    assert [CLIP.ends_word(i) for i in ids] == [False] * (len(ids) - 2) + [True, True]
    assert not any(CLIP.ends_word(i) for i in (CLIP.bos, CLIP.eos, CLIP.vocab_size))


def test_the_packaged_merges_are_the_published_file() -> None:
    # merges.txt of openai/clip-vit-large-patch14.
    published = "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"
    assert hashlib.sha256(MERGES.read_bytes()).hexdigest() == published


def test_what_is_cut_is_reported() -> None:
    got = CLIP("apple " * 76 + "a cat")
    assert got.cut == 3
    assert got.lost == "apple a cat"
    assert got.ids[-1] == CLIP.eos
    fitting = CLIP("apple " * 75)
    assert (fitting.cut, fitting.lost) == (0, "")


def test_other_padding_and_length() -> None:
    sd2 = ClipTokenizer.published(pad="!", max_length=5)
    assert sd2("cat").ids == [sd2.bos, 2368, sd2.eos, 0, 0]


def test_the_published_tokenizer_is_built_once() -> None:
    assert ClipTokenizer.published() is CLIP


def test_threads_agree() -> None:
    prompts = [f"a picture of number {n}" for n in range(40)]
    expected = [CLIP(prompt) for prompt in prompts]
    results: list[bool] = []
    work = [threading.Thread(target=lambda: results.append([CLIP(p) for p in prompts] == expected)) for _ in range(4)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert results == [True] * 4


def test_half_a_character_is_refused() -> None:
    with pytest.raises(InputError, match=r"U\+D83D\) at position 2"):
        CLIP("a \ud83d cat")


def test_a_frame_needs_room_for_a_word() -> None:
    with pytest.raises(InputError, match="no room"):
        ClipTokenizer.published(max_length=2)


def folder(path: Path, **files: str | None) -> Path:
    """Write a sound folder of five words, with some files replaced or (None) left out."""
    words = ["a", "b", "a</w>", "b</w>", "ab</w>", BOS, EOS]
    sound = {
        "vocab.json": json.dumps({w: i for i, w in enumerate(words)}),
        "merges.txt": "#version: 0.2\na b</w>\n",
    }
    for name, content in (sound | files).items():
        if content is not None:
            (path / name).write_text(content, encoding="utf-8")
    return path


def test_a_sound_folder(tmp_path: Path) -> None:
    tokenizer = ClipTokenizer.from_folder(folder(tmp_path), max_length=6)
    assert tokenizer("AB b").ids == [5, 4, 3, 6, 6, 6]


@pytest.mark.parametrize("length", [77, 12, 1e30])
def test_the_length_of_a_folder(tmp_path: Path, length: float) -> None:
    config = json.dumps({"model_max_length": length})
    assert len(ClipTokenizer.from_folder(folder(tmp_path, **{"tokenizer_config.json": config}))("a").ids) == min(
        length, LENGTH
    )


BROKEN: list[tuple[str, str | None, str]] = [
    ("vocab.json", None, "vocab.json is missing"),
    ("vocab.json", "{", "is not JSON"),
    ("vocab.json", "[" * 100_000, "is not JSON"),
    ("vocab.json", "[]", "holds a list"),
    ("vocab.json", "{}", "not a vocabulary"),
    ("vocab.json", '{"a": "0"}', "not a vocabulary"),
    ("vocab.json", '{"a": 0, "b": 0}', "not a vocabulary"),
    ("vocab.json", '{"a": -1}', "not a vocabulary"),
    ("vocab.json", '{"a": 0, "b</w>": 1, "ab</w>": 2}', "has no '<|startoftext|>'"),
    ("merges.txt", None, "merges.txt is missing"),
    ("merges.txt", "a b c\n", "Merge 0"),
    ("merges.txt", "ab\n", "Merge 0"),
    ("merges.txt", "a b</w>\n\na b\n", "Merge 1"),
    ("merges.txt", "b a</w>\n", "do not belong"),
    ("tokenizer_config.json", "nonsense", "is not JSON"),
    ("tokenizer_config.json", '{"model_max_length": "long"}', "model_max_length"),
    ("tokenizer_config.json", '{"model_max_length": NaN}', "model_max_length"),
    ("tokenizer_config.json", '{"padding_side": "left"}', "padding_side"),
    ("tokenizer_config.json", '{"pad_token": "?"}', "pad_token"),
    ("tokenizer_config.json", '{"pad_token": 3}', "special tokens"),
    ("tokenizer_config.json", '{"pad_token": {"content": 3}}', "special tokens"),
    ("tokenizer_config.json", '{"added_tokens_decoder": []}', "special tokens"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "c"}}}', "special tokens"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"99": {"content": "c"}}}', "claims id 99"),
    ("special_tokens_map.json", '{"bos_token": {}}', "special tokens"),
    ("added_tokens.json", '{"c": null}', "special tokens"),
    ("tokenizer.json", "{}", "no byte-pair model"),
    ("tokenizer.json", '{"added_tokens": 3}', "special tokens"),
    ("tokenizer.json", '{"model": {"vocab": {}, "merges": []}}', "not a vocabulary"),
    ("tokenizer.json", '{"model": {"vocab": {"<|startoftext|>": 0, "<|endoftext|>": 1}, "merges": {}}}', "Merge 0"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_a_broken_folder_is_one_clear_line(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ClipTokenizer.from_folder(folder(tmp_path, **{name: content})).encode("a")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_opening_does_not_wait_for_the_merges(tmp_path: Path) -> None:
    """The ids that frame a prompt are known from the vocabulary; what is wrong with the merges, the first text says."""
    tokenizer = ClipTokenizer.from_folder(folder(tmp_path, **{"merges.txt": "b a</w>\n"}))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.vocab_size) == (5, 6, 6, 7)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="do not belong"):
            tokenizer.encode("a")


def test_ids_that_are_known_before_the_published_vocabulary_is() -> None:
    """They are those that it has."""
    padded = ClipTokenizer.published(pad="!")
    assert (CLIP.encode(BOS), CLIP.encode(EOS), CLIP.encode("!")) == ([CLIP.bos], [CLIP.eos], [padded.pad + 256])
    assert CLIP.decode([padded.pad]) == "!"
    assert CLIP.decode([CLIP.vocab_size - 3]) != ""  # the last merge
    assert CLIP.decode([CLIP.vocab_size]) == ""


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    folder(tmp_path).joinpath("merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not readable as UTF-8"):
        ClipTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("pad", [EOS, "!"])
def test_a_saved_folder_is_the_same_tokenizer(pad: str, tmp_path: Path) -> None:
    """Tokens that were added to a vocabulary are saved, too, with how they are found."""
    source = tmp_path / "source"
    ClipTokenizer.published(pad=pad, max_length=50).save(source)
    added = {"content": "<mine>", "lstrip": True, "special": False}
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["49408"] = added
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    first = ClipTokenizer.from_folder(source)
    first.save(tmp_path / "again")
    again = ClipTokenizer.from_folder(tmp_path / "again")
    for text in ("a <mine> red apple!", "déjà  vu<mine>", "<|endoftext|> x"):
        assert first(text) == again(text)
    assert 49408 in again.encode("a <mine> red apple")
    assert (again.bos, again.eos, again.pad, again.max_length, again.vocab_size) == (
        first.bos, first.eos, first.pad, 50, 49409,
    )  # fmt: skip


def test_nothing_is_saved_over(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        CLIP.save(tmp_path)
