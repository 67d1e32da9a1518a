# yolo-sos, AGPL-3.0
"""What the benchmarks share: medians with their spread, peak memory, and records that say where they come from."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from yolo_sos import __version__
from yolo_sos.files import write_text
from yolo_sos.markdown import markdown_table

BENCH = Path(__file__).resolve().parents[1] / "docs/bench"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and largest of some values, and how many they are."""
    return {"median": median(values), "min": min(values), "max": max(values), "n": len(values)}


def told(values: Sequence[float], digits: int = 3) -> str:
    """Return ``median (least–largest)`` as tables print it."""
    s = spread(values)
    return f"{s['median']:.{digits}g} ({s['min']:.{digits}g}–{s['max']:.{digits}g})"


def cpu_model() -> str:
    """Return the processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Return what a timing depends on: hardware, load at this moment, and versions. No host name, no paths."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "yolo_sos": __version__,
        **{name: version(name) for name in ("torch", "ultralytics", "numpy")},
    }


def command(argv: Sequence[str] | None = None) -> str:
    """Return the command that was given, with paths cut to their last two parts."""
    words = [Path(sys.argv[0]).name, *(sys.argv[1:] if argv is None else argv)]
    short = [f"{k}{s}{'/'.join(Path(v).parts[-2:])}" if os.sep in v else w for w in words for k, s, v in [split(w)]]
    return shlex.join(["python", f"tools/{short[0]}", *short[1:]])


def split(word: str) -> tuple[str, str, str]:
    """Return the three parts of ``--key=value``; a word without ``=`` is all value."""
    key, sign, value = word.partition("=")
    return (key, sign, value) if sign else ("", "", word)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown, the first column to the left and the others to the right."""
    return markdown_table([[str(cell) for cell in line] for line in (header, *rows)]).rstrip()


def save(name: str, title: str, body: str, data: dict[str, Any], argv: Sequence[str] | None = None) -> None:
    """Write docs/bench/NAME.json and NAME.md, and print the latter.

    Args:
        name (str): Name of both files.
        title (str): Heading of the Markdown.
        body (str): Tables and text.
        data (dict): Everything measured, plain values.
        argv (Sequence[str], optional): The arguments. None: those of the process.
    """
    where, made = machine(), command(argv)
    gpu = f", {where['gpu']}" if where["gpu"] else ""
    versions = ", ".join(f"{k} {where[k]}" for k in ("python", "torch", "ultralytics", "yolo_sos"))
    text = (
        f"# {title}\n\n{body}\n\n{where['cpu']}, {where['cores']} cores, {where['threads']} threads, load "
        f"{where['load']}{gpu}; {versions}. Made by\n\n    {made}\n"
    )
    write_text(BENCH / f"{name}.json", json.dumps({"command": made, "machine": where, **data}, indent=1) + "\n")
    write_text(BENCH / f"{name}.md", text)
    print(text)


class Peak:
    """Peak memory since the last ``reset``, in MB: of the GPU where there is one, else of this process.

    Linux alone can forget a process's peak. Elsewhere ``mb`` is that of the whole run so far.
    """

    def __init__(self, device: str = "cpu"):
        """Remember the device."""
        self.cuda = device not in {"", "cpu"}

    def reset(self) -> None:
        """Forget the peak so far."""
        if self.cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM

    @property
    def mb(self) -> float:
        """The peak."""
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated() / 1e6
        if sys.platform == "linux":
            status = Path("/proc/self/status").read_text()
            return int(status.partition("VmHWM:")[2].split()[0]) / 1024
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 1e6 if sys.platform == "darwin" else peak / 1024
