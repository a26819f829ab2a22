"""The training loop, and the checkpoint it can stop at and go on from, bit for bit."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from PIL.Image import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from reverie.checkpoint.source import open_weights
from reverie.engine.image import save_image
from reverie.errors import ConfigError, GenerationError
from reverie.train.config import LoopConfig
from reverie.train.devices import Alone, Devices
from reverie.train.ema import Ema
from reverie.train.journal import Journal

Report = Callable[[int, dict[str, float]], None]


class Method(Protocol):
    """What is learned and how wrong it is."""

    @property
    def network(self) -> nn.Module:
        """All that is learned."""
        ...

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of micro-batch number `step`, and other numbers worth watching."""
        ...

    def export(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Write the model with these weights for others to use."""
        ...

    def sample(self, weights: dict[str, Tensor]) -> Image:
        """Pictures that show what has been learned so far."""
        ...


def learning_rate(config: LoopConfig, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@contextmanager
def _requests_to_stop(devices: Devices) -> Iterator[threading.Event]:
    """The first ctrl-C or SIGTERM sets the event, so that a step is never cut; a second one stops at once.

    Only on one device (others would wait for the one that stopped) and in the main thread, as Python wants it.
    """
    asked = threading.Event()
    if devices.count > 1 or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Trainer:
    """Network, optimiser and average of one run.

    Args:
        devices: what trains together; the first of them writes.
    """

    def __init__(self, method: Method, config: LoopConfig, devices: Devices | None = None) -> None:
        self.method, self.config, self.step = method, config, 0
        self.devices = devices or Alone()
        self.ema = Ema(method.network, config.ema)
        self.optimiser = torch.optim.AdamW(
            method.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        config.out.mkdir(parents=True, exist_ok=True)
        self._checkpoint = config.out / "checkpoint.safetensors"
        if self._checkpoint.exists():
            self._resume()
        elif config.start:
            self._begin_with(config.start)

    def run(self, report: Report, until: int | None = None) -> None:
        """Train to the last step (or to step `until`), then export the averaged weights.

        Raises:
            KeyboardInterrupt: ctrl-C or SIGTERM; on one device the step under way was finished and kept.
        """
        last = self.config.steps if until is None else min(until, self.config.steps)
        with self._journal() as journal, _requests_to_stop(self.devices) as stop:
            while self.step < last:
                started = time.perf_counter()
                numbers = self._one_step()
                numbers["seconds"] = round(time.perf_counter() - started, 4)
                if journal is not None:
                    journal.step(self.step, numbers)
                    report(self.step, numbers)
                    self._keep(journal, last)
                if stop.is_set() and self.step < last:
                    self._save()
                    raise KeyboardInterrupt
        if self.devices.rank == 0:
            self.method.export(self.ema.shadow, self.config.out / "export")
        self.devices.wait()

    def _journal(self) -> AbstractContextManager[Journal | None]:
        if self.devices.rank:
            return nullcontext()
        return Journal(self.config.out, self.step, tensorboard=self.config.tensorboard)

    def _keep(self, journal: Journal, last: int) -> None:
        """A checkpoint and a sheet of samples, where it is time for them."""
        if self.step % self.config.checkpoint_every == 0 or self.step == last:
            journal.flush()
            self._save()
        every = self.config.sample_every
        if every and (self.step % every == 0 or self.step == last):
            folder = self.config.out / "samples"
            folder.mkdir(exist_ok=True)
            save_image(self.method.sample(self.ema.shadow), folder / f"{self.step:07d}.png")

    def _one_step(self) -> dict[str, float]:
        rate = learning_rate(self.config, self.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad()
        for micro in range(self.config.accumulate):
            number = (self.step * self.config.accumulate + micro) * self.devices.count + self.devices.rank
            with self._autocast():
                loss, numbers = self.method.loss(number)
            (loss / self.config.accumulate).backward()  # type: ignore[no-untyped-call]
        loss = self.devices.average(self.method.network, loss)
        norm = nn.utils.clip_grad_norm_(self.method.network.parameters(), self.config.clip)
        if not torch.isfinite(norm):
            raise GenerationError(f"the gradient is not finite at step {self.step}; lower the learning rate")
        self.optimiser.step()
        self.ema.update(self.method.network, self.step)
        self.step += 1
        return {"loss": loss.item(), "gradient_norm": norm.item(), "learning_rate": rate, **numbers}

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.precision == "float32":
            return nullcontext()
        device = next(self.method.network.parameters()).device.type
        return torch.autocast(device, dtype=torch.bfloat16)

    def _save(self) -> None:
        """Everything that the next step depends on, written under a temporary name and then renamed."""
        tensors = {f"network.{k}": v for k, v in self.method.network.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.shadow.items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{k}": v for k, v in state.items()}
        temporary = self._checkpoint.with_suffix(".partial")
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"step": str(self.step)})
        temporary.replace(self._checkpoint)

    def _begin_with(self, checkpoint: Path) -> None:
        """The averaged weights of another run; its optimiser and step are left behind."""
        file = open_weights(checkpoint)
        averages = _under("ema.", {name: file.tensor(name).clone() for name in file.tensors})
        try:
            self.method.network.load_state_dict(averages)
        except RuntimeError as error:
            raise ConfigError(f"loop.start {checkpoint} does not fit: {str(error).splitlines()[0]}") from None
        self.ema = Ema(self.method.network, self.config.ema)

    def _resume(self) -> None:
        file = open_weights(self._checkpoint)
        tensors = {name: file.tensor(name).clone() for name in file.tensors}
        try:
            self.step = int(file.metadata["step"])
            self.method.network.load_state_dict(_under("network.", tensors))
            averages = _under("ema.", tensors)
            self.ema.shadow = {name: averages[name].to(p.device) for name, p in self.ema.shadow.items()}
            self._load_optimiser(_under("optimiser.", tensors))
        except (RuntimeError, KeyError, ValueError) as error:
            hint = "the configuration has changed since; choose another loop.out or remove the file"
            raise ConfigError(f"{self._checkpoint} does not fit: {str(error).splitlines()[0]}; {hint}") from None

    def _load_optimiser(self, tensors: dict[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        full = self.optimiser.state_dict()
        self.optimiser.load_state_dict({"state": state, "param_groups": full["param_groups"]})
        for weight, own in self.optimiser.state.items():
            # The fused step walks through memory: moments must lie as their weights do, channels last or not.
            own |= {key: torch.empty_like(weight).copy_(own[key]) for key in ("exp_avg", "exp_avg_sq")}


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
