"""`reverie train`."""

from pathlib import Path
from typing import Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reverie.apps import console
from reverie.engine.bundle import pick_device
from reverie.train.config import AutoencoderRun, ControlRun, DiffusionRun, JudgeRun, LoopConfig, LoraRun, read_config
from reverie.train.devices import training_devices
from reverie.train.loop import Method, Trainer
from reverie.train.methods import AutoencoderMethod, DiffusionMethod

SMOOTHING = 0.98  # of the numbers shown; the log has every step as it was


Kind = Literal["autoencoder", "diffusion", "lora", "controlnet", "judge"]


def run_training(kind: Kind, config: Path, device: str, until: int | None) -> None:
    """Train, showing the loss, pictures a second and the time that remains. Starts where a stopped run ended."""
    devices, own = training_devices(pick_device(device))
    method, loop = _method(kind, config, own, devices.count)
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

        try:
            trainer.run(report, until)
        except KeyboardInterrupt:
            kept = "; the same command goes on from here" if devices.count == 1 else ""
            console.note(f"stopped at step {trainer.step} of {loop.steps}{kept}")
            raise
    console.out.print(f"written to {loop.out / 'export'}", markup=False)


def _method(kind: Kind, config: Path, device: torch.device, stride: int) -> tuple[Method, LoopConfig]:
    """What a configuration trains, and how long.

    Raises:
        ConfigError: the configuration is wrong.
    """
    if kind == "autoencoder":
        autoencoder = read_config(AutoencoderRun, config)
        return AutoencoderMethod(autoencoder, device, stride), autoencoder.loop
    if kind == "diffusion":
        diffusion = read_config(DiffusionRun, config)
        return DiffusionMethod(diffusion, device, stride), diffusion.loop
    if kind == "judge":
        from reverie.train.judging import JudgeMethod

        judge = read_config(JudgeRun, config)
        return JudgeMethod(judge, device, stride), judge.loop
    from reverie.train.adapting import ControlMethod, LoraMethod

    if kind == "lora":
        lora = read_config(LoraRun, config)
        return LoraMethod(lora, device, stride), lora.loop
    control = read_config(ControlRun, config)
    return ControlMethod(control, device, stride), control.loop
