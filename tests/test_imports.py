# yolo-sos, AGPL-3.0
"""Imports point one way, and what is light stays light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "yolo_sos"
TOOLS = ROOT / "tools"


@cache
def modules() -> dict[str, Path]:
    """Return every module of the package by name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


class WithoutTypes(ast.NodeTransformer):
    """Drops what only type checkers read."""

    def visit_If(self, node: ast.If):
        test = node.test.id if isinstance(node.test, ast.Name) else None
        return node.orelse if test == "TYPE_CHECKING" else self.generic_visit(node)


@cache
def imports(module: str, types: bool = True) -> frozenset[str]:
    """Return what a module names in its imports, within functions too, and for type checkers if ``types``.

    Of ``from a import b`` that is ``a.b`` if it is a module of ours, else ``a``.
    """
    found = set()
    for node in ast.walk(tree(module) if types else WithoutTypes().visit(tree(module))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import hides where it points"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules() else str(node.module))
    return frozenset(found)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def of(package: str) -> list[str]:
    return [module for module in modules() if within(module, package)]


def ours(module: str, types: bool = True) -> list[str]:
    return [name for name in imports(module, types) if within(name, "yolo_sos")]


def others(module: str) -> set[str]:
    """Return the top-level names of imported packages that are neither ours nor Python's own."""
    names = {name.split(".")[0] for name in imports(module)} - {"yolo_sos"}
    return {name for name in names if name not in sys.stdlib_module_names}


def test_the_parser_sees_imports_of_every_form():
    assert len(modules()) > 20
    assert "yolo_sos.core" in imports("yolo_sos.config", types=False)  # in a function
    sharpness = "yolo_sos.train.sharpness"
    assert "ultralytics.engine.trainer" in imports(sharpness) - imports(sharpness, types=False)
    assert "yolo_sos.core.capture" in imports("yolo_sos.core.shift")
    assert "ultralytics" in others("yolo_sos.heads")
    assert "yolo_sos.train" in imports("yolo_sos.cli")


def test_the_core_knows_torch_alone():
    for module in of("yolo_sos.core"):
        assert others(module) <= {"torch"}, module
        assert all(within(name, "yolo_sos.core") for name in ours(module)), module


def test_evaluation_takes_arrays():
    allowed = ("yolo_sos.evaluate", "yolo_sos.data.voc", "yolo_sos.files", "yolo_sos.markdown")
    command = ("yolo_sos.evaluate.command", "yolo_sos.evaluate.detections")  # on top of the metrics
    for module in [m for m in of("yolo_sos.evaluate") if m not in command]:
        assert not others(module) & {"ultralytics", "torch", "torchvision"}, module
        assert all(within(name, *allowed) for name in ours(module)), module


@pytest.mark.parametrize("module", ["yolo_sos", "yolo_sos.config", "yolo_sos.files", "yolo_sos.markdown"])
def test_what_everyone_reads_knows_neither_torch_nor_the_host(module):
    assert others(module) <= {"yaml"}
    assert others(module).isdisjoint({"torch", "ultralytics"})


def test_the_host_is_known_where_it_must_be():
    allowed = (
        *("yolo_sos.heads", "yolo_sos.train", "yolo_sos.checkpoint", "yolo_sos.data", "yolo_sos.experiment"),
        *("yolo_sos.analyze", "yolo_sos.arguments", "yolo_sos.memory", "yolo_sos.cli"),
        "yolo_sos.evaluate.detections",
    )
    knowing = [module for module in modules() if "ultralytics" in others(module)]
    assert [module for module in knowing if not within(module, *allowed)] == []


def test_nobody_but_the_tools_knows_the_command():
    for module in modules():
        if module != "yolo_sos.cli":
            assert not [name for name in imports(module) if within(name, "yolo_sos.cli", "tools")], module


def test_lower_layers_do_not_know_higher_ones():
    higher = {
        "yolo_sos.config": ["yolo_sos.heads", "yolo_sos.train", "yolo_sos.checkpoint"],
        "yolo_sos.heads": ["yolo_sos.config", "yolo_sos.train", "yolo_sos.checkpoint", "yolo_sos.data"],
        "yolo_sos.train": ["yolo_sos.checkpoint", "yolo_sos.evaluate", "yolo_sos.experiment"],
        "yolo_sos.analyze": ["yolo_sos.train", "yolo_sos.data", "yolo_sos.evaluate", "yolo_sos.experiment"],
        "yolo_sos.data": ["yolo_sos.core", "yolo_sos.heads", "yolo_sos.train", "yolo_sos.checkpoint"],
        "yolo_sos.files": ["yolo_sos"],
    }
    for package, forbidden in higher.items():
        for module in of(package):
            assert not [name for name in ours(module) if within(name, *forbidden)], module


def test_no_module_imports_itself_on_a_detour():
    # The package itself names its modules as text; every import of one of them runs it first.
    graph = {module: set(ours(module, types=False)) - {"yolo_sos"} for module in modules()}
    assert imports("yolo_sos") <= {"importlib"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(f"import cycle: {' -> '.join(e.args[1])}")


def loaded_by(code: str) -> set[str]:
    """Return the heavy packages that a fresh interpreter has loaded after running some code."""
    heavy = ["torch", "torchvision", "ultralytics", "numpy", "cv2", "matplotlib", "sklearn", "scipy", "pycocotools"]
    code += f"; import sys, json; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(json.loads(out.stdout.splitlines()[-1]))


def test_the_package_loads_nothing_heavy():
    import yolo_sos

    code = (
        "import yolo_sos, yolo_sos.files, yolo_sos.cli; from yolo_sos.config import SOSConfig; SOSConfig.from_dict({})"
    )
    assert loaded_by(code) == set()
    assert loaded_by("import yolo_sos; dir(yolo_sos), yolo_sos.__version__") == set()
    assert set(dir(yolo_sos)) == set(yolo_sos.__all__)


def test_the_core_loads_no_host():
    loaded = loaded_by("import yolo_sos.core; from yolo_sos import shift_layers")
    assert "torch" in loaded and not loaded & {"ultralytics", "cv2", "matplotlib"}


def test_evaluation_loads_neither_torch_nor_the_host():
    assert not loaded_by("import yolo_sos.evaluate") & {"torch", "ultralytics", "torchvision"}


def test_public_names_are_those_of_their_modules():
    import yolo_sos
    from yolo_sos.config import SOSConfig
    from yolo_sos.core import shift_layers
    from yolo_sos.heads import final_layers
    from yolo_sos.train import SOSDetectionTrainer

    for value in SOSConfig, shift_layers, final_layers, SOSDetectionTrainer:
        assert getattr(yolo_sos, value.__name__) is value
    for name in yolo_sos.__all__:
        assert name == "__version__" or getattr(yolo_sos, name).__name__ == name
    with pytest.raises(AttributeError, match=r"no attribute 'SOSTrainer'. Available: .*SOSDetectionTrainer"):
        yolo_sos.SOSTrainer  # noqa: B018
