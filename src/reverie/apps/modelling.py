"""`reverie models`: list, search, pull."""

from typing import Any

from reverie.apps import console
from reverie.apps.doctoring import size
from reverie.apps.progress import steps_progress
from reverie.checkpoint.hub import Hub
from reverie.engine.library import Library


def run_list(search: str, hashes: bool, as_json: bool) -> None:
    """Print the models on this computer.

    Args:
        hashes: compute those that are not known yet; they are remembered.
    """
    library = Library.of_environment()
    models = library.models(search)
    if hashes:
        with steps_progress("hashing") as progress:
            models = library.hashed(models, progress)
    if as_json:
        console.print_json([model.as_dict() for model in models])
        return
    for model in models:
        console.out.print(
            f"{model.name:<40} {model.short:<10} {size(model.size):>8}  {model.where:<8} {model.path}", markup=False
        )
    if not models:
        console.note("no models found; set REVERIE_MODELS to the folders that hold yours, or pull one: org/name")


def run_pull(name: str, options: dict[str, Any], as_json: bool) -> None:
    """Fetch a model from the hub and print where it is.

    Args:
        options: as `reverie.checkpoint.hub.Hub.pull` takes them.
    """
    with steps_progress(f"fetching {name}") as progress:
        path = Hub.of_environment().pull(name, progress=progress, **options)
    if as_json:
        console.print_json({"name": name, "path": str(path)})
        return
    console.out.print(str(path), markup=False)
