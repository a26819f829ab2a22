"""`reverie batch`: many requests, one JSON object or one prompt a line; it goes on where it stopped."""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reverie.apps import console
from reverie.apps.generating import Session, draw_and_save, targets
from reverie.checkpoint.save import write_json
from reverie.engine.image import fingerprint
from reverie.engine.request import Request
from reverie.engine.resolve import resolve
from reverie.errors import GenerationError, RequestError

JOURNAL = "batch.json"  # in the output folder: which line drew which files


@dataclass(frozen=True)
class Job:
    """One line.

    Attributes:
        line: its number, from 1.
        request: what to draw.
        out: where; None for a number in the output folder.
        digest: of what was asked, by which a finished line is known again.
    """

    line: int
    request: Request
    out: Path | None
    digest: str


def read_jobs(text: str, shared: dict[str, Any], folder: Path, model: str) -> list[Job]:
    """All jobs of a batch, checked before anything is drawn. Blank lines and lines that begin with # are none.

    Args:
        shared: fields for every line; a line's own come first.
        folder: where pictures go, for lines without `out`.
        model: hash of the model: another model makes every line new.

    Raises:
        RequestError: the first line that cannot be, with its number; no lines at all.
    """
    jobs = []
    for number, line in enumerate(_lines(text), 1):
        if line is None:
            continue
        try:
            own = _object(line)
            out = own.pop("out", None)
            if out is not None and not isinstance(out, str):
                raise RequestError(f"out is {out!r}; expected a file name")
            fields = {**shared, **own}
            request = Request.of(**fields)
            if not request.prompt and request.image is None:
                raise RequestError("there is no prompt")
        except RequestError as error:
            raise RequestError(f"line {number}: {error}") from None
        asked = json.dumps([request.model_dump(mode="json"), out, model], sort_keys=True)
        digest = hashlib.sha256(asked.encode()).hexdigest()
        jobs.append(Job(number, request, None if out is None else folder / out, digest))
    if not jobs:
        raise RequestError("the batch is empty: give one JSON object or one prompt a line")
    return jobs


def run_batch(source: str, shared: dict[str, Any], folder: Path, session: Session) -> int:
    """Draw what is not drawn yet. Returns the exit code: 1 if a line failed.

    Args:
        source: a file, or `-` for stdin.
    """
    model = session.model
    jobs = read_jobs(_text(source), shared, folder, fingerprint(model)["hash"])
    targets(folder, 1)  # a folder that cannot be written is known now
    journal = _journal(folder)
    todo = [job for job in jobs if not _done(job, journal)]
    if len(todo) < len(jobs):
        console.note(f"{len(jobs) - len(todo)} of {len(jobs)} lines are drawn already")
    failed = 0
    for job in todo:
        try:
            place = targets(job.out or folder / f"{job.line:05d}.png", job.request.count)
            files = draw_and_save(session, resolve(model, job.request), place, {"line": job.line})
        except GenerationError as error:
            failed += 1
            console.error(f"line {job.line}: {error}")
            continue
        except KeyboardInterrupt:
            console.note(f"{len(journal)} of {len(jobs)} lines are drawn; the same command goes on from here")
            raise
        journal[job.digest] = [str(file.resolve()) for file in files]
        write_json(folder / JOURNAL, journal)
    counts = {"drawn": len(todo) - failed, "before": len(jobs) - len(todo), "failed": failed}
    if session.events:
        console.print_event("done", folder=str(folder), **counts)
    else:
        console.note(", ".join(f"{number} {what}" for what, number in counts.items()))
    return 1 if failed else 0


def _lines(text: str) -> list[str | None]:
    """The lines of a batch, or the entries of one JSON array; None for a line that is to be skipped."""
    if text.lstrip().startswith("["):
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the batch begins with [ but is no JSON array: {error}") from None
        return [json.dumps(entry) if isinstance(entry, dict) else str(entry) for entry in entries]
    stripped = (line.strip() for line in text.splitlines())
    return [line if line and not line.startswith("#") else None for line in stripped]


def _object(line: str) -> dict[str, Any]:
    if not line.startswith("{"):
        return {"prompt": line}
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        # A prompt may begin with {a|b}; JSON never has a bar after its first value.
        if '"' not in line:
            return {"prompt": line}
        raise RequestError(f"not JSON: {error}") from None
    assert isinstance(found, dict)
    return found


def _text(source: str) -> str:
    try:
        return sys.stdin.read() if source == "-" else Path(source).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot read {source}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"{source} is not UTF-8 text") from None


def _journal(folder: Path) -> dict[str, list[str]]:
    path = folder / JOURNAL
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(digest): [str(file) for file in files] for digest, files in found.items()}
    except (ValueError, AttributeError, TypeError, OSError):
        raise RequestError(
            f"{path} is not a journal of `reverie batch`; move it away or choose another folder"
        ) from None


def _done(job: Job, journal: dict[str, list[str]]) -> bool:
    files = journal.get(job.digest)
    return files is not None and all(Path(file).exists() for file in files)
