"""Train a CLIP-style byte-pair vocabulary on the captions of composed scenes.

    python -m recipes.emoji.vocabulary --data data/sprites --out data/vocabulary [--size 4096]

The files have the layout of the published CLIP tokenizer, so `transformers.CLIPTokenizer` and Reverie
read them alike.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from reverie.errors import ConfigError
from reverie.train.scenes import Scenes, ScenesConfig

END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"
CONTEXT_LENGTH = 77
# Captions that are counted: about forty for each thing.
CAPTIONS = 50_000
# How CLIP cuts text into words before any merge.
WORD_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class VocabularyError(Exception):
    """Something that the person who runs the recipe can put right; printed as one line."""


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes, in CLIP's order: printable bytes first, then the rest."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]


def base_tokens() -> list[str]:
    """The first 512 tokens: every byte inside a word, then every byte at the end of a word."""
    letters = byte_alphabet()
    return letters + [letter + END_OF_WORD for letter in letters]


def read_texts(data: Path) -> list[str]:
    """Captions of scenes of all things, all their names in all languages, and the tags of every emoji, drawn or not."""
    scenes = Scenes(ScenesConfig(path=data))
    texts = [scenes.scene(number).caption for number in range(CAPTIONS)]
    for concept in scenes.composer.concepts:
        texts += [word.text for word in concept.words]
        texts += concept.labels.values()
    return [*texts, *(data / "words.txt").read_text(encoding="utf-8").splitlines()]


def train_merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Learn `count` merges; every merge makes a token that no earlier merge made."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # Given as special tokens, the base tokens get fixed numbers, and equal counts are decided by numbers:
    # so the same text gives the same merges on every run.
    trainer = trainers.BpeTrainer(
        vocab_size=len(base_tokens()) + 2 * count,
        special_tokens=base_tokens(),
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pairs: list[Any] = json.loads(tokenizer.to_str())["model"]["merges"]
    return distinct_merges([(str(first), str(second)) for first, second in pairs], count)


def distinct_merges(merges: Iterable[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """Drop merges that make a token again by another way, so that number 512 + n is what merge n makes."""
    by_token: dict[str, tuple[str, str]] = {}
    for first, second in merges:
        by_token.setdefault(first + second, (first, second))
    return list(by_token.values())[:count]


def vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Number the tokens as CLIP does: bytes, bytes at a word's end, merges, start, end."""
    tokens = [*base_tokens(), *(first + second for first, second in merges), START, END]
    return {token: number for number, token in enumerate(tokens)}


def vocabulary_files(merges: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The four files of a CLIP tokenizer: {name: text}."""
    marks = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {
        **marks,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": CONTEXT_LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    return {
        "vocab.json": json.dumps(vocabulary(merges), ensure_ascii=False) + "\n",
        "merges.txt": "\n".join(lines) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(marks, indent=2) + "\n",
    }


def write_vocabulary(data: Path, out: Path, size: int) -> int:
    """Train on the set in `data`, write the files into `out` and return the number of tokens."""
    try:
        merges = train_merges(read_texts(data), size - len(base_tokens()) - 2)
        out.mkdir(parents=True, exist_ok=True)
        for name, text in vocabulary_files(merges).items():
            temporary = out / (name + ".tmp")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(out / name)
    except ConfigError as error:
        raise VocabularyError(str(error)) from error
    except OSError as error:
        raise VocabularyError(f"{error.filename or out}: {error.strerror or error}") from error
    return len(vocabulary(merges))


def vocabulary_size(text: str) -> int:
    """Parse --size."""
    if not text.isdecimal() or not 600 <= int(text) <= 49408:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 600 to 49408")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train a CLIP-style vocabulary on captions of scenes.")
    parser.add_argument("--data", type=Path, required=True, help="folder that build.py made")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokenizer files")
    parser.add_argument("--size", type=vocabulary_size, default=4096, help="most tokens (4096)")
    options = parser.parse_args(arguments)
    try:
        count = write_vocabulary(options.data, options.out, options.size)
    except VocabularyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {count} tokens", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
