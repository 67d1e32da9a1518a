# yolo-sos, AGPL-3.0
"""What is installed works without the checkout: the settings' defaults and the data sets come along."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

import yolo_sos

for module in "build", "hatchling":
    pytest.importorskip(module, reason=f"{module} is not installed: pip install -e '.[dev]'")
ROOT = Path(__file__).parents[1]


def run(*args, **kwargs) -> str:
    """Return what a command prints; its errors are shown if it fails."""
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--sdist", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_holds_the_package_and_every_named_config(wheel):
    assert wheel.name == f"yolo_sos-{yolo_sos.__version__}-py3-none-any.whl"
    names = set(ZipFile(wheel).namelist())
    assert {"yolo_sos/cfg/sos.yaml", "yolo_sos/cfg/datasets/digits.yaml"} <= names
    for folder, suffix in (("yolo_sos", "py"), ("cfg", "yaml")):
        for path in (ROOT / folder).rglob(f"*.{suffix}"):
            name = path.relative_to(ROOT).as_posix()
            assert (name if folder == "yolo_sos" else f"yolo_sos/{name}") in names
    packaged = (n for n in names if ".dist-info/" not in n)
    assert {n.split("/")[0] for n in packaged} == {"yolo_sos"}  # no tests, no tools, no studies
    assert [n for n in names if n.endswith("LICENSE")]


def test_the_source_distribution_can_be_tested_and_holds_no_studies(wheel):
    (sdist,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"yolo_sos", "cfg", "tests", "tools", "pyproject.toml"} <= names and not {"studies", "results"} & names


def test_the_metadata_are_whole(wheel):
    """What ``twine check`` asks for, and the same version and paper as CITATION.cff."""
    (name,) = (n for n in ZipFile(wheel).namelist() if n.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(ZipFile(wheel).read(name).decode())
    assert metadata["Description-Content-Type"] == "text/markdown" and len(metadata.get_payload()) > 1000
    assert {"digits", "eval", "lightning", "docs"} <= set(metadata.get_all("Provides-Extra"))
    classifiers = metadata.get_all("Classifier")
    assert "Programming Language :: Python :: 3.10" in classifiers and not [c for c in classifiers if "License" in c]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert metadata["Version"] == yolo_sos.__version__ == citation["version"]
    assert metadata["License-Expression"] == citation["license"]
    assert f"Paper, {citation['references'][0]['url']}" in metadata.get_all("Project-URL")


def test_it_works_from_elsewhere(wheel, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel)
    code = (
        "import json, yolo_sos; from yolo_sos.config import SOSConfig; "
        "from yolo_sos.builtin import CFG_DIR, resolve_data; "
        "print(json.dumps([yolo_sos.__file__, str(CFG_DIR), SOSConfig.from_dict({}).to_dict(), "
        "resolve_data('digits.yaml')]))"
    )
    env = {**os.environ, "PYTHONPATH": str(target)}
    file, cfg, defaults, digits = json.loads(run("-c", code, cwd=elsewhere, env=env))
    assert Path(file) == target / "yolo_sos/__init__.py"
    assert Path(cfg) == target / "yolo_sos/cfg"
    from yolo_sos.config import SOSConfig

    assert defaults == SOSConfig.from_dict({}).to_dict()
    assert Path(digits) == target / "yolo_sos/cfg/datasets/digits.yaml" and Path(digits).is_file()
    printed = run("-m", "yolo_sos.cli", "cfg", cwd=elsewhere, env=env)
    assert printed.strip() == (ROOT / "cfg/sos.yaml").read_text(encoding="utf-8").strip()
    assert f"yolo-sos {yolo_sos.__version__} " in run("-m", "yolo_sos.cli", "version", cwd=elsewhere, env=env)
    assert (target / "bin/yolo-sos").exists() or (target / "bin/yolo-sos.exe").exists()
