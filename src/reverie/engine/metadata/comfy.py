"""A picture of ComfyUI as a request: what its graph ran, walked backwards from the picture that was saved."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from reverie.engine.metadata import labels
from reverie.engine.metadata.comfy_graph import PICTURE, Graph, Node
from reverie.engine.metadata.report import (
    ADAPTER,
    NO_IMAGE,
    NO_MASK,
    NO_SAMPLER,
    NO_SPACING,
    Found,
    Notes,
    lora,
    parse_object,
    settle,
    words,
)
from reverie.errors import RequestError

PROGRAM = "ComfyUI"
OUTPUTS = ("SaveImage", "PreviewImage")
SCALERS = {"LatentUpscale", "LatentUpscaleBy", "ImageScale", "ImageScaleBy", "ImageUpscaleWithModel"}
METHODS = {  # upscale_method of latents -> ours
    "nearest-exact": "latent_nearest_exact", "bilinear": "latent", "bicubic": "latent_bicubic",
}  # fmt: skip
SAMPLER_NODES = {  # nodes that are a sampler of their own -> ComfyUI's name for it
    "SamplerEulerAncestral": "euler_ancestral", "SamplerDPMPP_2S_Ancestral": "dpmpp_2s_ancestral",
    "SamplerDPMPP_2M_SDE": "dpmpp_2m_sde", "SamplerDPMPP_3M_SDE": "dpmpp_3m_sde", "SamplerDPMPP_SDE": "dpmpp_sde",
    "SamplerLMS": "lms", "SamplerER_SDE": "er_sde", "SamplerSASolver": "sa_solver",
}  # fmt: skip
SIGMA_NODES = {  # nodes that are a spacing of their own -> ComfyUI's name for it
    "KarrasScheduler": "karras", "ExponentialScheduler": "exponential", "PolyexponentialScheduler": "polyexponential",
    "SDTurboScheduler": "turbo", "AlignYourStepsScheduler": "align_your_steps", "BetaSamplingScheduler": "beta",
    "LaplaceScheduler": "laplace", "VPScheduler": "vp",
}  # fmt: skip
SPACING_OPTIONS = ("rho", "sigma_min", "sigma_max", "alpha", "beta")
CHECKPOINTS = ("ckpt_name", "unet_name", "model_name")
NAMED_SCALE = re.compile(r"(?:^|[^0-9])([2348])x|x([2348])(?:[^0-9]|$)", re.IGNORECASE)
MOST_PASSES, MOST_OUTPUTS = 8, 10
LONGEST = 100  # nodes between a sampler and its words or its checkpoint
SECOND = ("steps", "sampler", "spacing", "guidance_scale", "prompt", "negative_prompt")


@dataclass
class Pass:
    """One run of a sampler.

    Attributes:
        node: the sampler.
        before: what its latent went through since the run before, in order.
        fields: what it says, by the names of `Request`; `strength` is how much it draws over.
        goes_on: whether it goes on from the noise that the run before left (a refiner).
        checkpoint: name of its model.
    """

    node: Node
    before: list[Node]
    fields: dict[str, Any] = field(default_factory=dict)
    goes_on: bool = False
    checkpoint: str = ""


def read(text: str, parsed: Mapping[str, Any] | None = None) -> Found:
    """What the graph says.

    Args:
        text: its JSON.
        parsed: the object that the JSON is, where it is known already.

    Raises:
        RequestError: not such a graph, or none of its nodes is a sampler.
    """
    graph = Graph.of(parse_object(text, "ComfyUI's prompt") if parsed is None else parsed)
    notes = Notes()
    reading = _Reading(graph, notes)
    passes, after = reading.passes()
    fields = reading.first(passes[0])
    refiner = passes.pop() if len(passes) > 1 and refines(passes[-1], passes[-2]) else None
    if refiner is not None:
        fields["refine"] = {"model": refiner.checkpoint, "at": round(1 - refiner.fields["strength"], 6)}
    goes_on, later = [p for p in passes[1:] if p.goes_on], [p for p in passes[1:] if not p.goes_on]
    if later:
        fields["hires"] = reading.second(later[0], fields)
    for one in (*goes_on, *later[1:]):
        notes.add(
            f"{one.node.kind} {one.node.number}", one.node.literals(), "only a first pass and a hires fix are drawn"
        )
    for node in after:
        if node.kind in SCALERS:
            notes.add(f"{node.kind} {node.number}", node.literals(), "what is done to the finished picture is not read")
    return Found(PROGRAM, settle(fields, notes), reading.model, notes.lines(), text)


def refines(one: Pass, before: Pass) -> bool:
    """Whether a run goes on with another model where the run before has left off, and is otherwise like it."""
    alike = all(one.fields.get(name) == before.fields.get(name) for name in ("steps", "sampler", "spacing"))
    return one.goes_on and one.checkpoint not in {"", before.checkpoint} and alike and 0 < one.fields["strength"] < 1


class _Reading:
    """Turns nodes into fields; keeps the model's name and the notes on the way."""

    def __init__(self, graph: Graph, notes: Notes) -> None:
        self.graph, self.notes = graph, notes
        self.model: dict[str, str] = {}

    def note(self, node: Node, why: str) -> None:
        """A node that could not be carried, with its settings."""
        self.notes.add(f"{node.kind} {node.number}", node.literals(), why)

    def passes(self) -> tuple[list[Pass], list[Node]]:
        """The runs of samplers in order, and what came after the last."""
        chain = self.chain()
        found: list[Pass] = []
        since: list[Node] = []
        for node in reversed(chain):
            if node.is_sampler():
                found.append(Pass(node, since))
                since = []
            else:
                since.append(node)
        if len(found) > MOST_PASSES:
            self.notes.add("samplers", len(found), f"only the first {MOST_PASSES} are read")
        for one in found[:MOST_PASSES]:
            self.sampling(one)
        return found[:MOST_PASSES], since

    def chain(self) -> list[Node]:
        """From the saved picture back to the empty latent or the loaded picture."""
        chains = [list(self.graph.walk(node, *PICTURE)) for node in self.outputs()[:MOST_OUTPUTS]]
        drawn = [chain for chain in chains if any(node.is_sampler() for node in chain)]
        if not drawn:
            kinds = ", ".join(sorted({node.kind for node in self.graph.nodes.values()}))
            raise RequestError(f"ComfyUI's graph has no sampler that is known; its nodes are {kinds[:200]}")
        last = {next(node.number for node in chain if node.is_sampler()) for chain in drawn}
        if len(last) > 1:
            numbers = ", ".join(chain[0].number for chain in drawn)
            self.notes.add("SaveImage", numbers, "the graph saves several pictures; the first is read")
        return drawn[0]

    def outputs(self) -> list[Node]:
        """Nodes that save pictures; where there are none that are known, samplers."""
        nodes = self.graph.nodes.values()
        for kind in OUTPUTS:
            if found := [node for node in nodes if node.kind == kind]:
                return found
        saving = [node for node in nodes if "save" in node.kind.lower() and self.graph.linked(node, "images", "image")]
        return saving or [node for node in nodes if node.is_sampler()][-1:]

    def sampling(self, one: Pass) -> None:
        """Fill the fields of one run."""
        graph, node = self.graph, one.node
        guider, random = graph.linked(node, "guider") or node, graph.linked(node, "noise") or node
        *made_by_hand, sigmas = [node, *graph.walk(graph.linked(node, "sigmas"), "sigmas")]
        for other in made_by_hand[1:]:
            self.note(other, "sigmas made by hand are not read")
        found = {
            "seed": graph.literal(random, "seed", "noise_seed"), "steps": graph.literal(sigmas, "steps"),
            "guidance_scale": graph.literal(guider, "cfg"), **self.sampler(graph.linked(node, "sampler") or node),
            **self.spacing(sigmas), **self.prompts(guider),
            "strength": self.advanced(one) if node.kind == "KSamplerAdvanced" else graph.literal(sigmas, "denoise"),
        }  # fmt: skip
        self.network(graph.linked(guider, "model", "model1"), found)
        one.checkpoint = found.pop("checkpoint", "")
        one.fields = {name: value for name, value in found.items() if value is not None}

    def advanced(self, one: Pass) -> float:
        """A sampler that begins and ends in the middle: how much it draws over."""
        literal, node = self.graph.literal, one.node
        steps, start, end = (literal(node, name) for name in ("steps", "start_at_step", "end_at_step"))
        one.goes_on = literal(node, "add_noise") == "disable"
        if not isinstance(steps, int) or not isinstance(start, int) or not 0 <= start <= steps or not steps:
            return 1.0
        if isinstance(end, int) and end < steps and literal(node, "return_with_leftover_noise") != "enable":
            self.notes.add(f"{node.kind} {node.number}", f"end_at_step {end}", "a run that ends early is not drawn so")
        return (steps - start) / steps

    def sampler(self, node: Node) -> dict[str, Any]:
        """The sampler's name and options."""
        name = SAMPLER_NODES.get(node.kind) or self.graph.literal(node, "sampler_name")
        found, spacing = labels.sampler(str(name))
        if found is None:
            self.notes.add(f"{node.kind} {node.number}", name, NO_SAMPLER)
        eta = node.inputs.get("eta") if node.kind in SAMPLER_NODES else None
        noise = node.inputs.get("s_noise") if node.kind in SAMPLER_NODES else None
        options: dict[str, Any] = dict(labels.options(str(name)))
        options |= {"s_noise": noise} if isinstance(noise, int | float) and noise != 1 else {}
        return {"sampler": found, "spacing": spacing, "eta": eta, "sampler_options": options or None}

    def spacing(self, node: Node) -> dict[str, Any]:
        """The spacing's name and options."""
        name = SIGMA_NODES.get(node.kind) or self.graph.literal(node, "scheduler")
        found = labels.spacing(str(name))
        if found is None:
            self.notes.add(f"{node.kind} {node.number}", name, NO_SPACING)
            return {}
        options = {key: node.inputs[key] for key in SPACING_OPTIONS if node.kind in SIGMA_NODES and key in node.inputs}
        return {"spacing": found, "spacing_options": options or None}

    def prompts(self, guider: Node) -> dict[str, Any]:
        """Both prompts, and the clip skip of the first."""
        found: dict[str, Any] = {}
        for side, name in (("positive", "prompt"), ("negative", "negative_prompt")):
            start = self.graph.linked(guider, side, *(["conditioning"] if side == "positive" else []))
            found[name] = self.text(start, side, found)
        return found

    def text(self, start: Node | None, side: str, found: dict[str, Any]) -> str | None:
        """The text behind a conditioning; what changes it on the way is noted."""
        names = (side, "conditioning", "conditioning_to", "conditioning_1")
        for node in islice(self.graph.walk(start, *names), LONGEST):
            if node.kind == "ConditioningZeroOut":
                self.note(node, "a conditioning of zeros is not the empty prompt, which is drawn with")
                return ""
            own = (
                value for name in (side, f"{side}_prompt", "prompt") if isinstance(value := node.inputs.get(name), str)
            )
            text = self.graph.literal(node, "text", "text_g") or next(own, None)
            if isinstance(text, str):
                self.clip(self.graph.linked(node, "clip"), found)
                other = self.graph.literal(node, "text_l")
                if other not in {None, text}:
                    self.notes.add(f"{node.kind} {node.number}", other, "one prompt goes to both text encoders")
                return text
            if node.kind != "Reroute":
                self.note(node, "conditionings are not combined or controlled")
        return None

    def clip(self, start: Node | None, found: dict[str, Any]) -> None:
        """How many layers of the text encoder are left out."""
        for node in islice(self.graph.walk(start, "clip"), LONGEST):
            layer = node.inputs.get("stop_at_clip_layer", node.inputs.get("clip_skip"))
            if isinstance(layer, int) and layer < 0:
                found["clip_skip"] = -layer
                return

    def network(self, start: Node | None, found: dict[str, Any]) -> None:
        """The checkpoint; what changes it is noted, and a rescaled guidance is a field."""
        for node in islice(self.graph.walk(start, "model"), LONGEST):
            name = self.graph.literal(node, *CHECKPOINTS)
            if isinstance(name, str):
                self.model.setdefault("name", name)
                found["checkpoint"] = name
                return
            if node.kind == "RescaleCFG":
                found["guidance_rescale"] = self.graph.literal(node, "multiplier")
            elif loras := self.loras(node):
                found["loras"] = [*loras, *found.get("loras", [])]
            elif node.kind != "Reroute":
                adapter = "lora" in node.kind.lower()
                self.note(node, ADAPTER if adapter else "changes of the model are not read")

    def loras(self, node: Node) -> list[dict[str, Any]]:
        """What a node loads: ComfyUI's own, one each, or rgthree's, an object each that is on or off."""
        literal = self.graph.literal
        several = (value for value in node.inputs.values() if isinstance(value, dict) and value.get("on") is True)
        found = [lora(one.get("lora"), one.get("strength", 1.0), one.get("strengthTwo")) for one in several]
        if "lora_name" in node.inputs:
            strength = literal(node, "strength_model")
            text = 0.0 if node.kind == "LoraLoaderModelOnly" else literal(node, "strength_clip")
            found.append(lora(literal(node, "lora_name"), 1.0 if strength is None else strength, text))
        return [one for one in found if one is not None]

    def first(self, one: Pass) -> dict[str, Any]:
        """The fields of a request that the first run decides."""
        fields = {"preset": "comfy", "dialect": "comfy"} | one.fields
        words(fields, self.notes, fields.get("prompt", ""), fields.get("negative_prompt", ""))
        if "prompt" not in one.fields:
            self.note(one.node, "its prompt comes from nodes that are not known")
        strength = fields.pop("strength", None)
        for node in one.before:
            self.origin(node, fields)
        if "width" not in fields:
            fields |= {} if strength is None else {"strength": strength}
        elif strength not in {None, 1}:
            self.notes.add("denoise", strength, "on an empty latent it would leave noise out; 1 is drawn")
        return fields

    def origin(self, node: Node, fields: dict[str, Any]) -> None:
        """What the first run began with."""
        literal = self.graph.literal
        width, height = (literal(node, name, f"empty_latent_{name}") for name in ("width", "height"))
        if "mask" in node.inputs:
            self.note(node, NO_MASK)
        if "LoadImage" in node.kind:
            self.note(node, NO_IMAGE)
        elif not self.graph.linked(node, *PICTURE) and isinstance(width, int) and isinstance(height, int):
            fields |= {"width": width, "height": height}
            count = literal(node, "batch_size")
            if isinstance(count, int) and count > 1:
                fields |= {"count": count, "only": 0}
                self.notes.add("batch_size", count, "which of the batch it is cannot be told; the first is drawn")
        elif node.kind in SCALERS:
            self.note(node, "the picture to start from is not scaled so")

    def second(self, one: Pass, first: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of `Hires` that a second run decides: what it does otherwise, and how its latent was enlarged."""
        found = {name: one.fields[name] for name in SECOND if one.fields.get(name) not in {None, first.get(name)}}
        if "strength" in one.fields:
            found["strength"] = one.fields["strength"]
        if one.fields.get("loras") != first.get("loras"):
            names = [each["path"] for each in one.fields.get("loras", [])]
            self.notes.add(f"{one.node.kind} {one.node.number}", names, "the hires fix has the first pass's LoRAs")
        if one.fields.get("seed") not in {None, first.get("seed")}:
            self.notes.add(f"{one.node.kind} {one.node.number}", one.fields["seed"], "the hires fix has the first seed")
        scale = 1.0
        for node in one.before:
            if node.kind in SCALERS:
                scale *= self.enlarged(node, found)
        if "width" not in found and "height" not in found:
            found["scale"] = scale
        return found

    def enlarged(self, node: Node, found: dict[str, Any]) -> float:
        """One enlargement between two runs: its factor, 1 where it goes to a size."""
        literal = self.graph.literal
        if node.kind == "ImageUpscaleWithModel":
            name = str(literal(self.graph.linked(node, "upscale_model"), "model_name"))
            self.notes.add(f"{node.kind} {node.number}", name, "give the upscaler's file with --hires-upscaler")
            said = NAMED_SCALE.search(name[:200])
            return float(said[1] or said[2]) if said else 4.0
        method = str(literal(node, "upscale_method"))
        ours = METHODS.get(method) if "Latent" in node.kind else "lanczos"
        found["upscaler"] = ours or "latent"
        if ours is None or (ours == "lanczos" != method):
            self.notes.add(f"{node.kind} {node.number}", method, f"enlarged by {found['upscaler']} instead")
        factor = literal(node, "scale_by")
        if isinstance(factor, int | float):
            return float(factor)
        found |= {side: size for side in ("width", "height") if (size := literal(node, side))}
        return 1.0
