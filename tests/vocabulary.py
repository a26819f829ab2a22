"""CLIP's vocabulary in the folder format of transformers, written without its classes, which take long to import."""

import json
from pathlib import Path

from reverie.text.tokenizer import MERGES


def tokenizer_folder(folder: Path, merges_kept: int | None = None, pad: str = "<|endoftext|>") -> Path:
    """The published CLIP vocabulary, or its first merges alone, in the folder format of transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    text = MERGES.read_text(encoding="utf-8")
    if merges_kept is not None:
        text = "\n".join(text.splitlines()[: merges_kept + 1]) + "\n"  # the first line is the version
    merges = [line.replace(" ", "") for line in text.splitlines() if line and not line.startswith("#version")]
    symbols = _byte_symbols()
    # The order of openai/CLIP's simple_tokenizer.py: bytes, bytes that end a word, merges, the two marks.
    tokens = [*symbols, *(s + "</w>" for s in symbols), *merges, "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text(text, encoding="utf-8")
    settings = {"model_max_length": 77, "pad_token": pad, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _byte_symbols() -> list[str]:
    """A printable character for each byte, printable bytes first (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
