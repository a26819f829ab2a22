"""What one process measures: `python -m peer.child JOB`, a `Job` in JSON; its last line are the figures."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from open_models import Memory

from peer.runners import RUNNERS, NotOfferedError, Runner, to_openvino
from peer.variants import MEASURES

PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "openvino", "stable-diffusion-cpp-python", "numpy",
    "safetensors", "tokenizers",
)  # fmt: skip
STATUS = Path("/proc/self/status")  # where there is none, memory is not measured
GEMMS = (1024, 2048, 4096)  # rows and columns of the products that the device's peak is looked for with
GEMM_SECONDS = 2.0  # for each


@dataclass(frozen=True)
class Job:
    """What a process does.

    Attributes:
        kind: `step`, `decode`, `picture`, `peak`, `work`, `models`, `openvino` or `versions`.
        runner, options: of the program; of `work` the measurements by name.
        folder: of the checkpoint; of `models` where they are written.
        steps: of a picture.
        repeats: measured repetitions, after one to warm up.
        out: where a picture leaves its latents.
    """

    kind: str
    runner: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    folder: str = ""
    model: str = ""
    device: str = "cpu"
    size: int = 0
    steps: int = 20
    repeats: int = 1
    tiny: bool = False
    out: str = ""

    def text(self) -> str:
        """As it is handed over."""
        return json.dumps(asdict(self))


class EnoughError(Exception):
    """All that is measured of a picture has been seen."""


def step(job: Job) -> dict[str, Any]:
    """Seconds of a step of a picture that is not drawn to its end; those of the first two, which prepare, apart."""
    runner, ends = opened(job), [time.perf_counter()]
    steps = job.repeats + 2 if job.runner == "sdcpp" else job.steps

    def tell() -> None:
        ends.append(time.perf_counter())
        if len(ends) > job.repeats + 2:
            raise EnoughError

    with suppress(EnoughError):
        runner.draw(job.size, steps, tell)
    took = [later - sooner for sooner, later in pairwise(ends[2:])]
    return {"seconds": median(took), "first": ends[1] - ends[0], "note": runner.note}


def decode(job: Job) -> dict[str, Any]:
    """Seconds of decoding one picture."""
    runner, torch = opened(job), import_module("torch")
    latents = torch.randn(1, 4, job.size // 8, job.size // 8, generator=torch.Generator().manual_seed(0))
    took = [seconds_of(lambda: runner.decode(latents)) for _ in range(job.repeats + 1)]
    return {"seconds": median(took[1:]), "first": took[0], "note": runner.note}


def picture(job: Job) -> dict[str, Any]:
    """When the first step ended and when the picture was written, by the system's clock; and the memory it took."""
    memory = Memory() if STATUS.exists() else None
    ends: list[float] = []
    runner = opened(job)
    latents, image = runner.draw(job.size, job.steps, lambda: ends.append(time.time()))
    image.save(f"{job.out}.png")
    done = time.time()
    if latents is not None:
        import_module("numpy").save(f"{job.out}.npy", latents.numpy())
    found = {"first ended": ends[0], "ended": done, "note": runner.note}
    if memory is not None:
        found |= memory.figures()
    if job.device.startswith("cuda"):
        found["device GB"] = import_module("torch").cuda.max_memory_allocated() / 1e9
    return found


def opened(job: Job) -> Runner:
    """The program with the model."""
    return RUNNERS[job.runner](Path(job.folder), job.device, **job.options)


def peak(job: Job) -> dict[str, float]:
    """The most TFLOP/s that any product of matrices reached, by type: torch's way, and oneDNN's with its own layout."""
    torch = import_module("torch")
    types = ("float32", "bfloat16") if job.device == "cpu" else ("float32", "bfloat16", "float16")
    sizes, seconds = ((256,), 0.05) if job.tiny else (GEMMS, GEMM_SECONDS)
    with torch.inference_mode():
        return {name: fastest(torch, getattr(torch, name), job.device, sizes, seconds) for name in types}


def fastest(torch: Any, dtype: Any, device: str, sizes: Sequence[int], seconds: float) -> float:
    """TFLOP/s of a type; larger products are left out where one has taken `seconds`: the type is emulated."""
    best = 0.0
    for n in sizes:
        best = max(best, *(rate(way, n, seconds) for way in ways(torch, dtype, device, n)))
        if 2 * n**3 / (best * 1e12) > seconds:
            break
    return best


def ways(torch: Any, dtype: Any, device: str, n: int) -> list[Callable[[], Any]]:
    """Functions that multiply two matrices of `n` rows and columns."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    if device != "cpu":

        def multiplied() -> None:
            a @ b
            torch.cuda.synchronize()

        return [multiplied]
    found = [lambda: a @ b]
    if torch.backends.mkldnn.is_available():
        packed = torch.nn.Linear(n, n, bias=False).to(dtype).requires_grad_(False)
        linear = import_module("torch.utils.mkldnn").to_mkldnn(packed, dtype)
        laid = a.to_mkldnn(dtype)
        found.append(lambda: linear(laid))
    return found


def rate(way: Callable[[], Any], n: int, seconds: float) -> float:
    """TFLOP/s of the fastest of the calls that fit into `seconds`, after one to warm up; 0 where it is refused."""
    try:
        way()
    except RuntimeError:  # oneDNN has no bfloat16 for processors without instructions for it
        return 0.0
    until, best = time.perf_counter() + seconds, float("inf")
    while time.perf_counter() < until or best == float("inf"):
        best = min(best, seconds_of(way))
    return 2 * n**3 / best / 1e12


def seconds_of(function: Callable[[], Any]) -> float:
    """By the clock."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def work(job: Job) -> dict[str, float]:
    """TFLOP of each measurement but pictures; see `peer.models.work`."""
    count, found = import_module("peer.models").work, {}
    for name, measure in MEASURES.items():
        if name in job.options and measure.kind != "picture":
            found[name] = count(measure.size, measure.model, tiny=job.tiny)[measure.kind]
    return found


def models(job: Job) -> dict[str, Any]:
    """Write a checkpoint."""
    import_module("peer.models").write(job.model, Path(job.folder), tiny=job.tiny)
    return {}


def openvino(job: Job) -> dict[str, Any]:
    """Convert a checkpoint for OpenVINO."""
    to_openvino(Path(job.folder))
    return {}


def versions(job: Job) -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


KINDS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "step": step, "decode": decode, "picture": picture, "peak": peak, "work": work, "models": models,
    "openvino": openvino, "versions": versions,
}  # fmt: skip


if __name__ == "__main__":
    given = Job(**json.loads(sys.argv[1]))
    try:
        print(json.dumps(KINDS[given.kind](given)))
    except NotOfferedError as error:
        print(json.dumps({"failed": str(error)}))
