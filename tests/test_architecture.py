"""The layers of docs/architecture.md: imports point down only, and never in a circle."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"idavlm._compat", "idavlm._auto_classes"},
    {"idavlm.utils"},
    {"idavlm.ops"},
    {"idavlm.modules", "idavlm.data"},
    {"idavlm.models", "idavlm.datasets"},
    {"idavlm.conversion", "idavlm.training", "idavlm.evaluation", "idavlm.inference", "idavlm.experimental"},
    {"idavlm.ablation"},
    {"idavlm.cli"},
]
# Parts of one layer do not import one another.
INDEPENDENT = {part: layer - {part} for layer in LAYERS for part in layer}

FILES = sorted((ROOT / "idavlm").rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Modules of idavlm that ``path`` imports when it is imported (not under TYPE_CHECKING)."""
    found = set()
    nodes = list(ast.parse(path.read_text()).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        nodes += ast.iter_child_nodes(node)
    known = {module_name(file) for file in FILES}
    return {name for name in found if name in known}


def part_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def layer_of(part: str) -> int:
    return next(number for number, parts in enumerate(LAYERS) if part in parts)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path):
    part = part_of(module_name(path))
    if part == "idavlm":
        assert imports(path) <= {"idavlm._auto_classes"}, "the top level is lazy"
        return
    for imported in map(part_of, imports(path)):
        assert imported != "idavlm", f"{path} imports the top level; import from the layer below"
        assert layer_of(imported) <= layer_of(part), f"{path} imports {imported}, a layer above"
        assert imported not in INDEPENDENT[part], f"{path} imports {imported}, its neighbour"


def test_no_cycles():
    """Counting a package's __init__ as importing what it re-exports, and nothing as importing its own package."""
    graph = {}
    for path in FILES:
        name = module_name(path)
        graph[name] = {other for other in imports(path) if other != name and not name.startswith(other + ".")}
    assert tuple(graphlib.TopologicalSorter(graph).static_order())
