"""How long does an SD-1.5-sized fp16 single file take to open, and how much memory? `python bench/open_file.py`

A random checkpoint of the true size (2.1 GB) is written to a temporary folder first. Each measurement is a process of
its own; peak memory counts the mapped pages that were touched. "use" also brings every part to computing precision
float16, which reads and checks every weight.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import in_turn, write
from safetensors.torch import save_file
from torch import Tensor, nn

from reverie.families.sd1 import names
from reverie.nets.autoencoder import Autoencoder, AutoencoderConfig
from reverie.nets.clip_text import ClipText, ClipTextConfig
from reverie.nets.unet import UNet, UNetConfig

OPEN = """
import sys, time
import reverie.engine.bundle, reverie.engine.generate
def peak():  # of this process alone; ru_maxrss would remember the parent's
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
base = peak()
start = time.perf_counter()
model = reverie.engine.bundle.load(sys.argv[1], device="cpu", precision="float16")
if sys.argv[2] == "use":
    for name, module in model.parts.modules().items():
        model.ready(name, module)
print(time.perf_counter() - start, peak() - base)
"""


def checkpoint(path: Path) -> None:
    """Random weights under the original layout's names."""
    with torch.device("meta"):
        parts: list[tuple[nn.Module, str, dict[str, str]]] = [
            (UNet(UNetConfig()), names.UNET, names.unet_table(UNetConfig())),
            (Autoencoder(AutoencoderConfig()), names.VAE, names.vae_table(AutoencoderConfig())),
            (ClipText(ClipTextConfig()), names.TEXT, {"text_model": "text_model"}),
        ]
    tensors: dict[str, Tensor] = {}
    for module, prefix, table in parts:
        for name, t in module.state_dict().items():
            square = prefix == names.VAE and ".attentions." in name and t.ndim == 2
            shape = (*t.shape, 1, 1) if square else t.shape
            tensors[f"{prefix}{names.rename(name, table)}"] = (torch.randn(shape) * 0.02).half()
    save_file(tensors, path)


def measure(path: Path, how: str, column: int) -> float:
    done = subprocess.run([sys.executable, "-c", OPEN, str(path), how], check=True, capture_output=True, text=True)
    return float(done.stdout.split()[column])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sd15-random.safetensors"
        checkpoint(file)
        size = file.stat().st_size
        figures = in_turn(
            {
                "open, seconds": lambda: measure(file, "open", 0),
                "open, peak memory over file size": lambda: measure(file, "open", 1) / size,
                "open and use, seconds": lambda: measure(file, "use", 0),
                "open and use, peak memory over file size": lambda: measure(file, "use", 1) / size,
            },
            rounds=3,
        )
        write("open_file", {"file bytes": size, **figures})
