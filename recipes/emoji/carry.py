"""Carry a trained text encoder into another vocabulary, so that training goes on with new words.

    python -m recipes.emoji.carry --checkpoint runs/emoji-few/checkpoint.safetensors --old data/emoji-vocabulary \\
        --new data/vocabulary --positions 32 --out runs/scenes-start.safetensors

A token that both vocabularies have keeps its vector; a whole word that only the new one has gets the mean of its old
pieces' vectors; other new tokens, parts of words, begin at random. Positions beyond the old ones begin as the last.
What comes out is for `loop.start`: the averaged weights, without an optimiser.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from reverie.checkpoint.source import open_weights
from reverie.text.tokenizer import WORD_END, ClipTokenizer

EMBEDDINGS = "ema.text_encoder.text_model.embeddings."
TOKENS, POSITIONS = EMBEDDINGS + "token_embedding.weight", EMBEDDINGS + "position_embedding.weight"


def carried(vectors: Tensor, old: Path, new: Path) -> Tensor:
    """Vectors `(old tokens, width)` of one vocabulary's folder -> `(new tokens, width)` of another's."""
    known, wanted = (json.loads((folder / "vocab.json").read_text(encoding="utf-8")) for folder in (old, new))
    pieces = ClipTokenizer.from_folder(old)
    g = torch.Generator().manual_seed(0)
    found = torch.zeros(len(wanted), vectors.shape[1])
    for token, row in wanted.items():
        word = token.removesuffix(WORD_END)
        if token in known:
            found[row] = vectors[known[token]]
        elif token != word and word.isascii():
            found[row] = vectors[pieces.encode(word)].mean(0)
        else:
            found[row] = torch.randn(vectors.shape[1], generator=g) * vectors.std()
    return found


def main() -> None:
    """Read the checkpoint of one run, write the start of another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--old", type=Path, required=True, help="the vocabulary that it was trained with")
    parser.add_argument("--new", type=Path, required=True, help="the vocabulary to go on with")
    parser.add_argument("--positions", type=int, default=32, help="length of a prompt in tokens from now on")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    file = open_weights(given.checkpoint)
    weights = {name: file.tensor(name).clone() for name in file.tensors if name.startswith("ema.")}
    weights[TOKENS] = carried(weights[TOKENS], given.old, given.new)
    positions = weights[POSITIONS]
    last = positions[-1:].repeat(given.positions - len(positions), 1)
    weights[POSITIONS] = torch.cat([positions, last])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, given.out, {"step": "0"})


if __name__ == "__main__":
    main()
