"""The floors of DESIGN: who may import whom, read from the source with `ast`.

An import inside a function counts like one at the top, and one under `if TYPE_CHECKING` not at all: it does not run.
The package's own `__init__` loads its public names by name when they are asked for, so it stands on floor 0.
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import reverie

ROOT = Path(reverie.__file__).parent
FLOORS = (
    {"", "types", "registry", "errors", "places", "collector"},
    {"diffusion", "nets", "text", "checkpoint"},
    {"sampling", "families"},
    {"adapters", "control"},
    {"engine"},
    {"train", "evaluate", "explain"},
    {"apps", "__main__"},
)
FLOOR = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
APART = 1  # the floor whose folders do not know each other
SAMPLING_SEES = {"diffusion"}
ORACLES = {"diffusers", "transformers", "k_diffusion", "peft"}
START = "reverie.apps.cli"  # what `reverie --help` imports
# `Model.generate` is the handle of the function `generate`, which takes a Model.
HANDLES = {("reverie.engine.bundle", "reverie.engine.generate")}


@dataclass(frozen=True)
class Import:
    """One import statement, resolved."""

    importer: str
    target: str
    line: int
    lazy: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def unit(module: str) -> str:
    """The folder or file of the first level that a module belongs to; `""` is the package itself."""
    return [*module.split("."), ""][1]


def module_name(path: Path) -> str:
    parts = ("reverie", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(module: str) -> list[Import]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return [
        Import(module, target, node.lineno, lazy)
        for node, lazy in _walk(tree, lazy=False)
        for target in _targets(node, module)
    ]


def _walk(node: ast.AST, *, lazy: bool) -> Iterator[tuple[ast.stmt, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (pair for other in child.orelse for pair in _walk(other, lazy=lazy))
        else:
            yield from _walk(child, lazy=lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


def _targets(node: ast.stmt, module: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
        for alias in node.names:  # `from reverie.apps import console` names a module
            full = f"{base}.{alias.name}"
            yield full if full in MODULES else base


ALL = [found for module in MODULES for found in imports(module)]
OURS = [found for found in ALL if found.target.split(".")[0] == "reverie"]


def complaint(found: Import) -> str | None:
    """What is wrong with one import, if anything."""
    importer, target = unit(found.importer), unit(found.target)
    if importer == target:
        return None
    if FLOOR[target] > FLOOR[importer]:
        return f"{found}: upwards, from floor {FLOOR[importer]} to {FLOOR[target]}"
    if FLOOR[target] == FLOOR[importer] == APART:
        return f"{found}: a sibling on floor {APART}"
    if importer == "sampling" and FLOOR[target] > 0 and target not in SAMPLING_SEES:
        return f"{found}: samplers see only {', '.join(SAMPLING_SEES)}"
    return None


def circle(edges: Iterable[tuple[str, str]]) -> list[str]:
    """Some circle in the graph, or nothing."""
    graph: dict[str, set[str]] = {}
    for importer, target in edges:
        graph.setdefault(importer, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_the_walk_sees_the_package() -> None:
    assert {"reverie", "reverie.apps.cli", "reverie.engine.bundle", "reverie.diffusion.process"} <= MODULES.keys()
    assert any(found.lazy for found in OURS)
    assert any(not found.lazy for found in OURS)


def test_every_module_has_a_floor() -> None:
    assert {unit(module) for module in MODULES} <= FLOOR.keys()


def test_nothing_imports_upwards_or_sideways() -> None:
    assert [text for found in OURS if (text := complaint(found))] == []


@pytest.mark.parametrize(
    ("importer", "target"),
    [
        ("reverie.errors", "reverie.nets.unet"),
        ("reverie.nets.unet", "reverie.text.tokenizer"),
        ("reverie.diffusion.process", "reverie.checkpoint"),
        ("reverie.sampling.steps", "reverie.nets.unet"),
        ("reverie.sampling.steps", "reverie.families.base"),
        ("reverie.families.base", "reverie.engine.request"),
        ("reverie.engine.generate", "reverie.train.loop"),
        ("reverie.train.loop", "reverie.apps.console"),
    ],
)
def test_the_rule_refuses(importer: str, target: str) -> None:
    assert complaint(Import(importer, target, 1, lazy=True))


def test_modules_import_in_no_circle() -> None:
    edges = {(found.importer, found.target) for found in OURS if found.importer != found.target}
    # A package's `__init__` with nothing but a docstring is no knot.
    assert circle(edges - HANDLES) == []
    assert circle(edges) != [], "the exception is no longer needed: remove it"


def test_folders_import_in_no_circle() -> None:
    edges = {(unit(found.importer), unit(found.target)) for found in OURS if unit(found.importer)}
    assert circle((a, b) for a, b in edges if a != b) == []


def test_circles_are_found() -> None:
    assert circle([("a", "b"), ("b", "c"), ("c", "a")])
    assert not circle([("a", "b"), ("b", "c"), ("a", "c")])


def test_the_oracles_of_the_tests_are_not_imported() -> None:
    assert [str(found) for found in ALL if found.target.split(".")[0] in ORACLES] == []


def at_start(module: str) -> set[str]:
    """Every module that importing `module` runs."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in MODULES and name not in seen:
            seen.add(name)
            todo += [".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 1)]
            todo += [found.target for found in imports(name) if not found.lazy]
    return seen


def test_help_needs_no_torch() -> None:
    heavy = {"torch", "numpy", "PIL", "safetensors", "tokenizers"}
    needed = at_start(START)
    assert {"reverie", START, "reverie.engine.request"} <= needed
    assert [str(f) for m in sorted(needed) for f in imports(m) if not f.lazy and f.target.split(".")[0] in heavy] == []
