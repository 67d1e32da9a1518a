# yolo-sos, AGPL-3.0
"""Packages whose public names are imported when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any


def lazy_exports(
    package: str, names: dict[str, Sequence[str]]
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__all__``, ``__getattr__`` and ``__dir__`` of a package (PEP 562).

    Args:
        package (str): Its name.
        names (dict[str, Sequence[str]]): Module in the package → the public names that it defines.
    """
    modules = {name: f"{package}.{module}" for module, of in names.items() for name in of}

    def get(name: str) -> Any:
        if name in modules:
            return getattr(import_module(modules[name]), name)
        raise AttributeError(f"module '{package}' has no attribute '{name}'. Available: {', '.join(sorted(modules))}")

    return sorted(modules), get, lambda: sorted(modules)
