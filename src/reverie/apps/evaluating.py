"""`reverie evaluate`: how far two sets of pictures are from each other."""

from pathlib import Path

from reverie.apps import console
from reverie.apps.progress import steps_progress
from reverie.control.weights import WEIGHTS
from reverie.engine.bundle import pick_device
from reverie.evaluate.distances import fid, kid, precision_recall
from reverie.evaluate.features import features_of, open_inception, pictures_in


def run_pictures(true: Path, drawn: Path, inception: Path | None, device: str, as_json: bool) -> None:
    """Print FID, KID, precision and recall of the pictures in `drawn` against those in `true`."""
    folders = [pictures_in(folder) for folder in (true, drawn)]
    network, where = open_inception(WEIGHTS["inception"].find(inception)), pick_device(device)
    found = []
    for name, pictures in zip(("true pictures", "drawn pictures"), folders, strict=True):
        with steps_progress(name) as progress:
            found.append(features_of(pictures, network, where, progress=progress))
    a, b = found
    discrepancy, both = kid(a, b), precision_recall(a, b)
    numbers = {
        "fid": fid(a, b), "kid": discrepancy.mean, "kid_deviation": discrepancy.deviation,
        "precision": both.precision, "recall": both.recall,
        "true": len(folders[0]), "drawn": len(folders[1]),
    }  # fmt: skip
    if as_json:
        console.print_json(numbers)
        return
    for name, value in numbers.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        console.out.print(f"{name.replace('_', ' '):<16}{shown}", markup=False)
