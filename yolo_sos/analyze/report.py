# yolo-sos, AGPL-3.0
"""Where an analysis goes: a folder with ``analysis.json`` and ``report.html``, which needs no network or other file."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ultralytics.cfg import get_save_dir

from yolo_sos.files import as_json, write_text

# No script, no address: what the browser may load is in the file.
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>yolo-sos analyze</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1170px; margin: 2em auto; padding: 0 1.5em }
h1 { font-size: 1.6em; margin-bottom: .2em } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd }
p { max-width: 60em } p.verdict { font-size: 1.1em; font-weight: 600 } p.note { color: #666; font-size: .9em }
img { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: .85em; font-variant-numeric: tabular-nums; margin: 1em 0 }
th, td { padding: .25em .5em; text-align: right; border-bottom: 1px solid #eee; overflow-wrap: anywhere }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #bbb }
</style></head><body>
"""


@dataclass(frozen=True)
class Section:
    """A figure, or a table, with what it shows in words.

    Attributes:
        title (str): Heading.
        text (Sequence[str]): Sentences under the figure, a paragraph each.
        figure (Path | None): A PNG.
        header (Sequence[str]): Of the table.
        rows (Sequence[Sequence[str]]): Of the table.
    """

    title: str
    text: Sequence[str]
    figure: Path | None = None
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = field(default=())


def save_dir(task: str, project: str | None, name: str | None, exist_ok: bool) -> Path:
    """Return the folder to write to, as Ultralytics does: ``project/name``, ``runs/{task}/analyze`` by default."""
    return get_save_dir(SimpleNamespace(project=project, name=name, task=task, mode="analyze", exist_ok=exist_ok))


def labels(paths: Sequence[Path]) -> list[str]:
    """Return short names that tell paths apart: their last parts, without ``weights`` and ``.pt``.

    Raises:
        ValueError: If a path is given twice.
    """
    whole = [path.resolve() for path in paths]
    for path in whole:
        if whole.count(path) > 1:
            raise ValueError(f"{path} is given twice: there would be nothing to compare.")
    parts = [[p for p in (*path.parts[1:-1], path.name.removesuffix(".pt")) if p != "weights"] for path in whole]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def write_report(folder: Path, result: dict[str, Any], verdict: Sequence[str], sections: Sequence[Section]) -> None:
    """Write ``analysis.json`` and ``report.html``.

    Args:
        folder (Path): Where to.
        result (dict): Everything that was measured, as plain values.
        verdict (Sequence[str]): What was found, a plain sentence each.
        sections (Sequence[Section]): The report, in order.
    """
    write_text(folder / "analysis.json", as_json(result))
    config = ", ".join(f"{k}={v}" for k, v in result["config"].items() if not isinstance(v, list) and v is not None)
    known = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    names = [m["name"] for m in result.get("models", result.get("runs", ()))]
    parts = [HEAD, f"<h1>{escape(' · '.join(names))}</h1>\n"]
    parts += [f"<p class=verdict>{escape(sentence)}</p>\n" for sentence in verdict]
    parts += [f"<p class=note>{escape(config)}<br>{escape(known)}</p>\n", *map(_section, sections), "</body></html>\n"]
    write_text(folder / "report.html", "".join(parts))


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>\n"]
    if section.figure is not None:
        image = base64.b64encode(section.figure.read_bytes()).decode()
        parts.append(f'<img alt="{escape(section.title)}" src="data:image/png;base64,{image}">\n')
    parts += [f"<p>{escape(text)}</p>\n" for text in section.text]
    if section.rows:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in section.header)
        body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>\n" for row in section.rows)
        parts.append(f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>\n")
    return "".join(parts)


def number(value: dict[str, Any] | float | None) -> str:
    """Return a number, or one with its standard error, for a table; a dash where there is none."""
    if isinstance(value, dict):
        if value["estimate"] is None or not math.isfinite(value["estimate"]):
            return "–"
        error = value["stderr"]
        known = error is not None and math.isfinite(error)
        return number(value["estimate"]) + (f" ± {digits(error, 2)}" if known else "")
    return "–" if value is None or not math.isfinite(value) else digits(value, 4)


def digits(value: float, count: int, sign: str = "") -> str:
    """Return a number to ``count`` digits, without an exponent where it is neither huge nor tiny."""
    if math.isfinite(value) and value and 1e-4 <= abs(value) < 1e7:
        rounded = float(f"{value:.{count - 1}e}")
        places = max(0, count - 1 - math.floor(math.log10(abs(rounded))))
        return f"{value:{sign}.{places}f}"
    return f"{value:{sign}.{count}g}"
