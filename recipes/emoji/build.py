"""Make a folder of sprites from openly licensed emoji sets: one thing, many drawing styles, many names.

    python -m recipes.emoji.build --out data/sprites [--size 128] [--packages DIR]

The drawings and their names come from three packages, fetched by name and version and checked against the hashes in
packages.py. The same packages give the same bytes on every run; a run that was interrupted goes on with the next style.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from recipes.emoji.concepts import (
    Concept,
    Entry,
    bare_names,
    choose_concepts,
    load_words,
    read_entries,
    word_lines,
    words_of,
)
from recipes.emoji.drawing import Pixels, draw_svg_set, draw_webp_set
from recipes.emoji.packages import (
    EMOJIBASE,
    FLUENT_3D,
    ICONIFY,
    PACKAGES,
    BuildError,
    fetch_package,
    read_json_members,
    write_atomically,
)
from recipes.emoji.styles import STYLES, Style, code_key, icons_by_code, name_table

from reverie.train.scenes.colours import COLOURS, Tone, describe
from reverie.train.scenes.sprites import FORMAT, Word

PARTS = "parts"


@dataclass(frozen=True)
class Row:
    """One sprite of the folder."""

    concept: Concept
    style: Style
    pixels: Pixels


# --- drawing, style by style --------------------------------------------------------------------------------


def draw_all(
    out: Path, archives: Mapping[str, Path], entries: Sequence[Entry], keys: Sequence[str], size: int
) -> dict[str, dict[str, Pixels]]:
    """Draw the wanted emoji in all styles: {style: {code points: pixels}}; styles that are there already are read."""
    found = {style.key: read_part(part_path(out, style), keys, size) for style in STYLES}
    drawn = {key: part for key, part in found.items() if part is not None}
    missing = [style for style in STYLES if style.key not in drawn]
    if any(style.package is ICONIFY for style in missing):
        sets = read_sets(archives[ICONIFY.name])
        table = name_table(((entry.label, entry.hexcode) for entry in entries), list(sets.values()))
    for style in missing:
        if style.package is FLUENT_3D:
            part = draw_webp_set(archives[FLUENT_3D.name], keys, size)
        else:
            icon_set = sets[style.set_name]
            part = draw_svg_set(icon_set, icons_by_code(icon_set, table), keys, size)
        write_part(part_path(out, style), part, keys)
        drawn[style.key] = part
    return drawn


def read_sets(archive: Path) -> dict[str, Any]:
    """The Iconify sets of all styles: {set name: set}."""
    print(f"reading {ICONIFY.file_name}", file=sys.stderr)
    names = {style.set_name: f"package/json/{style.set_name}.json" for style in STYLES if style.package is ICONIFY}
    files = read_json_members(archive, list(names.values()))
    return {name: files[path] for name, path in names.items()}


def part_path(out: Path, style: Style) -> Path:
    """Where the drawings of one style wait until all are there."""
    return out / PARTS / f"{style.set_name}.npz"


def write_part(path: Path, part: Mapping[str, Pixels], keys: Sequence[str]) -> None:
    """Keep the drawings of one style, with the list of what was asked for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = [key for key in keys if key in part]
    buffer = io.BytesIO()
    np.savez(buffer, wanted=np.array(keys), shown=np.array(shown), pixels=np.stack([part[key] for key in shown]))
    write_atomically(path, buffer.getvalue())


def read_part(path: Path, keys: Sequence[str], size: int) -> dict[str, Pixels] | None:
    """The drawings of a style, if an earlier run kept them for the same emoji at the same size."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        pixels = file["pixels"]
        if file["wanted"].tolist() != list(keys) or pixels.shape[1] != size:
            return None
        return dict(zip(file["shown"].tolist(), pixels, strict=True))


# --- output -------------------------------------------------------------------------------------------------


def index(rows: Sequence[Row], concepts: Sequence[Concept], size: int) -> dict[str, Any]:
    """The content of index.json; see `reverie.train.scenes.sprites`."""
    tones = [describe(row.pixels, row.style.ink) for row in rows]
    return {
        "format": FORMAT,
        "size": size,
        "styles": [style_record(style) for style in STYLES],
        "concepts": concept_records(rows, concepts, tones),
        "sprites": [asdict(tone) for tone in tones],
        "packages": {f"{package.name}@{package.version}": package.sha256 for package in PACKAGES},
    }


def style_record(style: Style) -> dict[str, Any]:
    """What index.json says of a style."""
    names = {"name": style.key, "set": style.set_name, "licence": style.licence}
    return {**names, "ink": style.ink, "adjective": style.adjective}


def concept_records(rows: Sequence[Row], concepts: Sequence[Concept], tones: Sequence[Tone]) -> list[dict[str, Any]]:
    """What index.json says of things: those that are drawn, the best known first."""
    words, bare = load_words(), bare_names(concepts)
    numbers: dict[str, dict[str, int]] = {}
    for number, row in enumerate(rows):
        numbers.setdefault(row.concept.name, {})[row.style.key] = number
    names = {concept.name: words_of(concept, bare, words) for concept in concepts if concept.name in numbers}
    spoken = frozenset(word.text for found in names.values() for word in found)
    return [
        {
            "name": concept.name,
            "hexcode": concept.hexcode,
            "group": concept.group,
            "words": [asdict(word) for word in names[concept.name]],
            "labels": dict(concept.labels),
            "natural": sorted(
                {colour for number in numbers[concept.name].values() for colour in tones[number].own}
                | said_colours(names[concept.name], spoken)
            ),
            "rows": numbers[concept.name],
        }
        for concept in concepts
        if concept.name in numbers
    ]


def said_colours(names: Sequence[Word], spoken: Collection[str]) -> set[str]:
    """The colours in which something of these names is drawn: apples are red, and green in "green apple"."""
    return {colour for colour in COLOURS for word in names if f"{colour} {word.text}" in spoken}


def attribution(rows: Sequence[Row]) -> str:
    """The text of ATTRIBUTION.md."""
    counts = Counter(row.style.key for row in rows)
    parts = [
        "# Attribution\n",
        "The sprites in this folder are small renderings of the emoji sets below: each drawing was cropped to its "
        "outline and scaled. Pictures composed of them recolour, arrange and repeat the drawings. Names are those of "
        f"emojibase-data {EMOJIBASE.version} (MIT, Miles Johnson), which carries the names of Unicode's CLDR "
        "(Unicode License).\n",
        "| style | set | authors | licence | source | package | SHA-256 of the package | sprites |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for style in STYLES:
        package = style.package
        parts.append(
            f"| {style.key} | {style.set_name} | {style.authors} | {style.licence} | {style.source} | "
            f"{package.name} {package.version} | `{package.sha256}` | {counts[style.key]} |"
        )
    parts.append(f"\nThe SHA-256 of {EMOJIBASE.name} {EMOJIBASE.version} is `{EMOJIBASE.sha256}`.")
    parts.append("\nCC-BY-4.0: creativecommons.org/licenses/by/4.0, changes as described above.\n")
    return "\n".join(parts)


def write_folder(out: Path, rows: Sequence[Row], concepts: Sequence[Concept], lines: Sequence[str], size: int) -> None:
    """Write all files; index.json comes last and so marks a finished folder."""
    buffer = io.BytesIO()
    np.save(buffer, np.stack([row.pixels for row in rows]))
    content = json.dumps(index(rows, concepts, size), ensure_ascii=False, indent=1) + "\n"
    write_atomically(out / "sprites.npy", buffer.getvalue())
    write_atomically(out / "words.txt", ("\n".join(lines) + "\n").encode())
    write_atomically(out / "ATTRIBUTION.md", attribution(rows).encode())
    write_atomically(out / "index.json", content.encode())
    shutil.rmtree(out / PARTS)


def build(out: Path, size: int, packages: Path) -> None:
    """Make the whole folder in `out`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # finds out now, not after minutes of drawing
            pass
        archives = {package.name: fetch_package(package, packages) for package in PACKAGES}
        entries = read_entries(archives[EMOJIBASE.name])
        concepts = choose_concepts(entries, load_words())
        keys = [code_key(concept.hexcode) for concept in concepts]
        sprites = draw_all(out, archives, entries, keys, size)
        rows = [
            Row(concept, style, sprites[style.key][key])
            for concept, key in zip(concepts, keys, strict=True)
            for style in STYLES
            if key in sprites[style.key]
        ]
        write_folder(out, rows, concepts, word_lines(entries), size)
    except OSError as error:
        raise BuildError(f"{error.filename or out}: {error.strerror or error}") from error
    print(f"{out}: {len(rows)} sprites of {len(concepts)} things, {size}x{size}", file=sys.stderr)


def sprite_size(text: str) -> int:
    """Parse --size; the 3D pictures are 256 pixels wide, so nothing larger makes sense."""
    if not text.isdecimal() or not 16 <= int(text) <= 256:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 16 to 256")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make a folder of sprites from open emoji drawings.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the sprites")
    parser.add_argument("--size", type=sprite_size, default=128, help="width and height in pixels (128)")
    parser.add_argument("--packages", type=Path, help="folder of the archives (<out>/packages)")
    options = parser.parse_args(arguments)
    try:
        build(options.out, options.size, options.packages or options.out / "packages")
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
