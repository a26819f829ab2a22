"""Models from the Hugging Face hub, by its HTTP interface, into the cache that every program of the field shares.

Interface: `GET /api/models/<name>/revision/<revision>?blobs=true` lists the files of a commit with their checksums,
`GET /<name>/resolve/<commit>/<file>` is a file. Cache: `models--<org>--<name>/` with `blobs/<checksum>`,
`refs/<revision>` and links in `snapshots/<commit>/` (huggingface_hub, "Understand caching"). The library itself is not
used: it neither goes on with a download of an earlier run, nor compares checksums of what came over plain HTTP.
"""

import hashlib
import http.client
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from reverie.errors import CheckpointError, OutputError, RequestError
from reverie.places import user_cache

ENDPOINT = "https://huggingface.co"
NAME = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")
CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
CHUNK = 1 << 20  # bytes
TIMEOUT = 30  # seconds without an answer
ATTEMPTS = 5  # in a row without a byte
MAX_LISTING = 1 << 26  # bytes
TRANSIENT = {408, 429, 500, 502, 503, 504}
FALSE = {"", "0", "false", "no", "off"}
# Folders of a pipeline that draw nothing here.
SKIPPED = ("safety_checker", "feature_extractor", "onnx", "openvino", "flax")
BESIDE = (".json", ".txt", ".model")  # endings of what stands beside weights
SAFE, TORCH = ".safetensors", ".bin"

Progress = Callable[[int, int], None]  # bytes received, bytes in all


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit.

    Attributes:
        checksum: SHA-256 of a large file, Git's SHA-1 of a small one: the name of its blob in the cache.
    """

    name: str
    size: int
    checksum: str


@dataclass(frozen=True)
class Hub:
    """Where models come from and go to; see `Hub.of_environment`.

    Attributes:
        cache: the folder that holds `models--*`.
        token: sent to the endpoint alone, never to where it redirects.
        pause: seconds before the second attempt; doubled for each further one.
    """

    endpoint: str = ENDPOINT
    cache: Path = Path()
    token: str | None = None
    offline: bool = False
    pause: float = 1.0

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] | None = None) -> "Hub":
        """As `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_CACHE`, `HF_HOME`, `HF_HUB_OFFLINE` and `REVERIE_OFFLINE` say."""
        env = os.environ if environment is None else environment
        offline = any(env.get(key, "").lower() not in FALSE for key in ("HF_HUB_OFFLINE", "REVERIE_OFFLINE"))
        endpoint = env.get("HF_ENDPOINT") or ENDPOINT
        return cls(endpoint.rstrip("/"), cache_folder(env), env.get("HF_TOKEN") or None, offline)

    def pull(
        self,
        name: str,
        *,
        revision: str = "main",
        variant: str | None = None,
        file: str | None = None,
        progress: Progress | None = None,
    ) -> Path:
        """Fetch a model, or what is missing of it.

        Args:
            name: `org/name`.
            revision: branch, tag or commit; what it is now is pinned: all files are of that commit.
            variant: of a pipeline's weights, for example `fp16`.
            file: one file of a repository, for example `v1-5-pruned-emaonly.safetensors`.
            progress: called as `(bytes received, bytes in all)`.

        Returns:
            the folder of the commit in the cache, or the file.

        Raises:
            RequestError: no such model, revision, variant or file; no permission; no connection; offline.
            CheckpointError: a file whose checksum is wrong.
            OutputError: the cache cannot be written, or the disk is too full.
        """
        if not NAME.fullmatch(name) or not REVISION.fullmatch(revision) or ".." in f"{name}/{revision}":
            raise RequestError(f"{name!r} at {revision!r} is no name on the hub; expected org/name and a revision")
        if not self.endpoint.startswith(("https://", "http://")):
            raise RequestError(f"HF_ENDPOINT is {self.endpoint!r}; expected an address that begins with https://")
        folder = self.cache / f"models--{name.replace('/', '--')}"
        if self.offline:
            return _cached(folder, name, revision, file)
        commit, files = self._listing(name, revision)
        chosen = [one(files, file)] if file else wanted(files, variant, name)
        try:
            self._fetch(name, commit, folder, chosen, progress)
            _remember(folder, revision, commit)
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror or error}") from None
        snapshot = folder / "snapshots" / commit
        alone = file or (chosen[0].name if len(chosen) == 1 else None)
        return snapshot / alone if alone else snapshot

    def _listing(self, name: str, revision: str) -> tuple[str, list[RemoteFile]]:
        """The commit that a revision is now, and its files."""
        quoted = urllib.parse.quote(revision, safe="")
        url = f"{self.endpoint}/api/models/{name}/revision/{quoted}?blobs=true"
        try:
            with self._open(url, f"{name} at {revision}") as answer:
                listing = json.loads(answer.read(MAX_LISTING))
            files = [_remote_file(entry) for entry in listing["siblings"]]
            commit = str(listing["sha"])
        except (ValueError, KeyError, TypeError, AttributeError, OSError, http.client.HTTPException) as error:
            raise RequestError(f"{self.endpoint} gave no list of files of {name}: {str(error)[:80]}") from None
        if not COMMIT.fullmatch(commit):
            raise RequestError(f"{self.endpoint} gave the commit {commit[:60]!r} for {name}; expected 40 hex digits")
        return commit, files

    def _fetch(
        self, name: str, commit: str, folder: Path, files: Sequence[RemoteFile], progress: Progress | None
    ) -> None:
        snapshot, total, done = folder / "snapshots" / commit, sum(file.size for file in files), 0
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        missing = [file for file in files if not (folder / "blobs" / file.checksum).exists()]
        _check_space(folder, sum(file.size for file in missing))
        for file in files:
            blob = folder / "blobs" / file.checksum
            if file in missing:
                url = f"{self.endpoint}/{name}/resolve/{commit}/{urllib.parse.quote(file.name)}"
                self._download(url, blob, file, _shifted(progress, done, total))
            _link(snapshot / file.name, blob)
            done += file.size
            if progress:
                progress(done, total)

    def _download(self, url: str, blob: Path, file: RemoteFile, progress: Progress | None) -> None:
        """One file, from where an earlier attempt or run ended; it gets its name when its checksum is right."""
        partial = blob.with_name(f"{blob.name}.incomplete")
        attempts, before, reason = 0, -1, ""
        while (have := partial.stat().st_size if partial.exists() else -1) < file.size:
            attempts = 1 if have > before else attempts + 1
            before = have
            if attempts > ATTEMPTS:
                raise RequestError(
                    f"the connection broke while {file.name} came ({max(have, 0):,} of {file.size:,} bytes are kept)"
                    f"{reason}; run it again to go on"
                )
            if attempts > 1:
                time.sleep(self.pause * 2 ** (attempts - 2))
            try:
                self._append(url, partial, max(have, 0), file, progress)
            except (OSError, http.client.HTTPException) as error:
                reason = f": {str(error)[:80] or type(error).__name__}"
        found = checksum_of(partial, sha256=len(file.checksum) == 64)
        if found != file.checksum:
            partial.unlink()
            raise CheckpointError(
                f"{file.name} has the checksum {found[:16]}..., expected {file.checksum[:16]}...; it was removed: "
                "download it again"
            )
        partial.replace(blob)

    def _append(self, url: str, partial: Path, have: int, file: RemoteFile, progress: Progress | None) -> None:
        with self._open(url, file.name, {"Range": f"bytes={have}-"} if have else {}) as answer:
            whole = answer.status != 206  # the server sends all of it again
            with partial.open("wb" if whole else "ab") as target:
                _copy(answer, target, 0 if whole else have, file.size, progress)

    def _open(self, url: str, what: str, headers: Mapping[str, str] | None = None) -> Any:
        """An answer of the hub.

        Raises:
            RequestError: one that says no.
        """
        request = urllib.request.Request(url, headers={"User-Agent": "reverie", **(headers or {})})
        if self.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                return urllib.request.urlopen(request, timeout=TIMEOUT)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code not in TRANSIENT or attempt + 1 == ATTEMPTS:
                    raise RequestError(self._refusal(error.code, what, url)) from None
            except (OSError, http.client.HTTPException) as error:
                if attempt + 1 == ATTEMPTS:
                    reason = getattr(error, "reason", error)
                    raise RequestError(
                        f"cannot reach {self.endpoint} ({reason}); REVERIE_OFFLINE=1 uses what is in the cache"
                    ) from None
        raise AssertionError("every attempt returns or raises")

    def _refusal(self, code: int, what: str, url: str) -> str:
        token = "HF_TOKEN is not accepted there" if self.token else "set HF_TOKEN to a token of your account"
        name = "/".join(url.removeprefix(f"{self.endpoint}/").removeprefix("api/models/").split("/")[:2])
        reasons = {
            401: f"{what}: the hub wants to know who asks (401): the name is wrong, or the model is private; {token}",
            403: f"{what}: no permission (403); accept its licence at {self.endpoint}/{name}; {token}",
            404: f"{what} is not on {self.endpoint} (404); check the name and the revision",
        }
        return reasons.get(code, f"{what}: {self.endpoint} answered {code}; try again later")


def cache_folder(environment: Mapping[str, str]) -> Path:
    """The cache of the hub, where huggingface_hub has it."""
    if cache := environment.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    home = environment.get("HF_HOME")
    return (Path(home).expanduser() if home else user_cache(environment) / "huggingface") / "hub"


def wanted(files: Sequence[RemoteFile], variant: str | None, name: str) -> list[RemoteFile]:
    """What a pipeline needs: configs, tokenizers, and of every network one form of its weights.

    Raises:
        RequestError: no pipeline and not exactly one safetensors file either, or a variant that is not there.
    """
    there = {file.name: file for file in files}
    if "model_index.json" not in there:
        single = [file for file in files if file.name.endswith(SAFE) and "/" not in file.name]
        if len(single) == 1:
            return single
        found = ", ".join(file.name for file in single[:8]) or "no safetensors file"
        raise RequestError(f"{name} is no pipeline; choose one of its files ({found})")
    chosen = [there[own] for own in ("model_index.json", "reverie.json") if own in there]
    folders = sorted({file.name.split("/")[0] for file in files if file.name.count("/") == 1} - set(SKIPPED))
    varied = False
    for folder in folders:
        own = [file for file in files if PurePosixPath(file.name).parent == PurePosixPath(folder)]
        weights = _weights(own, variant)
        varied = varied or any(variant is not None and f".{variant}." in file.name for file in weights)
        beside = [file for file in own if file.name.endswith(BESIDE) and ".index." not in file.name]
        chosen += beside + weights
    if variant is not None and not varied:
        raise RequestError(f"{name} has no weights of the variant {variant!r}")
    return chosen


def one(files: Sequence[RemoteFile], name: str) -> RemoteFile:
    """A file by its name.

    Raises:
        RequestError: it is not there.
    """
    for file in files:
        if file.name == name:
            return file
    found = ", ".join(file.name for file in files if file.name.endswith((SAFE, TORCH, ".ckpt", ".gguf")))
    raise RequestError(f"no file {name!r} there; it has {found[:300] or 'no weights'}")


def checksum_of(path: Path, *, sha256: bool) -> str:
    """SHA-256 of a file, or the SHA-1 that Git names it by."""
    if sha256:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _weights(files: Iterable[RemoteFile], variant: str | None) -> list[RemoteFile]:
    """One form of the weights of a folder: safetensors before torch, the variant before the plain ones."""
    named = {file.name.rpartition("/")[2]: file for file in files}
    for ending in (SAFE, TORCH):
        stems = ("diffusion_pytorch_model", "model" if ending == SAFE else "pytorch_model")
        forms: dict[str, list[RemoteFile]] = {}
        for name, file in named.items():
            match = re.fullmatch(
                rf"({'|'.join(stems)}){re.escape(ending)}\.index(\.[\w-]+)?\.json"
                rf"|({'|'.join(stems)})(\.[\w]+)?(-\d+-of-\d+)?(\.[\w]+)?{re.escape(ending)}",
                name,
            )
            if match:
                forms.setdefault((match[2] or match[4] or match[6] or "").removeprefix("."), []).append(file)
        if forms:
            lone = next(iter(forms)) if len(forms) == 1 else ""
            return forms.get(variant or "") or forms.get("") or forms.get(lone) or []
    return []


def _remote_file(entry: Mapping[str, Any]) -> RemoteFile:
    """A file of a listing.

    Raises:
        ValueError: a name that leads out of the folder, or a checksum that is none.
    """
    name, large = str(entry["rfilename"]), entry.get("lfs") or {}
    checksum = str(large.get("sha256") or large.get("oid") or entry.get("blobId") or "")
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or {"..", "."} & set(name.split("/")) or "\\" in name or ":" in name:
        raise ValueError(f"a file named {name[:60]!r}")
    if not CHECKSUM.fullmatch(checksum):
        raise ValueError(f"no checksum of {name[:60]!r}")
    return RemoteFile(name, int(large.get("size") or entry.get("size") or 0), checksum)


def _copy(answer: BinaryIO, target: BinaryIO, done: int, total: int, progress: Progress | None) -> None:
    while chunk := answer.read(CHUNK):
        target.write(chunk)
        done += len(chunk)
        if done > total:
            raise http.client.HTTPException(f"more than the {total:,} bytes that were announced")
        if progress:
            progress(done, total)


def _shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(before + done, total)


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OutputError(f"{folder} has {free:,} bytes free; {size:,} are needed")


def _link(path: Path, blob: Path) -> None:
    """A link into the blobs; a copy where the system has no links."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        shutil.copyfile(blob, path)


def _remember(folder: Path, revision: str, commit: str) -> None:
    if revision != commit:
        ref = folder / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit, encoding="utf-8")


def _cached(folder: Path, name: str, revision: str, file: str | None) -> Path:
    """What an earlier run left.

    Raises:
        RequestError: nothing.
    """
    ref = folder / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    snapshot = folder / "snapshots" / commit
    if not COMMIT.fullmatch(commit) or not snapshot.is_dir():
        raise RequestError(f"{name} at {revision} is not in the cache {folder.parent}, and offline is set")
    if file is not None:
        if not (snapshot / file).is_file() or ".." in file:
            raise RequestError(f"{file} of {name} is not in the cache {folder.parent}, and offline is set")
        return snapshot / file
    alone = [path for path in snapshot.iterdir() if path.is_file()]
    return alone[0] if len(alone) == 1 and alone[0].suffix == SAFE else snapshot
