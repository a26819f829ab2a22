"""The CLIP tokenizer: a prompt to the 77 ids that a CLIP text encoder reads.

Byte-pair encoding (Sennrich et al. 2016) over bytes, with `</w>` at the end of a word (Radford et al. 2021).
The `tokenizers` library does the work; this file holds CLIP's vocabulary, its rules and its frame of 77.
The rules are those of `transformers.CLIPTokenizer`, against which tests/parity holds every id.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from reverie.errors import CheckpointError, InputError

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"
LENGTH = 77  # context_length of the published CLIP models; Stable Diffusion 1, 2 and XL keep it
WORD_END = "</w>"
MERGES = Path(__file__).parent / "clip" / "merges.txt"
SIZE = 49_408  # ids of the published vocabulary: 512 symbols, 48,894 merges, BOS and EOS

# What one word is: openai/CLIP simple_tokenizer.py, the pattern of SimpleTokenizer.
_WORD = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
# The names that a tokenizer folder gives to special tokens, in the order in which transformers adds them:
# where two names share one text (in SD1 eos, unk and pad do), the flags of the last one hold.
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_DEFAULTS = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")  # of tokenizers.AddedToken

KEPT = 4  # vocabularies
_VOCABULARIES: dict[tuple[str, ...], "_Vocabulary"] = {}

Merges = list[tuple[str, str]]


@dataclass(frozen=True)
class Encoded:
    """One prompt as a text encoder reads it.

    ids: exactly `max_length` ids: BOS, the words, EOS, padding.
    cut: how many ids of words did not fit; 0 where nothing was lost. The caller warns.
    lost: the text of what was cut, for that warning.
    """

    ids: list[int]
    cut: int = 0
    lost: str = ""


class ClipTokenizer:
    """Text to ids and back, with one vocabulary. Immutable; safe to share between threads.

    Its pairs are put together when the first text comes: opening a model does not wait for that.

    make: gives the library's tokenizer. bos, eos, pad: the ids that frame a prompt. vocab_size: ids are below it.
    """

    def __init__(
        self, make: Callable[[], Tokenizer], *, bos: int, eos: int, pad: int, vocab_size: int, max_length: int = LENGTH
    ):
        if max_length < 3:
            raise InputError(f"A prompt of {max_length} ids has no room for a word: give at least 3 ids.")
        self._make = make
        self.bos, self.eos, self.pad, self.vocab_size = bos, eos, pad, vocab_size
        self.max_length = max_length

    @cached_property
    def _model(self) -> Tokenizer:
        return self._make()

    @staticmethod
    def published(*, pad: str = EOS, max_length: int = LENGTH) -> "ClipTokenizer":
        """Give the tokenizer of the published CLIP models (49,408 ids), from data in this package; cached.

        pad: SD1 and the first encoder of SDXL pad with EOS; SD2 and the second of SDXL with "!" (id 0).
        """
        return _published(pad, max_length)

    @classmethod
    def from_folder(cls, folder: Path, *, max_length: int | None = None) -> "ClipTokenizer":
        """Read a transformers folder: tokenizer.json, or vocab.json with merges.txt, and the settings beside.

        max_length: the ids of a prompt; without it what tokenizer_config.json says, else 77.
        Raises CheckpointError where a file is missing or broken; of the merges the first text does.
        """
        settings, where = _Settings.read(folder), str(folder)
        vocabulary = _read_vocabulary(folder, settings)
        known = {token.content: i for i, token in settings.added.items()} | vocabulary.ids
        bos, eos, pad = _named_ids(known, settings, where)
        length = max_length or settings.max_length
        make = partial(_build, vocabulary, settings, where)
        return cls(make, bos=bos, eos=eos, pad=pad, vocab_size=len(known), max_length=length)

    def encode(self, text: str) -> list[int]:
        """Give the ids of the words alone, as many as there are. Raises InputError for half a character."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"The prompt holds half a character (surrogate U+{ord(text[error.start]):04X}) at position "
                f"{error.start}, which has no id: it was decoded wrongly, type it again."
            ) from None
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def frame(self, words: Sequence[int]) -> Encoded:
        """Put BOS before and EOS after the ids of words; cut or pad to `max_length`."""
        room = self.max_length - 2
        kept, cut = list(words[:room]), list(words[room:])
        padding = [self.pad] * (room - len(kept))
        return Encoded([self.bos, *kept, self.eos, *padding], len(cut), self.decode(cut))

    def __call__(self, text: str) -> Encoded:
        """Give the framed ids of one prompt, and what did not fit."""
        return self.frame(self.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Give the text of ids, lower-cased as CLIP reads it, one space between words, special ids left out.

        Half of a character cut into bytes becomes U+FFFD; an id outside the vocabulary is left out.
        """
        known = [i for i in ids if 0 <= i < self.vocab_size]
        text: str = self._model.decode(known, skip_special_tokens=True)
        return text.replace(WORD_END, " ").strip()

    def ends_word(self, i: int) -> bool:
        """Say whether a word ends with an id."""
        token: str | None = self._model.id_to_token(i)
        return token is not None and token.endswith(WORD_END)

    def save(self, folder: Path) -> None:
        """Write it into a new folder, in the format of transformers.

        Raises OSError where that cannot be written.
        """
        folder.mkdir()
        self._model.model.save(str(folder))
        ends = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad, "unk_token": self.eos}
        named = {name: self._model.id_to_token(i) for name, i in ends.items()}
        added = {
            i: {"content": token.content, "special": token.special} | {flag: getattr(token, flag) for flag in _FLAGS}
            for i, token in self._model.get_added_tokens_decoder().items()
        }
        settings = {
            **named, "added_tokens_decoder": added, "tokenizer_class": "CLIPTokenizer",
            "model_max_length": self.max_length,
        }  # fmt: skip
        for name, content in (("special_tokens_map.json", named), ("tokenizer_config.json", settings)):
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Settings:
    """What a tokenizer folder says beside its vocabulary.

    named: special tokens by name. added: further tokens by id, in the order of the ids.
    """

    named: dict[str, AddedToken]
    added: dict[int, AddedToken]
    max_length: int = LENGTH

    @classmethod
    def read(cls, folder: Path) -> "_Settings":
        """Read tokenizer_config.json, special_tokens_map.json and added_tokens.json, each if it is there."""
        config = _read_json(folder / "tokenizer_config.json", optional=True)
        _refuse_left(config, folder)
        try:
            named, added = _read_tokens(config, folder)
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"The special tokens of {folder} are not readable ({error}): expected texts or objects with "
                "a 'content'; get tokenizer_config.json and special_tokens_map.json again."
            ) from None
        return cls(named, dict(sorted(added.items())), _length(config, folder))

    @property
    def unknown(self) -> str:
        """What stands for a byte that is in no vocabulary."""
        text: str = self.named["unk_token"].content
        return text


def _read_tokens(config: dict[str, Any], folder: Path) -> tuple[dict[str, AddedToken], dict[int, AddedToken]]:
    """Read special tokens by name and added tokens by id. Raises what a wrong type of value raises."""
    if "added_tokens_decoder" in config:
        # Newer folders: here the tokens have their flags; special_tokens_map.json is a copy.
        listed = config["added_tokens_decoder"]
        added = {int(i): _token(token, special=False) for i, token in listed.items()}
        values = config
    else:
        values = config | _read_json(folder / "special_tokens_map.json", optional=True)
        added = _legacy_added(folder, [values.get(name) for name in _NAMES])
    given = _DEFAULTS | {name: values[name] for name in _NAMES if values.get(name) is not None}
    named = {name: _token(given[name]) for name in _NAMES if name in given}
    by_text = {token.content: token for token in added.values()}
    return {name: by_text.get(token.content, token) for name, token in named.items()}, added


def _token(value: Any, *, special: bool = True) -> AddedToken:
    """Make a token of a text or of an object with `content` and flags; `special` where it does not say."""
    if isinstance(value, str):
        return AddedToken(value, special=special)
    return AddedToken(
        value["content"],
        special=bool(value.get("special", special)),
        **{flag: bool(value[flag]) for flag in _FLAGS if flag in value},
    )


def _text(value: Any) -> str | None:
    """Give the text of a special token in either spelling."""
    return value.get("content") if isinstance(value, dict) else value


def _legacy_added(folder: Path, specials: list[Any]) -> dict[int, AddedToken]:
    """Read the tokens that older folders keep in added_tokens.json, and those within tokenizer.json."""
    special = {_text(value) for value in specials}
    added = {}
    for text, i in _read_json(folder / "added_tokens.json", optional=True).items():
        known = text in special
        added[int(i)] = AddedToken(text, special=known, normalized=not known)
    for entry in _read_json(folder / "tokenizer.json", optional=True).get("added_tokens", []):
        added[int(entry["id"])] = _token(entry, special=False)
    return added


def _refuse_left(config: dict[str, Any], folder: Path) -> None:
    """Refuse the sides that no CLIP model uses, rather than give ids that nobody asked for."""
    for key in ("padding_side", "truncation_side"):
        if config.get(key, "right") != "right":
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'} sets {key} to {config[key]!r}: CLIP text encoders are "
                "framed on the right; set it to 'right'."
            )


def _length(config: dict[str, Any], folder: Path) -> int:
    """Read model_max_length. Absent, or the 1e30 by which transformers says `unknown`: CLIP's 77."""
    length = config.get("model_max_length") or LENGTH
    # `not >=`, for JSON here may also say NaN.
    if not isinstance(length, int | float) or not length >= 3:
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'} sets model_max_length to {length!r}: expected a "
            f"whole number of ids of at least 3; CLIP's is {LENGTH}."
        )
    return int(length) if length < 1 << 20 else LENGTH


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: a CLIP tokenizer folder holds vocab.json and merges.txt, "
            "or tokenizer.json; copy it from the model's publisher."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is not readable as UTF-8 text ({type(error).__name__}): get the file again."
        ) from None


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Read one JSON object; an optional file that is not there is an empty one."""
    if optional and not path.exists():
        return {}
    try:
        content = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): get the file again.") from None
    if not isinstance(content, dict):
        found = type(content).__name__
        raise CheckpointError(f"{path} holds a {found}, expected a JSON object: get the file again.")
    return content


@dataclass(eq=False)
class _Vocabulary:
    """Ids by text, and the merges, which are looked at when they are needed.

    unknown: what stands for a byte that is in no vocabulary. where: for messages.
    """

    ids: dict[str, int]
    merges: Callable[[], Merges]
    unknown: str
    where: str

    @cached_property
    def pairs(self) -> BPE:
        """The library's byte-pair model."""
        merges = self.merges()
        try:
            # The library promises no class of error for a merge whose parts or result have no id.
            return BPE(vocab=self.ids, merges=merges, unk_token=self.unknown, end_of_word_suffix=WORD_END)
        except Exception as error:
            raise CheckpointError(
                f"The merges of {self.where} do not belong to its vocabulary ({error}): get both files again."
            ) from None


def _read_vocabulary(folder: Path, settings: _Settings) -> _Vocabulary:
    """Read ids and merges, from tokenizer.json where there is one: transformers prefers it too.

    The last few are kept by what is in the files: a second load, or the second encoder of SDXL, makes none again.
    """
    whole = folder / "tokenizer.json"
    paths = [whole] if whole.exists() else [folder / "vocab.json", folder / "merges.txt"]
    key = (*map(_read_text, paths), settings.unknown)
    if key not in _VOCABULARIES:
        if len(_VOCABULARIES) >= KEPT:
            _VOCABULARIES.pop(next(iter(_VOCABULARIES)))
        read = _of_whole if whole.exists() else _of_two
        _VOCABULARIES[key] = _Vocabulary(*read(*paths), settings.unknown, str(folder))
    return _VOCABULARIES[key]


def _of_whole(path: Path) -> tuple[dict[str, int], Callable[[], Merges]]:
    model = _read_json(path).get("model")
    if not isinstance(model, dict) or not {"vocab", "merges"} <= model.keys():
        raise CheckpointError(
            f"{path} has no byte-pair model with vocab and merges: expected a CLIP tokenizer; "
            "remove the file to use vocab.json and merges.txt."
        )
    return _check_vocab(model["vocab"], path), partial(_check_merges, model["merges"], path)


def _of_two(vocab: Path, merges: Path) -> tuple[dict[str, int], Callable[[], Merges]]:
    return _check_vocab(_read_json(vocab), vocab), partial(_merges_of, _read_text(merges), merges)


def _check_vocab(vocab: Any, path: Path) -> dict[str, int]:
    """Check that texts map to distinct whole ids from 0 up."""
    ids = vocab.values() if isinstance(vocab, dict) else ()
    # bool is an int in Python, so `type` and not `isinstance`.
    sound = set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < 1 << 31
    if not sound or len(set(ids)) != len(vocab):
        raise CheckpointError(f"{path} is not a vocabulary: expected texts with distinct ids; get it again.")
    return dict(vocab)


def _merges_of(text: str, path: Path) -> Merges:
    """Read a merges.txt: one pair a line, in the order of their rank, with `#version` lines between."""
    # Only at the line feed: `splitlines` would also split at characters that stand for bytes.
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    return _check_merges([line for line in lines if line[:8] != "#version"], path)


def _check_merges(merges: Any, path: Path) -> Merges:
    """Check that every merge is a pair, written `a b` or as a list of two texts."""
    pairs: Merges = []
    for rank, merge in enumerate(merges if isinstance(merges, list) else [None]):
        # `type`, which is faster than `isinstance`: there are 49,000 of them at every start
        parts = merge.split(" ") if type(merge) is str else merge
        if type(parts) is not list or len(parts) != 2 or {*map(type, parts)} != {str} or not all(parts):
            raise CheckpointError(
                f"Merge {rank} of {path} is {merge!r}, expected two texts with one space between: get the file again."
            )
        pairs.append((parts[0], parts[1]))
    return pairs


def _named_ids(known: dict[str, int], settings: _Settings, where: str) -> list[int]:
    """Give the ids of BOS, EOS and padding. Raises CheckpointError for a named token that has no id."""
    for name, token in settings.named.items():
        if token.content not in known:
            raise CheckpointError(
                f"The vocabulary of {where} has no {token.content!r}, which its {name} names: "
                "get vocab.json and tokenizer_config.json of one model."
            )
    return [known[settings.named[name].content] for name in ("bos_token", "eos_token", "pad_token")]


def _build(vocabulary: _Vocabulary, settings: _Settings, where: str) -> Tokenizer:
    """Make the tokenizer."""
    model = Tokenizer(vocabulary.pairs)
    model.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    _add_tokens(model, settings, where)
    return model


def _add_tokens(model: Tokenizer, settings: _Settings, where: str) -> None:
    """Make tokens that are found whole in the text, before it is cut into words."""
    names = {token.content for token in settings.named.values()}
    for i, token in settings.added.items():
        model.add_tokens([_flagged(token, special=token.special or token.content in names)])
        if (got := model.token_to_id(token.content)) != i:
            raise CheckpointError(
                f"The added token {token.content!r} of {where} claims id {i} and would get {got}: "
                "the vocabulary and the added tokens belong to different models; get the folder again."
            )
    added = {token.content for token in settings.added.values()}
    for token in settings.named.values():
        if token.content not in added:
            model.add_tokens([_flagged(token, special=True)])


def _flagged(token: AddedToken, *, special: bool) -> AddedToken:
    """Copy a token with `special` set, and the flags that say how it is found in the text."""
    flags = {flag: getattr(token, flag) for flag in _FLAGS}
    return AddedToken(token.content, special=special, **flags)


def _byte_symbols() -> list[str]:
    """Give the 256 characters that stand for bytes, in CLIP's order of ids.

    Bytes that print stand for themselves and come first, the other 68 take the characters from U+0100 up
    (openai/CLIP simple_tokenizer.py, `bytes_to_unicode`).
    """
    spans = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printing = [chr(code) for first, last in spans for code in range(ord(first), ord(last) + 1)]
    return printing + [chr(256 + n) for n in range(256 - len(printing))]


@cache
def _published_vocabulary() -> _Vocabulary:
    """Ids and merges; the ids follow from the merges (openai/CLIP simple_tokenizer.py, `SimpleTokenizer`)."""
    merges = _merges_of(_read_text(MERGES), MERGES)
    symbols = _byte_symbols()
    ends = [symbol + WORD_END for symbol in symbols]
    texts = [*symbols, *ends, *(first + second for first, second in merges), BOS, EOS]
    ids = {text: i for i, text in enumerate(texts)}
    return _Vocabulary(ids, lambda: merges, EOS, "the CLIP vocabulary of this package")


@cache
def _published(pad: str, max_length: int) -> ClipTokenizer:
    """The published tokenizer, which pads with EOS or a symbol."""
    named = {name: AddedToken(text, special=True) for name, text in (_DEFAULTS | {"pad_token": pad}).items()}
    padding = SIZE - 1 if pad == EOS else _byte_symbols().index(pad)

    def make() -> Tokenizer:
        vocabulary = _published_vocabulary()
        return _build(vocabulary, _Settings(named, {}), vocabulary.where)

    return ClipTokenizer(make, bos=SIZE - 2, eos=SIZE - 1, pad=padding, vocab_size=SIZE, max_length=max_length)
