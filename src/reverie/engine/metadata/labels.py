"""Samplers and spacings by the names that other programs write into pictures."""

from reverie.diffusion.spacing import SPACINGS
from reverie.errors import RequestError
from reverie.sampling.names import a1111_labels, label_options, resolve
from reverie.sampling.registry import load_all

AUTOMATIC = "Automatic"
LONGEST = 100  # characters of a name


def written(sampler: str | None, spacing: str | None) -> tuple[str | None, str]:
    """The labels that AUTOMATIC1111 prints for our names; a name that is not ours stays as it is."""
    known = sampler is not None and sampler in load_all()
    spaced = spacing is not None and spacing in SPACINGS
    # the label of a spacing is the same for every sampler
    label, said = a1111_labels(str(sampler) if known else "euler", spacing if spaced else None)
    return label if known else sampler, said if spaced else spacing or AUTOMATIC


def sampler(text: str) -> tuple[str | None, str | None]:
    """Our sampler and spacing behind a name of another program; None for each that is not known or not said."""
    try:
        return resolve(text) if len(text) <= LONGEST else (None, None)
    except RequestError:
        return None, None


def options(text: str) -> dict[str, float | str]:
    """What a sampler's name says beside the sampler: `uni_pc_bh2` has the variant bh2."""
    return label_options(text) if len(text) <= LONGEST else {}


def spacing(text: str) -> str | None:
    """Our spacing behind a name of another program, None if it is not known."""
    return SPACINGS.name(text) if text in SPACINGS else None
