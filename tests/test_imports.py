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

# What each room may import, in the order core ← yolo ← {analyze, evaluate, experiment, recipes} ← trainers ← cli.
# `data` makes data sets: it stands beside yolo. Those that are not named here may be imported by all.
SHARED = ("config", "builtin", "files", "markdown", "versions", "_lazy")
ROOMS = {
    "core": ("_lazy",),
    "lightning": ("core",),
    "data": SHARED,
    "yolo": (*SHARED, "core", "data", "evaluate"),  # detections and their metrics, which know nothing of yolo
    "recipes": (*SHARED, "core", "yolo"),
    "analyze": (*SHARED, "core", "yolo", "arguments"),
    "evaluate": (*SHARED, "core", "data", "arguments"),
    "trainers": (*SHARED, "core", "yolo", "recipes", "analyze"),
    "arguments": (*SHARED, "core"),
    "experiment": (*SHARED, "core", "yolo", "data", "evaluate", "arguments", "trainers"),  # it trains
    "cli": (*SHARED, "core", "yolo", "data", "analyze", "evaluate", "experiment", "recipes", "trainers", "arguments"),
}
WITHOUT_TORCH = (
    "boxes",
    "calibration",
    "coco",
    "coco_files",
    "plot",
    "report",
    "voc",
    "voc_files",
)  # of evaluate: arrays and files
OPEN = {"yolo_sos.core", "yolo_sos.core.checks"}  # of core, to all; `checks` is a module of plain functions on settings


@cache
def modules() -> dict[str, Path]:
    """Return every module of the package by name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


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
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree if types else WithoutTypes().visit(tree)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import hides where it points"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in modules() else str(node.module))
    return frozenset(found)


def ours(module: str, types: bool = True) -> set[str]:
    """Return the modules of the package that a module imports; the package itself only names its modules as text."""
    return {name for name in imports(module, types) if name.startswith("yolo_sos.")}


def others(module: str) -> set[str]:
    """Return the top-level names of imported packages that are neither ours nor Python's own."""
    return {name.split(".")[0] for name in imports(module)} - {"yolo_sos", *sys.stdlib_module_names}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_the_parser_sees_imports_of_every_form():
    assert len(modules()) > 50
    assert "yolo_sos.trainers" in imports("yolo_sos.cli.train", types=False)  # in a function
    training = "yolo_sos.yolo.training"
    assert "ultralytics.engine.trainer" in imports(training) - imports(training, types=False)
    assert "yolo_sos.core.checks" in imports("yolo_sos.config")  # a module, by `from package import module`
    assert "ultralytics" in others("yolo_sos.yolo.heads")


def test_every_module_has_its_room():
    assert {room(module) for module in modules()} <= {"", *ROOMS, *SHARED}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_one_way(module):
    here = room(module)
    allowed = {here, *ROOMS[here]} if here in ROOMS else {*SHARED, "core"}
    assert {room(name) for name in ours(module)} <= allowed


@pytest.mark.parametrize("module", sorted(m for m in modules() if room(m) != "core"))
def test_nobody_reaches_past_the_public_names_of_core(module):
    assert {name for name in ours(module) if room(name) == "core"} <= OPEN


@pytest.mark.parametrize("module", sorted(m for m in modules() if room(m) == "core"))
def test_core_knows_torch_alone(module):
    assert others(module) <= {"torch"}


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_metrics_take_arrays(name):
    module = f"yolo_sos.evaluate.{name}"
    assert not others(module) & {"ultralytics", "torch", "torchvision"}
    assert all(room(n) != "evaluate" or n.split(".")[-1] in (*WITHOUT_TORCH, "evaluate") for n in ours(module))


@pytest.mark.parametrize("name", SHARED)
def test_what_everyone_reads_knows_neither_torch_nor_ultralytics(name):
    module = f"yolo_sos.{name}"
    if name != "versions":  # which is about the versions of the two
        assert others(module) <= {"yaml"}


def test_no_module_imports_itself_on_a_detour():
    graph = {module: ours(module, types=False) for module in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        pytest.fail(f"import cycle: {' -> '.join(e.args[1])}")


def loaded_by(code: str) -> set[str]:
    """Return the heavy packages that a fresh interpreter has loaded after running some code."""
    heavy = ["torch", "torchvision", "ultralytics", "numpy", "cv2", "matplotlib", "sklearn", "scipy", "pycocotools"]
    code += f"; import sys, json; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import yolo_sos; dir(yolo_sos), yolo_sos.__version__",
        "import yolo_sos.core, yolo_sos.files, yolo_sos.markdown, yolo_sos.builtin",
        "from yolo_sos.config import SOSConfig; SOSConfig.from_dict({'sos_rank': 3})",
        "import yolo_sos.cli; from yolo_sos.arguments import training_keys; training_keys()",
    ],
)
def test_settings_and_the_command_load_nothing_heavy(code):
    assert loaded_by(code) == set()


def test_core_loads_no_ultralytics():
    loaded = loaded_by("from yolo_sos import SOS, shift_model")
    assert "torch" in loaded and not loaded & {"ultralytics", "cv2", "matplotlib"}


def test_metrics_load_neither_torch_nor_ultralytics():
    names = ", ".join(f"yolo_sos.evaluate.{name}" for name in WITHOUT_TORCH)
    assert not loaded_by(f"import yolo_sos.evaluate, {names}") & {"torch", "ultralytics", "torchvision"}


def test_public_names_are_those_of_their_modules():
    import yolo_sos
    from yolo_sos.config import SOSConfig
    from yolo_sos.core import SOS, shift_model
    from yolo_sos.trainers import SOSDetectionTrainer

    for value in SOSConfig, SOS, shift_model, SOSDetectionTrainer:
        assert getattr(yolo_sos, value.__name__) is value
    for name in yolo_sos.__all__:
        assert name == "__version__" or getattr(yolo_sos, name).__name__ == name
    assert set(dir(yolo_sos)) <= {*yolo_sos.__all__}
    with pytest.raises(AttributeError, match=r"no attribute 'SOSTrainer'. Available: .*SOSDetectionTrainer"):
        yolo_sos.SOSTrainer  # noqa: B018
