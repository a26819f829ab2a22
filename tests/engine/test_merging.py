"""Merges of models, against the formulas in float64; LoRAs baked, extracted, cut."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reverie.adapters.attach import Attachment, formed
from reverie.adapters.deltas import LoRA
from reverie.adapters.factoring import Target, extracted, resized
from reverie.adapters.lora import open_adapter
from reverie.adapters.lora_names import networks
from reverie.adapters.lora_save import save_lora
from reverie.engine.merging import Merge, bake, merge
from reverie.engine.mixing import METHODS, Options
from reverie.errors import RequestError
from reverie.families.detect import load_parts
from tests import tiny

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of one shape."""
    root = tmp_path_factory.mktemp("models")
    first = tiny.model_file(root, "sd1")
    found = [first]
    for seed in (1, 2):
        g = torch.Generator().manual_seed(seed)
        path = root / f"other-{seed}.safetensors"
        save_file(
            {k: t + 0.1 * torch.randn(t.shape, generator=g).to(t.dtype) if t.is_floating_point() else t
             for k, t in load_file(first).items()}, path,
        )  # fmt: skip
        found.append(path)
    return found


def tensors(path: Path) -> dict[str, Tensor]:
    return {k: t.double() for k, t in load_file(path).items()}


def merged(files: Sequence[Path], out: Path, **fields: object) -> dict[str, Tensor]:
    merge(files[0], Merge(**fields), out)  # type: ignore[arg-type]
    return tensors(out)


def test_weighted_sum_of_three(files: list[Path], tmp_path: Path) -> None:
    found = merged(files, tmp_path / "m.safetensors", others=((files[1], 0.3), (files[2], 0.2)))
    a, b, c = map(tensors, files)
    left_out = {"alphas_cumprod", "model_ema.decay"}  # what no picture needs
    assert found.keys() <= a.keys()
    assert {name for name in a.keys() - found.keys() if not name.startswith("model_ema.")} <= left_out
    for name, tensor in found.items():
        mixed = not name.startswith("first_stage_model.")
        expected = 0.5 * a[name] + 0.3 * b[name] + 0.2 * c[name] if mixed else a[name]
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)  # float32 arithmetic


def test_add_difference(files: list[Path], tmp_path: Path) -> None:
    found = merged(files, tmp_path / "m.safetensors", others=((files[1], 0.7),), base=files[2], method="add_difference")
    a, b, c = map(tensors, files)
    name = next(name for name in a if name.startswith(UNET) and name.endswith("attn1.to_q.weight"))
    torch.testing.assert_close(found[name], a[name] + 0.7 * (b[name] - c[name]), rtol=0, atol=1e-6)


def test_blocks_have_their_own_weights(files: list[Path], tmp_path: Path) -> None:
    blocks = {"IN00": 1.0, "mid_block": 0.0, "BASE": 0.25}
    found = merged(files[:2], tmp_path / "m.safetensors", others=((files[1], 0.5),), blocks=blocks)
    a, b = tensors(files[0]), tensors(files[1])
    for start, weight in {
        f"{UNET}input_blocks.0.": 1.0, f"{UNET}middle_block.": 0.0, f"{UNET}output_blocks.1.": 0.5,
        f"{UNET}time_embed.": 0.25, "cond_stage_model.": 0.25,
    }.items():  # fmt: skip
        names = [name for name in a if name.startswith(start)]
        assert names
        for name in names:
            torch.testing.assert_close(found[name], torch.lerp(a[name], b[name], weight), rtol=0, atol=1e-6)


def test_an_inpainting_model_takes_others_at_its_first_channels(tmp_path: Path) -> None:
    inpaint = tiny.model_file(tmp_path / "a", "sd1-inpaint")
    plain = tiny.model_file(tmp_path / "b", "sd1")
    found = merged([inpaint], tmp_path / "m.safetensors", others=((plain, 1.0),))
    name = f"{UNET}input_blocks.0.0.weight"
    a, b = tensors(inpaint)[name], tensors(plain)[name]
    torch.testing.assert_close(found[name][:, :4], b, rtol=0, atol=1e-6)
    assert torch.equal(found[name][:, 4:], a[:, 4:])


def mix(method: str, *tensors: Tensor, weights: Sequence[float], base: Tensor, **options: float) -> Tensor:
    return METHODS[method].mix(tensors[0], tensors[1:], weights, base, Options(**options))  # type: ignore[arg-type]


def test_slerp_stays_on_the_sphere() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    half = mix("slerp", a, b, weights=[0.5], base=a)
    torch.testing.assert_close(half, torch.full((2,), math.sqrt(2)))
    for w in (0.0, 0.2, 1.0):
        assert float(mix("slerp", a, b, weights=[w], base=a).norm()) == pytest.approx(2, abs=1e-6)
    torch.testing.assert_close(mix("slerp", a, 3 * a, weights=[0.25], base=a), 1.5 * a)
    torch.testing.assert_close(mix("slerp", torch.zeros(2), b, weights=[0.5], base=a), b / 2)


def test_ties_by_hand() -> None:
    """Task vectors (1, 0, -4, 3) and (2, 5, 1, 0) of weight 1/2 each, of which half is kept."""
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    one, two = base + torch.tensor([1.0, 0.0, -4.0, 3.0]), base + torch.tensor([2.0, 5.0, 1.0, 0.0])
    found = mix("ties", one, two, weights=[0.5], base=base, density=0.5)
    # kept: (0, 0, -4, 3) and (2, 5, 0, 0); nothing disagrees, and each mean has one member
    torch.testing.assert_close(found - base, torch.tensor([2.0, 5.0, -4.0, 3.0]))
    clash = mix("ties", base + torch.tensor([4.0]).expand(4), base - torch.tensor([2.0]).expand(4), weights=[0.5],
                base=base, density=1.0)  # fmt: skip
    torch.testing.assert_close(clash - base, torch.full((4,), 4.0))  # the larger sum wins, the other is left out


def test_dare_keeps_the_mean() -> None:
    """What is dropped is made up for by what is kept."""
    base, model = torch.zeros(200_000), torch.full((200_000,), 0.3)
    found = mix("dare", base, model, weights=[1.0], base=base, density=0.25, seed=3)
    assert sorted(set(found.tolist())) == [0.0, pytest.approx(1.2)]
    assert float(found.mean()) == pytest.approx(0.3, rel=0.02)  # 4 standard deviations are 0.016 of it
    again = mix("dare", base, model, weights=[1.0], base=base, density=0.25, seed=3)
    assert torch.equal(found, again)
    ties = mix("dare_ties", base, model, weights=[1.0], base=base, density=0.25, seed=3)
    torch.testing.assert_close(ties, found)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"others": ()}, "at least one other model; 0 were given"),
        ({"method": "slerp", "others": 2}, "exactly one other model; 2 were given"),
        ({"method": "ties"}, "takes differences from a base model; give one"),
        ({"base": Path("x")}, "has no use for a base model"),
        ({"method": "mix"}, "unknown way to merge 'mix'"),
        ({"options": Options(density=0)}, "density is 0; it is a share"),
    ],
)
def test_what_cannot_be_merged(fields: Mapping[str, object], message: str) -> None:
    given = {"others": ((Path("b"), 0.5),)} | dict(fields)
    if given["others"] == 2:
        given["others"] = ((Path("b"), 0.5),) * 2
    with pytest.raises(RequestError, match=message):
        Merge(**given)  # type: ignore[arg-type]


def test_models_of_other_shapes_are_refused(files: list[Path], tmp_path: Path) -> None:
    other = tiny.model_file(tmp_path / "x", "sdxl")
    with pytest.raises(RequestError, match=r"only models of one family and shape merge"):
        merge(files[0], Merge(((other, 0.5),)), tmp_path / "m.safetensors")
    assert not (tmp_path / "m.safetensors").exists()


# LoRAs


def changes(path: Path, rank: int, scale: float = 0.3) -> dict[str, dict[str, LoRA]]:
    """A LoRA for every linear layer and convolution."""
    g = torch.Generator().manual_seed(0)
    found: dict[str, dict[str, LoRA]] = {}
    for part, network in networks(load_parts(path)).items():
        for name, module in network.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                fresh = LoRA.fresh(module.weight.shape, rank, generator=g)
                up = scale * torch.randn(fresh.up.shape, generator=g)
                found.setdefault(part, {})[name] = LoRA(fresh.down, up, alpha=rank / 2)
    return found


def test_baking_is_attaching(files: list[Path], tmp_path: Path) -> None:
    parts = load_parts(files[0])
    lora = tmp_path / "l.safetensors"
    save_lora(changes(files[0], 2), lora, parts)
    bake(files[0], lambda model: [Attachment(open_adapter(lora, model), 0.8, 0.5)], tmp_path / "baked.safetensors")
    baked, attachment = load_parts(tmp_path / "baked.safetensors"), Attachment(open_adapter(lora, parts), 0.8, 0.5)
    for part, network in networks(parts).items():
        expected = formed(network, part, [attachment], "merge").state_dict()
        written = networks(baked)[part].state_dict()
        assert [name for name in expected if not torch.equal(expected[name], written[name])] == []


def test_extracting_finds_the_lora_again(files: list[Path], tmp_path: Path) -> None:
    parts = load_parts(files[0])
    lora = tmp_path / "l.safetensors"
    save_lora(changes(files[0], 3), lora, parts)
    baked = tmp_path / "baked.safetensors"
    bake(files[0], lambda model: [Attachment(open_adapter(lora, model))], baked)
    found = extracted(parts, load_parts(baked), Target(3), dtype=torch.float32)
    assert found.held > 1 - 1e-6
    assert found.ranks == (3, 3)
    for part, own in changes(files[0], 3).items():
        for name, delta in own.items():
            weight = networks(parts)[part].get_submodule(name).weight
            assert isinstance(weight, Tensor)
            difference = found.deltas[part][name].difference(weight, 1.0)
            torch.testing.assert_close(difference, delta.difference(weight, 1.0), rtol=0, atol=2e-5)


def test_extracting_by_quality(files: list[Path]) -> None:
    whole = extracted(load_parts(files[0]), load_parts(files[1]), Target(9999), dtype=torch.float32)
    part = extracted(load_parts(files[0]), load_parts(files[1]), Target(9999, 0.6), dtype=torch.float32)
    assert whole.held == pytest.approx(1)
    assert 0.6 <= part.held < 0.85
    assert part.ranks[1] < whole.ranks[1]


def test_models_that_do_not_differ(files: list[Path]) -> None:
    with pytest.raises(RequestError, match="do not differ"):
        extracted(load_parts(files[0]), load_parts(files[0]), Target(4))


def test_resizing_is_the_nearest_of_its_rank(files: list[Path], tmp_path: Path) -> None:
    parts = load_parts(files[0])
    lora = tmp_path / "l.safetensors"
    save_lora(changes(files[0], 6), lora, parts)
    adapter = open_adapter(lora, parts)
    same, small = resized(adapter, Target(6)), resized(adapter, Target(2))
    assert same.held == pytest.approx(1, abs=1e-6)
    assert small.ranks == (2, 2)
    for part, own in adapter.deltas.items():
        for name, delta in own.items():
            weight = networks(parts)[part].get_submodule(name).weight
            assert isinstance(weight, Tensor)
            full = delta.difference(weight, 1.0)
            torch.testing.assert_close(same.deltas[part][name].difference(weight, 1.0), full, rtol=0, atol=1e-5)
            u, s, v = torch.linalg.svd(full.flatten(1), full_matrices=False)
            nearest = (u[:, :2] * s[:2] @ v[:2]).view_as(full)
            torch.testing.assert_close(small.deltas[part][name].difference(weight, 1.0), nearest, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("rank", "quality", "message"), [(0, None, "rank is 0"), (4, 0.0, "quality is 0")])
def test_targets_that_are_none(rank: int, quality: float | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Target(rank, quality)
