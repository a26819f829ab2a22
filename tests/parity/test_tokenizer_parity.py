"""Every id that our tokenizer gives is the one that `transformers.CLIPTokenizer` gives: tolerance none."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reverie.text.tokenizer import BOS, EOS, LENGTH, MERGES, ClipTokenizer

transformers = pytest.importorskip("transformers")

HOW_MANY = 2400
ALPHABETS = {
    "english": "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "accents": "àéîõüçñåøßœÆŁžİıŸǅﬁẞſΣσςЖйщ",
    "cjk": "画像生成猫犬東京日本語漢字カタカナひらがな한국어그림가각",
    "arabic": "صورةقطجميلةءآؤئىلا\u0640",
    "hebrew": "שלוםעולםתמונהחתול\u05b0\u05b8\u05bc",
    "indic": "हिन्दीतमिழ்ไทยกขค",
    "digits": "0123456789٠١٢३४²½Ⅷ①",
    "punctuation": "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~“”‘’…—¿¡«»、。！？",
    "spaces": " \t\n\r\v\f\u00a0\u1680\u2003\u2009\u2028\u2029\u202f\u205f\u3000\u0085",
    "combining": "\u0300\u0301\u0308\u0327\u0338\u093f\u20dd\ufe0f\ufe0e",
    "invisible": "\u200b\u200c\u200d\u200e\u202e\u2060\ufeff\u00ad\u034f\u180e",
    "controls": "\x00\x01\x07\x08\x1b\x1c\x1d\x1e\x1f\x7f\x80\x9f",
    "astral": "𝔘𝕟𝒾𝐜𝚘𝓭𝖊𐍈𠜎𡿺🂡𝟘𝟙",
    "odd": "\ufffd\ufffe\uffff\U0010ffff\ue000ﷺ㎒℡™",
}
# Joined by U+200D, with skin tones, flags and the selectors of emoji style.
EMOJI = ["😀", "👍🏽", "👩🏿‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇯🇵", "❤️", "1️⃣", "🧑‍🍳", "☎", "🫠"]
PHRASES = [
    "a photo of an astronaut riding a horse", "it's", "I'm", "they'Ll", "we've", "you'd", "don't", "'S",
    "''ll", "(masterpiece:1.2)", "((best quality))", "[blurry]", "<lora:style-v1:0.8>", "{a|b|c}", "BREAK",
    "__colour__", "[cat:dog:0.5]", "AND", "\\(escaped\\)", "embedding:bad-hands-5", "e\u0301cole", "!", "!!!",
    "A\u030angstro\u0308m", "x" * 300, "Donaudampfschifffahrt", "supercalifragilistic" * 4, "8k", "12345",
    "</w>", "a</w>", "#version: 0.2", "&amp;", "&lt;b&gt;", "ï»¿", "schÃ¶n", "Ġhello", "<unk>", "low",
    "lower", "newest", "<cat>", "<CAT>",
]  # fmt: skip
SPECIALS = [
    BOS, EOS, BOS.upper(), EOS.upper(), EOS.title(), f" {EOS} ", f"a{EOS}b", f"{BOS}{EOS}",
    "<|endoftext", "|>",
]  # fmt: skip


def texts(seed: int) -> Iterator[str]:
    """Draw the same strings every time: pieces of every script, run together or spaced."""
    rng = random.Random(seed)
    yield from ("", " ", "\u00a0", "\u200b", *PHRASES, *EMOJI, *SPECIALS)
    for n in range(HOW_MANY):
        pieces = [_piece(rng) for _ in range(rng.randint(1, 60 if n % 10 == 0 else 8))]
        yield rng.choice(["", " ", ", ", "\u3000", " "]).join(pieces)


def _piece(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(PHRASES)
    if kind < 0.32:
        return rng.choice(EMOJI) * rng.randint(1, 3)
    if kind < 0.4:
        return rng.choice(SPECIALS)
    if kind < 0.45:  # any character at all, surrogates excepted
        return "".join(chr(_scalar(rng)) for _ in range(rng.randint(1, 6)))
    letters = ALPHABETS[rng.choice(list(ALPHABETS))]
    if kind < 0.6:
        letters += ALPHABETS[rng.choice(list(ALPHABETS))]
    return "".join(rng.choice(letters) for _ in range(rng.randint(1, 12)))


def _scalar(rng: random.Random) -> int:
    code = rng.randrange(0x110000 - 0x800)
    return code if code < 0xD800 else code + 0x800


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def added(text: str, *, normalized: bool, special: bool | None = None, **flags: bool) -> dict[str, Any]:
    """Write a token as the folders of published models do."""
    token = {
        "content": text,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
        "normalized": normalized,
    }
    return token | flags | ({} if special is None else {"special": special})


def published_vocabulary() -> dict[str, int]:
    """Derive the published ids a second time, straight from the wording of the rule."""
    first = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(code) for code in first] + [chr(256 + n) for n in range(256 - len(first))]
    pairs = MERGES.read_text(encoding="utf-8").split("\n")[1:-1]
    words = [*symbols, *(s + "</w>" for s in symbols), *(pair.replace(" ", "") for pair in pairs), BOS, EOS]
    return {word: i for i, word in enumerate(words)}


TINY = [
    "l",
    "o",
    "w",
    "e",
    "r",
    "s",
    "t",
    "i",
    "d",
    "n",
    "!",
    "lo",
    "l</w>",
    "o</w>",
    "w</w>",
    "r</w>",
    "t</w>",
    "d</w>",
]
TINY += [
    "!</w>",
    "low</w>",
    "er</w>",
    "est</w>",
    "es",
    "ne",
    "wer</w>",
    "new",
    "newer</w>",
    "Ã",
    "©</w>",
    "Ã©</w>",
]
TINY_MERGES = [
    "l o",
    "lo w</w>",
    "e r</w>",
    "w er</w>",
    "e s",
    "es t</w>",
    "n e",
    "ne w",
    "ne wer</w>",
    "Ã ©</w>",
]


def tiny_folder(folder: Path, *, end: str = "\n") -> Path:
    folder.mkdir(exist_ok=True)
    write_json(folder / "vocab.json", {word: i for i, word in enumerate([*TINY, "<unk>", BOS, EOS])})
    folder.joinpath("merges.txt").write_bytes(end.join(["#version: 0.2", *TINY_MERGES, ""]).encode())
    return folder


def published_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    write_json(folder / "vocab.json", published_vocabulary())
    folder.joinpath("merges.txt").write_bytes(MERGES.read_bytes())
    return folder


def sd1_settings(folder: Path) -> None:
    """Lay the settings as Stable Diffusion 1.5 does: names with flags, twice, and padding as bare text."""
    names = {name: added(EOS, normalized=True) for name in ("eos_token", "unk_token")}
    names["bos_token"] = added(BOS, normalized=True)
    write_json(folder / "special_tokens_map.json", names | {"pad_token": EOS})
    typed = {name: {"__type": "AddedToken", **token} for name, token in names.items()}
    write_json(
        folder / "tokenizer_config.json",
        typed | {"pad_token": EOS, "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"},
    )


def sd2_settings(folder: Path) -> None:
    """Lay the settings as SD-Turbo does: padding is `!`, and all flags stand in added_tokens_decoder."""
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    flagged = [added("!", normalized=False, special=True), added(BOS, normalized=True, special=True)]
    flagged.append(added(EOS, normalized=False, special=True))
    write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {str(vocab[token["content"]]): token for token in flagged},
            "bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": "!",
            "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer",
        },
    )  # fmt: skip


def added_settings(folder: Path) -> None:
    """Add words of textual inversion, one that is found in any case and one that eats the space before it."""
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    extra = [added("<cat>", normalized=True, special=False), added("newest", normalized=False, special=False)]
    extra[1] |= {"lstrip": True, "single_word": True}
    flagged = {str(vocab[EOS]): added(EOS, normalized=False, special=False)}
    flagged |= {str(len(vocab) + n): token for n, token in enumerate(extra)}
    names = {
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": "<unk>" if "<unk>" in vocab else EOS,
        "pad_token": EOS,
    }
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": flagged, "model_max_length": 20, **names})


def legacy_settings(folder: Path) -> None:
    """Lay the settings of the first releases: names without flags, and added_tokens.json."""
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    write_json(folder / "special_tokens_map.json", {"bos_token": BOS, "eos_token": EOS, "pad_token": "!"})
    write_json(folder / "added_tokens.json", {"<cat>": len(vocab)})


def bare_settings(folder: Path) -> None:
    """Lay no settings at all."""


def saved_settings(folder: Path) -> None:
    """Let transformers save the folder anew: then it holds tokenizer.json and neither vocab nor merges."""
    sd1_settings(folder)
    oracle(folder).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    assert (folder / "tokenizer.json").exists()


SETTINGS = [sd1_settings, sd2_settings, added_settings, legacy_settings, bare_settings, saved_settings]


def oracle(folder: Path) -> Any:
    return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def assert_same(ours: ClipTokenizer, theirs: Any, prompts: list[str]) -> None:
    """Compare words, frames and decoded text of every prompt."""
    frames = theirs(prompts, padding="max_length", truncation=True, max_length=ours.max_length)["input_ids"]
    words = theirs(prompts, add_special_tokens=False)["input_ids"]
    for prompt, frame, ids in zip(prompts, frames, words, strict=True):
        got = ours(prompt)
        assert ours.encode(prompt) == ids, repr(prompt)
        assert got.ids == frame, repr(prompt)
        assert got.cut == max(0, len(ids) + 2 - ours.max_length), repr(prompt)
        decoded = theirs.backend_tokenizer.decode(ids, skip_special_tokens=True).replace("</w>", " ").strip()
        assert ours.decode(ids) == decoded, repr(prompt)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_published_vocabulary_in_a_folder(settings: Any, tmp_path: Path) -> None:
    folder = published_folder(tmp_path)
    settings(folder)
    ours, theirs = ClipTokenizer.from_folder(folder), oracle(folder)
    assert (ours.bos, ours.eos, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    assert_same(ours, theirs, list(texts(7)))


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_tiny_vocabulary_in_a_folder(settings: Any, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    settings(folder)
    ours, theirs = ClipTokenizer.from_folder(folder), oracle(folder)
    assert ours.vocab_size == len(theirs)
    assert_same(ours, theirs, list(texts(8)))


def test_carriage_returns_in_the_merges_change_nothing(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, end="\r\n")
    assert_same(ClipTokenizer.from_folder(folder), oracle(folder), ["lower newest low é"])


@pytest.mark.parametrize("pad", [EOS, "!"])
def test_the_packaged_vocabulary(pad: str, tmp_path: Path) -> None:
    folder = published_folder(tmp_path)
    theirs = transformers.CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), pad_token=pad
    )
    assert_same(ClipTokenizer.published(pad=pad), theirs, list(texts(9)))
