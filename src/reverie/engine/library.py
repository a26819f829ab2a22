"""The models on this computer, in the folders where other programs keep them: listed, searched, found by name or hash.

Folders come from `REVERIE_MODELS`, from `[models] folders` of `~/.config/reverie/config.toml`, and from the cache of
the Hugging Face hub. A folder of A1111 (or Forge), ComfyUI or InvokeAI is recognised by what is in it; nothing is
copied.
"""

import difflib
import hashlib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reverie.adapters.files import find
from reverie.checkpoint.hub import NAME, cache_folder
from reverie.engine.hashes import hash_paths
from reverie.engine.remembered import Remembered, key_of
from reverie.errors import CheckpointError, ConfigError, RequestError
from reverie.families.detect import open_checkpoint
from reverie.places import user_config

ENDINGS = (".safetensors", ".ckpt", ".gguf", ".sft")
INDEX = "model_index.json"
# What a program's folder is recognised by, and where its models are below it.
PROGRAMS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("A1111", "models/Stable-diffusion", ("models/Stable-diffusion",)),
    ("ComfyUI", "models/checkpoints", ("models/checkpoints", "models/diffusion_models", "models/unet",
                                       "models/diffusers")),
    ("InvokeAI", "invokeai.yaml", ("models",)),
)  # fmt: skip
# Folders beside models, of what is none.
OTHERS = {
    "lora", "loras", "lycoris", "vae", "vae_approx", "vae-approx", "embeddings", "embedding", "controlnet",
    "clip", "clip_vision", "text_encoders", "upscale_models", "esrgan", "realesrgan", "hypernetworks", "codeformer",
    "gfpgan", "ip_adapter", "t2i_adapter", "style_models", "gligen", "photomaker", "deepbooru", "karlo", "blobs",
}  # fmt: skip
# Folders of adapters, by what is in them; beside a program's models or below its first folder.
ADAPTERS: Mapping[str, frozenset[str]] = {
    "LoRA": frozenset({"lora", "loras", "lycoris"}),
    "embedding": frozenset({"embedding", "embeddings"}),
    "control net": frozenset({"controlnet", "t2i_adapter"}),
    "IP-Adapter": frozenset({"ipadapter", "ip_adapter", "ip_adapters", "controlnet"}),
    "image encoder": frozenset({"clip_vision", "image_encoder", "image_encoders"}),
    "tiny decoder": frozenset({"vae_approx", "vae-approx", "vae-taesd"}),  # ComfyUI's; A1111's two
}
ADAPTER_ENDINGS = (*ENDINGS, ".pt", ".bin", ".png", ".webp")
ABOVE = 3  # folders above a model in which its program's other folders may be
DEEPEST = 8  # folders below the first
HASH = re.compile(r"[0-9a-f]{8,64}")
SHORT = 10  # digits of a hash that people write

Progress = Callable[[int, int], None]  # models hashed, models in all


@dataclass(frozen=True)
class Found:
    """A model on this computer.

    Attributes:
        name: the file's or folder's, without its ending; `org/name` in the cache of the hub.
        where: the program whose folder it is in, or `folder`, or `hub`.
        size: bytes.
        sha256: of its weights, where it is known; see `Library.hashed`.
    """

    name: str
    path: Path
    where: str
    size: int
    sha256: str = ""

    @property
    def short(self) -> str:
        """The first ten digits of its hash."""
        return self.sha256[:SHORT]

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"name": self.name, "path": str(self.path), "where": self.where, "size": self.size, "hash": self.short}


@dataclass(frozen=True)
class Library:
    """Folders with models, and a file that remembers their hashes.

    Attributes:
        folders: as they were asked for, each its own or a program's.
        hub: the cache of the hub.
        memory: where hashes are kept.
    """

    folders: tuple[Path, ...]
    hub: Path
    memory: Remembered = field(repr=False, compare=False)
    _children: dict[Path, list[Path]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] | None = None) -> "Library":
        """As the environment and the config file say.

        Raises:
            ConfigError: the config file is broken.
        """
        env = os.environ if environment is None else environment
        config = user_config(env) / "reverie" / "config.toml"
        named = [part for part in env.get("REVERIE_MODELS", "").split(os.pathsep) if part]
        folders = dict.fromkeys(Path(part).expanduser() for part in [*named, *_configured(config)])
        return cls(tuple(folders), cache_folder(env), Remembered.of_environment(env))

    def models(self, search: str = "") -> list[Found]:
        """Every model, or those whose name or folder has all words of `search`; by name.

        Files are not opened: a hash is there only if it was computed before.
        """
        found: dict[Path, Found] = {}
        for model in self._walk():
            found.setdefault(model.path, model)
        words = search.lower().split()
        return sorted(
            (self._remembered(m) for m in found.values() if all(w in f"{m.name} {m.path}".lower() for w in words)),
            key=lambda model: (model.name.lower(), str(model.path)),
        )

    def hashed(self, models: Iterable[Found], progress: Progress | None = None) -> list[Found]:
        """The same with their hashes, which takes seconds for each one that is not known yet. Broken ones have none."""
        todo = list(models)
        done: list[Found] = []
        for model in todo:
            if not model.sha256:
                with suppress(CheckpointError, OSError):
                    self._remember(model)
            done.append(self._remembered(model))
            if progress:
                progress(len(done), len(todo))
        return done

    def resolve(self, name: str, progress: Progress | None = None) -> Path:
        """The model that a name means: a path, a file's name or stem, `org/name` of the hub, the digits of a hash.

        Hashes are those that programs write into pictures: the first digits (8 to 64, usually 10) of the SHA-256, or
        the 8 digits of A1111's old hash.

        Raises:
            RequestError: no such model, or several.
        """
        path = Path(name).expanduser()
        if path.exists():
            return path
        models = self.models()
        for chosen in (_named(models, name), _named(models, name.lower(), lower=True)):
            if chosen:
                return _only(chosen, name)
        if HASH.fullmatch(name.lower()):
            return self._by_hash(models, name.lower(), progress)
        names = [model.name for model in models]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"{len(names)} models are known: reverie models"
        pull = f"; reverie models pull {name} fetches it from the hub" if NAME.fullmatch(name) else ""
        raise RequestError(f"no model {name!r}: no such path, and none of that name; {hint}{pull}")

    def folders_for(self, kind: str, model: Path | None = None) -> list[Path]:
        """The folders where adapters of a kind are, one of `ADAPTERS`: of the library, and around a model."""
        found = self.named_for(kind, model)
        plain = [folder for folder in self.folders if not any(folder in path.parents for path in found)]
        return list(dict.fromkeys((*found, *plain)))

    def named_for(self, kind: str, model: Path | None = None) -> list[Path]:
        """Those of them that are named for the kind."""
        above = () if model is None else (model.resolve(), *model.resolve().parents[:ABOVE])
        roots = dict.fromkeys((*self.folders, *above))
        places = (place for root in roots for place in (root, root / "models"))
        return [path for place in places for path in self._below(place) if path.name.lower() in ADAPTERS[kind]]

    def _below(self, place: Path) -> list[Path]:
        """The folders in a folder, looked at once."""
        if place not in self._children:
            self._children[place] = _children(place)
        return self._children[place]

    def adapter(self, name: str, kind: str, model: Path | None = None) -> Path:
        """The file that a name means: a path, or the name of one in `folders_for`.

        Raises:
            RequestError: no such file, or several.
        """
        return find(name, self.folders_for(kind, model), kind)

    def adapters(self, kind: str, model: Path | None = None) -> list[Path]:
        """Every adapter of a kind in folders that are named for it; see `folders_for`."""
        folders = [path for path in self.folders_for(kind, model) if path.name.lower() in ADAPTERS[kind]]
        found = (path for folder in folders for path in sorted(folder.rglob("*")))
        return [path for path in found if path.suffix.lower() in ADAPTER_ENDINGS and path.is_file()]

    def _by_hash(self, models: list[Found], digits: str, progress: Progress | None) -> Path:
        known = [model for model in models if model.sha256.startswith(digits)]
        chosen = known or [model for model in models if len(digits) == 8 and _old_hash(model.path) == digits]
        chosen = chosen or [m for m in self.hashed(models, progress) if m.sha256.startswith(digits)]
        if not chosen:
            raise RequestError(f"none of {len(models)} models has a hash that begins with {digits}")
        return chosen[0].path if len({model.sha256 for model in chosen}) == 1 else _only(chosen, digits)

    # Walking

    def _walk(self) -> Iterator[Found]:
        for folder in self.folders:
            programs = [(name, below) for name, sign, below in PROGRAMS if (folder / sign).exists()]
            for name, below in programs or [("folder", ("",))]:
                for part in below:
                    yield from _in_folder(folder / part, name)
        for repository in sorted(self.hub.glob("models--*--*")):
            yield from _in_hub(repository)

    # Hashes

    def _remembered(self, model: Found) -> Found:
        return replace(model, sha256=self.memory.get(_key(model.path)) or "")

    def _remember(self, model: Found) -> None:
        self.memory.note(_key(model.path), hash_paths(weight_paths(model.path)))


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:  # not there, or not to be read
        return []


def weight_paths(path: Path) -> list[Path]:
    """The files whose hash is that of the model, in the order in which `engine/image.py: fingerprint` takes them.

    Raises:
        CheckpointError: a folder that is broken.
    """
    if path.is_file():
        return [path]
    _, opened = open_checkpoint(path)
    return sorted({file for piece in opened.pieces.values() for file in piece.files})


def _configured(config: Path) -> list[str]:
    """`[models] folders` of the config file; none without a file."""
    try:
        table = tomllib.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {config}: {str(error)[:120]}") from None
    models = table.get("models", {})
    folders = models.get("folders", []) if isinstance(models, dict) else None
    if not isinstance(folders, list) or not all(isinstance(folder, str) for folder in folders):
        raise ConfigError(f"{config}: [models] folders is {folders!r}; expected a list of paths")
    return folders


def _in_folder(folder: Path, where: str, depth: int = 0) -> Iterator[Found]:
    """Models of a folder and of those below it; a diffusers folder is one model."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # not there, or not to be read
        return
    if any(entry.name == INDEX for entry in entries):
        yield _found(folder, folder.name, where)
        return
    for entry in entries:
        if entry.is_dir():
            if depth < DEEPEST and entry.name.lower() not in OTHERS and not entry.name.startswith("."):
                yield from _in_folder(entry, where, depth + 1)
        elif entry.suffix.lower() in ENDINGS and not entry.name.startswith(".") and entry.exists():
            yield _found(entry, entry.stem, where)


def _in_hub(repository: Path) -> Iterator[Found]:
    """The commit that a repository's `main` is, or else its latest."""
    name = "/".join(repository.name.split("--")[1:])
    snapshots = sorted((repository / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
    with suppress(OSError):
        main = repository / "snapshots" / (repository / "refs" / "main").read_text(encoding="utf-8").strip()
        snapshots = [main] if main.is_dir() else snapshots
    for snapshot in snapshots[-1:]:
        if (snapshot / INDEX).exists():
            yield _found(snapshot, name, "hub")
            continue
        for path in sorted(snapshot.glob("*")):
            if path.suffix.lower() in ENDINGS and path.exists():
                yield _found(path, f"{name}/{path.stem}", "hub")


def _found(path: Path, name: str, where: str) -> Found:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return Found(name, path, where, sum(p.stat().st_size for p in files))


def _named(models: Iterable[Found], name: str, *, lower: bool = False) -> list[Found]:
    def names(model: Found) -> set[str]:
        known = {model.name, model.path.name, model.path.stem} if model.path.is_file() else {model.name}
        known |= {model.name.rpartition("/")[2]} if model.where == "hub" else set()
        return {text.lower() for text in known} if lower else known

    return [model for model in models if name in names(model)]


def _only(models: list[Found], name: str) -> Path:
    if len(models) > 1:
        paths = ", ".join(str(model.path) for model in models[:5])
        raise RequestError(f"{len(models)} models are called {name!r}: {paths}; give the path of one")
    return models[0].path


def _key(path: Path) -> str:
    """Changes when the model does: of a folder, when any of its files does."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return f"model|{path}|{hashlib.sha256(key_of('', files).encode()).hexdigest()[:32]}"


def _old_hash(path: Path) -> str:
    """A1111's hash of before 2023: of 64 KiB at the first MiB."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
