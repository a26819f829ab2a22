"""Draw a sheet for every feature with the bundled model: `python recipes/emoji/features.py [NAME ...]`."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

import reverie
from reverie.engine.animation import save_animation
from reverie.engine.bundle import Model
from reverie.engine.grid import captioned
from reverie.engine.image import save_image
from reverie.engine.sources import data_url, to_picture, to_tensor
from reverie.engine.upscale import open_upscaler

Cell = tuple[str, Image.Image]
COLUMNS, SIZE = 6, 192
SEED = 7


def draw(model: Model, label: str, prompt: str, **fields: Any) -> Cell:
    """One picture and what is written under it."""
    return label, model.generate(prompt, **{"seed": SEED, **fields}).images[0]


def right_half(image: Image.Image) -> str:
    """A mask of the right half of a picture."""
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (image.width // 2, 0, *image.size))
    return data_url(mask)


def words(model: Model) -> list[Cell]:
    """Weights, schedules, alternation, AND, wildcards."""
    prompts = (
        "a red apple", "a red apple AND a sun", "a red apple :1.2 AND a sun :0.6",
        "[a sun:a cat:0.15]", "[a red apple|a strawberry]", "{a rocket|a castle|an owl}",
    )  # fmt: skip
    return [draw(model, prompt, prompt) for prompt in prompts]


def samplers(model: Model) -> list[Cell]:
    """The same seed by samplers of every kind."""
    names = ("euler", "euler_a", "heun", "dpm_2", "dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc",
             "deis", "lms", "ddim", "pndm", "restart", "er_sde", "sa_solver", "lcm", "euler_cfg_pp")  # fmt: skip
    found = []
    for name in names:
        scale = 1.5 if name.endswith("cfg_pp") else None  # CFG++ wants low scales
        found.append(draw(model, name, "a sun", sampler=name, spacing="sgm_uniform", steps=20, guidance_scale=scale))
    return found


def spacings(model: Model) -> list[Cell]:
    """Twelve steps, differently spaced."""
    names = ("leading", "trailing", "linspace", "sgm_uniform", "karras", "exponential", "polyexponential", "beta",
             "kl_optimal", "align_your_steps", "laplace", "turbo")  # fmt: skip
    return [draw(model, name, "a cat", sampler="dpmpp_2m", spacing=name, steps=12) for name in names]


def guidance(model: Model) -> list[Cell]:
    """Scales, and the guides beside them."""
    scales = [draw(model, f"guidance_scale {s}", "an owl", guidance_scale=s) for s in (1.0, 2.0, 4.0, 12.0)]
    taken = [draw(model, "12, rescale 0.7", "an owl", guidance_scale=12.0, guidance_rescale=0.7),
             draw(model, "4, in the first half", "an owl", guidance_scale=4.0, guidance_end=0.5)]  # fmt: skip
    names = ("apg", "dynamic_thresholding", "pag:scale=2", "sag", "slg", "freeu", "perp_neg", "cfg_zero", "cfg_pp")
    return scales + taken + [draw(model, name, "an owl", guides=(name,)) for name in names]


def from_a_picture(model: Model) -> list[Cell]:
    """Image to image: how much is drawn over."""
    given = draw(model, "given", "a red apple")
    image = data_url(given[1])
    return [given] + [
        draw(model, f"a sun, strength {s}", "a sun", image=image, strength=s, seed=3)
        for s in (0.15, 0.25, 0.35, 0.5, 0.8)
    ]


def inpainting(model: Model) -> list[Cell]:
    """Parts drawn anew; the rest stays bit for bit."""
    given = draw(model, "given", "a red apple")
    image, mask = data_url(given[1]), right_half(given[1])
    both: dict[str, Any] = {"image": image, "mask": mask, "seed": 3}
    wide = model.generate("a row of apples", image=image, extend={"right": 128}, seed=3).images[0]
    return [
        given,
        draw(model, "right half: a sun", "a sun", **both),
        draw(model, "mask_blur 16", "a sun", **both, mask_blur=16),
        draw(model, "strength 0.6, mask_fill fill", "a sun", **both, strength=0.6, mask_fill="fill"),
        draw(model, "mask_invert", "a sun", **both, mask_invert=True),
        ("extend to the right", wide),
    ]


def variations(model: Model) -> list[Cell]:
    """A second seed mixed in."""
    return [
        draw(
            model, f"variation_strength {s}", "a smiling face with sunglasses", variation_seed=42, variation_strength=s
        )
        for s in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]


def larger(model: Model) -> list[Cell]:
    """Larger than the model draws by itself."""
    first = draw(model, "64 x 64, before the upscaler", "a strawberry", upscaler="none")
    network = open_upscaler("realesr-animevideov3-x4")
    return [
        first,
        ("reverie upscale, 4 times", to_picture(network.enlarge(to_tensor(first[1])))),
        draw(model, "hires 1.5 times, strength 0.4", "a strawberry", hires={"scale": 1.5, "strength": 0.4}),
        draw(model, "hires, lanczos, strength 0.3", "a strawberry",
             hires={"scale": 1.5, "strength": 0.3, "upscaler": "lanczos"}),
        draw(model, "tiles: 128 x 64 in windows of 64", "a strawberry", width=128, height=64,
             tiles={"size": 64, "overlap": 24}),
    ]  # fmt: skip


def travel(model: Model) -> list[Cell]:
    """Frames from one prompt and seed to another; also `docs/features/travel.webp`."""
    way = {"frames": 6, "prompt": "a green apple", "seed": 9}
    frames = model.generate("a sun", seed=SEED, travel=way).images
    return [(f"frame {i}", frame) for i, frame in enumerate(frames)]


FEATURES: dict[str, Callable[[Model], list[Cell]]] = {
    "words": words, "samplers": samplers, "spacings": spacings, "guidance": guidance, "image": from_a_picture,
    "inpainting": inpainting, "variations": variations, "larger": larger, "travel": travel,
}  # fmt: skip


def page(cells: Sequence[Cell]) -> Image.Image:
    """The pictures on squares in rows, each over its label."""
    squares = [ImageOps.pad(picture.convert("RGB"), (SIZE, SIZE), color="white") for _, picture in cells]
    return captioned(squares, [label for label, _ in cells], COLUMNS)


def main() -> None:
    """Draw the sheets that are named, or all."""
    parser = argparse.ArgumentParser(description="Draw a sheet for every feature with the bundled model.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FEATURES)}; all if absent")
    parser.add_argument("--out", type=Path, default=Path("docs/features"))
    given = parser.parse_args()
    model = reverie.load()
    for name in given.names or FEATURES:
        cells = FEATURES[name](model)
        save_image(page(cells), given.out / f"{name}.png")
        if name == "travel":
            save_animation([picture for _, picture in cells], given.out / "travel.webp")
        print(f"{given.out / name}.png: {len(cells)} pictures", flush=True)


if __name__ == "__main__":
    main()
