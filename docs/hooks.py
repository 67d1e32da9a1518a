# yolo-sos, AGPL-3.0
"""Pages of the site that are made when it is built: README, settings, the command's modes, studies and their records.

MkDocs calls these functions by their names, see ``hooks`` in mkdocs.yml.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from yolo_sos import cli
from yolo_sos.arguments import sos_arguments, ultralytics_arguments
from yolo_sos.cli.grammar import Mode
from yolo_sos.config import settings_table
from yolo_sos.markdown import markdown_table

ROOT = Path(__file__).parents[1]
RECORDS = {".md", ".png", ".csv", ".json", ".html"}  # of studies/, to read


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made, and those of studies/."""
    made = {"index.md": first_page(), "reference/settings.md": settings_page(), "reference/cli.md": cli_page()}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    for path in sorted((ROOT / "studies").rglob("*")):
        if path.suffix in RECORDS:
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links of a study that lead into docs/ stay in the site, and name what the site does not have."""
    here = page.file.src_uri
    if not here.startswith("studies/"):
        return markdown

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        path, hash_, anchor = target.partition("#")
        if "://" in target or not path:
            return found[0]
        name = posixpath.normpath(posixpath.join(posixpath.dirname(here), path))
        if name.startswith("docs/"):
            path = os.path.relpath(name.removeprefix("docs/"), posixpath.dirname(here)).replace(os.sep, "/")
            name = name.removeprefix("docs/")
        return f"[{text}]({path}{hash_}{anchor})" if files.get_file_from_path(name) else f"{text} (`{name}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", link, markdown)


def first_page() -> str:
    """Return README, whose links are from the root of the repository: what the site does not have is only named."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    return re.sub(r"\[([^\]]+)\]\([A-Z]+\.(?:md|cff)\)", r"`\1`", text)


def settings_page() -> str:
    """Return the page of all settings of a training."""
    return (
        "# Settings\n\n`yolo-sos train` takes these beside every argument of `yolo train`; in Python, the trainers do. "
        "`yolo-sos cfg` prints them as YAML, and `cfg=file.yaml` reads them from a file. Those of a single shift are "
        "also those of [`yolo-sos shift`](cli.md#shift), with or without `sos_` before their names.\n\n"
        f"{settings_table()}"
    )


def cli_page() -> str:
    """Return the page of all modes of the command."""
    stock = ", ".join(f"`{mode.name}`" for mode in cli.stock.MODES)
    others = ", ".join(f"`{name}`" for name in cli.stock.COMMANDS)
    return (
        "# Command line\n\n    yolo-sos [TASK] MODE key=value ...\n\nThe grammar is that of `yolo`. `yolo-sos MODE "
        f"--help` prints what stands here. {stock} and {others} are passed on to `yolo`. A wrong argument or file ends "
        "the command with exit status 2 and one line that says what would be right.\n\n"
        + "\n".join(mode_section(mode) for mode in cli.OURS)
    )


def mode_section(mode: Mode) -> str:
    """Return what a mode does and takes; the arguments of Ultralytics are in its own documentation."""
    examples = "".join(f"    yolo-sos {example}\n" for example in mode.examples)
    text = f"## {mode.name}\n\n{mode.summary[0].upper()}{mode.summary[1:]}.\n\n{examples}\n{mode.result}\n\n"
    of_training = [*sos_arguments(), *ultralytics_arguments()]
    for section, arguments in mode.arguments().items():
        if all(a in of_training for a in arguments):
            text += f"{section} see [Settings](settings.md) and Ultralytics' documentation.\n\n"
            continue
        rows = [[f"`{a.name}`", "" if a.default is None else f"`{a.default}`", a.type, a.help] for a in arguments]
        text += f"{section}\n\n{markdown_table([['argument', 'default', 'type', 'meaning'], *rows], texts=4)}\n"
    return text
