"""The single-file layout of Stable Diffusion 3 against diffusers' own conversion, in both directions.

The original layout is written down here a second time, as Stability's sd3-ref `mmdit.py` builds it.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from reverie.errors import CheckpointError
from reverie.families.sd3 import names
from reverie.nets.autoencoder import SD3_AUTOENCODER, Autoencoder
from reverie.nets.mmdit import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, MMDiT, MMDiTConfig
from reverie.nets.t5 import T5Config, T5Encoder
from tests import tiny

TINY = MMDiTConfig(
    in_channels=3, out_channels=5, layers=3, heads=2, head_width=64, context_width=20, vector_width=12, positions=6
)
CONFIGS = {
    "SD3": TINY,
    "SD3.5 large": replace(TINY, heads=4, head_width=32, qk_norm=True),
    "SD3.5 medium": replace(TINY, qk_norm=True, dual_attention=(0, 1)),
    "dual attention without norms": replace(TINY, dual_attention=(1,)),
    "one block": replace(TINY, layers=1),
}
PUBLISHED = {"SD3 medium": SD3_MEDIUM, "SD3.5 medium": SD35_MEDIUM, "SD3.5 large": SD35_LARGE}
VAE = replace(SD3_AUTOENCODER, block_out_channels=(32, 64), layers_per_block=1)
T5_TINY = T5Config(vocab_size=30, width=16, inner_width=24, layers=2, heads=2, head_width=4)


def original_shapes(c: MMDiTConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the original transformer, without the prefix."""
    w = c.width
    yield "pos_embed", (1, c.positions**2, w)
    yield from _layer("x_embedder.proj", (w, c.in_channels, c.patch_size, c.patch_size))
    for embedder, source in (("t_embedder", 256), ("y_embedder", c.vector_width)):
        yield from _layer(f"{embedder}.mlp.0", (w, source))
        yield from _layer(f"{embedder}.mlp.2", (w, w))
    yield from _layer("context_embedder", (w, c.context_width))
    for i in range(c.layers):
        dual, last = i in c.dual_attention, i == c.layers - 1
        yield from _original_block(f"joint_blocks.{i}.x_block", c, modulation=9 if dual else 6)
        if dual:
            yield from _original_attention(f"joint_blocks.{i}.x_block.attn2", c)
        yield from _original_block(f"joint_blocks.{i}.context_block", c, modulation=2 if last else 6)
    yield from _layer("final_layer.linear", (c.patch_size**2 * c.out_channels, w))
    yield from _layer("final_layer.adaLN_modulation.1", (2 * w, w))


def _layer(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _original_attention(name: str, c: MMDiTConfig, *, projected: bool = True) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from _layer(f"{name}.qkv", (3 * c.width, c.width))
    if projected:
        yield from _layer(f"{name}.proj", (c.width, c.width))
    if c.qk_norm:
        yield f"{name}.ln_q.weight", (c.head_width,)
        yield f"{name}.ln_k.weight", (c.head_width,)


def _original_block(name: str, c: MMDiTConfig, modulation: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    complete = modulation > 2  # the last block's text is only read
    yield from _layer(f"{name}.adaLN_modulation.1", (modulation * c.width, c.width))
    yield from _original_attention(f"{name}.attn", c, projected=complete)
    if complete:
        yield from _layer(f"{name}.mlp.fc1", (4 * c.width, c.width))
        yield from _layer(f"{name}.mlp.fc2", (c.width, 4 * c.width))


def original(config: MMDiTConfig) -> dict[str, Tensor]:
    """A transformer in the original layout, every number another."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in original_shapes(config)}


def on_meta(config: MMDiTConfig) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in original_shapes(config)}


def by_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    utils: Any = import_module("diffusers.loaders.single_file_utils")
    converted: dict[str, Tensor] = utils.convert_sd3_transformer_checkpoint_to_diffusers(dict(tensors))
    return converted


def shapes(tensors: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


# The transformer


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_every_tensor_is_where_diffusers_puts_it(kind: str) -> None:
    file = original(CONFIGS[kind])
    ours = names.transformer_from_file(file, CONFIGS[kind])
    assert_same(ours, by_diffusers(file))
    MMDiT(CONFIGS[kind]).load_state_dict(ours, strict=True)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_there_and_back(kind: str) -> None:
    file = original(CONFIGS[kind])
    ours = names.transformer_from_file(file, CONFIGS[kind])
    assert_same(names.transformer_to_file(ours, CONFIGS[kind]), file)


@pytest.mark.parametrize("kind", list(PUBLISHED))
def test_true_sizes(kind: str) -> None:
    """Names and shapes of the published models, there and back, and the config from them."""
    config, file = PUBLISHED[kind], on_meta(PUBLISHED[kind])
    ours = names.transformer_from_file(file, config)
    with torch.device("meta"):
        network = MMDiT(config)
    assert shapes(ours) == shapes(by_diffusers(file)) == shapes(network.state_dict())
    assert shapes(names.transformer_to_file(ours, config)) == shapes(file)
    assert names.config_from_header({f"model.diffusion_model.{name}": t for name, t in file.items()}) == config


def test_nothing_is_copied_but_what_is_swapped() -> None:
    config = CONFIGS["SD3.5 medium"]
    file = original(config)
    ours = names.transformer_from_file(file, config)
    storages = {t.untyped_storage().data_ptr() for t in file.values()}
    copies = {name for name, t in ours.items() if t.untyped_storage().data_ptr() not in storages}
    swapped = ("norm_out.linear", "transformer_blocks.2.norm1_context.linear")
    assert copies == {f"{module}.{leaf}" for module in swapped for leaf in ("weight", "bias")}


def test_a_tensor_too_many_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"joint_blocks\.3\.x_block"):
        names.transformer_from_file(original(TINY) | {"joint_blocks.3.x_block.attn.qkv.weight": torch.zeros(1)}, TINY)
    ours = names.transformer_from_file(original(TINY), TINY)
    with pytest.raises(CheckpointError, match=r"1 tensors that Stable Diffusion 3 has not: transformer_blocks\.9"):
        names.transformer_to_file(ours | {"transformer_blocks.9.ff.net.2.bias": torch.zeros(1)}, TINY)


def test_a_missing_tensor() -> None:
    """On the way in the loading says what is missing, by our names; on the way out nothing else would."""
    file = original(TINY)
    del file["joint_blocks.1.x_block.attn.qkv.bias"]
    ours = names.transformer_from_file(file, TINY)
    missing = MMDiT(TINY).state_dict().keys() - ours.keys()
    assert missing == {f"transformer_blocks.1.attn.to_{part}.bias" for part in "qkv"}
    with pytest.raises(CheckpointError, match=r"3 tensors .* missing: transformer_blocks\.1\.attn\.to_q\.bias"):
        names.transformer_to_file(ours, TINY)


@pytest.mark.parametrize("shape", [(), (4,)])
def test_rows_that_do_not_divide_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="no 3 equal parts"):
        names.transformer_from_file({"joint_blocks.0.x_block.attn.qkv.bias": torch.zeros(shape)}, TINY)


# The config from the header


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_header_tells_the_config(kind: str, prefix: str) -> None:
    config = CONFIGS[kind]
    assert names.config_from_header({prefix + name: t for name, t in original(config).items()}) == config


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("pos_embed", None, "pos_embed is missing"),
        ("pos_embed", (1, 37, 128), "37 positions"),
        ("pos_embed", (36, 128), r"pos_embed has shape \[36, 128\]"),
        ("x_embedder.proj.weight", (100, 3, 2, 2), "width 100 with heads of 64"),
        ("x_embedder.proj.weight", (128, 3, 0, 0), "patches of 0"),
        ("x_embedder.proj.weight", (0, 3, 2, 2), "width 0"),
        ("x_embedder.proj.weight", None, "is missing"),
        ("context_embedder.weight", (128,), "2 dimensions"),
        ("y_embedder.mlp.0.weight", None, "is missing"),
        ("final_layer.linear.weight", None, "is missing"),
        ("joint_blocks.0.x_block.attn.qkv.weight", None, "is missing|no layers"),
        ("joint_blocks.0.x_block.attn.ln_q.weight", (), "ln_q"),
        ("joint_blocks.0.x_block.attn.ln_q.weight", (0,), "heads of 0"),
    ],
)
def test_a_header_of_something_else_is_refused(name: str, shape: tuple[int, ...] | None, message: str) -> None:
    header = original(TINY)
    if shape is None:
        del header[name]
    else:
        header[name] = torch.empty(shape)
    with pytest.raises(CheckpointError, match=message):
        names.config_from_header(header)


def test_a_header_of_endless_layers_is_refused() -> None:
    many = {f"joint_blocks.{i}.x_block.attn.qkv.weight": torch.zeros(1) for i in range(202)}
    with pytest.raises(CheckpointError, match=r"201 layers .* expected 1 to 200"):
        names.config_from_header(original(TINY) | many)


@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer."])
@pytest.mark.parametrize("table", ["shared.weight", "encoder.embed_tokens.weight"])
def test_the_header_tells_the_config_of_t5(prefix: str, table: str) -> None:
    tensors = {name.replace("shared.weight", table): t for name, t in T5Encoder(T5_TINY).state_dict().items()}
    assert names.t5_config_from_header({prefix + name: t for name, t in tensors.items()}, prefix) == T5_TINY


def test_a_header_without_t5_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"encoder\.embed_tokens\.weight is missing"):
        names.t5_config_from_header(original(TINY))


@pytest.mark.parametrize("heads", [0, 3])
def test_a_t5_of_broken_heads_is_refused(heads: int) -> None:
    biases = {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": torch.empty(32, heads)}
    with pytest.raises(CheckpointError, match=f"for {heads} heads"):
        names.t5_config_from_header(dict(T5Encoder(T5_TINY).state_dict()) | biases, "")


# A whole file


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, Tensor]]:
    """The five networks of a model, under our names."""
    torch.manual_seed(0)
    clip = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in _clip().items()}
    return {
        "transformer": dict(MMDiT(TINY).state_dict()),
        "vae": dict(Autoencoder(VAE).state_dict()),
        "text_encoder": clip | {"text_projection.weight": torch.eye(64)},
        "text_encoder_2": clip | {"text_projection.weight": torch.randn(20, 64)},
        "text_encoder_3": dict(T5Encoder(T5_TINY).state_dict()),
    }


def _clip() -> dict[str, Tensor]:
    return dict(tiny.text_encoder(vocab_size=30, num_hidden_layers=2, bos_token_id=28, eos_token_id=29).state_dict())


def test_a_whole_file_and_back(parts: dict[str, dict[str, Tensor]]) -> None:
    file = names.join(parts, TINY, VAE)
    back = names.split(file, TINY, VAE)
    assert back.keys() == parts.keys()
    for part, tensors in parts.items():
        assert_same(back[part], tensors)
    assert_same(names.join(back, TINY, VAE), file)


def test_the_names_in_a_whole_file(parts: dict[str, dict[str, Tensor]]) -> None:
    """As ComfyUI and Stability write them; the VAE by the table of the tests, which knows nothing of ours."""
    file = names.join(parts, TINY, VAE)
    text = "text_model.encoder.layers.1.self_attn.q_proj.weight"
    for name in (
        "model.diffusion_model.pos_embed",
        f"text_encoders.clip_l.transformer.{text}",
        f"text_encoders.clip_g.transformer.{text}",
        "text_encoders.clip_g.transformer.text_projection.weight",
        "text_encoders.t5xxl.transformer.shared.weight",
        "text_encoders.t5xxl.transformer.encoder.block.1.layer.1.DenseReluDense.wo.weight",
    ):
        assert name in file
    vae = {name for name in file if name.startswith("first_stage_model.")}
    assert vae == {f"first_stage_model.{tiny.ldm_vae_name(name, levels=2)}" for name in parts["vae"]}
    assert file["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert not any(re.search(r"quant_conv", name) for name in vae)


@pytest.mark.parametrize("kept", [("transformer",), ("transformer", "vae"), ("text_encoder_3",), ("vae",)])
def test_files_with_some_of_the_parts(parts: dict[str, dict[str, Tensor]], kept: tuple[str, ...]) -> None:
    some = {part: parts[part] for part in kept}
    back = names.split(names.join(some, TINY, VAE), TINY, VAE)
    assert back.keys() == some.keys()
    for part in kept:
        assert_same(back[part], some[part])


def test_a_transformer_alone_may_lack_the_prefix() -> None:
    assert_same(names.split(original(TINY), TINY, VAE)["transformer"], by_diffusers(original(TINY)))


def test_leftovers_are_ignored(parts: dict[str, dict[str, Tensor]]) -> None:
    left = {
        "text_encoders.clip_l.logit_scale": torch.ones(()),
        "text_encoders.t5xxl.logit_scale": torch.ones(()),
        "text_encoders.clip_g.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    back = names.split(names.join(parts, TINY, VAE) | left, TINY, VAE)
    assert {part: tensors.keys() for part, tensors in back.items()} == {p: t.keys() for p, t in parts.items()}


@pytest.mark.parametrize("written", [True, False])
def test_the_projection_of_clip_l_is_the_identity(parts: dict[str, dict[str, Tensor]], written: bool) -> None:
    """As in diffusers' `create_diffusers_clip_model_from_checkpoint`, whether or not the file holds one."""
    file = {name: t.half() for name, t in names.join(parts, TINY, VAE).items()}
    name = "text_encoders.clip_l.transformer.text_projection.weight"
    file[name] = torch.randn(64, 64).half()
    if not written:
        del file[name]
    found = names.split(file, TINY, VAE)["text_encoder"]["text_projection.weight"]
    assert found.dtype == torch.float16
    assert torch.equal(found, torch.eye(64).half())


def test_the_second_table_of_t5_is_dropped() -> None:
    shared, again = torch.zeros(1), torch.ones(1)
    both = {"shared.weight": shared, "encoder.embed_tokens.weight": again}
    assert names.t5_tensors(both) == {"shared.weight": shared}
    assert names.t5_tensors({"encoder.embed_tokens.weight": again}) == {"shared.weight": again}


@pytest.mark.parametrize("name", ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.quant", "lora"])
def test_a_stranger_in_a_file_is_refused(parts: dict[str, dict[str, Tensor]], name: str) -> None:
    with pytest.raises(CheckpointError, match=name.rpartition(".")[2]):
        names.split(names.join(parts, TINY, VAE) | {name: torch.zeros(1)}, TINY, VAE)


def test_a_part_of_another_family_is_refused(parts: dict[str, dict[str, Tensor]]) -> None:
    with pytest.raises(CheckpointError, match="1 parts that Stable Diffusion 3 has not: unet"):
        names.join(parts | {"unet": {}}, TINY, VAE)
