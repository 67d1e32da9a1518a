# yolo-sos, AGPL-3.0
"""The documentation: its commands are right, and the site builds without a warning and has what it promises."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from html import unescape
from importlib.util import find_spec
from pathlib import Path

import pytest

import yolo_sos
from yolo_sos import cli
from yolo_sos.config import KEYS

ROOT = Path(__file__).parents[2]
SITE = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *(p for p in SITE if p.relative_to(ROOT / "docs").parts[0] not in {"bench", "eval"})]


def commands(page: Path) -> list[list[str]]:
    """Return the commands of a page's code blocks, without comments and without those that stand for any."""
    lines = re.findall(r"^ {4}yolo-sos +(.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines if "..." not in line and "…" not in line]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_are_right(page):
    for command in commands(page):
        if "--help" not in command:
            cli.read(command, cli.MODES)  # raises for an unknown mode, argument or switch


def test_commands_are_found():
    assert sum(len(commands(page)) for page in PAGES) > 20


def test_the_first_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built strictly: a warning, such as of a dead link, is an error."""
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None:
        pytest.skip("MkDocs is not installed: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def text(site: Path, page: str) -> str:
    return unescape(re.sub(r"<[^>]+>", "", (site / page / "index.html").read_text(encoding="utf-8")))


def test_made_pages_have_every_setting_and_mode(site):
    settings, reference = text(site, "reference/settings"), text(site, "reference/cli")
    assert all(key in settings for key in KEYS)
    for mode in cli.OURS:
        assert all(f"yolo-sos {example}" in reference for example in mode.examples)
    assert "val_share" in reference and "share of train that is held out" in reference


def test_every_public_name_is_in_the_reference(site):
    page = text(site, "reference/api")
    assert [name for name in yolo_sos.__all__ if name not in page] == ["__version__"]
    assert "Return what a resumed run needs" in page  # from the docstring of a method


def test_studies_and_records_are_there(site):
    assert "Where does SOS help a detector?" in text(site, "studies/training/training")
    assert (site / "studies/analyze/analysis.json").is_file() and (site / "bench/growth-model.png").is_file()
