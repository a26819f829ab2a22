"""Textual inversions: every published format says the same; wrong widths and broken files are one line."""

import base64
import hashlib
import json
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file
from torch import Tensor, nn

from reverie.adapters.embedding import Embedding, open_embedding, vectors_for
from reverie.errors import CheckpointError, RequestError
from reverie.families.base import Parts
from reverie.text.embed import Embedder, Encoding, Tokens
from reverie.text.prompt import parse
from tests.adapters.loras import parts_of
from tests.checkpoint.hostile_pickles import Hostile

WIDTH, WIDTH_G, WIDTH_T5 = 32, 64, 112
VECTORS = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
WIDE = torch.randn(3, WIDTH_G, generator=torch.Generator().manual_seed(2))
WIDEST = torch.randn(3, WIDTH_T5, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def sd1(root: Path) -> Parts:
    return parts_of(root, "sd1")


# Writers


def a1111(path: Path, vectors: Tensor) -> None:
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "inner", "step": 1500,
         "sd_checkpoint": "abc", "sd_checkpoint_name": "v1-5"}, path,
    )  # fmt: skip


def paper(path: Path, vectors: Tensor) -> None:
    """The code of the paper: a ParameterDict, tokens as tensors."""
    torch.save(
        {
            "string_to_token": {"*": torch.tensor(265)},
            "string_to_param": nn.ParameterDict({"*": nn.Parameter(vectors)}),
        },
        path,
    )


def diffusers(path: Path, vectors: Tensor) -> None:
    torch.save({"<cat-toy>": vectors}, path)


def diffusers_safe(path: Path, vectors: Tensor) -> None:
    save_file({"<cat-toy>": vectors}, path)


def emb_params(path: Path, vectors: Tensor) -> None:
    save_file({"emb_params": vectors}, path)


def nested(path: Path, vectors: Tensor) -> None:
    save_file({"string_to_param.*": vectors}, path)


def keyed(path: Path, vectors: Tensor) -> None:
    save_file({"clip_l": vectors}, path)


def half(path: Path, vectors: Tensor) -> None:
    save_file({"emb_params": vectors.half()}, path)


def as_json(vectors: Tensor) -> bytes:
    table = {"*": {"TORCHTENSOR": vectors.tolist()}}
    return json.dumps({"string_to_token": {"*": 265}, "string_to_param": table, "name": "drawn"}).encode()


def text_chunk(path: Path, vectors: Tensor) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(as_json(vectors)).decode())
    Image.new("RGB", (64, 64), (9, 20, 30)).save(path, pnginfo=info)


def generator(count: int) -> npt.NDArray[np.uint8]:
    """The sequence as its definition says, one number after the other."""
    state, found = 0, []
    for _ in range(count):
        state = (1664525 * state + 1013904223) % 2**32
        found.append(state % 255 & 0x0F)
    return np.array(found, dtype=np.uint8)


def pixels(path: Path, vectors: Tensor) -> None:
    """Two blocks beside the picture, behind black columns; high bits of their pixels are decoration."""
    raw = np.frombuffer(zlib.compress(as_json(vectors), 9), np.uint8)
    height = 64
    width = -(-len(raw) // (height * 3))
    blocks = []
    for bits in (raw & 0x0F, raw >> 4):
        block = np.resize(bits, height * width * 3)
        drawn = np.random.default_rng(0).integers(1, 16, block.shape, dtype=np.uint8) << 4
        blocks.append(((block ^ generator(len(block))) | drawn).reshape(height, width, 3))
    black = np.zeros((height, 1, 3), np.uint8)
    picture = np.random.default_rng(1).integers(1, 255, (height, 40, 3), dtype=np.uint8)
    Image.fromarray(np.concatenate([blocks[0], black, picture, black, blocks[1]], axis=1)).save(path, lossless=True)


Write = Callable[[Path, Tensor], None]
FORMATS: dict[str, tuple[Write, str, str, str]] = {  # writer, file, token, word
    "A1111": (a1111, "toy.pt", "", "toy"),
    "the paper's": (paper, "toy.pt", "", "toy"),
    "diffusers": (diffusers, "learned_embeds.bin", "<cat-toy>", "<cat-toy>"),
    "diffusers safetensors": (diffusers_safe, "toy.safetensors", "<cat-toy>", "toy"),
    "emb_params": (emb_params, "toy.safetensors", "", "toy"),
    "nested": (nested, "toy.safetensors", "", "toy"),
    "clip_l": (keyed, "toy.safetensors", "", "toy"),
    "half": (half, "toy.safetensors", "", "toy"),
    "text chunk": (text_chunk, "toy.png", "drawn", "toy"),
    "pixels": (pixels, "toy.png", "drawn", "toy"),
    "pixels in webp": (pixels, "toy.webp", "drawn", "toy"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats(sd1: Parts, tmp_path: Path, name: str) -> None:
    write, file, token, word = FORMATS[name]
    path = tmp_path / file
    write(path, VECTORS)
    embedding = open_embedding(path, sd1)
    assert (embedding.name, embedding.token) == (word, token)
    assert set(embedding.vectors) == {"text_encoder"}
    wanted = VECTORS.half().float() if name == "half" else VECTORS
    assert torch.equal(embedding.vectors["text_encoder"], wanted)
    assert embedding.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert embedding.digest.startswith(embedding.short)


def test_one_vector(sd1: Parts, tmp_path: Path) -> None:
    """diffusers writes a single one without its first axis."""
    diffusers(tmp_path / "a.bin", VECTORS[0])
    assert torch.equal(open_embedding(tmp_path / "a.bin", sd1).vectors["text_encoder"], VECTORS[:1])


def test_several_text_encoders(root: Path, tmp_path: Path) -> None:
    save_file({"clip_l": VECTORS, "clip_g": WIDE}, tmp_path / "pair.safetensors")
    save_file({"clip_l": VECTORS, "clip_g": WIDE, "t5xxl": WIDEST}, tmp_path / "triple.safetensors")
    pair = open_embedding(tmp_path / "pair.safetensors", parts_of(root, "sdxl")).vectors
    assert torch.equal(pair["text_encoder"], VECTORS)
    assert torch.equal(pair["text_encoder_2"], WIDE)
    sd3 = parts_of(root, "sd35-medium")
    assert set(open_embedding(tmp_path / "pair.safetensors", sd3).vectors) == {"text_encoder", "text_encoder_2"}
    assert torch.equal(open_embedding(tmp_path / "triple.safetensors", sd3).vectors["text_encoder_3"], WIDEST)


# Bad input


@pytest.mark.parametrize(
    ("tensors", "made"),
    [
        ({"emb_params": torch.ones(2, 768)}, "Stable Diffusion 1 .768 wide."),
        ({"emb_params": torch.ones(2, 1024)}, "Stable Diffusion 2 .1024 wide."),
        ({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "Stable Diffusion XL .768 and 1280 wide."),
        ({"clip_l": torch.ones(2, 8), "clip_g": torch.ones(2, 8), "t5xxl": torch.ones(2, 9)}, "Stable Diffusion 3"),
        ({"emb_params": torch.ones(2, 48)}, "48 wide"),
    ],
)
def test_wrong_width(sd1: Parts, tmp_path: Path, tensors: dict[str, Tensor], made: str) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"an embedding for .*{made}.*this sd1 model is 32 wide"):
        open_embedding(tmp_path / "a.safetensors", sd1)


def test_an_embedding_of_one_text_encoder_is_none_for_two(root: Path, tmp_path: Path) -> None:
    """One for Stable Diffusion 1 is as wide as SDXL's first text encoder, and yet not for it."""
    emb_params(tmp_path / "a.safetensors", VECTORS)
    with pytest.raises(CheckpointError, match="this sdxl model are 32 and 64 wide"):
        open_embedding(tmp_path / "a.safetensors", parts_of(root, "sdxl"))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"emb_params": torch.full((2, WIDTH), float("nan"))}, "NaN"),
        ({"emb_params": torch.ones(2, 2, WIDTH)}, "no embedding"),
        ({"emb_params": torch.ones(0, WIDTH)}, "expected vectors"),
        ({"emb_params": torch.ones(2, WIDTH, dtype=torch.int64)}, "no embedding"),
        ({f"{i}": torch.ones(2, WIDTH) for i in range(9)}, "no embedding"),
        ({"<a>": torch.ones(2, WIDTH), "<b>": torch.ones(2, WIDTH)}, "holds 2 words"),
    ],
)
def test_broken(sd1: Parts, tmp_path: Path, tensors: dict[str, Tensor], said: str) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=said) as raised:
        open_embedding(tmp_path / "a.safetensors", sd1)
    assert "\n" not in str(raised.value)


def test_different_counts(root: Path, tmp_path: Path) -> None:
    save_file({"clip_l": VECTORS, "clip_g": WIDE[:1]}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="1 and 3 vectors for one word"):
        open_embedding(tmp_path / "a.safetensors", parts_of(root, "sdxl"))


def _chunk(text: str) -> Write:
    def write(path: Path, vectors: Tensor) -> None:
        info = PngImagePlugin.PngInfo()
        info.add_text("sd-ti-embedding", text)
        Image.new("RGB", (64, 64), (9, 20, 30)).save(path, pnginfo=info)

    return write


def _plain(path: Path, vectors: Tensor) -> None:
    Image.new("RGB", (64, 64), (9, 20, 30)).save(path)


def _black(path: Path, vectors: Tensor) -> None:
    Image.new("RGB", (64, 64)).save(path)


def _noise(path: Path, vectors: Tensor) -> None:
    """Black columns, and nonsense beside them."""
    numbers = np.random.default_rng(0).integers(1, 255, (32, 64, 3), dtype=np.uint8)
    numbers[:, [20, 43]] = 0
    Image.fromarray(numbers).save(path)


def _cut(path: Path, vectors: Tensor) -> None:
    pixels(path, vectors)
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    "write",
    [_plain, _black, _noise, _cut, _chunk("???"), _chunk(""), _chunk(base64.b64encode(b"[1]").decode()),
     _chunk(base64.b64encode(b'{"string_to_param": {"*": {"TORCHTENSOR": [[1], "x"]}}}').decode()),
     _chunk(base64.b64encode(b"[" * 100_000).decode())],
)  # fmt: skip
def test_broken_pictures(sd1: Parts, tmp_path: Path, write: Write) -> None:
    write(tmp_path / "a.png", VECTORS)
    with pytest.raises(CheckpointError) as raised:
        open_embedding(tmp_path / "a.png", sd1)
    assert "\n" not in str(raised.value)


def test_a_bomb_in_a_picture(sd1: Parts, tmp_path: Path) -> None:
    """128 MiB of zeros in a few pixels is not unpacked."""
    raw = np.frombuffer(zlib.compress(b"0" * 2**27, 9), np.uint8)
    width = -(-len(raw) // 192)
    blocks = [np.resize(bits, 192 * width) ^ generator(192 * width) for bits in (raw & 0x0F, raw >> 4)]
    left, right = (block.reshape(64, width, 3) | 0x10 for block in blocks)
    black = np.zeros((64, 1, 3), np.uint8)
    Image.fromarray(np.concatenate([left, black, black + 1, black, right], axis=1)).save(tmp_path / "a.png")
    with pytest.raises(CheckpointError, match="too large"):
        open_embedding(tmp_path / "a.png", sd1)


def test_hostile_pickle(sd1: Parts, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Hostile(mark), protocol=2))
    with pytest.raises(CheckpointError):
        open_embedding(tmp_path / "a.pt", sd1)
    assert not mark.exists()


def test_not_there(sd1: Parts, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        open_embedding(tmp_path / "a.pt", sd1)


# In prompts


def embedding(name: str, vectors: Tensor = VECTORS, token: str = "", path: str = "") -> Embedding:
    return Embedding(name, {"text_encoder": vectors}, Path(path or name), "", token)


def test_words_of_dialects() -> None:
    one = embedding("EasyNegative", token="<neg>")
    assert one.words() == one.words("diffusers") == ("EasyNegative", "<neg>")
    assert one.words("comfy") == ("embedding:EasyNegative", "embedding:<neg>")
    assert set(vectors_for("text_encoder", [one])) == {"EasyNegative", "<neg>"}
    assert vectors_for("text_encoder_2", [one]) == {}


def test_two_of_one_word() -> None:
    both = [embedding("toy", path="a/toy.pt"), embedding("Toy", path="b/Toy.pt")]
    with pytest.raises(RequestError, match=r"two embeddings are called 'Toy': a/toy.pt and b/Toy.pt"):
        vectors_for("text_encoder", both)
    assert vectors_for("text_encoder", [both[0], both[0]])


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        ("a1111", "a photo of toy, (toy:1.3) and toyland"), ("a1111", "TOY, [Toy]"),
        ("comfy", "a photo of embedding:toy, (embedding:toy:1.3) and embedding:toyland"),
        ("compel", "a photo of toy, (toy)1.3 and toyland"), ("a1111", "toyish toy.toy"),
    ],
)  # fmt: skip
def test_where_words_are_found(sd1: Parts, dialect: str, text: str) -> None:
    """The vectors stand where the words do, as whole words, in any case, and keep their weights."""
    seen: list[Tokens] = []

    def encode(tokens: Tokens) -> Encoding:
        seen.append(tokens)
        return Encoding(torch.zeros(*tokens.ids.shape, 4))

    vectors = vectors_for("text_encoder", [embedding("toy"), embedding("other")], dialect)
    stage = parse(text, dialect=dialect, steps=1).parts[0].at(1)
    Embedder(sd1.tokenizer, encode, vectors=vectors)(stage)
    places = [(row, at, v) for tokens in seen for row, at, v in tokens.vectors]
    assert len(places) == 2
    assert all(torch.equal(v, VECTORS) for *_, v in places)


def test_the_longest_word_wins(sd1: Parts) -> None:
    seen: list[Tokens] = []

    def encode(tokens: Tokens) -> Encoding:
        seen.append(tokens)
        return Encoding(torch.zeros(*tokens.ids.shape, 4))

    both = [embedding("toy"), embedding("toy house", torch.ones(2, WIDTH))]
    stage = parse("a toy house, toy", dialect="a1111", steps=1).parts[0].at(1)
    Embedder(sd1.tokenizer, encode, vectors=vectors_for("text_encoder", both))(stage)
    assert [len(v) for *_, v in seen[0].vectors] == [2, 3]
