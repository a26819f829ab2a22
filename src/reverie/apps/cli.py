"""The command line. Importing it does not import torch: `reverie --help` answers at once."""

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from reverie import __version__
from reverie.apps import console
from reverie.apps.flags import fields
from reverie.apps.options import (
    ConfigArgument,
    DebugOption,
    DeviceOption,
    JsonOption,
    MetadataOption,
    ModelOption,
    Opening,
    OutOption,
    Precision,
    PrecisionOption,
    PreviewDecoderOption,
    PreviewOption,
    PreviewOutOption,
    UntilOption,
    VariantOption,
    VerboseOption,
    request_options,
)
from reverie.errors import RequestError, ReverieError

if TYPE_CHECKING:
    from reverie.apps.generating import Session
    from reverie.apps.training import Kind

app = typer.Typer(
    name="reverie",
    help="Stable Diffusion: pictures from words.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models_app = typer.Typer(help="List the models at hand, or fetch one.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(models_app, name="models")
train_app = typer.Typer(
    help="Train a model from scratch, or an adapter for one.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(train_app, name="train")
merge_app = typer.Typer(help="Make models of models, and LoRAs of both.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(merge_app, name="merge")
evaluate_app = typer.Typer(
    help="Measure how good pictures, or the pictures of a model, are.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(evaluate_app, name="evaluate")


def _session(opening: Opening, how: dict[str, Any]) -> "Session":
    with console.starting():  # importing torch takes a while
        from reverie.apps.generating import Session, opened

        return Session(opened(*opening), **how)


@app.command()
@request_options
def generate(
    prompt: Annotated[str | None, typer.Argument(help="what the picture shows")] = None,
    out: OutOption = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="draw the picture in this file again; other options override")
    ] = None,
    *,
    opening: Opening,
    preview: PreviewOption = 0,
    preview_out: PreviewOutOption = None,
    preview_decoder: PreviewDecoderOption = None,
    metadata: MetadataOption = True,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **flags: Any,
) -> None:
    """Draw pictures for a prompt, from a picture, or both."""
    with console.starting():  # importing torch takes a while
        from reverie.apps.generating import Previews, run_generate

    given = fields(flags) | ({} if prompt is None else {"prompt": prompt})
    previews = Previews(preview, preview_out, preview_decoder)
    how = {"events": as_json, "previews": previews, "metadata": metadata, "verbose": verbose}
    run_generate(given, out, source, *opening, how)


@app.command()
@request_options
def plan(
    prompt: Annotated[str | None, typer.Argument(help="what the picture would show")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="plan the picture in this file; other options override")
    ] = None,
    *,
    opening: Opening,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **flags: Any,
) -> None:
    """Say what drawing would take, without drawing: memory, seconds, where everything is. Options as for generate."""
    with console.starting():
        from reverie.apps.planning import run_plan

    run_plan(fields(flags) | ({} if prompt is None else {"prompt": prompt}), source, *opening, as_json)


@app.command()
@request_options
def batch(
    source: Annotated[str, typer.Argument(help="file with a JSON object or a prompt a line; - is stdin")],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the pictures and the journal")] = Path("batch"),
    *,
    opening: Opening,
    metadata: MetadataOption = True,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **flags: Any,
) -> None:
    """Draw many requests; the same command goes on where it was stopped. Options hold for every line."""
    session = _session(opening, {"events": as_json, "metadata": metadata})
    from reverie.apps.batching import run_batch

    raise typer.Exit(run_batch(source, fields(flags), out, session))


@app.command()
@request_options
def grid(
    prompt: Annotated[str | None, typer.Argument(help="what the pictures show")] = None,
    axis: Annotated[
        list[str] | None,
        typer.Option("--axis", "-x", help="field=value,value,... or field=low..high:step; one to three of them"),
    ] = None,
    out: OutOption = None,
    keep: Annotated[Path | None, typer.Option(help="folder for the single pictures too")] = None,
    *,
    opening: Opening,
    metadata: MetadataOption = True,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **flags: Any,
) -> None:
    """Draw every combination of values of up to three fields on one labelled sheet."""
    session = _session(opening, {"events": as_json, "metadata": metadata})
    from reverie.apps.gridding import run_grid

    run_grid(fields(flags) | ({} if prompt is None else {"prompt": prompt}), axis or [], out, keep, session)


@app.command()
def upscale(
    picture: Annotated[str, typer.Argument(help="picture file")],
    out: Annotated[Path, typer.Option("--out", "-o", help="file for the larger picture")],
    upscaler: Annotated[
        str | None, typer.Option(help="name or file of weights; the one in the package if absent")
    ] = None,
    scale: Annotated[float | None, typer.Option(help="enlargement in all; the network's own if absent")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps")] = "cpu",
    debug: DebugOption = False,
) -> None:
    """Enlarge a picture with an upscaling network."""
    with console.starting():
        from reverie.apps.enlarging import run_upscale

    run_upscale(picture, out, upscaler, scale, device)


@app.command()
def read(
    picture: Annotated[Path, typer.Argument(help="picture of ours, AUTOMATIC1111, ComfyUI, InvokeAI, NovelAI, ...")],
    form: Annotated[str, typer.Option("--as", help="report, cli, python, json or a1111")] = "report",
    debug: DebugOption = False,
) -> None:
    """Say what made a picture, in words or as something that makes it again."""
    with console.busy("reading"):
        from reverie.apps.reading import run_read

    run_read(picture, form)


@app.command()
def tokens(
    prompt: Annotated[str, typer.Argument(help="a prompt")],
    dialect: Annotated[str, typer.Option(help="a1111, comfy, compel, plain")] = "a1111",
    model: ModelOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Count the tokens of a prompt and show where its chunks end."""
    with console.starting():
        from reverie.apps.inspecting import run_tokens

    run_tokens(prompt, dialect, model, as_json)


@app.command()
def guides(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the guidance wrappers and their settings."""
    from reverie.apps.inspecting import run_guides

    run_guides(as_json)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="safetensors file or diffusers folder")],
    variant: VariantOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Say what a checkpoint is, and why."""
    with console.busy("reading"):
        from reverie.apps.inspecting import report, show

        found = report(path, variant)
    show(found, as_json)


@app.command()
def samplers(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the samplers and spacings."""
    from reverie.apps.inspecting import run_samplers

    run_samplers(as_json)


@app.command()
def doctor(
    path: Annotated[Path, typer.Argument(help="file or folder of weights, of whatever kind")],
    variant: VariantOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Examine weights: what they are, whether they are sound, what fits them, what code they carry."""
    with console.starting():
        from reverie.apps.doctoring import run_doctor

    raise typer.Exit(run_doctor(path, variant, as_json))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="file or folder of weights")],
    out: Annotated[Path, typer.Argument(help="NAME.safetensors, or a folder that is not there yet")],
    layout: Annotated[str | None, typer.Option(help="diffusers or single; by the name of OUT if absent")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16 or fp8; as it is if absent")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="take the averaged weights")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="leave out what no picture needs")] = False,
    part: Annotated[list[str] | None, typer.Option(help="only this part (unet, vae, text_encoder); repeatable")] = None,
    variant: VariantOption = None,
    shard: Annotated[int, typer.Option(min=1_000_000, help="largest file of a folder, in bytes")] = 5_000_000_000,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Rewrite weights in another layout or precision, tensor by tensor."""
    with console.starting():
        from reverie.apps.converting import run_convert

    options = {"layout": layout, "dtype": dtype, "ema": ema, "prune": prune, "parts": tuple(part or ()),
               "variant": variant, "shard": shard}  # fmt: skip
    run_convert(source, out, options, as_json)


@models_app.command(name="list")
def list_models(
    search: Annotated[str, typer.Argument(help="part of a name")] = "",
    hashes: Annotated[bool, typer.Option("--hashes", help="compute and show short hashes")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List the models in the folders of REVERIE_MODELS and of other programs that it names."""
    with console.busy("looking"):
        from reverie.apps.modelling import run_list

    run_list(search, hashes, as_json)


@models_app.command()
def pull(
    name: Annotated[str, typer.Argument(help="org/name on the hub")],
    revision: Annotated[str, typer.Option(help="branch, tag or commit")] = "main",
    variant: VariantOption = None,
    file: Annotated[str | None, typer.Option(help="one file instead of a pipeline's folder")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Fetch a model from the hub; goes on where it was cut off, and checks what came."""
    with console.starting():
        from reverie.apps.modelling import run_pull

    run_pull(name, {"revision": revision, "variant": variant, "file": file}, as_json)


@app.command()
def tune(
    model: Annotated[
        str | None, typer.Argument(help="file, folder or name of a model; the bundled one if absent")
    ] = None,
    budget: Annotated[
        str, typer.Option(help="how near the exact picture, on average: psnr=35 (dB), ssim=0.95 or lpips=0.05")
    ] = "psnr=30",
    size: Annotated[str | None, typer.Option(help="pixels: 512, or 512x768; the model's own if absent")] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="the model's own if absent")] = None,
    prompts: Annotated[Path | None, typer.Option(help="file with a prompt a line; four of ours if absent")] = None,
    lpips: Annotated[
        Path | None,
        typer.Option(help="folder with LPIPS's weights: alexnet-*.pth and alex.pth"),
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.auto,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure what each way to do less work gives and costs here; --fast auto then uses those inside the budget."""
    with console.starting():
        from reverie.apps.tuning import run_tune

    how = {"device": device, "precision": precision.value}
    run_tune(model, budget, {"size": size, "steps": steps}, prompts, lpips, how, as_json)


@app.command()
def control(
    preprocessor: Annotated[
        str | None, typer.Argument(help="canny, softedge, openpose, ...; --list shows them")
    ] = None,
    picture: Annotated[str | None, typer.Argument(help="picture file")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="file for the control picture")] = Path("control.png"),
    option: Annotated[list[str] | None, typer.Option("--option", help="name=value; repeatable")] = None,
    resolution: Annotated[
        int | None, typer.Option(help="shorter side at which it runs; the picture's own if absent")
    ] = None,
    mask: Annotated[str | None, typer.Option(help="for inpaint: white where the picture is to be drawn anew")] = None,
    weights: Annotated[Path | None, typer.Option(help="file of weights to take instead")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps")] = "cpu",
    listed: Annotated[bool, typer.Option("--list", help="list the preprocessors and their options")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make the picture that a ControlNet follows: edges, lines, pose, depth, ..."""
    with console.starting():
        from reverie.apps.controlling import run_control, run_list
    if listed:
        run_list(as_json)
    elif preprocessor is None or picture is None:
        raise RequestError("give a preprocessor and a picture, or --list")
    else:
        how = {"resolution": resolution, "mask": mask, "weights": weights, "device": device}
        run_control(preprocessor, picture, out, option or [], how)


InceptionOption = Annotated[
    Path | None, typer.Option(help="Inception v3's weights; where recipes/control/fetch.py puts them if absent")
]


@evaluate_app.command("pictures")
def evaluate_pictures(
    true: Annotated[Path, typer.Argument(help="folder of true pictures")],
    drawn: Annotated[Path, typer.Argument(help="folder of drawn pictures")],
    inception: InceptionOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """How far drawn pictures are from true ones: FID, KID, precision and recall."""
    with console.starting():
        from reverie.apps.evaluating import run_pictures
    run_pictures(true, drawn, inception, device, as_json)


@evaluate_app.command("prompts")
def evaluate_prompts(
    pictures: Annotated[Path, typer.Argument(help="folder of pictures that carry their prompts")],
    clip: Annotated[Path, typer.Option(help="folder or file of a whole CLIP: text encoder and image encoder")],
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """How well pictures fit their prompts: the CLIP score."""
    with console.starting():
        from reverie.apps.evaluating import run_prompts
    run_prompts(pictures, clip, device, as_json)


@evaluate_app.command("scenes")
def evaluate_scenes(
    judge: Annotated[Path, typer.Option(help="folder that `reverie train judge` has exported")],
    model: ModelOption = None,
    sprites: Annotated[Path | None, typer.Option(help="folder of sprites; as in --config if absent")] = None,
    config: Annotated[
        Path | None, typer.Option(help="what the model was trained by; else it is asked for all that the judge knows")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="scenes of each group")] = 200,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="folder for pictures and report; the next run goes on in it")
    ] = Path("evaluation"),
    inception: Annotated[Path | None, typer.Option(help="Inception v3's weights; without them no FID")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=64, help="pictures drawn at once")] = 16,
    steps: Annotated[int | None, typer.Option(min=1, help="sampling steps; the model's own if absent")] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0, help="the model's own if absent")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the scenes that are asked for")] = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """How often a model draws what it is asked for: composed scenes, of seen and of held-out kinds."""
    with console.starting():
        from reverie.apps.evaluating import Wanted, run_scenes
    run_scenes(
        Wanted(model, judge, sprites, config, inception, count, out, batch_size, steps, guidance_scale, seed, device),
        as_json,
    )


LayoutOption = Annotated[str | None, typer.Option(help="diffusers or single; by the name of OUT if absent")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, float16, bfloat16 or fp8; as it is if absent")]
OutArgument = Annotated[Path, typer.Option("--out", "-o", help="NAME.safetensors, or a folder that is not there yet")]
LoraOutOption = Annotated[Path, typer.Option("--out", "-o", help="NAME.safetensors")]
RankOption = Annotated[int, typer.Option(min=1, help="the largest rank")]
QualityOption = Annotated[
    float | None, typer.Option(min=0, max=1, help="share of the difference to hold, by the fewest ranks that do")
]
DialectOption = Annotated[str, typer.Option(help="names of the file: kohya or diffusers")]


@merge_app.command("models")
def merge_models(
    first: Annotated[str, typer.Argument(help="the model that the others are merged into")],
    others: Annotated[list[str], typer.Argument(help="MODEL, or MODEL:WEIGHT; the first has what is left of 1")],
    out: OutArgument,
    method: Annotated[
        str, typer.Option(help="weighted_sum, add_difference, slerp, ties, dare, dare_ties")
    ] = "weighted_sum",
    weight: Annotated[float, typer.Option(help="of models that are given without one")] = 0.5,
    base: Annotated[str | None, typer.Option(help="the model that differences are taken from")] = None,
    block: Annotated[
        list[str] | None, typer.Option(help="NAME=WEIGHT of a block (IN00 to IN11, MID, OUT00 to OUT11, BASE)")
    ] = None,
    density: Annotated[float, typer.Option(help="share of a difference that ties and dare keep")] = 0.2,
    seed: Annotated[int, typer.Option(help="of what dare drops")] = 0,
    layout: LayoutOption = None,
    dtype: DtypeOption = None,
    debug: DebugOption = False,
) -> None:
    """Merge models of one family, tensor by tensor."""
    with console.starting():
        from reverie.apps.merging import run_merge

    how = {"method": method, "weight": weight, "base": base, "blocks": block or [], "density": density, "seed": seed}
    run_merge(first, others, out, how, {"layout": layout, "dtype": dtype})


@merge_app.command("bake")
def merge_bake(
    model: Annotated[str, typer.Argument(help="the model")],
    loras: Annotated[list[str], typer.Argument(help="LORA, or LORA:0.8")],
    out: OutArgument,
    layout: LayoutOption = None,
    dtype: DtypeOption = None,
    debug: DebugOption = False,
) -> None:
    """Write a model with LoRAs in its weights."""
    with console.starting():
        from reverie.apps.merging import run_bake

    run_bake(model, loras, out, {"layout": layout, "dtype": dtype})


@merge_app.command("extract")
def merge_extract(
    base: Annotated[str, typer.Argument(help="the model that the other was made of")],
    tuned: Annotated[str, typer.Argument(help="the model whose difference is wanted")],
    out: LoraOutOption,
    rank: RankOption = 64,
    quality: QualityOption = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float16",
    dialect: DialectOption = "kohya",
    debug: DebugOption = False,
) -> None:
    """Write the difference of two models as a LoRA."""
    with console.starting():
        from reverie.adapters.factoring import Target
        from reverie.apps.merging import run_extract

    run_extract(base, tuned, out, Target(rank, quality), dtype, dialect)


@merge_app.command("resize")
def merge_resize(
    lora: Annotated[str, typer.Argument(help="a LoRA")],
    out: LoraOutOption,
    model: ModelOption = None,
    rank: RankOption = 16,
    quality: QualityOption = None,
    dialect: DialectOption = "kohya",
    debug: DebugOption = False,
) -> None:
    """Write a LoRA with other ranks; --model is one that it was made for."""
    with console.starting():
        from reverie.adapters.factoring import Target
        from reverie.apps.merging import run_resize

    run_resize(lora, model, out, Target(rank, quality), dialect)


TRAINED: "dict[Kind, str]" = {
    "autoencoder": "Train a KL autoencoder.",
    "diffusion": "Train text encoder and U-Net on the latents of an autoencoder.",
    "lora": "Train a LoRA for a model.",
    "controlnet": "Train a ControlNet for a model.",
    "judge": "Train the network that says what a composed picture shows, for `reverie evaluate scenes`.",
}


def _trains(kind: "Kind", does: str) -> None:
    """Add the command that trains a kind of model."""

    @train_app.command(kind, help=does)
    def train(
        config: ConfigArgument, until: UntilOption = None, device: DeviceOption = "auto", debug: DebugOption = False
    ) -> None:
        from reverie.apps.training import run_training

        run_training(kind, config, device, until)


for kind, does in TRAINED.items():
    _trains(kind, does)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"reverie {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    pass


def main() -> NoReturn:
    """Run the command line: exit 0, 2 for bad input, 1 for a failure, 130 when interrupted; one line for an error."""
    warnings.showwarning = lambda message, *_: console.note(f"note: {message}")
    debug = "--debug" in sys.argv
    try:
        code = app(prog_name="reverie", standalone_mode=False) or 0
        if code == 130:  # what typer makes of a KeyboardInterrupt
            console.note("interrupted")
    except ReverieError as error:
        code = _failed(str(error), error.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort):
        console.note("interrupted")
        code = 130
    except Exception as error:  # the last resort: a defect of ours, still one line
        code = _usage(error) or _failed(f"{type(error).__name__}: {error} (a defect; --debug shows where)", 1, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Exception) -> int:
    """Print a wrong command line in one line, or the help where there was nothing at all; 0 for other errors."""
    if not hasattr(error, "format_message"):
        return 0
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.format_message(), err=True)
        return 2
    message = error.format_message().replace("Value error, ", "").rstrip(".")
    if isinstance(error.__cause__, ValidationError):  # typer parses values with pydantic, and leaves out the value
        found = repr(error.__cause__.errors()[0]["input"])
        message += "" if found in message else f": found {found}"
    console.error(f"{message}. Try `reverie --help`.")
    return 2


def _failed(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    console.error(message)
    return code
