"""Adapters through the whole engine: they combine with every other field, and leave without a trace.

Pictures are compared bit for bit where the same arithmetic runs, within 1e-4 of [0, 1] where it runs in another order.
"""

import gc
import itertools
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import reverie
from reverie.adapters.attach import Attachment, Branched, formed
from reverie.adapters.lora import open_adapter
from reverie.checkpoint.packed import is_packed
from reverie.engine.bundle import Model
from reverie.engine.sources import data_url
from reverie.errors import RequestError
from tests import tiny
from tests.adapters import controls, driving, kinds_of_change, loras, pictured, sketched
from tests.parity.test_lora_parity import bare

CLOSE = 1e-4
SIZE = 32
KINDS = ("lora", "lokr", "boft", "dora of peft", "merged set")
WORDS = "a red apple"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with folders of adapters beside it: LoRAs `a`, `b`, `c` and the textual inversions `toy`, `hat`."""
    folder = tmp_path_factory.mktemp("models")
    made = tiny.model(folder, "sd1", merges_kept=500)
    tiny.scheduler_of(tiny.DDIM).save_pretrained(made / "scheduler")
    for seed, (name, kind) in enumerate({"a": "lora", "b": "loha", "c": "dora of peft"}.items()):
        lora(folder / "loras" / f"{name}.safetensors", kind, seed, made)
    (folder / "embeddings").mkdir()
    save_file({"emb_params": vectors(2, 1)}, folder / "embeddings" / "toy.safetensors")
    torch.save({"string_to_param": {"*": vectors(3, 2)}, "name": "x"}, folder / "embeddings" / "hat.pt")
    return folder


@pytest.fixture(scope="module")
def model(root: Path) -> Model:
    return opened(root)


@pytest.fixture(autouse=True)
def library(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REVERIE_MODELS", str(root))


def opened(root: Path, name: str = "sd1") -> Model:
    return reverie.load(root / name, device="cpu", precision="float32")


def vectors(count: int, seed: int) -> Tensor:
    return 0.3 * torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def lora(path: Path, kind: str, seed: int, folder: Path, **more: Tensor) -> Path:
    """A change of one kind at some attention layers of both networks of a model, under kohya's names."""
    parts, tensors = driving.parts_of(folder), dict(more)
    for part, layer in loras.layers_of(parts, loras.ATTENTION, loras.TEXT_ATTENTION):
        weight = parts.modules()[part].get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        module = loras.flat(f"{'lora_unet' if part == 'unet' else 'lora_te'}.{layer}")
        found = kinds_of_change.tensors_of(kind, tuple(weight.shape), len(tensors) + 1000 * seed)
        tensors |= {f"{module}.{ending}": t if ending == "on_input" else 0.5 * t for ending, t in found.items()}
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    return path


def drawn(model: Model, prompt: str = WORDS, **fields: Any) -> Tensor:
    common: dict[str, Any] = {"steps": 2, "seed": 7, "guidance_scale": 3.0, "negative_prompt": "blurry"}
    if "image" not in fields:
        common |= {"width": SIZE, "height": SIZE}
    return model.generate(prompt, **common | fields).pixels


def apart(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


# LoRA


@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_beside(model: Model, root: Path, tmp_path: Path, kind: str) -> None:
    """The same picture; afterwards the model's own, bit for bit."""
    path = str(lora(tmp_path / "x.safetensors", kind, 5, root / "sd1"))
    plain = drawn(model)
    found = [drawn(model, loras={"path": path, "strength": 0.4, "way": way}) for way in ("merge", "branch")]
    assert branched(model) and apart(*found) < CLOSE
    assert apart(found[0], plain) > 10 * CLOSE
    assert torch.equal(drawn(model), plain)


def branched(model: Model) -> bool:
    """Whether the last form of the U-Net has branches."""
    return any(isinstance(module, Branched) for module in model.forms["unet"][1].modules())


def test_every_order_of_three(model: Model) -> None:
    """Bit for bit, and so are the pictures between: whoever leaves, the others stay."""
    plain, alone = drawn(model), {name: drawn(model, loras=name) for name in "abc"}
    found = []
    for order in itertools.permutations("abc"):
        model.forms.clear()
        found.append(drawn(model, loras=[f"{name}:0.3" for name in order]))
        assert torch.equal(drawn(model, loras=order[0]), alone[order[0]])
    assert all(torch.equal(one, found[0]) for one in found)
    assert torch.equal(drawn(model), plain)


def test_strengths(model: Model) -> None:
    """Nothing at 0; U-Net and text encoders apart, and by block; twice at half is once."""
    plain = drawn(model)
    assert torch.equal(drawn(model, loras="a:0"), plain)
    both, unet, text = (drawn(model, loras=f"a:{numbers}") for numbers in ("0.5:0.5", "0.5:0", "0:0.5"))
    assert min(apart(*pair) for pair in itertools.combinations((plain, both, unet, text), 2)) > CLOSE
    assert torch.equal(drawn(model, loras="a:0.5"), both)
    assert apart(drawn(model, loras=["a:0.25", "a:0.25"]), both) < CLOSE
    assert apart(drawn(model, loras="a:-0.5"), both) > CLOSE


def test_blocks(model: Model) -> None:
    every = drawn(model, loras="a:0.5:0")
    blocks = {"down": drawn(model, loras="a:0.5:0:blocks.up=0,blocks.mid=0"),
              "up": drawn(model, loras="a:0.5:0:blocks.down=0,blocks.mid=0")}  # fmt: skip
    assert apart(blocks["down"], blocks["up"]) > CLOSE
    assert apart(blocks["down"], every) > CLOSE
    assert torch.equal(drawn(model, loras="a:0.5:0:blocks.down=0,blocks.mid=0,blocks.up=0"), drawn(model))


def on_the_way(model: Model, **fields: Any) -> list[Tensor]:
    """The x0 of every evaluation."""
    found: list[Tensor] = []
    common: dict[str, Any] = {"steps": 4, "seed": 7, "sampler": "euler", "width": SIZE, "height": SIZE}
    model.generate(WORDS, watch=lambda done, total, x0: found.append(x0.clone()), **common | fields)
    return found


@pytest.mark.parametrize(("interval", "acts"), [("start=0.5", [0, 0, 1, 1]), ("end=0.5", [1, 1, 0, 0]),
                                                ("start=0.25,end=0.75", [0, 1, 1, 0])])  # fmt: skip
def test_some_of_the_steps(model: Model, interval: str, acts: list[int]) -> None:
    """The first half as with it or without it; then otherwise."""
    found = on_the_way(model, loras=f"a:0.5:0:{interval}")
    ways = [on_the_way(model), on_the_way(model, loras={"path": "a", "strength": 0.5, "text_strength": 0,
                                                        "way": "branch"})]  # fmt: skip
    same = next(i for i in range(1, 4) if acts[i] != acts[0])
    for i in range(same):
        assert torch.equal(found[i], ways[acts[0]][i])
    assert apart(found[same], ways[acts[0]][same]) > CLOSE
    # from there on a step is one of the plain network, or of that with the LoRA, at another sample
    assert not torch.equal(found[-1], ways[0][-1]) and not torch.equal(found[-1], ways[1][-1])


@pytest.fixture(scope="module")
def changed(root: Path) -> Model:
    """The model with LoRAs in the weights of its files."""
    folder, parts = root / "baked", driving.parts_of(root / "sd1")
    shutil.copytree(root / "sd1", folder)
    attached = [
        Attachment(open_adapter(root / "loras" / f"{name}.safetensors", parts), weight, weight)
        for name, weight in {"a": 0.5, "b": -0.4}.items()
    ]
    for part in ("unet", "text_encoder"):
        own = bare(formed(parts.modules()[part], part, attached, "merge").state_dict())
        [file] = (folder / part).glob("*.safetensors")
        tensors = {name: own[name.removeprefix("text_model.")].clone() for name in load_file(file)}
        file.unlink()  # it may be a link
        save_file(tensors, file, {"format": "pt"})
    return opened(root, "baked")


NOISE = Image.effect_noise((SIZE, SIZE), 60).convert("RGB")
HALF = Image.new("L", (SIZE, SIZE))
HALF.paste(255, (16, 0, 32, 32))
FIELDS: dict[str, dict[str, Any]] = {
    "alone": {},
    "seamless": {"seamless": "both"},
    "tiles": {"width": 48, "tiles": {"size": 32, "overlap": 8}},
    "hires": {"hires": {"scale": 1.5, "strength": 0.8}},
    "image": {"image": NOISE, "strength": 0.8},
    "mask": {"image": NOISE, "mask": HALF},
    "guides": {"guides": ("pag:scale=2", "sag")},
    "words over time": {"prompt": "a [red:green:0.5] apple AND a (leaf:1.4)"},
    "frames": {"travel": {"frames": 2, "prompt": "a leaf", "seed": 3}},
    "batch": {"count": 2, "batch_size": 2},
    "handed over": {"steps": 4, "refine": {"at": 0.5}},
    "drawn over": {"refine": {"strength": 0.6}},
}


@pytest.mark.parametrize("name", list(FIELDS))
def test_other_fields(root: Path, model: Model, changed: Model, name: str) -> None:
    """Drawn as by a model in whose files the LoRAs are."""
    fields = dict(FIELDS[name])
    if "refine" in fields:
        fields["refine"] = {"model": str(root / "sd1")} | fields["refine"]
    want = drawn(changed, **fields)
    assert apart(drawn(model, loras=["a:0.5", "b:-0.4"], **fields), want) < CLOSE
    assert apart(drawn(model, **fields), want) > CLOSE


# In the prompt


def test_each_picture_its_own(model: Model) -> None:
    """Wildcards name other LoRAs for the pictures of one request."""
    result = model.generate("an apple {<lora:a:0.5>|<lora:b:0.5>|}", count=4, batch_size=2, steps=2, seed=3,
                            width=SIZE, height=SIZE)  # fmt: skip
    told = [own.prompt for own in result.own]
    assert len(set(told)) > 1
    for pixels, own in zip(result.pixels, result.own, strict=True):
        assert apart(model.draw(own).pixels[0], pixels) < CLOSE
    named = drawn(model, "an apple <lora:a:0.5>")
    assert torch.equal(named, drawn(model, "an apple ", loras="a:0.5"))
    both = drawn(model, "an apple ", loras=["a:0.5", "b:0.5"])
    assert torch.equal(drawn(model, "an apple <lora:b:0.5>", loras="a:0.5"), both)


def test_in_the_prompt_of_the_second_pass(model: Model) -> None:
    """It acts there alone."""
    hires = {"scale": 1.5, "strength": 0.7}
    plain = on_the_way(model, hires=hires)
    found = on_the_way(model, hires=hires | {"prompt": f"{WORDS}<lora:a:0.5>"})
    assert len(found) == len(plain) > 4
    assert all(torch.equal(*pair) for pair in zip(found[:4], plain[:4], strict=True))
    assert apart(found[4], plain[4]) > CLOSE


def test_ranks(model: Model) -> None:
    """`<lora:name:text:unet:rank>` cuts it; the form of the whole is not taken for it."""
    whole, cut = drawn(model, "apple <lora:a:1:1>"), drawn(model, "apple <lora:a:1:1:1>")
    assert apart(whole, cut) > CLOSE
    assert torch.equal(drawn(model, "apple <lora:a:1:1>"), whole)


def test_in_the_negative_prompt(model: Model) -> None:
    with pytest.warns(UserWarning, match="<lora:a:0.5> stands in the negative prompt and is left out"):
        found = drawn(model, negative_prompt="blurry <lora:a:0.5>")
    assert apart(found, drawn(model, negative_prompt="blurry ")) < CLOSE


# Textual inversion


def test_words_of_embeddings(model: Model, root: Path, tmp_path: Path) -> None:
    """By name in the library or the request, by another word, from a wildcard, in both prompts, with emphasis."""
    toy = root / "embeddings" / "toy.safetensors"
    found = drawn(model, "a toy on a table")
    assert torch.equal(drawn(model, "a toy on a table", embeddings="toy"), found)
    assert torch.equal(drawn(model, "a thing on a table", embeddings=f"thing={toy}"), found)
    assert torch.equal(drawn(model, "a thing on a table", embeddings="thing=toy"), found)
    comfy = drawn(model, "a embedding:toy on a table", dialect="comfy")
    assert torch.equal(comfy, found)
    (tmp_path / "thing.txt").write_text("toy\n", encoding="utf-8")
    assert torch.equal(drawn(model, "a __thing__ on a table", wildcards=str(tmp_path)), found)
    others = [
        drawn(model, "a (toy:1.5) on a table"), drawn(model, "a hat on a table"), drawn(model, "a toy hat"),
        drawn(model, "a table", negative_prompt="toy"), drawn(model, "a table", negative_prompt="hat"),
        drawn(model, "a toys on a table"),
    ]  # fmt: skip
    assert min(apart(*pair) for pair in itertools.combinations((found, *others), 2)) > CLOSE


def test_embeddings_in_a_lora(model: Model, root: Path, tmp_path: Path) -> None:
    """They come and go with it."""
    table = {"bundle_emb.gem.string_to_param.*": vectors(2, 9)}
    both = lora(tmp_path / "both.safetensors", "lora", 0, root / "sd1", **table)
    save_file({"emb_params": vectors(2, 9)}, tmp_path / "gem.safetensors")
    plain = drawn(model, "a gem")
    found = drawn(model, "a gem", loras=f"{both}:0")
    assert torch.equal(found, drawn(model, "a gem", embeddings=str(tmp_path / "gem.safetensors")))
    assert apart(found, plain) > CLOSE
    assert torch.equal(drawn(model, "a gem"), plain)


# Metadata


def test_what_was_used(model: Model, root: Path) -> None:
    """Hashes and coverage; in the text that other programs read, too."""
    result = model.generate("a toy <lora:b:0.5>", loras="a:0.4", negative_prompt="hat", steps=1, seed=1, width=SIZE,
                            height=SIZE)  # fmt: skip
    opened_ = {name: open_adapter(root / "loras" / f"{name}.safetensors", model.parts) for name in "ab"}
    for name, adapter in opened_.items():
        assert result.model[f"lora: {name}"] == adapter.digest
        assert result.model[f"lora coverage: {name}"] == adapter.coverage.line()
    text = result.images[0].info["parameters"]
    assert f'Lora hashes: "a: {opened_["a"].short}, b: {opened_["b"].short}"' in text
    digests = {name: result.model[f"embedding: {name}"][:12] for name in ("toy", "hat")}
    assert f"toy: {digests['toy']}" in text and f"hat: {digests['hat']}" in text and "TI hashes: " in text
    assert torch.equal(model.draw(result.own[0]).pixels, result.pixels)
    plain = model.generate("a table", steps=1, width=SIZE, height=SIZE).model
    assert not [key for key in plain if "lora" in key or "embedding" in key]


# Packed weights


def test_beside_packed_weights(root: Path) -> None:
    """Packed weights stay as they are; the picture is that of unpacked ones, bit for bit."""
    shutil.copytree(root / "sd1", root / "packed")
    [file] = (root / "packed" / "unet").glob("*.safetensors")
    small = {n: t.to(torch.float8_e4m3fn) if t.ndim > 1 else t for n, t in load_file(file).items()}
    file.unlink()
    save_file(small, file, {"format": "pt"})
    folder = root / "packed"
    models = {how: reverie.load(folder, device="cpu", precision="float32", weights=how) for how in ("packed", "full")}
    plain = drawn(models["packed"])
    packed = drawn(models["packed"], loras="a:0.5:0")
    assert is_packed(models["packed"].forms["unet"][1])
    assert branched(models["packed"])
    full, merged = (drawn(models["full"], loras=f"a:0.5:0:way={way}") for way in ("branch", "merge"))
    assert torch.equal(packed, full)
    assert apart(packed, merged) < CLOSE
    assert apart(packed, plain) > CLOSE
    assert torch.equal(drawn(models["packed"]), plain)


# Steered


def steered(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every kind of picture that steers."""
    control = {"kind": "canny", "preprocessor": "none", "picture": data_url(pictured.picture(3, (SIZE, SIZE)))}
    yield "ControlNet", {"controls": control | {"net": str(root / "control")}}
    yield "T2I-Adapter", {"controls": control | {"net": str(root / "t2i")}}
    yield "reference", {"controls": control | {"kind": "reference"}}
    encoder = str(root / "image_encoder")
    yield "IP-Adapter", {"image_prompts": {"pictures": data_url(pictured.picture()), "encoder": encoder,
                                           "adapter": str(root / "ip.safetensors")}}  # fmt: skip
    yield "style", {"image_prompts": {"pictures": data_url(pictured.picture()), "encoder": encoder, "strength": 3,
                                      "adapter": str(root / "style.safetensors")}}  # fmt: skip
    yield "FaceID", {"image_prompts": {"pictures": data_url(pictured.picture()), "faces": str(root / "who.safetensors"),
                                       "adapter": str(root / "face.safetensors")}}  # fmt: skip


@pytest.fixture(scope="module")
def steering(root: Path, model: Model) -> dict[str, dict[str, Any]]:
    controls.sd1_control(root)
    sketched.adapter("full_adapter", widths=[32, 64]).save_pretrained(root / "t2i")
    pictured.image_encoder().save_pretrained(root / "image_encoder")
    pictured.file_of(root, "ip.safetensors", pictured.tensors("plain", model.parts.unet))  # type: ignore[arg-type]
    pictured.file_of(root, "face.safetensors", pictured.tensors("face", model.parts.unet, lora=True))  # type: ignore[arg-type]
    save_file(sketched.style(model.parts.unet.config.context_width), root / "style.safetensors")
    save_file({"face": driving.rand(1, 512)}, root / "who.safetensors")
    return dict(steered(root))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *itertools.product(("ControlNet", "T2I-Adapter", "reference", "IP-Adapter"), ("tiles", "batch")),
        ("ControlNet", "hires"), ("reference", "image"), ("style", "tiles"), ("style", "batch"), ("FaceID", "batch"),
    ],
)  # fmt: skip
def test_steered(model: Model, steering: dict[str, dict[str, Any]], name: str, way: str) -> None:
    """With other fields, and without a trace."""
    fields, plain = FIELDS[way], drawn(model, **FIELDS[way])
    if (name, way) == ("T2I-Adapter", "tiles"):
        with pytest.raises(RequestError, match="draw without tiles"):
            drawn(model, **fields, **steering[name])
        return
    found = drawn(model, **fields, **steering[name])
    assert found.shape == plain.shape
    assert torch.isfinite(found).all()
    assert apart(found, plain) > CLOSE
    if way == "batch":
        assert apart(found[1:], drawn(model, **steering[name], seed=8)) < CLOSE
    assert torch.equal(drawn(model, **fields), plain)


def test_a_style_for_some_of_the_steps(model: Model, steering: dict[str, dict[str, Any]]) -> None:
    prompt, plain = steering["style"]["image_prompts"], drawn(model)
    parts = [drawn(model, image_prompts=prompt | {"start": a, "end": b}) for a, b in ((0, 0.5), (0.5, 1), (0, 1))]
    assert all(apart(one, plain) > CLOSE for one in parts)
    assert all(apart(one, other) > CLOSE for one, other in itertools.combinations(parts, 2))
    with pytest.raises(RequestError, match="leave blocks out"):
        drawn(model, image_prompts=prompt | {"blocks": {"mid": 0.5}})


def test_faceid_is_tokens_and_a_lora(model: Model, root: Path, steering: dict[str, dict[str, Any]]) -> None:
    """Its LoRA acts on the layers, whatever the strength of its tokens; without a face it is refused."""
    prompt = steering["FaceID"]["image_prompts"]
    tensors = load_file(root / "face.safetensors")
    save_file({name: t for name, t in tensors.items() if "_lora." not in name}, root / "tokens.safetensors")
    alone = drawn(model, image_prompts=prompt | {"adapter": str(root / "tokens.safetensors")})
    assert apart(drawn(model, image_prompts=prompt), alone) > CLOSE
    assert apart(drawn(model, image_prompts=prompt | {"strength": 0}), drawn(model)) > CLOSE
    with pytest.raises(RequestError, match="faces=FILE"):
        drawn(model, image_prompts={name: value for name, value in prompt.items() if name != "faces"})


@pytest.mark.parametrize("resize", ["crop", "fill", "stretch"])
def test_a_control_picture_of_another_size(model: Model, steering: dict[str, dict[str, Any]], resize: str) -> None:
    """It is brought to the drawing's, in the way that is asked for: as the same picture of that size."""
    wide = pictured.picture(1, (96, 64))
    like = {"crop": wide.crop((16, 0, 80, 64)), "stretch": wide, "fill": Image.new("RGB", (96, 96))}[resize]
    if resize == "fill":
        like.paste(wide, (0, 16))
    asked = steering["ControlNet"]["controls"] | {"resize": resize}
    found = drawn(model, controls=asked | {"picture": data_url(wide)})
    want = drawn(model, controls=asked | {"picture": data_url(like.resize((SIZE, SIZE), Image.Resampling.BILINEAR))})
    assert apart(found, want) < apart(found, drawn(model)) / 2


# Again and again


@pytest.fixture
def smallest(root: Path) -> Path:
    """A model with one layer of everything, and two LoRAs for it beside those of the other."""
    torch.manual_seed(0)
    networks = (
        tiny.text_encoder(**tiny.NARROW | {"num_hidden_layers": 1}),
        tiny.unet(block_out_channels=(16,), norm_num_groups=8, layers_per_block=1, cross_attention_dim=32,
                  **tiny.levels((1,))),
        tiny.vae(block_out_channels=(8, 8, 8), norm_num_groups=8),
    )  # fmt: skip
    tiny.assembled(root, tiny.scheduler_of(tiny.DDIM), networks, merges_kept=500).save_pretrained(root / "smallest")
    for seed, kind in enumerate(("lora", "loha")):
        lora(root / "loras" / f"small_{kind}.safetensors", kind, seed, root / "smallest")
    return root / "smallest"


def test_two_hundred_times(root: Path, smallest: Path) -> None:
    """Attached, drawn with, detached: no tensor stays, no memory is lost, no pixel moves."""
    model = opened(root, smallest.name)
    small: dict[str, Any] = {"steps": 1, "width": 16, "height": 16, "guidance_scale": 1.0}
    asked: list[dict[str, Any]] = [
        {"loras": ["small_lora:0.5"]},
        {},
        {"loras": "small_loha:0.3:end=0.5", "embeddings": "toy"},
        {},
    ]
    first = [drawn(model, "a toy", **small, **fields) for fields in asked]

    def rounds(count: int) -> tuple[int, int]:
        """Tensors that are held afterwards, and the largest size of the process so far, in KiB."""
        for i in range(count):
            assert torch.equal(drawn(model, "a toy", **small, **asked[i % 4]), first[i % 4])
        gc.collect()
        held = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
        return held, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    (held, size), (held_later, size_later) = rounds(40), rounds(160)
    assert held_later <= held
    assert size_later - size < 8 * 2**10
