# yolo-sos, AGPL-3.0
"""The ``sos*`` settings: defaults from ``cfg/sos.yaml``, ranges, and errors that name the key."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from reprlib import Repr
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from yolo_sos.core import Method

CHECKPOINT_KEY = "sos"  # of a checkpoint: what was done to it, in plain values
METHODS = ("principal", "expected", "budget", "full", "rows")
WEIGHTINGS = ("balanced", "confidence", "uniform")
SOLVERS = ("svd", "qr", "gauss")
# Without their "sos_"; the others are of a training: whether, when and how far it shifts.
SHIFT_SETTINGS = ("method", "rank", "weighting", "budget", "solver", "images", "layers", "guard")
KINDS = ("box", "cls", "mask", "kpt", "angle", "linear")

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries cfg/ inside the package; in a checkout it lies beside it.
CFG_DIR = _PACKAGE / "cfg" if (_PACKAGE / "cfg").is_dir() else _PACKAGE.parent / "cfg"
SOS_YAML = CFG_DIR / "sos.yaml"


PEERS = ("sam", "asam", "gnp")
# Settings of ours that act with sos=false too
RECIPE = ("lr_steps", "mixup_alpha", "sharpness_aware", "rho", "swa", "sos_analyze")
# Classification sets are folders: those that come along are built in the host's datasets directory on first use.
BUILDERS = {"digits-cls": "yolo_sos.data.digits_cls"}


def resolve_data(data: Any) -> Any:
    """Return the path of a data set that comes with yolo-sos: ``digits.yaml``, or ``digits-cls``, built on first use.

    Anything else is returned as it is. What bears that name in the working directory goes first, as everywhere in
    Ultralytics.
    """
    if isinstance(data, str) and data in BUILDERS and not Path(data).exists():
        return str(import_module(BUILDERS[data]).build())
    return _resolve("datasets", data)


def resolve_model(model: Any) -> Any:
    """Return the path of a model YAML that comes with yolo-sos, such as ``resnet18-cifar.yaml``; else as it is."""
    return _resolve("models", model)


def resolve_cfg(cfg: Any) -> Any:
    """Return the path of an experiment that comes with yolo-sos, such as ``cifar/rows.yaml``; else as it is."""
    return _resolve("experiments", cfg)


def _resolve(folder: str, name: Any) -> Any:
    if isinstance(name, str) and Path(name).suffix in {"", ".yaml"} and not Path(name).exists():
        path = (CFG_DIR / folder / name).with_suffix(".yaml")
        if path.is_file():
            return str(path)
    return name


def is_sos_key(key: str) -> bool:
    """Tell whether a setting is ours: ``sos``, anything that starts with ``sos_``, or one of ``RECIPE``."""
    return key == "sos" or key.startswith("sos_") or key in RECIPE


@dataclass(frozen=True)
class SOSConfig:
    """The ``sos*`` settings; ``cfg/sos.yaml`` holds their defaults and says what each does.

    Attributes:
        sos (bool): On or off.
        sos_method (str): ``principal``, ``expected``, ``budget``, ``full`` or ``rows``.
        sos_rank (int | float): An int of at least 1, or a fraction of d in (0, 1] as a float.
        sos_weighting (str): ``balanced``, ``confidence`` or ``uniform``.
        sos_budget (float): In [0, 1).
        sos_solver (str): ``svd``, ``qr`` or ``gauss``.
        sos_start (float): In [0, 1].
        sos_interval (int): At least 1, epochs.
        sos_step (float): In (0, 1].
        sos_momentum (bool): On or off.
        sos_images (int | None): At least 1, or None.
        sos_layers (str | list[str]): ``all`` or kinds of layers.
        sos_guard (float | None): At least 0, or None.
        lr_steps (list[float] | None): Fractions of the epochs, in (0, 1), or None.
        mixup_alpha (float | None): Above 0, or None.
        sharpness_aware (str | None): ``sam``, ``asam``, ``gnp``, or None.
        rho (float | None): Above 0, or None.
        swa (float | None): In [0, 1), or None.
        sos_analyze (int | None): At least 1, epochs, or None.
    """

    sos: bool
    sos_method: str
    sos_rank: int | float
    sos_weighting: str
    sos_budget: float
    sos_solver: str
    sos_start: float
    sos_interval: int
    sos_step: float
    sos_momentum: bool
    sos_images: int | None
    sos_layers: str | list[str]
    sos_guard: float | None
    lr_steps: list[float] | None
    mixup_alpha: float | None
    sharpness_aware: str | None
    rho: float | None
    swa: float | None
    sos_analyze: int | None

    @property
    def stock(self) -> bool:
        """Whether nothing is asked for that the host's own trainer does not do."""
        return not self.sos and all(getattr(self, key) is None for key in RECIPE)

    @classmethod
    def keys(cls) -> list[str]:
        """Return the names of all settings."""
        return [f.name for f in fields(cls)]

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> SOSConfig:
        """Return the defaults overridden by ``settings``, checked.

        Raises:
            ValueError: If a key is unknown or a value out of range; names the key, the value and what would be right.
        """
        keys = cls.keys()
        for key in settings:
            if key not in keys:
                near = get_close_matches(str(key), keys, n=1, cutoff=0.0)[0]
                raise ValueError(f"'{key}' is not a setting of SOS. Did you mean '{near}'? See 'yolo-sos cfg'.")
        defaults = yaml.safe_load(SOS_YAML.read_text(encoding="utf-8"))
        config = cls(**{key: _CHECKS[key](key, settings.get(key, defaults[key])) for key in keys})
        if config.rho is not None and config.sharpness_aware is None:
            raise ValueError(f"'rho={config.rho}' needs sharpness_aware, one of {', '.join(PEERS)}.")
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, as YAML and checkpoints keep them."""
        return asdict(self)

    def method(self) -> Method:
        """Return the settings that say how weights are found, as the core takes them."""
        from yolo_sos.core import Method  # loads torch, which reading settings must not

        return Method(self.sos_method, self.sos_rank, self.sos_budget, self.sos_solver, self.sos_weighting)

    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of layers to shift."""
        return KINDS if isinstance(self.sos_layers, str) else tuple(self.sos_layers)


_REPR = Repr()
_REPR.maxlevel = 2  # a YAML file can hold a list that is endless when it is written out


def _shown(value: Any) -> str:
    return str(value) if value is None or isinstance(value, (str, int, float)) else _REPR.repr(value)


def _error(key: str, value: Any, right: str) -> ValueError:
    return ValueError(f"'{key}={_shown(value)}' is invalid: {key} must be {right}.")


def _bool(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _error(key, value, "true or false")
    return value


def _choice(*choices: str):
    def check(key: str, value: Any) -> str:
        if value not in choices:
            near = get_close_matches(_shown(value), choices, n=1, cutoff=0.0)[0]
            raise _error(key, value, f"one of {', '.join(choices)}; nearest: {near}")
        return value

    return check


def _real(right: str, accept, integer: bool = False):
    """Return a check for a finite number that ``accept`` takes; ``right`` says in words what that is."""

    def check(key: str, value: Any):
        number = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
        if not number or not abs(value) <= sys.float_info.max or not accept(value):  # NaN is not, either
            raise _error(key, value, right)
        return value if integer else float(value)

    return check


def _rank(key: str, value: Any) -> int | float:
    right = "an integer of at least 1, or a fraction of d: a float above 0 and up to 1.0"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _error(key, value, right)
    if not (value >= 1 if isinstance(value, int) else 0.0 < value <= 1.0):
        raise _error(key, value, right)
    return value


def _layers(key: str, value: Any) -> str | list[str]:
    # The host's grammar leaves [box,cls] a text, since its items have no quotes.
    given = value.removeprefix("[").removesuffix("]").split(",") if isinstance(value, str) else value
    kinds = [_shown(kind).strip() for kind in given] if isinstance(given, (list, tuple)) else []
    if kinds == ["all"]:
        return "all"
    wrong = [kind for kind in kinds if kind not in KINDS]
    if wrong or not kinds:
        raise _error(key, value, f"'all' or a list of {', '.join(KINDS)}")
    return kinds


def _optional(check):
    """Return a check that also takes None: YAML knows 'null', users write 'none'."""
    return lambda key, value: None if _shown(value).lower() == "none" else check(key, value)


def _steps(key: str, value: Any) -> list[float]:
    right = "a list of fractions of the epochs, each above 0 and below 1, such as [0.5,0.75], or none"
    steps = list(value) if isinstance(value, (list, tuple)) else [value]
    if not steps or not all(type(step) is float and 0 < step < 1 for step in steps):
        raise _error(key, value, right)
    return steps


_CHECKS = {
    "sos": _bool,
    "sos_method": _choice(*METHODS),
    "sos_rank": _rank,
    "sos_weighting": _choice(*WEIGHTINGS),
    "sos_budget": _real("a number of at least 0 and less than 1", lambda x: 0 <= x < 1),
    "sos_solver": _choice(*SOLVERS),
    "sos_start": _real("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "sos_interval": _real("an integer of at least 1", lambda x: x >= 1, integer=True),
    "sos_step": _real("a number above 0 and up to 1", lambda x: 0 < x <= 1),
    "sos_momentum": _bool,
    "sos_images": _optional(_real("an integer of at least 1, or none", lambda x: x >= 1, integer=True)),
    "sos_layers": _layers,
    "sos_guard": _optional(_real("a number of at least 0, or none", lambda x: x >= 0)),
    "lr_steps": _optional(_steps),
    "mixup_alpha": _optional(_real("a number above 0, or none", lambda x: x > 0)),
    "sharpness_aware": _optional(_choice(*PEERS)),
    "rho": _optional(_real("a number above 0, or none", lambda x: x > 0)),
    "swa": _optional(_real("a number of at least 0 and less than 1, or none", lambda x: 0 <= x < 1)),
    "sos_analyze": _optional(_real("an integer of at least 1, or none", lambda x: x >= 1, integer=True)),
}
