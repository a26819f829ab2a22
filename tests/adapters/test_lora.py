"""LoRA files of every dialect: the same changes at the same layers, everything accounted for, one line for bad input.

Tolerance of products 1e-5: sums of 4 or 5 float32 products of numbers of about 1.
"""

import json
import pickle
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from reverie.adapters.deltas import DELTAS
from reverie.adapters.lora import Adapter, open_adapter
from reverie.adapters.lora_names import names_of, parted
from reverie.errors import CheckpointError, RequestError
from reverie.families.base import Parts
from tests.adapters import loras
from tests.adapters.loras import Factors, Written, flat, kohya_entries, parts_of
from tests.checkpoint.hostile_pickles import Hostile

TOLERANCE = 1e-5
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = f"lora_unet_{flat(LAYER)}"


@pytest.fixture(scope="module")
def sd1(root: Path) -> Parts:
    return parts_of(root, "sd1")


def check(adapter: Adapter, parts: Parts, written: Written, tolerance: float = TOLERANCE) -> None:
    """Exactly the written layers are changed, by the written products."""
    found = {(part, path) for part, own in adapter.deltas.items() for path in own}
    assert found == set(written.layers)
    modules = parts.modules()
    for (part, path), factors in written.layers.items():
        weight = modules[part].get_submodule(path).weight
        assert isinstance(weight, Tensor)
        difference = adapter.deltas[part][path].difference(weight, 1.0)
        assert difference.shape == weight.shape
        assert (difference.flatten(1) - factors.product()).abs().max() < tolerance, path


def saved(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    return Written(tensors, {}, metadata or {}).save(path)


def one(weight: Tensor, rank: int = 4) -> dict[str, Tensor]:
    return kohya_entries(KOHYA, loras.factors(weight, rank, 2.0, 0))


def weight_of(parts: Parts, path: str = LAYER) -> Tensor:
    weight = parts.unet.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight


# Dialects


@pytest.mark.parametrize(("kind", "dialect"), loras.CASES, ids=lambda text: text)
def test_dialects_say_the_same(root: Path, tmp_path: Path, kind: str, dialect: str) -> None:
    parts = parts_of(root, kind)
    written = loras.DIALECTS[kind][dialect](parts)
    adapter = open_adapter(written.save(tmp_path / "a.safetensors"), parts)
    assert adapter.coverage.whole, adapter.coverage.line()
    check(adapter, parts, written)


def test_names_of_every_layer(sd1: Parts) -> None:
    """The table has all of the network's own names, and whatever it says is a layer that there is."""
    names = names_of(sd1)
    for part, module in sd1.modules().items():
        for path, layer in module.named_modules():
            if part != "vae" and isinstance(getattr(layer, "weight", None), Tensor):
                target = names.find(f"{part}.{path}")
                assert target is not None
                assert (target.part, target.paths) == (part, (path,))


@pytest.mark.parametrize("case", [str.upper, str.title])
def test_names_are_not_guessed(sd1: Parts, case: object) -> None:
    assert callable(case)
    assert names_of(sd1).find(case(KOHYA)) is None


def test_a_name_of_two_layers_means_neither(root: Path, tmp_path: Path) -> None:
    """LyCORIS' prefix does not say which text encoder."""
    parts = parts_of(root, "sdxl")
    layers = loras.layers_of(parts, loras.ATTENTION, loras.TEXT_ATTENTION)
    written = loras.written(layers, lambda part, path: flat(f"lycoris.{path}"), kohya_entries)
    adapter = open_adapter(written.save(tmp_path / "a.safetensors"), parts)
    assert set(adapter.deltas) == {"unet"}
    assert adapter.coverage.unmatched
    assert all("_encoder_layers_" in name for name in adapter.coverage.unmatched)


def test_every_ending_is_known() -> None:
    for algorithm in DELTAS:
        for ending in DELTAS[algorithm].endings:
            assert parted(f"lora_unet_x.{ending}") == ("lora_unet_x", ending)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precisions(sd1: Parts, tmp_path: Path, dtype: torch.dtype) -> None:
    """Factors are used as the file holds them, products are float32."""
    written = loras.kohya(sd1)
    tensors = {name: t.to(dtype) for name, t in written.tensors.items()}
    rounded = {
        key: Factors(f.down.to(dtype).double(), f.up.to(dtype).double(), f.alpha) for key, f in written.layers.items()
    }
    adapter = open_adapter(saved(tmp_path / "a.safetensors", tensors), sd1)
    check(adapter, sd1, Written(tensors, rounded))


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.ckpt"])
def test_files_of_torch(sd1: Parts, tmp_path: Path, name: str) -> None:
    written = loras.kohya(sd1)
    torch.save(dict(written.tensors), tmp_path / name)
    check(open_adapter(tmp_path / name, sd1), sd1, written)


def test_folder_of_peft(sd1: Parts, tmp_path: Path) -> None:
    """`adapter_config.json` beside the weights tells the scale, here with rsLoRA: alpha / sqrt(rank)."""
    layers = loras.layers_of(sd1, text=None, alpha=None)
    written = loras.written(layers, lambda part, path: f"base_model.model.{path}", loras.peft_entries)
    written.save(tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"conv_in": 3}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    scaled = {
        (part, path): Factors(f.down, f.up, (3 if path == "conv_in" else 6) * len(f.down) ** 0.5)
        for (part, path), f in layers.items()
    }
    check(open_adapter(tmp_path, sd1), sd1, Written({}, scaled))


def test_folder_of_diffusers(sd1: Parts, tmp_path: Path) -> None:
    written = loras.diffusers_plain(sd1)
    written.save(tmp_path / "pytorch_lora_weights.safetensors")
    check(open_adapter(tmp_path, sd1), sd1, written)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="pytorch_lora_weights"):
        open_adapter(tmp_path / "empty", sd1)


def test_layers_said_twice_count_once(sd1: Parts, tmp_path: Path) -> None:
    """Under the names of diffusers and again under those of the original file, as some files are."""
    first = loras.kohya(sd1)
    again = loras.kohya_xl(sd1)
    unet = {name: t for name, t in again.tensors.items() if name.startswith("lora_unet_")}
    adapter = open_adapter(saved(tmp_path / "a.safetensors", dict(first.tensors) | unet), sd1)
    check(adapter, sd1, first)
    assert len(adapter.coverage.unmatched) == len(set(unet) - set(first.tensors))


def test_algorithms_together(sd1: Parts, tmp_path: Path) -> None:
    """A merged set: several at one layer add up, others elsewhere."""
    weight, random_ = weight_of(sd1), torch.Generator().manual_seed(3)
    out, into = weight.shape
    diff = torch.randn(weight.shape, generator=random_)
    lora = loras.factors(weight, 4, None, 1)
    hada = {"hada_w1_a": (out, 2), "hada_w1_b": (2, into), "hada_w2_a": (out, 2), "hada_w2_b": (2, into)}
    conv = flat("lora_unet_down_blocks.0.resnets.0.conv1")
    kron = {"lokr_w1": (2, 2), "lokr_w2": (16, 16, 3, 3)}
    norm = "lora_unet_down_blocks_0_resnets_0_norm1"
    tensors = {f"{KOHYA}.{n}": torch.randn(s, generator=random_) for n, s in hada.items()} | {f"{KOHYA}.diff": diff}
    tensors |= kohya_entries(KOHYA, lora) | {f"{conv}.{n}": torch.randn(s, generator=random_) for n, s in kron.items()}
    tensors |= {
        f"{norm}.w_norm": torch.randn(32, generator=random_),
        f"{norm}.b_norm": torch.randn(32, generator=random_),
    }
    adapter = open_adapter(saved(tmp_path / "a.safetensors", tensors), sd1)
    one_, two = (tensors[f"{KOHYA}.hada_w{i}_a"] @ tensors[f"{KOHYA}.hada_w{i}_b"] for i in (1, 2))
    want = one_ * two + diff + lora.product()
    assert (adapter.deltas["unet"][LAYER].difference(weight, 1.0) - want).abs().max() < TOLERANCE
    assert adapter.coverage.whole
    assert sum(adapter.coverage.algorithms.values()) == 3
    assert set(adapter.coverage.algorithms) == {"LoRA + LoHa + FullDifference", "LoKr", "NormDifference"}


def test_dora(sd1: Parts, tmp_path: Path) -> None:
    """`m * (W + D) / |W + D|` in float64, of the outputs."""
    weight, lora = weight_of(sd1), loras.factors(weight_of(sd1), 4, 2.0, 1)
    scale = torch.rand(len(weight), 1) + 0.5
    path = saved(tmp_path / "a.safetensors", kohya_entries(KOHYA, lora) | {f"{KOHYA}.dora_scale": scale})
    delta = open_adapter(path, sd1).deltas["unet"][LAYER]
    changed = weight.double() + lora.product()
    want = scale.double() * changed / changed.norm(dim=1, keepdim=True) - weight.double()
    assert (delta.difference(weight, 1.0) - want).abs().max() < TOLERANCE


def test_bundled_embeddings(sd1: Parts, tmp_path: Path) -> None:
    vectors, other = torch.randn(3, 32), torch.randn(2, 32)
    tensors = one(weight_of(sd1)) | {
        "bundle_emb.cat.toy.string_to_param.*": vectors, "bundle_emb.dog.emb_params": other,
        "bundle_emb.dog.clip_l_out": torch.ones(2, 32),
    }  # fmt: skip
    adapter = open_adapter(saved(tmp_path / "a.safetensors", tensors), sd1)
    found = {embedding.name: embedding.vectors["text_encoder"] for embedding in adapter.embeddings}
    assert set(found) == {"cat.toy", "dog"}
    assert torch.equal(found["cat.toy"], vectors)
    assert torch.equal(found["dog"], other)
    assert adapter.coverage.unmatched == ("bundle_emb.dog.clip_l_out",)


def test_cut_to_a_rank(sd1: Parts, tmp_path: Path) -> None:
    """A dynamic LoRA at rank 2: its first two ranks, the scale of the whole."""
    factors = loras.factors(weight_of(sd1), 4, 2.0, 0)
    adapter = open_adapter(saved(tmp_path / "a.safetensors", kohya_entries(KOHYA, factors)), sd1)
    want = 0.5 * factors.up[:, :2] @ factors.down[:2]
    cut = adapter.cut(2).deltas["unet"][LAYER]
    assert (cut.difference(weight_of(sd1), 1.0) - want).abs().max() < TOLERANCE
    assert adapter.cut(4).deltas["unet"][LAYER].rank == adapter.cut(9).deltas["unet"][LAYER].rank == 4


# Coverage


def test_partial_coverage_is_told(sd1: Parts, tmp_path: Path) -> None:
    stranger = {"lora_unet_no_such_layer.lora_up.weight": torch.ones(4, 4), "something": torch.ones(1)}
    wrong = {f"lora_unet_conv_in.{n}": torch.ones(4, 4) for n in ("lora_up.weight", "lora_down.weight")}
    adapter = open_adapter(saved(tmp_path / "a.safetensors", one(weight_of(sd1)) | stranger | wrong), sd1)
    coverage = adapter.coverage
    assert not coverage.whole
    assert set(coverage.unmatched) == set(stranger)
    assert set(coverage.unfit) == {"lora_unet_conv_in"}
    line = coverage.line()
    assert "\n" not in line
    for said in ("LoRA at 1 layers of rank 4 (unet 1)", "2 of 7 tensors unmatched", "no_such_layer", "conv_in"):
        assert said in line
    assert coverage.as_dict()["unmatched"] == 2
    assert json.loads(json.dumps(coverage.as_dict())) == coverage.as_dict()


def of_width(width: int, place: str = "attn2_to_k") -> dict[str, Tensor]:
    module = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{place}"
    return {f"{module}.lora_down.weight": torch.ones(4, width), f"{module}.lora_up.weight": torch.ones(32, 4)}


@pytest.mark.parametrize(
    ("tensors", "made"),
    [
        (of_width(768), "Stable Diffusion 1"),
        (of_width(1024), "Stable Diffusion 2"),
        (of_width(2048), "Stable Diffusion XL"),
        (of_width(1280), "the Stable Diffusion XL refiner"),
        (of_width(48), "a model whose prompt is 48 wide"),
        (of_width(768) | of_width(32, "attn1_to_q"), "Stable Diffusion 1"),
        ({"transformer.transformer_blocks.9.attn.add_k_proj.lora_A.weight": torch.ones(4, 8)}, "Stable Diffusion 3"),
        ({"lora_unet_joint_blocks_23_x_block_attn_qkv.lora_down.weight": torch.ones(4, 8)}, "at least 24 blocks"),
        ({"transformer.single_transformer_blocks.1.attn.to_k.lora_A.weight": torch.ones(4, 8)}, "Flux"),
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(4, 8)}, "Flux"),
        ({"lllite_unet_x.lora_down.weight": torch.ones(4, 8)}, "ControlNet-LLLite"),
        ({"lora_unet_x.lora_down.weight": torch.ones(4, 8)}, "names do not tell"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_another_family_is_named(sd1: Parts, tmp_path: Path, tensors: dict[str, Tensor], made: str) -> None:
    with pytest.raises(CheckpointError, match=made) as raised:
        open_adapter(saved(tmp_path / "a.safetensors", tensors), sd1)
    assert "this model is Stable Diffusion 1" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value", "made"),
    [
        ("ss_base_model_version", "sdxl_base_v1-0", "Stable Diffusion XL"),
        ("ss_base_model_version", "sd_v2_v", "Stable Diffusion 2"),
        ("modelspec.architecture", "stable-diffusion-xl-v1-base/lora", "Stable Diffusion XL"),
        ("modelspec.architecture", "stable-diffusion-v1/lora", "Stable Diffusion 1"),
    ],
)
def test_another_family_by_metadata(root: Path, tmp_path: Path, key: str, value: str, made: str) -> None:
    tensors = {"lora_unet_x.lora_down.weight": torch.ones(4, 8), "lora_unet_x.lora_up.weight": torch.ones(8, 4)}
    path = saved(tmp_path / "a.safetensors", tensors, {key: value})
    with pytest.raises(CheckpointError, match=f"a LoRA for {made};"):
        open_adapter(path, parts_of(root, "sd35-medium"))


@pytest.mark.parametrize("other", ["sdxl", "sd35-medium", "refiner"])
def test_every_family_refuses_the_others(root: Path, sd1: Parts, tmp_path: Path, other: str) -> None:
    """Layers of one name and size in both do not make a file fit: the prompt that it reads does."""
    path = loras.kohya(sd1).save(tmp_path / "a.safetensors")
    parts = parts_of(root, other)
    with pytest.raises(CheckpointError, match="for a model whose prompt is 32 wide; this model is Stable Diffusion"):
        open_adapter(path, parts)


# Bad input


def test_what_is_no_lora_is_named(root: Path, sd1: Parts, tmp_path: Path) -> None:
    for name, tensors, what in (
        ("control", {"controlnet_cond_embedding.conv_in.weight": torch.ones(4, 3, 3, 3)}, "ControlNet"),
        ("embedding", {"emb_params": torch.ones(2, 768)}, "embedding"),
        ("other", {"a.b.weight": torch.ones(2, 2), "c": torch.ones(1)}, "no LoRA; its 2 tensors"),
    ):
        with pytest.raises(CheckpointError, match=what):
            open_adapter(saved(tmp_path / f"{name}.safetensors", tensors), sd1)
    with pytest.raises(CheckpointError, match="is no LoRA"):
        open_adapter(root / "sd1" / "unet" / "diffusion_pytorch_model.safetensors", sd1)


@pytest.mark.parametrize("ending", ["lora_up.weight", "lora_down.weight", "alpha"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan(sd1: Parts, tmp_path: Path, ending: str, value: float) -> None:
    tensors = {**loras.kohya(sd1).tensors, **one(weight_of(sd1))}
    damaged = tensors[f"{KOHYA}.{ending}"].clone()
    damaged.view(-1)[-1] = value
    with pytest.raises(CheckpointError, match=f"{KOHYA}.{ending} holds NaN"):
        open_adapter(saved(tmp_path / "a.safetensors", tensors | {f"{KOHYA}.{ending}": damaged}), sd1)


def test_truncated(sd1: Parts, tmp_path: Path) -> None:
    path = loras.kohya(sd1).save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        open_adapter(path, sd1)


def test_hostile_pickle(sd1: Parts, tmp_path: Path) -> None:
    """The code in it does not run."""
    mark = tmp_path / "ran"
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Hostile(mark), protocol=2))
    with pytest.raises(CheckpointError):
        open_adapter(tmp_path / "a.pt", sd1)
    torch.save({f"{KOHYA}.lora_up.weight": torch.ones(4, 4), "x": Hostile(mark)}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError):
        open_adapter(tmp_path / "b.pt", sd1)
    assert not mark.exists()


def test_absurd_rank(sd1: Parts, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="rank 5000 for a layer of 32 x 32"):
        open_adapter(saved(tmp_path / "a.safetensors", one(weight_of(sd1), 5000)), sd1)


def test_absurd_rank_among_others(sd1: Parts, tmp_path: Path) -> None:
    """Of a file that is broken no layer is used."""
    tensors = dict(loras.diffusers_plain(sd1).tensors)
    down, up = (next(name for name in tensors if name.endswith(end)) for end in (".lora_A.weight", ".lora_B.weight"))
    tensors |= {down: torch.ones(5000, tensors[down].shape[1]), up: torch.ones(tensors[up].shape[0], 5000)}
    with pytest.raises(CheckpointError, match="rank 5000"):
        open_adapter(saved(tmp_path / "a.safetensors", tensors), sd1)


def test_rank_larger_than_the_layer(sd1: Parts, tmp_path: Path) -> None:
    factors = loras.factors(weight_of(sd1), 48, 2.0, 0)
    adapter = open_adapter(saved(tmp_path / "a.safetensors", kohya_entries(KOHYA, factors)), sd1)
    difference = adapter.deltas["unet"][LAYER].difference(weight_of(sd1), 1.0)
    assert (difference - factors.product()).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "config", ["[", "[1]", '"x"', '{"unet.alpha_pattern": 3}', '{"unet.lora_alpha": "x"}',
               '{"unet.alpha_pattern": {"(a+)+$": 2}}', "[" * 5000]
)  # fmt: skip
def test_broken_configs(sd1: Parts, tmp_path: Path, config: str) -> None:
    path = saved(tmp_path / "a.safetensors", loras.diffusers_plain(sd1).tensors, {"lora_adapter_metadata": config})
    with pytest.raises(CheckpointError) as raised:
        open_adapter(path, sd1)
    assert "\n" not in str(raised.value)


def test_shapes_drawn_by_chance(sd1: Parts, tmp_path: Path) -> None:
    """Whatever shapes a file has, it opens or is refused in one line."""
    draw = random.Random(0)
    endings = sorted({ending for name in DELTAS for ending in DELTAS[name].endings} | {"alpha", "dora_scale"})
    refused = 0
    for i in range(30):
        shape = [draw.choice([0, 1, 2, 4, 32]) for _ in range(draw.randrange(5))]
        group = {f"{KOHYA}.{ending}": torch.zeros(shape) for ending in draw.sample(endings, draw.randrange(1, 5))}
        good = one(weight_of(sd1)) if i % 2 else {}
        path = tmp_path / f"{i}.safetensors"
        save_file(group | {f"{n}".replace("to_q", "to_k"): t for n, t in good.items()}, path)
        try:
            open_adapter(path, sd1)
        except CheckpointError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 10 < refused < 30
