"""The hub, played by a server on this computer that can also misbehave."""

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from reverie.checkpoint.hub import Hub, RemoteFile, cache_folder, wanted
from reverie.errors import CheckpointError, OutputError, RequestError

NAME, COMMIT = "org/tiny", "0123456789abcdef0123456789abcdef01234567"
BIG = bytes(range(256)) * 8192  # 2 MiB


@dataclass
class Behaviour:
    """What the server holds and how it behaves.

    Attributes:
        cuts: how many answers end too early, each after `cut_after` bytes.
        codes: what is answered, by the beginning of the path.
        ranges: the ranges that were asked for.
        seen: the tokens that came.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    cuts: int = 0
    cut_after: int = 700_000
    codes: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, bytes] = field(default_factory=dict)
    ranges: list[str] = field(default_factory=list)
    seen: list[str | None] = field(default_factory=list)
    ignores_range: bool = False
    listing: dict[str, Any] | None = None
    fetched: list[str] = field(default_factory=list)
    elsewhere: str = ""


class Handler(BaseHTTPRequestHandler):
    behaviour: Behaviour

    def log_message(self, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        at = unquote(self.path.split("?")[0])
        self.behaviour.seen.append(self.headers.get("Authorization"))
        code = next((code for start, code in self.behaviour.codes.items() if at.startswith(start)), None)
        if code is not None:
            self.send_error(code)
        elif at.startswith("/api/models/"):
            self.answer(json.dumps(self.behaviour.listing or self.listing()).encode())
        else:
            self.serve(at.removeprefix("/cdn").removeprefix(f"/{NAME}/resolve/{COMMIT}/"))

    def listing(self) -> dict[str, Any]:
        return {"sha": COMMIT, "siblings": [entry(name, data) for name, data in self.behaviour.files.items()]}

    def serve(self, name: str) -> None:
        b = self.behaviour
        if b.elsewhere and not self.path.startswith("/cdn"):
            self.send_response(302)
            self.send_header("Location", f"{b.elsewhere}/cdn{self.path}")
            self.end_headers()
            return
        data, start = b.wrong.get(name, b.files[name]), 0
        b.fetched.append(name)
        if (wanted_range := self.headers.get("Range")) is not None:
            b.ranges.append(wanted_range)
            start = 0 if b.ignores_range else int(wanted_range.removeprefix("bytes=").removesuffix("-"))
        cut = b.cuts > 0 and len(data) > b.cut_after
        b.cuts -= cut
        self.answer(data[start:], 206 if start else 200, b.cut_after if cut else None)

    def answer(self, data: bytes, code: int = 200, cut: int | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:cut])
        self.close_connection = True


def entry(name: str, data: bytes) -> dict[str, Any]:
    git = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
    found: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git}
    if name.endswith((".safetensors", ".bin")):
        found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    return found


FILES = {
    "model_index.json": b"{}",
    "README.md": b"hello",
    "scheduler/scheduler_config.json": b'{"a": 1}',
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"#version: 0.2\n",
    "unet/config.json": b'{"u": 1}',
    "unet/diffusion_pytorch_model.safetensors": BIG,
    "unet/diffusion_pytorch_model.fp16.safetensors": BIG[: len(BIG) // 2],
    "unet/diffusion_pytorch_model.bin": b"pickle",
    "vae/config.json": b'{"v": 1}',
    "vae/diffusion_pytorch_model.bin": b"only a pickle",
    "safety_checker/model.safetensors": b"none",
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Behaviour, str]]:
    monkeypatch.setenv("NO_PROXY", "*")
    behaviour = Behaviour(dict(FILES))
    handler = type("Own", (Handler,), {"behaviour": behaviour})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield behaviour, f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def hub(server: tuple[Behaviour, str], cache: Path, **settings: Any) -> Hub:
    return Hub(server[1], cache, pause=0.0, **settings)


def test_pull_fetches_what_a_pipeline_needs_and_nothing_else(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    folder = hub(server, tmp_path).pull(NAME, progress=lambda done, total: steps.append((done, total)))
    assert folder == tmp_path / "models--org--tiny" / "snapshots" / COMMIT
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    left = {"README.md", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin"}
    assert there == FILES.keys() - left - {"safety_checker/model.safetensors"}
    assert all((folder / name).read_bytes() == FILES[name] for name in there)
    total = sum(len(FILES[name]) for name in there)
    assert steps[-1] == (total, total) and all(a[0] <= b[0] for a, b in pairwise(steps))
    assert (tmp_path / "models--org--tiny" / "refs" / "main").read_text() == COMMIT
    server[0].fetched.clear()
    assert hub(server, tmp_path).pull(NAME) == folder and not server[0].fetched  # all of it is there


def test_a_variant_is_preferred_and_an_unknown_one_refused(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    folder = hub(server, tmp_path).pull(NAME, variant="fp16")
    assert [p.name for p in (folder / "unet").glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]
    with pytest.raises(RequestError, match="no weights of the variant 'fp8'"):
        hub(server, tmp_path).pull(NAME, variant="fp8")


@pytest.mark.parametrize("ignores_range", [False, True])
def test_a_cut_connection_goes_on(server: tuple[Behaviour, str], tmp_path: Path, ignores_range: bool) -> None:
    server[0].cuts, server[0].ignores_range = 2, ignores_range
    path = hub(server, tmp_path).pull(NAME, file="unet/diffusion_pytorch_model.safetensors")
    assert path.read_bytes() == BIG
    assert server[0].ranges[0] == "bytes=700000-"
    if not ignores_range:
        assert server[0].ranges == ["bytes=700000-", "bytes=1400000-"]


def test_a_later_run_goes_on_where_an_earlier_one_ended(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    name = "unet/diffusion_pytorch_model.safetensors"
    server[0].cuts, server[0].cut_after = 10_000, 0
    partial = tmp_path / "models--org--tiny" / "blobs" / f"{hashlib.sha256(BIG).hexdigest()}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(BIG[:1_000_000])
    with pytest.raises(RequestError, match=r"the connection broke .* \(1,000,000 of 2,097,152 bytes are kept\)"):
        hub(server, tmp_path).pull(NAME, file=name)
    server[0].cuts = 0
    server[0].ranges.clear()
    assert hub(server, tmp_path).pull(NAME, file=name).read_bytes() == BIG
    assert server[0].ranges == ["bytes=1000000-"] and not partial.exists()


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json"])
def test_a_wrong_checksum_is_refused(server: tuple[Behaviour, str], tmp_path: Path, name: str) -> None:
    server[0].wrong[name] = bytes(len(FILES[name]))
    with pytest.raises(CheckpointError, match=f"{name} has the checksum .* expected .* removed"):
        hub(server, tmp_path).pull(NAME)
    assert not list(tmp_path.rglob("*.incomplete"))
    server[0].wrong.clear()
    folder = hub(server, tmp_path).pull(NAME)
    assert (folder / name).read_bytes() == FILES[name]


def test_offline_uses_the_cache_alone(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"org/tiny at main is not in the cache .* offline"):
        hub(server, tmp_path, offline=True).pull(NAME)
    assert not server[0].seen
    folder = hub(server, tmp_path).pull(NAME)
    server[0].seen.clear()
    offline = hub(server, tmp_path, offline=True)
    assert offline.pull(NAME) == offline.pull(NAME, revision=COMMIT) == folder
    assert offline.pull(NAME, file="unet/config.json") == folder / "unet/config.json"
    with pytest.raises(RequestError, match="unet/none of org/tiny is not in the cache"):
        offline.pull(NAME, file="unet/none")
    with pytest.raises(RequestError, match="is not in the cache"):
        offline.pull(NAME, file="../../refs/main")
    assert not server[0].seen


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (401, "wants to know who asks.*set HF_TOKEN"),
        (403, "no permission .*accept its licence at http://127.0.0.1:[0-9]+/org/tiny"),
        (404, "org/tiny at main is not on http"),
        (503, "answered 503"),
    ],
)
def test_refusals_are_one_clear_line(server: tuple[Behaviour, str], tmp_path: Path, code: int, expected: str) -> None:
    server[0].codes["/api/models/"] = code
    with pytest.raises(RequestError, match=expected) as caught:
        hub(server, tmp_path).pull(NAME)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*"))


def test_a_gated_file_is_one_clear_line(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    server[0].codes[f"/{NAME}/resolve"] = 403
    with pytest.raises(RequestError, match=r"no permission .*/org/tiny; HF_TOKEN is not accepted"):
        hub(server, tmp_path, token="secret").pull(NAME)


def test_no_connection_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"cannot reach http://127.0.0.1:1 .*REVERIE_OFFLINE=1"):
        Hub("http://127.0.0.1:1", tmp_path, pause=0.0).pull(NAME)
    with pytest.raises(RequestError, match="HF_ENDPOINT is 'file:///etc'"):
        Hub("file:///etc", tmp_path).pull(NAME)


def test_the_token_goes_to_the_endpoint_alone(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    server[0].elsewhere = server[1].replace("127.0.0.1", "localhost")
    folder = hub(server, tmp_path, token="secret").pull(NAME)
    assert (folder / "unet/config.json").read_bytes() == FILES["unet/config.json"]
    assert {"Bearer secret", None} == set(server[0].seen)
    assert server[0].seen.count(None) == len(server[0].fetched)


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "a/../../b", "C:\\x", "."])
def test_names_that_lead_out_of_the_folder_are_refused(
    server: tuple[Behaviour, str], tmp_path: Path, name: str
) -> None:
    server[0].listing = {"sha": COMMIT, "siblings": [entry(name, b"x"), entry("model_index.json", b"{}")]}
    with pytest.raises(RequestError, match="gave no list of files"):
        hub(server, tmp_path).pull(NAME)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    "listing", [{"sha": "../..", "siblings": []}, {"siblings": []}, {"sha": COMMIT, "siblings": [{"rfilename": "a"}]}]
)
def test_a_broken_listing_is_refused(server: tuple[Behaviour, str], tmp_path: Path, listing: dict[str, Any]) -> None:
    server[0].listing = listing
    with pytest.raises(RequestError, match=r"gave no list of files|expected 40 hex digits"):
        hub(server, tmp_path).pull(NAME)


@pytest.mark.parametrize("name", ["tiny", "org/tiny/more", "../tiny", "org/.."])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="expected org/name"):
        Hub(cache=tmp_path).pull(name)


def test_a_repository_of_files_is_a_file(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    server[0].files = {"one.safetensors": b"1", "README.md": b"hello"}
    assert hub(server, tmp_path).pull(NAME).name == "one.safetensors"
    assert hub(server, tmp_path, offline=True).pull(NAME).name == "one.safetensors"
    server[0].files["two.safetensors"] = b"2"
    with pytest.raises(RequestError, match=r"choose one of its files \(one.safetensors, two.safetensors\)"):
        hub(server, tmp_path).pull(NAME)
    with pytest.raises(RequestError, match=r"no file 'three' there; it has one.safetensors, two.safetensors"):
        hub(server, tmp_path).pull(NAME, file="three")


def test_a_disk_that_is_too_small_is_refused(server: tuple[Behaviour, str], tmp_path: Path) -> None:
    huge = entry("one.safetensors", b"1")
    huge["lfs"]["size"] = 1 << 60
    server[0].listing = {"sha": COMMIT, "siblings": [huge]}
    with pytest.raises(OutputError, match="bytes free; 1,152,921,504,606,846,976 are needed"):
        hub(server, tmp_path).pull(NAME)


def test_shards_and_their_index_are_taken() -> None:
    sum_ = "0" * 64
    names = [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
        "text_encoder/config.json", "text_encoder/model.fp16.safetensors",
    ]  # fmt: skip
    files = [RemoteFile(name, 1, sum_) for name in names]
    plain = {file.name for file in wanted(files, None, NAME)}
    assert plain == set(names) - {names[5], names[6]}  # a lone variant is better than nothing
    assert {file.name for file in wanted(files, "fp16", NAME)} == set(names) - {*names[2:5]}


def test_the_environment_is_heard(tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": "https://mirror/", "HF_TOKEN": "secret", "HF_HOME": str(tmp_path)}
    assert Hub.of_environment(env) == Hub("https://mirror", tmp_path / "hub", "secret", False)
    assert Hub.of_environment({"REVERIE_OFFLINE": "1"}).offline and Hub.of_environment({"HF_HUB_OFFLINE": "ON"}).offline
    assert not Hub.of_environment({"HF_HUB_OFFLINE": "0"}).offline
    assert cache_folder({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}) == Path("/a")
    assert cache_folder({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
