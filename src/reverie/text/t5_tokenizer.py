"""T5's tokenizer: a prompt to the ids that the third text encoder of Stable Diffusion 3 reads.

A unigram language model over pieces (Kudo 2018) with SentencePiece's normalisation. The `tokenizers` library does the
work; the vocabulary is data of this package, or comes from the folder `tokenizer_3` of a model. It is a
`tokenizer.json` or SentencePiece's `spiece.model`, whose few fields that matter are read here
(sentencepiece_model.proto), so that no further package is needed. The rules are those of
`transformers.T5TokenizerFast`, against which the tests hold every id.
"""

import base64
import binascii
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram

from reverie.errors import CheckpointError, InputError
from reverie.text.tokenizer import Encoded

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"
LENGTH = 256  # ids of a prompt in Stable Diffusion 3: diffusers `max_sequence_length`
SENTINELS = 100  # ids that T5 has after those of its spiece.model, `<extra_id_99>` down to `<extra_id_0>`
SPACE = "▁"  # SentencePiece's mark of a space
FILES = ("tokenizer.json", "spiece.model")  # in this order, as transformers prefers them
PUBLISHED = Path(__file__).parent / "t5" / "spiece.model"
SIZE = 32_100  # ids of the published vocabulary: 32,000 pieces and the sentinels
PUBLISHED_PAD, PUBLISHED_EOS = 0, 1

# sentencepiece_model.proto: numbers of the fields, kinds of pieces, model type.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # of ModelProto
_TEXT, _SCORE, _KIND = 1, 2, 3  # of SentencePiece
_MODEL_TYPE, _CHARSMAP = 3, 2  # of TrainerSpec, of NormalizerSpec
_NORMAL, _CONTROL, _USER_DEFINED, _UNIGRAM = 1, 3, 4, 1
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")  # of tokenizers.AddedToken


class T5Tokenizer:
    """Text to ids and back, with one vocabulary. Immutable; safe to share between threads.

    It is put together when the first text comes: opening a model does not wait for that.

    make: gives the library's tokenizer. eos, pad: the ids that frame a prompt. vocab_size: ids are below it.
    """

    def __init__(self, make: Callable[[], Tokenizer], *, eos: int, pad: int, vocab_size: int, max_length: int = LENGTH):
        if max_length < 2:
            raise InputError(f"A prompt of {max_length} ids has no room for a word: give at least 2 ids.")
        self._make = make
        self.eos, self.pad, self.vocab_size = eos, pad, vocab_size
        self.max_length = max_length

    @cached_property
    def _model(self) -> Tokenizer:
        return self._make()

    @staticmethod
    def published(*, max_length: int = LENGTH) -> "T5Tokenizer":
        """Give the tokenizer of the published T5 models (32,100 ids), from data in this package; cached."""
        return _published(max_length)

    @classmethod
    def read(cls, path: Path, *, max_length: int = LENGTH) -> "T5Tokenizer":
        """Read a tokenizer folder (`tokenizer.json` or `spiece.model` in it), or one of these files.

        Raises CheckpointError where it is missing, broken or of another kind; the first text does where the library
        cannot make a tokenizer of it.
        """
        file = _find(path)
        vocabulary = _checked(file)
        size = len({text for text, _ in vocabulary.pieces} | {token.content for token in vocabulary.added.values()})
        eos, pad = vocabulary.id_of(EOS), vocabulary.id_of(PAD)
        return cls(partial(_build, vocabulary, file), eos=eos, pad=pad, vocab_size=size, max_length=max_length)

    def encode(self, text: str) -> list[int]:
        """Give the ids of the words alone, as many as there are. Raises InputError for half a character."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"The prompt holds half a character at position {error.start}, which has no id: type it again."
            ) from None
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def frame(self, words: Sequence[int]) -> Encoded:
        """Put the end-of-sequence id after the ids of words; cut or pad to `max_length`."""
        room = self.max_length - 1
        kept, cut = list(words[:room]), list(words[room:])
        padding = [self.pad] * (room - len(kept))
        return Encoded([*kept, self.eos, *padding], len(cut), self.decode(cut))

    def __call__(self, text: str) -> Encoded:
        """Give the framed ids of one prompt, and what did not fit."""
        return self.frame(self.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of ids; special ids and those outside the vocabulary are left out."""
        known = [i for i in ids if 0 <= i < self.vocab_size]
        text: str = self._model.decode(known, skip_special_tokens=True)
        return text

    def save(self, folder: Path) -> None:
        """Write it into a new folder, in the format of transformers.

        Raises OSError where that cannot be written.
        """
        folder.mkdir()
        self._model.save(str(folder / "tokenizer.json"))
        settings = {
            "eos_token": EOS, "pad_token": PAD, "unk_token": UNKNOWN, "tokenizer_class": "T5Tokenizer",
            "model_max_length": self.max_length,
        }  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Vocabulary:
    """What both kinds of file say.

    pieces: texts and log-probabilities, by id. charsmap: SentencePiece's compiled replacements of characters; empty
    where there are none. added: tokens that are found whole in the text, by id.
    """

    pieces: list[tuple[str, float]]
    charsmap: bytes
    added: dict[int, AddedToken]

    def id_of(self, text: str) -> int:
        """The id of a piece that is there."""
        return [piece for piece, _ in self.pieces].index(text)


def _find(path: Path) -> Path:
    """The vocabulary's file at or in a path."""
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).exists():
            return path / name
    found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
    raise CheckpointError(
        f"{path} is no T5 tokenizer: expected {' or '.join(FILES)}, found {found}; copy the folder tokenizer_3 "
        "of a Stable Diffusion 3 model."
    )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror}): give a T5 tokenizer's folder.") from None


def _from_json(file: Path) -> _Vocabulary:
    """Read the vocabulary, the replacements and the added tokens of a tokenizer.json."""
    try:
        content = json.loads(_read(file))
        model = content["model"]
        pieces = [(text, float(score)) for text, score in model["vocab"]]
        charsmap = _charsmap_of(content.get("normalizer"))
        added = {int(entry["id"]): _added(entry) for entry in content.get("added_tokens", [])}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is not a T5 tokenizer ({type(error).__name__}: {error}): expected a unigram vocabulary of pieces "
            "with scores; get the file again."
        ) from None
    if model.get("type", "Unigram") != "Unigram":
        raise CheckpointError(f"{file} holds a {model['type']} vocabulary: T5's is Unigram; get the file again.")
    return _Vocabulary(pieces, charsmap, added)


def _charsmap_of(normalizer: Any) -> bytes:
    """Find the compiled replacements in a tokenizer.json's normaliser, which may be a sequence of several."""
    if normalizer is None:
        return b""
    for step in normalizer.get("normalizers", [normalizer]):
        if step["type"] == "Precompiled":
            try:
                return base64.b64decode(step["precompiled_charsmap"], validate=True)
            except binascii.Error as error:
                raise ValueError(f"precompiled_charsmap: {error}") from None
    return b""


def _added(entry: dict[str, Any]) -> AddedToken:
    """Make an added token with the flags that it has in the file."""
    flags = {flag: bool(entry.get(flag, False)) for flag in _FLAGS}
    return AddedToken(entry["content"], special=bool(entry.get("special", True)), **flags)


def _from_spiece(file: Path) -> _Vocabulary:
    """Read a SentencePiece model, and give it T5's sentinels, which it does not hold."""
    pieces: list[tuple[str, float]] = []
    added: dict[int, AddedToken] = {}
    charsmap, model_type = b"", _UNIGRAM
    try:
        for number, value in _fields(_read(file)):
            if number == _PIECES:
                text, score, kind = _piece(value)
                if kind in {_CONTROL, _USER_DEFINED} or text == UNKNOWN:
                    added[len(pieces)] = AddedToken(text, normalized=False, special=kind != _USER_DEFINED)
                pieces.append((text, score))
            elif number == _TRAINER:
                model_type = dict(_fields(value)).get(_MODEL_TYPE, _UNIGRAM)
            elif number == _NORMALIZER:
                charsmap = _bytes(dict(_fields(value)).get(_CHARSMAP, b""))
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise CheckpointError(f"{file} is not a SentencePiece model ({error}): get the file again.") from None
    if model_type != _UNIGRAM:
        raise CheckpointError(f"{file} holds no unigram model (type {model_type}): T5's is one; get its spiece.model.")
    for n in reversed(range(SENTINELS)):
        added[len(pieces)] = AddedToken(f"<extra_id_{n}>", normalized=False, special=True)
        pieces.append((f"<extra_id_{n}>", 0.0))
    return _Vocabulary(pieces, charsmap, added)


def _piece(message: Any) -> tuple[str, float, int]:
    """Text, score and kind of one piece."""
    field = dict(_fields(message))
    (score,) = struct.unpack("<f", _bytes(field.get(_SCORE, bytes(4))))
    return _bytes(field[_TEXT]).decode("utf-8"), score, field.get(_KIND, _NORMAL)


def _bytes(value: Any) -> bytes:
    """A field that must be bytes. A number is none: `bytes` would make as many zeros of it."""
    if isinstance(value, int):
        raise ValueError(f"the number {value} in the place of bytes")
    return bytes(value)


def _fields(message: Any) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer: number, and a whole number or bytes.

    Raises ValueError or IndexError where the bytes are no message.
    """
    view, at = memoryview(_bytes(message)), 0
    while at < len(view):
        key, at = _varint(view, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(view, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(view, at)
        elif wire in {1, 5}:
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + length > len(view):
            raise ValueError(f"cut short at byte {len(view)}")
        yield number, view[at : at + length]
        at += length


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """A whole number, 7 bits a byte, the lowest first; and where it ends."""
    value = 0
    for shift in range(0, 64, 7):
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number of more than 64 bits at byte {at}")


def _checked(file: Path) -> _Vocabulary:
    """Read a vocabulary. Raises CheckpointError where it is none of T5, or would make the library panic."""
    vocabulary = _from_spiece(file) if file.suffix == ".model" else _from_json(file)
    _check_pieces(vocabulary.pieces, file)
    if vocabulary.charsmap:
        _check_charsmap(vocabulary.charsmap, file)
    return vocabulary


def _build(vocabulary: _Vocabulary, file: Path) -> Tokenizer:
    """Make the tokenizer of a vocabulary. Raises CheckpointError where the library cannot."""
    try:
        # The library promises no class of error for texts that are none or rules that it cannot read.
        model = Tokenizer(Unigram(vocabulary.pieces, unk_id=vocabulary.id_of(UNKNOWN), byte_fallback=False))
        if vocabulary.charsmap:
            model.normalizer = normalizers.Precompiled(vocabulary.charsmap)
    except Exception as error:
        raise CheckpointError(f"{file} is no vocabulary of pieces ({error}): get the file again.") from None
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")]
    )
    model.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    for i, token in sorted(vocabulary.added.items()):
        model.add_tokens([token])
        if (got := model.token_to_id(token.content)) != i:
            raise CheckpointError(
                f"{file} gives the added token {token.content!r} the id {i}, the vocabulary {got}: get the file again."
            )
    return model


def _check_pieces(pieces: list[tuple[str, float]], file: Path) -> None:
    """Check that pieces are distinct texts with finite scores, T5's three special ones among them."""
    if not all(isinstance(text, str) and text and math.isfinite(score) for text, score in pieces):
        raise CheckpointError(f"{file} holds a piece without text or without a finite score: get the file again.")
    texts = {text for text, _ in pieces}
    if len(texts) != len(pieces):
        raise CheckpointError(f"{file} holds the same piece twice: get the file again.")
    if missing := {PAD, EOS, UNKNOWN} - texts:
        raise CheckpointError(f"{file} has no {' and no '.join(sorted(missing))}: it is no vocabulary of T5.")


def _check_charsmap(charsmap: bytes, file: Path) -> None:
    """Check the compiled replacements: a trie in a double array (Darts-clone), then the texts that it points to.

    The library follows the array's offsets unchecked, so every one must stay inside it.
    """
    size = int.from_bytes(charsmap[:4], "little")
    texts = charsmap[4 + size :]
    sound = 4 <= size <= len(charsmap) - 4 and size % 4 == 0 and _is_utf8(texts)
    if not sound or not _stays_inside(struct.unpack(f"<{size // 4}I", charsmap[4 : 4 + size]), texts):
        raise CheckpointError(f"{file} has broken rules of normalisation (precompiled_charsmap): get the file again.")


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _stays_inside(units: Sequence[int], texts: bytes) -> bool:
    """Whether every step through the array ends in it, and every leaf points to the start of a character."""
    for place, unit in enumerate(units):
        if place and unit >> 31:  # a leaf, from which nothing goes on
            continue
        children = place ^ ((unit >> 10) << ((unit & 0x200) >> 6))
        if children | 0xFF >= len(units):
            return False
        if unit & 0x100:  # a leaf hangs here
            start = units[children] & 0x7FFFFFFF
            if start >= len(texts) or texts[start] & 0xC0 == 0x80:
                return False
    return True


@cache
def _published_model() -> Tokenizer:
    return _build(_checked(PUBLISHED), PUBLISHED)


@cache
def _published(max_length: int) -> T5Tokenizer:
    return T5Tokenizer(_published_model, eos=PUBLISHED_EOS, pad=PUBLISHED_PAD, vocab_size=SIZE, max_length=max_length)
