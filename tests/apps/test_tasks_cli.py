"""The commands beside `generate`: batch, grid, upscale, tokens, guides, read; previews and events."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reverie.apps.terminal import COLUMNS, encoded, protocol
from tests.apps.commandline import CommandLine


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    return path


def test_image_mask_and_groups_are_flags(cli: CommandLine, folder: Path, photo: Path, tmp_path: Path) -> None:
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (16, 0, 32, 32))
    mask.save(tmp_path / "mask.png")
    out = tmp_path / "out.png"
    ran = cli("generate", "apple", "--model", folder, "--image", photo, "--mask", tmp_path / "mask.png", "--steps", 2,
              "--seed", 1, "--out", out)  # fmt: skip
    assert ran.code == 0, ran.err
    with Image.open(out) as drawn, Image.open(photo) as given:
        assert np.array_equal(np.asarray(drawn)[:, :16], np.asarray(given)[:, :16])
    ran = cli("generate", "apple", "--model", folder, "--hires-scale", 2, "--hires-strength", 0.5, "--steps", 2,
              "--guides", "rescale:share=0.5", "--sampler", "DPM++ 2M Karras", "--out", out)  # fmt: skip
    assert ran.code == 0, ran.err
    assert size(out) == (64, 64)


def test_a_picture_with_groups_is_drawn_again(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "a.png", tmp_path / "b.png"
    words = ["--model", folder, "--hires-scale", 1.5, "--steps", 2, "--guides", "apg:eta=0.5", "--seed", 3]
    assert cli("generate", "a {red|green} (apple:1.2)", *words, "--out", first).code == 0
    assert cli("generate", "--from", first, "--out", again).code == 0
    with Image.open(first) as one, Image.open(again) as other:
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_events_tell_programs_what_happens(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    ran = cli("generate", "apple", "--model", folder, "--steps", 3, "--count", 2, "--json", "--out", tmp_path / "out")
    events = [json.loads(line) for line in ran.out.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[-1] == "done" and kinds.count("picture") == 2
    steps = [event for event in events if event["event"] == "step"]
    assert [s["done"] for s in steps] == list(range(1, len(steps) + 1))
    assert all(s["total"] == len(steps) for s in steps)
    assert [Path(event["file"]) for event in events if event["event"] == "picture"] == [
        Path(file) for file in events[-1]["files"]
    ]
    assert events[-1]["request"]["prompt"] == "apple"


def test_previews_go_to_a_file(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    preview = tmp_path / "preview.png"
    ran = cli("generate", "apple", "--model", folder, "--steps", 3, "--preview", 1, "--preview-out", preview,
              "--out", tmp_path / "apple.png")  # fmt: skip
    assert ran.code == 0, ran.err
    assert size(preview)[0] >= 192


def test_a_journey_is_one_moving_picture(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "journey.webp"
    words = ["--travel-frames", 3, "--travel-prompt", "a pear", "--travel-seed", 9, "--steps", 2, "--seed", 1]
    assert cli("generate", "apple", "--model", folder, *words, "--out", out).code == 0
    with Image.open(out) as film:
        assert getattr(film, "n_frames", 1) == 4  # there and back again


class TestBatch:
    def lines(self, tmp_path: Path, *lines: str) -> Path:
        path = tmp_path / "batch.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    def test_lines_are_prompts_or_requests(self, cli: CommandLine, folder: Path, tmp_path: Path) -> None:
        source = self.lines(
            tmp_path, "# two pictures", "an apple", '{"prompt": "a pear", "seed": 4, "out": "pear.png"}'
        )
        out = tmp_path / "out"
        words = ["--model", folder, "--steps", 2, "--seed", 1, "--out", out]
        assert cli("batch", source, *words).code == 0
        assert {p.name for p in out.iterdir()} == {"00002.png", "pear.png", "batch.json"}

    def test_it_goes_on_where_it_stopped(self, cli: CommandLine, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        words = ["--model", folder, "--steps", 2, "--seed", 1, "--out", out]
        assert cli("batch", self.lines(tmp_path, "an apple"), *words).code == 0
        stamp = (out / "00001.png").stat().st_mtime_ns
        ran = cli("batch", self.lines(tmp_path, "an apple", "a pear"), *words)
        assert "1 of 2 lines are drawn already" in ran.err
        assert (out / "00001.png").stat().st_mtime_ns == stamp
        (out / "00001.png").unlink()
        assert "1 of 2" in cli("batch", self.lines(tmp_path, "an apple", "a pear"), *words).err
        assert (out / "00001.png").exists()

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ('{"prompt": "x", "stepz": 3}', "line 2: unknown field 'stepz'; did you mean steps?"),
            ('{"prompt": "x", "steps": 0}', "line 2: steps is 0"),
            ('{"prompt": "x"', "line 2: not JSON"),
            ('{"steps": 3}', "line 2: there is no prompt"),
            ('{"prompt": "x", "out": 3}', "line 2: out is 3"),
        ],
    )
    def test_a_wrong_line_is_known_before_anything_is_drawn(
        self, cli: CommandLine, folder: Path, tmp_path: Path, line: str, said: str
    ) -> None:
        out = tmp_path / "out"
        error = cli.refused("batch", self.lines(tmp_path, "an apple", line), "--model", folder, "--out", out)
        assert said in error
        assert not out.exists()

    def test_an_empty_batch_is_refused(self, cli: CommandLine, folder: Path, tmp_path: Path) -> None:
        assert "the batch is empty" in cli.refused("batch", self.lines(tmp_path, "", "# no"), "--model", folder)


class TestGrid:
    def test_a_sheet_of_every_combination(self, cli: CommandLine, folder: Path, tmp_path: Path) -> None:
        out, keep = tmp_path / "sheet.png", tmp_path / "cells"
        words = ["--axis", "steps=1,2,3", "--axis", "sampler=euler,DDIM", "--keep", keep, "--out", out]
        ran = cli("grid", "apple", "--model", folder, "--width", 32, "--height", 32, *words)
        assert ran.code == 0, ran.err
        assert "6 pictures" in ran.out
        assert len(list(keep.iterdir())) == 6
        width, height = size(out)
        assert width > 3 * 32 and height > 2 * 32

    @pytest.mark.parametrize(
        ("axes", "said"),
        [
            (["stepz=1,2"], "did you mean steps?"),
            (["steps"], "expected field=value"),
            (["steps=0,1"], "steps is '0'"),
            (["steps=9..1"], "range '9..1'"),
            (["steps=1", "steps=2"], "a field can be one axis only"),
            (["seed=1..99", "steps=1..99"], "at most 1000"),
            (["prompt_sr=pear,plum"], "is not in the prompt"),
            (["sampler=euler,oiler"], "oiler"),
            ([], "1 to 3 axes"),
        ],
    )
    def test_wrong_axes_are_refused(
        self, cli: CommandLine, folder: Path, tmp_path: Path, axes: list[str], said: str
    ) -> None:
        words = [word for axis in axes for word in ("--axis", axis)]
        assert said in cli.refused("grid", "apple", "--model", folder, *words, "--out", tmp_path / "s.png")

    def test_search_and_replace(self, cli: CommandLine, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "sheet.png"
        ran = cli("grid", "an apple", "--model", folder, "--axis", "prompt_sr=apple,pear", "--steps", 1, "--out", out)
        assert "2 pictures" in ran.out


def test_upscale_with_the_network_in_the_package(cli: CommandLine, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "large.png"
    assert cli("upscale", photo, "--out", out).code == 0
    assert size(out) == (128, 128)
    assert cli("upscale", photo, "--out", out, "--scale", 2.5).code == 0
    assert size(out) == (80, 80)


def test_upscale_refuses_what_it_cannot(cli: CommandLine, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "large.png"
    assert "no upscaler 'nope'" in cli.refused("upscale", photo, "--out", out, "--upscaler", "nope")
    assert "scale is 99" in cli.refused("upscale", photo, "--out", out, "--scale", 99)
    assert "is not there" in cli.refused("upscale", tmp_path / "none.png", "--out", out)


def test_tokens_are_counted_with_chunk_boundaries(cli: CommandLine) -> None:
    ran = cli("tokens", "a (red:1.3) apple, " * 20)
    assert ran.code == 0
    assert "chunks of 75" in ran.out
    found = json.loads(cli("tokens", "a red apple", "--json").out)
    assert (found["tokens"], found["chunks"], found["until_next"]) == (3, 1, 72)


def test_tokens_of_the_bundled_model_are_its_own(cli: CommandLine) -> None:
    import reverie.engine.bundle as bundle

    assert "of 30" in cli("tokens", "a red apple", "--model", bundle.bundled_path()).out


def test_guides_are_listed(cli: CommandLine) -> None:
    names = {row["name"] for row in json.loads(cli("guides", "--json").out)}
    assert {"pag", "sag", "apg", "freeu", "rescale", "perp_neg"} <= names
    assert "Ahn et al. 2024" in cli("guides").out


def test_read_says_what_made_a_picture(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "apple.png"
    assert cli("generate", "an apple", "--model", folder, "--seed", 7, "--steps", 2, "--out", out).code == 0
    assert "an apple" in cli("read", out).out
    assert json.loads(cli("read", out, "--as", "json").out)["seed"] == 7
    assert cli("read", out, "--as", "cli").out.startswith("reverie generate")
    assert "Steps: 2" in cli("read", out, "--as", "a1111").out


def test_pictures_without_metadata(cli: CommandLine, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "apple.png"
    assert cli("generate", "an apple", "--model", folder, "--steps", 1, "--no-metadata", "--out", out).code == 0
    with Image.open(out) as image:
        assert "parameters" not in image.info and "reverie" not in image.info


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color"}, "blocks"),
    ],
)
def test_terminals_say_what_they_can(environment: dict[str, str], found: str) -> None:
    assert protocol(environment) == found


def test_pictures_in_a_terminal() -> None:
    image = Image.new("RGB", (64, 64), "red")
    blocks = encoded(image, "blocks")
    assert blocks.count("▀") == COLUMNS * (COLUMNS // 2)
    assert "38;2;255;0;0;48;2;255;0;0" in blocks
    assert encoded(image, "kitty").startswith("\x1b_Ga=T,f=100,")
    assert encoded(image, "iterm2").startswith("\x1b]1337;File=inline=1;")
