"""Two processes that train together learn what one learns that accumulates twice."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from tests.train import toy

SCRIPT = """
import sys
from pathlib import Path
import torch
from reverie.train.devices import training_devices
from reverie.train.loop import Trainer
from reverie.train.methods import AutoencoderMethod
from tests.train import toy

devices, own = training_devices(torch.device("cpu"))
run = toy.autoencoder_run(Path(sys.argv[1]), "together", steps=4, batch=4, tensorboard=False)
Trainer(AutoencoderMethod(run, own), run.loop, devices).run(toy.silent)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_two_devices_are_one_that_accumulates(tmp_path: Path) -> None:
    alone = toy.trained(toy.autoencoder_run(tmp_path, "alone", steps=4, batch=4, accumulate=2))
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join(p for p in sys.path if p)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    run = toy.autoencoder_run(tmp_path, "together", steps=4, batch=4)
    together = toy.trained(run)  # resumes at the last step: nothing is left to do
    assert together.step == 4
    a, b = toy.state(alone), toy.state(together)
    for name, value in a.items():
        # sums in another order, through Adam's division by the root of the second moment
        torch.testing.assert_close(b[name], value, rtol=1e-3, atol=2e-5)
    losses = [line["loss"] for line in toy.log(together)]
    assert len(losses) == 4
