"""The command line. Importing it does not import torch: `reverie --help` answers at once."""

import inspect as introspection
import sys
import warnings
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from reverie import __version__
from reverie.apps import console
from reverie.engine.request import Request
from reverie.errors import ReverieError

app = typer.Typer(
    name="reverie",
    help="Stable Diffusion: pictures from words.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
train_app = typer.Typer(help="Train a model from scratch.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(train_app, name="train")


class Precision(StrEnum):
    """In which numbers the networks compute."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="safetensors file or diffusers folder; the bundled model if absent"),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto")]
PrecisionOption = Annotated[Precision, typer.Option(help="numbers the networks compute in")]
VariantOption = Annotated[str | None, typer.Option(help="of a folder's weight files, for example fp16")]
PredictionOption = Annotated[
    str | None, typer.Option(help="override what the file says it predicts: epsilon, v, sample")
]
ConfigArgument = Annotated[Path, typer.Argument(help="TOML file")]
UntilOption = Annotated[int | None, typer.Option(min=1, help="stop after this step; the next run goes on from there")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
DebugOption = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


def request_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give `function` one option for every field of `Request`, named and described by the field."""
    own = [p for p in introspection.signature(function).parameters.values() if p.name != "fields"]
    fields = []
    for name, info in Request.model_fields.items():
        if name == "prompt":
            continue
        kind: Any = info.annotation if info.default is None else info.annotation | None  # type: ignore[operator]
        annotation = Annotated.__class_getitem__((kind, typer.Option(help=_help(name))))  # type: ignore[attr-defined]
        place = introspection.Parameter.KEYWORD_ONLY
        fields.append(introspection.Parameter(name, place, default=None, annotation=annotation))
    function.__signature__ = introspection.Signature([*own, *fields])  # type: ignore[attr-defined]
    return function


def _help(name: str) -> str:
    info = Request.model_fields[name]
    default = "" if info.default in (None, "") else f" [default: {info.default}]"
    return f"{info.description}{default}"


@app.command()
@request_options
def generate(
    prompt: Annotated[str | None, typer.Argument(help="what the picture shows")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="file, or folder for several; reverie-00001.png here if absent")
    ] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="draw the picture in this PNG again; other options override")
    ] = None,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = Precision.auto,
    variant: VariantOption = None,
    prediction: PredictionOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
    **fields: Any,
) -> None:
    """Draw pictures for a prompt."""
    with console.busy("starting"):  # importing torch takes a while
        from reverie.apps.generating import run_generate

    given = {name: value for name, value in fields.items() if value is not None}
    if prompt is not None:
        given["prompt"] = prompt
    options = {"device": device, "precision": precision.value, "variant": variant, "prediction": prediction}
    run_generate(given, out, source, model, options, as_json)


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


@train_app.command()
def autoencoder(
    config: ConfigArgument,
    until: UntilOption = None,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Train a KL autoencoder."""
    from reverie.apps.training import run_training

    run_training("autoencoder", config, device, until)


@train_app.command()
def diffusion(
    config: ConfigArgument,
    until: UntilOption = None,
    device: DeviceOption = "auto",
    debug: DebugOption = False,
) -> None:
    """Train text encoder and U-Net on the latents of an autoencoder."""
    from reverie.apps.training import run_training

    run_training("diffusion", config, device, until)


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
