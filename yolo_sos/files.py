# yolo-sos, AGPL-3.0
"""Files and folders that are either finished or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Build a folder under a temporary name beside it, and give it its own name when it is complete.

    The temporary folder is removed if the block raises. Relative links that leave or stay within the folder keep
    their meaning, since both names have the same parent.

    Args:
        path (str | Path): The folder to make; its parents are made as needed. An empty folder may stand there.

    Yields:
        (Path): The temporary folder to fill.

    Raises:
        FileExistsError: If something else stands at `path`, at the start or at the end.
    """
    path = Path(path).resolve()
    _check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        _check_free(path)  # another process may have been faster
        if path.is_dir():
            path.rmdir()  # Windows does not rename onto a folder, not even an empty one
        temporary.rename(path)
    except BaseException:  # KeyboardInterrupt too
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` to write to; on success it replaces ``path``, else it is removed.

    The temporary name keeps the suffix, which many writers choose the format by.

    Args:
        path (str | Path): The file to write. Missing folders are made.

    Yields:
        (Path): The temporary path.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file with Unix line ends, atomically.

    Args:
        path (str | Path): The file.
        text (str): The content.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def read_text(path: str | Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 with a byte order mark, as some Windows tools write it.

    Args:
        path (str | Path): The file.

    Returns:
        (str): Its content, with Unix line ends and without the byte order mark.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is in another encoding; names the file and the line.
    """
    data = Path(path).read_bytes()
    encoding = "utf-16" if data.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: not a text file in {e.encoding.upper()}: {e.reason} at byte {e.start}"
        ) from e
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Args:
        path (str | Path): The file.

    Returns:
        (Any): Its content.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON; names the file and the line.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}, line {e.lineno}, column {e.colno}: not JSON: {e.msg}") from e
    except (ValueError, RecursionError) as e:  # a number of thousands of digits, brackets in thousands of brackets
        raise ValueError(f"{path}: not JSON that can be read: {e}") from e


def as_json(value: Any) -> str:
    """Return nested plain values as JSON, with null for every number that JSON does not know: NaN, and infinity."""
    return json.dumps(finite(value), indent=1, allow_nan=False) + "\n"


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows of the same keys as CSV, with these as the header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def save_figure(figure: Any, path: str | Path, dpi: int) -> None:
    """Write a figure of matplotlib atomically; the suffix says what kind of picture."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def finite(value: Any) -> Any:
    """Return nested dictionaries and lists with None for every number that JSON does not know: NaN, and infinity."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def link(source: Path, target: Path, *, copy: bool = False) -> None:
    """Make a file appear at a second place: by a relative link, or by a copy where links are not to be had.

    Args:
        source (Path): An existing file.
        target (Path): Where it is to appear; its folder must exist.
        copy (bool): Copy in any case.
    """
    if not copy:
        try:
            target.symlink_to(os.path.relpath(source.resolve(), target.parent.resolve()))
            return
        except (OSError, ValueError, NotImplementedError):
            pass  # Windows without the right to link, or another drive; a file system without links
    shutil.copyfile(source, target)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.stem}.{uuid4().hex[:8]}{path.suffix}")


def _check_free(path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path}: exists already and is not an empty folder; remove it or name another one")
