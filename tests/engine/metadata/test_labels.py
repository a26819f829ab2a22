"""Names of samplers and spacings."""

import pytest

from reverie.diffusion.spacing import SPACINGS
from reverie.engine.metadata import labels
from reverie.sampling.registry import load_all


@pytest.mark.parametrize(
    ("names", "written"),
    [
        (("dpmpp_2m", "karras"), ("DPM++ 2M", "Karras")), (("euler_a", None), ("Euler a", "Automatic")),
        ((None, "karras"), (None, "Karras")), ((None, None), (None, "Automatic")),
        (("magic", "odd"), ("magic", "odd")), (("euler", "odd"), ("Euler", "odd")),
    ],
)  # fmt: skip
def test_what_is_written(names: tuple[str | None, str | None], written: tuple[str | None, str]) -> None:
    assert labels.written(*names) == written


@pytest.mark.parametrize("name", sorted(load_all()))
def test_a_sampler_is_known_by_its_label(name: str) -> None:
    assert labels.sampler(labels.written(name, None)[0] or "") == (name, None)


@pytest.mark.parametrize("text", ["", "Undefined", "x" * 100_000, "nai_smea", "\ud800"])
def test_names_of_nothing(text: str) -> None:
    assert labels.sampler(text) == (None, None)
    assert labels.spacing(text) is None


def test_what_a_name_says_beside_the_sampler() -> None:
    assert labels.options("uni_pc_bh2") == {"variant": "bh2"}
    assert labels.options("euler") == labels.options("x" * 100_000) == {}


def test_spacings() -> None:
    assert labels.spacing("SGM Uniform") == "sgm_uniform"
    assert all(labels.spacing(name) == name for name in SPACINGS)
