"""Words that a model was never taught stand for the trained names nearest to them."""

import json
import string
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes.emoji import meanings
from recipes.emoji.meanings import Anchor, Merges, anchors, nearest, teach, trained_words
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from reverie.engine.bundle import bundled_path
from reverie.text.tokenizer import ClipTokenizer
from reverie.train.scenes import Scenes, ScenesConfig
from tests.train.scenes.world import write_world

TOKENS = "text_model.embeddings.token_embedding.weight"


class Encoder:
    """Words are as near as the letters that they share."""

    def words(self) -> list[str]:
        return ["foxy", "fooox", "stars", "starss", "zzz", "fox"]

    def __call__(self, texts: Any) -> torch.Tensor:
        counts = torch.tensor([[float(text.count(letter)) for letter in string.ascii_lowercase] for text in texts])
        return torch.nn.functional.normalize(counts, dim=-1)


def test_a_word_stands_for_the_nearest_name_and_only_plurals_for_plurals() -> None:
    known = [Anchor("fox", ("fox",)), Anchor("star", ("star", "tsar")), Anchor("stars", ("stars",), several=True)]
    found = nearest(Encoder(), known, ["fox"])  # type: ignore[arg-type]
    assert found == {"stars": "stars", "starss": "stars", "foxy": "fox", "fooox": "fox"}
    assert next(iter(found)) == "stars"
    one = [Anchor("star", ("rats",)), Anchor("foxes", ("foxy",), several=True)]
    assert "foxy" not in nearest(Encoder(), one, [])  # type: ignore[arg-type]


def test_anchors_are_the_trained_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meanings, "CAPTIONS", 2000)
    scenes = Scenes(ScenesConfig(path=write_world(tmp_path)))
    trained = trained_words(scenes)
    found = {anchor.word: anchor for anchor in anchors(scenes, trained)}
    by_name = scenes.composer.splits.word
    for concept in scenes.composer.concepts:
        names = [word.text for word in concept.words if not by_name(word.text)]
        single = [name for name in names if name in found and not found[name].several]
        assert all(found[name].texts == tuple(names) for name in single)
    assert found["foxes"].several and "fox" not in found["foxes"].texts
    assert found["red"].texts == ("red",) and "of" not in found  # a part of a longer name
    withheld = {word.text for c in scenes.composer.concepts for word in c.words if by_name(word.text)}
    assert withheld and withheld.isdisjoint(found) and set(found) <= set(trained)


def test_merges_behind_all_others_leave_protected_words_alone() -> None:
    merges = Merges([("c", "a"), ("ca", "t</w>"), ("d", "o")], ["cat", "dog", "cap"])
    assert merges.pieces("cat") == ["cat</w>"] and merges.pieces("cats") == ["ca", "t", "s</w>"]
    assert merges.add("cats") and merges.pieces("cats") == ["cats</w>"]
    assert merges.pieces("dog") == ["do", "g</w>"] and merges.pieces("cap") == ["ca", "p</w>"]
    before = list(merges.merges)
    assert not Merges([("d", "o")], ["dog"]).add("dog")
    assert not merges.add("dog") and merges.merges == before and merges.pieces("dog") == ["do", "g</w>"]


@pytest.fixture
def taught(tmp_path: Path) -> Path:
    meaning = {"kittycat": "cat", "grizzlies": "bears", "qwertyuiop": "fox", "cat": "dog", "nowhere": "unknownword"}
    placed = teach(bundled_path(), tmp_path / "out", meaning, ["fox", "foxes", "cat", "a", "dog"])
    assert {"kittycat", "qwertyuiop"} <= set(placed) and "nowhere" not in placed
    return tmp_path / "out"


def test_new_words_are_one_token_with_the_vector_of_the_name(taught: Path) -> None:
    old, new = (ClipTokenizer.from_folder(folder / "tokenizer") for folder in (bundled_path(), taught))
    before, after = (load_file(f / "text_encoder" / "model.safetensors")[TOKENS] for f in (bundled_path(), taught))
    config = json.loads((taught / "text_encoder" / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == len(after) == new.vocab_size > old.vocab_size
    assert (new.bos, new.eos) == (config["bos_token_id"], config["eos_token_id"]) == (len(after) - 2, len(after) - 1)
    assert torch.equal(after[-2:], before[-2:])
    (token,) = new.encode("qwertyuiop")
    assert torch.equal(after[token], before[old.encode("fox")].squeeze(0))
    for text in ("a red apple", "two foxes", "a rocket above a house", "cat"):
        meant = "dog" if text == "cat" else text
        assert torch.equal(after[new.encode(text)], before[old.encode(meant)])


def test_transformers_reads_the_same_words(taught: Path) -> None:
    ours, theirs = ClipTokenizer.from_folder(taught / "tokenizer"), CLIPTokenizer.from_pretrained(taught / "tokenizer")
    for text in ("a kittycat", "kittycats and grizzlies", "a qwertyuiop above two foxes", "qwerty"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
    assert ours.max_length == ClipTokenizer.from_folder(bundled_path() / "tokenizer").max_length


def test_it_is_not_written_over_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path("recipes/emoji/scenes_diffusion.toml").read_text(encoding="utf-8")
    (tmp_path / "c.toml").write_text(config, encoding="utf-8")
    words = ["--model", str(bundled_path()), "--config", str(tmp_path / "c.toml"), "--out", str(tmp_path)]
    assert meanings.main(words) == 2
    assert "is there already" in capsys.readouterr().err
    (tmp_path / "c.toml").unlink()
    assert meanings.main(words) == 2
    assert "no configuration file" in capsys.readouterr().err
