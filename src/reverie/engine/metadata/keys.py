"""A table of settings of another program, turned into fields one after another; what is left is noted."""

from collections.abc import Iterable, Mapping
from typing import Any

from reverie.engine.metadata import labels
from reverie.engine.metadata.report import NO_SAMPLER, NO_SETTING, NO_SPACING, Found, Notes, lora, settle, words

NOTHING: tuple[Any, ...] = (None, "", "None", False, 0, [], {})  # settings that change nothing


class Keys:
    """The settings of one picture.

    Attributes:
        fields: what has been read, by the names of `Request`; `model`: name and hash of the model.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.left = dict(settings)
        self.fields: dict[str, Any] = {}
        self.model: dict[str, str] = {}
        self.notes = Notes()

    def take(self, *names: str) -> Any:
        """The value of the first of these keys that is there, None if none is; all of them are then read."""
        values = [self.left.pop(name, None) for name in names]
        return next((value for value in values if value is not None), None)

    def text(self, *names: str) -> str:
        """As `take`, for a text; anything else is none."""
        value = self.take(*names)
        return value if isinstance(value, str) else ""

    def plain(self, table: Mapping[str, str]) -> None:
        """Keys that are a field under another name."""
        for key, name in table.items():
            value = self.take(key)
            if value is not None and value != "":
                self.fields[name] = value

    def refiner(self, model: str, at: str) -> None:
        """A second model under the key `model`, by its name or as an object with one; takes over at the share `at`."""
        found, place = self.take(model), self.take(at)
        name = found.get("name") or found.get("model_name") if isinstance(found, dict) else found
        if isinstance(name, str) and name not in NOTHING:
            self.fields["refine"] = {"model": name} | ({} if place is None else {"at": place})

    def loras(self, said: Iterable[tuple[object, object]]) -> None:
        """LoRAs by the names of their files, each with its strength."""
        found = [made for name, strength in said if (made := lora(name, strength)) is not None]
        if found:
            self.fields["loras"] = found

    def words(self, prompt: str, negative: str) -> None:
        """Both prompts, without the spaces around them."""
        words(self.fields, self.notes, prompt.strip(), negative.strip())

    def sampler(self, key: str, spacing_key: str | None = None) -> None:
        """Sampler, and spacing if it is said apart."""
        name = self.text(key)
        found, fused = labels.sampler(name)
        if name and found is None:
            self.notes.add(key, name, NO_SAMPLER)
        said = self.text(spacing_key) if spacing_key else ""
        spacing = labels.spacing(said) if said else fused
        if said and spacing is None:
            self.notes.add(str(spacing_key), said, NO_SPACING)
        named = {"sampler": found, "spacing": spacing, "sampler_options": labels.options(name)}
        self.fields |= {field: value for field, value in named.items() if value}

    def found(
        self, program: str, text: str, *, why: Mapping[str, str] | None = None, silent: frozenset[str] = frozenset()
    ) -> Found:
        """The request, with a note for every setting that is left and changes something.

        Args:
            program: who made the picture.
            text: the metadata as they stand.
            why: reasons for keys that are known not to be carried.
            silent: keys that say nothing about the picture.
        """
        request = settle(self.fields, self.notes)
        for key, value in self.left.items():
            if key not in silent and value not in NOTHING:
                self.notes.add(key, value, (why or {}).get(key, NO_SETTING))
        return Found(program, request, self.model, self.notes.lines(), text)
