# yolo-sos, AGPL-3.0
"""The settings of a training with SOS: one schema, from which the checks, ``cfg/sos.yaml``, help and docs are made.

To change a setting, change it here and write the file anew: ``python -m yolo_sos.config > cfg/sos.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import Any

import yaml

from yolo_sos.core import METHODS, SOLVERS, WEIGHTINGS, Method, checks
from yolo_sos.core.checks import Check, boolean, choice, number, optional
from yolo_sos.markdown import markdown_table

CHECKPOINT_KEY = "sos"  # of a checkpoint: what was done to it, in plain values
KINDS = ("box", "cls", "mask", "kpt", "angle", "linear")  # of final layers
PEERS = ("sam", "asam", "gnp")
SECTIONS = {
    "sos": "Stochastic optimum shifting. `yolo-sos shift` takes those of a single shift, with or without `sos_`.",
    "fit": "A better start for a pretrained model: acts with sos=false too.",
    "recipe": "Of the recipe that SOS was published with: these act with sos=false too.",
    "peers": "Other ways to flat minima, to compare SOS with or to combine it with: these act with sos=false too.",
    "analyze": "A measurement, which changes nothing: with sos=false too.",
}


def check_keys(keys: Iterable[str], valid: Iterable[str], what: str = "a valid argument", source: str = "") -> None:
    """Raise a ``ValueError`` that names the first key that is not valid, and the nearest one that is.

    Args:
        keys (Iterable[str]): What was given.
        valid (Iterable[str]): What can be given.
        what (str): What a valid key is called.
        source (str): The file that holds the keys, if one does.
    """
    valid = list(valid)
    for key in keys:
        if key not in valid:
            near = get_close_matches(str(key), valid, n=1, cutoff=0.0)[0]
            raise ValueError(f"{source}{': ' if source else ''}'{key}' is not {what}. Did you mean '{near}'?")


def _layers(key: str, value: Any) -> str | list[str]:
    # In Ultralytics' grammar [box,cls] is a string, since its items have no quotes.
    given = value.removeprefix("[").removesuffix("]").split(",") if isinstance(value, str) else value
    kinds = [checks.shown(kind).strip() for kind in given] if isinstance(given, (list, tuple)) else []
    if kinds == ["all"]:
        return "all"
    if not kinds or any(kind not in KINDS for kind in kinds):
        raise checks.invalid(key, value, f"'all' or a list of {', '.join(KINDS)}")
    return kinds


def _lr_steps(key: str, value: Any) -> list[float]:
    steps = list(value) if isinstance(value, (list, tuple)) else [value]
    if not steps or not all(type(step) is float and 0 < step < 1 for step in steps):
        right = "a list of fractions of the epochs, each above 0 and below 1, such as [0.5,0.75], or none"
        raise checks.invalid(key, value, right)
    return steps


_COUNT = number("an integer of at least 1, or none", lambda x: x >= 1, integer=True)
_POSITIVE = number("a number above 0, or none", lambda x: x > 0)


def _setting(default: Any, check: Check, text: str, section: str = "sos") -> Any:
    return field(default=default, metadata={"check": check, "help": text, "section": section})


@dataclass(frozen=True)
class SOSConfig:
    """The settings, checked; ``cfg/sos.yaml`` shows them all.

    Raises:
        ValueError: If a value is out of range; names the key, the value and what would be right.
    """

    sos: bool = _setting(False, boolean, "turn SOS on")
    sos_method: str | None = _setting(
        None,
        optional(choice(*METHODS)),
        "loss, expected, principal, budget, full or rows (the paper's, Algorithm 1); none: loss, but expected for a "
        "classifier, and with another sos_weighting than balanced",
    )
    sos_rank: int | float | None = _setting(
        None,
        optional(checks.rank),
        "rank kept (principal), in the mean over all outputs (loss), or rows expected (expected) or drawn (rows) in "
        "each layer; a float up to 1.0 is a fraction of the layer's input size d; none: the least from 0.5 on that the "
        "guard accepts, 0.5 without a guard",
    )
    sos_weighting: str = _setting(
        "balanced",
        choice(*WEIGHTINGS),
        "whose outputs matter: balanced (every class, and the background, alike), confidence or uniform",
    )
    sos_budget: float | None = _setting(
        None,
        optional(checks.budget),
        "for method budget: relative change of the outputs that is allowed, at least 0 and below 1; none: the largest "
        "up to 0.1 that the guard accepts, 0.01 without a guard",
    )
    sos_solver: str = _setting(
        "svd", choice(*SOLVERS), "for method rows: svd, or gauss, the elimination of Algorithm 1"
    )
    sos_start: float = _setting(
        1.0,
        checks.start,
        "fraction of the epochs before the first shift: 1.0 shifts once, at the end, 0 the untrained head too",
    )
    sos_interval: int = _setting(5, checks.interval, "epochs from one shift to the next")
    sos_step: float = _setting(1.0, checks.up_to_1, "largest step size t of V + t(V* - V), above 0 and up to 1.0")
    sos_momentum: bool = _setting(
        False, boolean, "apply the shift of the live weights to the optimizer's momentum as well"
    )
    sos_images: int | None = _setting(
        None,
        optional(_COUNT),
        "training images to fit on, at most; half as many others, at most 32, are held out; none: 512 for method loss, "
        "else 8; or 3 per class if that is more, and for a classifier no fewer than the rank",
    )
    sos_layers: str | list[str] = _setting("all", _layers, f"all, or kinds of final layers: {', '.join(KINDS)}")
    sos_guard: float | None = _setting(
        0.005,
        checks.guard,
        "largest relative rise of the held-out loss, which decides how strong a shift is; one with a given rank or "
        "budget is shortened or left out; none: no guard",
    )
    fit_head: bool = _setting(
        False,
        boolean,
        "fit the class layers to the labels before the first epoch, as `yolo-sos fit` does, unless nothing is gained",
        "fit",
    )
    lr_steps: list[float] | None = _setting(
        None,
        optional(_lr_steps),
        "fractions of the epochs at which the learning rate is divided by 10, such as [0.5, 0.75], in place of lrf and "
        "cos_lr",
        "recipe",
    )
    mixup_alpha: float | None = _setting(
        None,
        optional(_POSITIVE),
        "classify: mix each training batch with itself, the share drawn from Beta(alpha, alpha)",
        "recipe",
    )
    sharpness_aware: str | None = _setting(
        None,
        optional(choice(*PEERS)),
        "sam, asam or gnp: step along the gradient at weights a step uphill, for twice the time",
        "peers",
    )
    rho: float | None = _setting(
        None,
        optional(_POSITIVE),
        "length of the step uphill; none: the papers' 0.05 for sam and gnp, 0.5 for asam",
        "peers",
    )
    swa: float | None = _setting(
        None,
        optional(number("a number of at least 0 and less than 1, or none", lambda x: 0 <= x < 1)),
        "fraction of the epochs before weights are averaged over epochs; the average takes the place of the EMA",
        "peers",
    )
    sos_analyze: int | None = _setting(
        None,
        optional(_COUNT),
        "measure a Hessian trace and neural collapse every so many epochs, into results.csv and analyze.png",
        "analyze",
    )

    def __post_init__(self):
        """Check every value."""
        for f in fields(self):
            object.__setattr__(self, f.name, f.metadata["check"](f.name, getattr(self, f.name)))
        if self.rho is not None and self.sharpness_aware is None:
            raise ValueError(f"'rho={self.rho}' needs sharpness_aware, one of {', '.join(PEERS)}.")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> SOSConfig:
        """Return the defaults overridden by ``settings``.

        Raises:
            ValueError: If a key is unknown or a value out of range; names the key and what would be right.
        """
        check_keys(settings, KEYS, "a setting of SOS")
        return cls(**settings)

    @classmethod
    def of_training(cls, settings: Mapping[str, Any]) -> SOSConfig:
        """Return the settings of a training, as ``from_dict`` does.

        Raises:
            ValueError: Also if settings of a shift are given without ``sos=true``, where they would have no effect.
        """
        config = cls.from_dict(settings)
        idle = [key for key in settings if key not in ("sos", *RECIPE)]
        if idle and "sos" not in settings:
            given = ", ".join(f"{key}={checks.shown(settings[key])}" for key in idle)
            raise ValueError(f"{given} without sos=true would train without SOS. Add sos=true.")
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, as YAML and checkpoints keep them."""
        return asdict(self)

    @property
    def stock(self) -> bool:
        """Whether nothing is asked for that Ultralytics' own trainer does not do."""
        return not self.sos and all(getattr(self, key) == SCHEMA[key].default for key in RECIPE)

    def method_of(self, task: str) -> Method:
        """Return the settings that say how weights are found, for ``detect`` or another task of Ultralytics.

        ``loss`` has no weighting, and for a classifier it takes a matrix of size d² for each class.
        """
        unfit = task == "classify" or self.sos_weighting != SCHEMA["sos_weighting"].default
        name = self.sos_method or ("expected" if unfit else "loss")
        return Method(name, self.sos_rank, self.sos_budget, self.sos_solver, self.sos_weighting)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of layers to shift."""
        return KINDS if isinstance(self.sos_layers, str) else tuple(self.sos_layers)


SCHEMA = {f.name: f for f in fields(SOSConfig)}  # name → field with its default, and metadata check, help, section
KEYS = tuple(SCHEMA)
RECIPE = tuple(key for key, f in SCHEMA.items() if f.metadata["section"] != "sos")  # settings that act with sos=false
# Settings of a single shift, without their "sos_"; the others are of a training: whether, when and how far it shifts.
SHIFT_SETTINGS = ("method", "rank", "weighting", "budget", "solver", "images", "layers", "guard")


def is_sos_key(key: str) -> bool:
    """Tell whether a setting is ours: ``sos``, anything that starts with ``sos_``, or one of ``RECIPE``."""
    return key == "sos" or key.startswith("sos_") or key in RECIPE


def setting_type(key: str) -> str:
    """Return the type of a setting in words: ``bool``, ``float | none``."""
    return str(SCHEMA[key].type).replace("[str]", "").replace("[float]", "").replace("None", "none")


def setting_default(key: str) -> str:
    """Return the default of a setting as YAML has it."""
    return yaml.safe_dump(SCHEMA[key].default).removesuffix("...\n").strip()


def settings_yaml() -> str:
    """Return ``cfg/sos.yaml``: every setting with its default, its type and what it does, by section."""
    lines = ["# Every setting of yolo-sos for training: default, type and meaning. `yolo-sos cfg` prints this file."]
    for section, text in SECTIONS.items():
        lines += ["", f"# {text}"]
        for key, f in SCHEMA.items():
            if f.metadata["section"] == section:
                lines.append(f"{key}: {setting_default(key)} # ({setting_type(key)}) {f.metadata['help']}")
    return "\n".join(lines) + "\n"


def settings_table() -> str:
    """Return the settings as the table of the documentation."""
    rows = [[f"`{key}`", f"`{setting_default(key)}`", f.metadata["help"]] for key, f in SCHEMA.items()]
    return markdown_table([["key", "default", "meaning"], *rows], texts=3)


if __name__ == "__main__":
    print(settings_yaml(), end="")
