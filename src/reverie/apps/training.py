"""`reverie train`."""

from pathlib import Path
from typing import Literal

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reverie.apps import console
from reverie.engine.bundle import pick_device
from reverie.train.config import AutoencoderRun, DiffusionRun, read_config
from reverie.train.devices import training_devices
from reverie.train.loop import Trainer
from reverie.train.methods import AutoencoderMethod, DiffusionMethod

SMOOTHING = 0.98  # of the numbers shown; the log has every step as it was


def run_training(kind: Literal["autoencoder", "diffusion"], config: Path, device: str, until: int | None) -> None:
    """Train, showing the loss, pictures a second and the time that remains. Starts where a stopped run ended."""
    method: AutoencoderMethod | DiffusionMethod
    devices, own = training_devices(pick_device(device))
    if kind == "autoencoder":
        run = read_config(AutoencoderRun, config)
        method, loop = AutoencoderMethod(run, own), run.loop
    else:
        diffusion = read_config(DiffusionRun, config)
        method, loop = DiffusionMethod(diffusion, own), diffusion.loop
    trainer = Trainer(method, loop, devices)
    if trainer.step:
        console.note(f"going on from step {trainer.step}")
    pictures = loop.batch * loop.accumulate * devices.count
    shown: dict[str, float] = {}
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    with Progress(*columns, console=console.err) as progress:
        task = progress.add_task(kind, total=loop.steps, completed=trainer.step)

        def report(step: int, numbers: dict[str, float]) -> None:
            for key, value in (numbers | {"pictures/s": pictures / numbers["seconds"]}).items():
                shown[key] = SMOOTHING * shown.get(key, value) + (1 - SMOOTHING) * value
            words = (f"{k} {v:.4g}" for k, v in shown.items() if k not in {"seconds", "learning_rate", "gradient_norm"})
            progress.update(task, completed=step, description=f"{kind}: {', '.join(words)}")

        trainer.run(report, until)
    console.out.print(f"written to {loop.out / 'export'}", markup=False)
