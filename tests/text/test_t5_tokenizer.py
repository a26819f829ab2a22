"""T5's tokenizer against transformers, on a vocabulary small enough to stand here; broken and hostile files."""

import base64
import json
import struct
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie.errors import CheckpointError, InputError
from reverie.text.t5_tokenizer import T5Tokenizer

transformers: Any = import_module("transformers")

# Log-probabilities; "▁" is SentencePiece's space. The first three are T5's.
PIECES = [
    *(("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -3.0), ("▁red", -4.0), ("▁apple", -4.5)),
    *(("▁re", -3.9), ("d", -3.5), ("app", -5.0), ("le", -4.0), (",", -3.0), ("fi", -5.0), ("1", -5.5), ("e", -5.0)),
    *(("s", -4.0), ("t", -4.1), ("é", -6.0), ("▁日", -7.0), ("本", -7.0), ("A", -5.0), ("R", -5.0), ("</", -9.0)),
]
# What SentencePiece's rules replace: here a ligature, a full-width letter, two kinds of blank, a control character.
REPLACED = {"ﬁ": "fi", "Ａ": "A", "\u3000": " ", "\t": " ", "\x07": ""}
KINDS = {"<pad>": 3, "</s>": 3, "<unk>": 2}


def charsmap(replaced: dict[str, str]) -> bytes:
    """Rules compiled as SentencePiece compiles them: a trie in a double array, then the texts, each with a zero.

    Every node has a block of 256 places of its own for its children; the format is that of Darts-clone.
    """
    texts, starts = b"", {}
    for source, target in replaced.items():
        starts[source.encode()] = len(texts)
        texts += target.encode() + b"\0"
    nodes = sorted({source[:length] for source in starts for length in range(len(source) + 1)})
    block = {node: 256 * (i + 1) for i, node in enumerate(nodes)}
    units = [0] * (256 * (len(nodes) + 1))
    for node in nodes:
        place, label = (block[node[:-1]] + node[-1], node[-1]) if node else (0, 0)
        units[place] = (place ^ block[node]) << 10 | (node in starts) << 8 | label
        if node in starts:
            units[block[node]] = 1 << 31 | starts[node]
    return struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + texts


CHARSMAP = charsmap(REPLACED)


def message(*fields: tuple[int, bytes | int | float]) -> bytes:
    """A protocol buffer."""
    found = b""
    for number, value in fields:
        if isinstance(value, int):
            found += _varint(number << 3) + _varint(value)
        elif isinstance(value, float):
            found += _varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            found += _varint(number << 3 | 2) + _varint(len(value)) + value
    return found


def _varint(value: int) -> bytes:
    return bytes([value & 0x7F | 0x80]) + _varint(value >> 7) if value > 0x7F else bytes([value])


def spiece(pieces: Any = PIECES, rules: bytes = CHARSMAP, trainer: bytes = message((3, 1))) -> bytes:
    """A SentencePiece model, with fields that nobody needs in between, as the published one has."""
    found = [(1, message((1, text.encode()), (2, score), (3, KINDS.get(text, 1)))) for text, score in pieces]
    return message(*found, (2, trainer), (3, message((1, b"nmt_nfkc"), (2, rules), (3, 1))), (4, b"\x01"))


def tokenizer_json() -> dict[str, Any]:
    """The same vocabulary as transformers writes it, with T5's sentinels."""
    vocabulary = [*PIECES, *((f"<extra_id_{n}>", 0.0) for n in reversed(range(100)))]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [(i, text) for i, (text, _) in enumerate(vocabulary) if i < 3 or i >= len(PIECES)]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    one, two = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **plain} for i, text in special],
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(CHARSMAP).decode()},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [one, end],
            "pair": [one, end, two, end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocabulary, "byte_fallback": False},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer_3")
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return transformers.T5TokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spiece") / "spiece.model"
    path.write_bytes(spiece())
    return path


@pytest.fixture(scope="module")
def both(folder: Path, model: Path) -> tuple[T5Tokenizer, T5Tokenizer]:
    return T5Tokenizer.read(folder), T5Tokenizer.read(model.parent)


TEXTS = [
    *(
        "",
        " ",
        "a",
        "a red apple",
        "A red   apple, ",
        "\ta\nred\r\napple",
        "apples",
        "ﬁt",
        "Ａ\u3000Red",
        "日本",
        "a\x07a",
    ),
    *("</s>", "a</s>red", "<extra_id_0> a", "<pad> <unk>", "▁a", "a▁▁red", "🎨🎨 a🎨", "é", "e\u0301", "\u200b"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(reference: Any, both: tuple[T5Tokenizer, T5Tokenizer], text: str) -> None:
    for ours in both:
        assert ours.encode(text) == reference(text, add_special_tokens=False).input_ids


@given(st.text(st.sampled_from("aredplts ,éﬁＡ\u3000\t\n\x07日本▁</>🎨1"), max_size=30) | st.text(max_size=20))
def test_ids_of_any_text_are_those_of_transformers(
    reference: Any, both: tuple[T5Tokenizer, T5Tokenizer], text: str
) -> None:
    want = reference(text, padding="max_length", truncation=True, max_length=256).input_ids
    for ours in both:
        assert ours(text).ids == want


def test_known_words(both: tuple[T5Tokenizer, T5Tokenizer]) -> None:
    """By hand: the likelier of "▁red" (-4) and "▁re" + "d" (-7.4); what is no piece is unknown, once in a row."""
    for ours in both:
        assert ours.encode("a red apple") == [4, 5, 6]
        assert ours.encode("Ａ ﬁt zz") == [3, 20, 3, 12, 16, 3, 2]
        assert (ours.pad, ours.eos, ours.vocab_size) == (0, 1, len(PIECES) + 100)


def test_the_rules_of_normalisation_are_used(model: Path, tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(spiece(rules=b""))
    plain = T5Tokenizer.read(tmp_path)
    assert plain.encode("ﬁt") != T5Tokenizer.read(model).encode("ﬁt")
    assert plain.encode("a red") == T5Tokenizer.read(model).encode("a red")


def test_the_rules_may_be_one_of_several_steps(model: Path, tmp_path: Path) -> None:
    """As in the published folders, whose other steps strip blanks."""
    content = tokenizer_json()
    content["normalizer"] = {"type": "Sequence", "normalizers": [content["normalizer"], {"type": "Strip"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert T5Tokenizer.read(tmp_path).encode("ﬁt") == T5Tokenizer.read(model).encode("ﬁt")


@pytest.mark.parametrize("words", [0, 1, 6, 7, 8, 30])
def test_frame(folder: Path, words: int) -> None:
    ours = T5Tokenizer.read(folder, max_length=8)
    found = ours(" ".join(["red"] * words))
    kept = min(words, 7)
    assert found.ids == [5] * kept + [1] + [0] * (7 - kept)
    assert found.cut == words - kept
    assert found.lost == " ".join(["red"] * (words - kept))


def test_the_length_of_stable_diffusion_3(folder: Path) -> None:
    assert len(T5Tokenizer.read(folder)("a red apple").ids) == 256


def test_decode(folder: Path) -> None:
    ours = T5Tokenizer.read(folder)
    assert ours.decode([*ours.encode("a red apple,"), ours.eos, ours.pad, 10**6, -1]) == "a red apple,"


def test_half_a_character_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="half a character at position 2"):
        T5Tokenizer.read(folder).encode("a \ud83c")


def test_no_room_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="at least 2 ids"):
        T5Tokenizer.read(folder, max_length=1)


# Files


def test_a_file_may_be_named_itself(folder: Path, model: Path) -> None:
    assert T5Tokenizer.read(folder / "tokenizer.json").encode("a red") == T5Tokenizer.read(model).encode("a red")


def test_tokenizer_json_comes_first(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "spiece.model").write_bytes(b"broken")
    assert T5Tokenizer.read(tmp_path).encode("a red") == [4, 5]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected tokenizer\.json or spiece\.model, found nothing"):
        T5Tokenizer.read(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"found vocab\.json"):
        T5Tokenizer.read(tmp_path)


@pytest.mark.parametrize("name", ["nothing", "nothing.model"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        T5Tokenizer.read(tmp_path / name)


def _set(path: str, value: Any) -> Callable[[Any], Any]:
    """A change of a tokenizer.json: what stands at a path of keys becomes another value."""

    def change(content: Any) -> Any:
        place = content
        *keys, last = path.split("/")
        for key in keys:
            place = place[int(key) if isinstance(place, list) else key]
        place[int(last) if isinstance(place, list) else last] = value
        return content

    return change


BROKEN_JSON: dict[str, Callable[[Any], Any]] = {
    "a list": lambda _: [],
    "no model": _set("model", None),
    "byte pairs": _set("model/type", "BPE"),
    "a vocabulary of CLIP": _set("model/vocab", {"a": 0}),
    "no pieces": _set("model/vocab", []),
    "a piece of three": _set("model/vocab/4", ["a", 1.0, 2.0]),
    "a piece without text": _set("model/vocab/4/0", ""),
    "a number for a text": _set("model/vocab/4/0", 7),
    "a list for a text": _set("model/vocab/4/0", []),
    "half a character": _set("model/vocab/4/0", "\ud83c"),
    "a score that is none": _set("model/vocab/4/1", "x"),
    "an endless score": _set("model/vocab/4/1", float("inf")),
    "a score beyond floats": _set("model/vocab/4/1", 10**400),
    "no number": _set("model/vocab/4/1", float("nan")),
    "a piece twice": _set("model/vocab/5", ["▁a", -1.0]),
    "no padding": _set("model/vocab/0/0", "<nothing>"),
    "no unknown": _set("model/vocab/2/0", "<nothing>"),
    "an added token elsewhere": _set("added_tokens/0/id", 3),
    "an added token far away": _set("added_tokens/0/id", 10**9),
    "an added token without text": _set("added_tokens/0/content", None),
    "added tokens that are none": _set("added_tokens", 3),
    "rules that are no base64": _set("normalizer/precompiled_charsmap", "***"),
    "rules that are a number": _set("normalizer/precompiled_charsmap", 3),
    "a normaliser that is none": _set("normalizer", "NFKC"),
    "rules of nothing": _set("normalizer/precompiled_charsmap", base64.b64encode(b"\0\0").decode()),
}


@pytest.mark.parametrize("kind", list(BROKEN_JSON))
def test_a_broken_tokenizer_json_is_one_line(tmp_path: Path, kind: str) -> None:
    content = BROKEN_JSON[kind](json.loads(json.dumps(tokenizer_json())))  # pairs become lists
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert_refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_json_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert_refused(tmp_path)


def units(*values: int, texts: bytes = b"a\0") -> bytes:
    return struct.pack("<I", 4 * len(values)) + struct.pack(f"<{len(values)}I", *values) + texts


BROKEN_RULES = {
    "cut short": CHARSMAP[:100],
    "longer than they say": units(0)[:5],
    "no array": units(),
    "half a unit": struct.pack("<I", 2) + bytes(6),
    "texts that are none": CHARSMAP + b"\xff",
    "a step out of the array": units(5000 << 10, *[0] * 255),
    "a far step out of the array": units(1 << 9 | 1 << 10, *[0] * 255),
    "a leaf beyond the texts": units(256 << 10 | 1 << 8, *[0] * 255, 1 << 31 | 2, *[0] * 255),
    "a leaf within a character": units(256 << 10 | 1 << 8, *[0] * 255, 1 << 31 | 1, *[0] * 255, texts="é".encode()),
}


@pytest.mark.parametrize("kind", list(BROKEN_RULES))
def test_broken_rules_are_one_line(tmp_path: Path, kind: str) -> None:
    """The library would follow them out of its array and take the process with it."""
    (tmp_path / "spiece.model").write_bytes(spiece(rules=BROKEN_RULES[kind]))
    with pytest.raises(CheckpointError, match="rules of normalisation"):
        T5Tokenizer.read(tmp_path)


BROKEN_SPIECE = {
    "nothing": b"",
    "text": b"version https://git-lfs",
    "byte pairs": spiece(trainer=message((3, 2))),
    "a number for a piece": message((1, 1 << 40)),
    "a number for a text": message((1, message((1, 1 << 40)))),
    "a piece without text": message((1, message((2, -1.0)))),
    "a text that is none": message((1, message((1, b"\xff")))),
    "a score of two bytes": message((1, message((1, b"a"), (2, b"ab")))),
    "a number of eleven bytes": b"\x08" + b"\xff" * 11,
    "a piece longer than the file": b"\x0a\x7f",
    "a number for rules": message((3, message((2, 1 << 40)))),
}


@pytest.mark.parametrize("kind", list(BROKEN_SPIECE))
def test_a_broken_spiece_model_is_one_line(tmp_path: Path, kind: str) -> None:
    (tmp_path / "spiece.model").write_bytes(BROKEN_SPIECE[kind])
    assert_refused(tmp_path)


def assert_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        T5Tokenizer.read(folder).encode("a")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("damaged") / "spiece.model"


@given(st.data())
def test_a_damaged_file_is_read_or_refused(scratch: Path, data: st.DataObject) -> None:
    """Whatever bytes change, it is one of these; what is read can be used."""
    content = bytearray(spiece())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    scratch.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        ours = T5Tokenizer.read(scratch)
    except CheckpointError:
        return
    for text in ("a red apple, ﬁt Ａ\u3000\t", "日本 🎨"):
        ours(text)


def test_a_saved_folder_is_the_same_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "spiece.model").write_bytes(spiece())
    first = T5Tokenizer.read(tmp_path, max_length=9)
    first.save(tmp_path / "saved")
    again = T5Tokenizer.read(tmp_path / "saved", max_length=9)
    for text in ("a red apple, ﬁt Ａ\u3000\t", "日本 🎨 <extra_id_0>"):
        assert first(text) == again(text)
    assert (again.eos, again.pad, again.vocab_size) == (first.eos, first.pad, first.vocab_size)
