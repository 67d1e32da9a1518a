# yolo-sos, AGPL-3.0
"""What a comparison found, in plain sentences."""

from __future__ import annotations

from typing import Any

from yolo_sos.analyze.figures import WHAT, WHERE, overall
from yolo_sos.analyze.report import number

HALF = ("sos_rank", 0.5)


def verdict(result: dict[str, Any]) -> list[str]:
    """Return what a comparison found, in a sentence for every model but the first; of one alone, what a shift does."""
    first, *others = result["models"]
    if not others:
        i = next(i for i, s in enumerate(first["spectrum"][0]["settings"]) if (s["setting"], s["value"]) == HALF)
        ratio, deviation = overall(first["spectrum"], i)
        return [
            f"A shift of {first['name']} to half of each layer's directions (principal) would multiply the squared "
            f"norm of the final layers' weights by {ratio:.2f}, and change their outputs by up to {deviation:.1%}."
        ]
    found = []
    block = list(first["trace"])[-1]  # all parameters, unless only a part was measured
    for model, change in zip(others, result["differences"], strict=True):
        changes = [change["trace"][block][key] for key in ("gauss_newton", "hessian")]
        signs = {e["estimate"] > 0 for e in changes if e["resolved"]}
        curves = {
            frozenset({False}): "curves less",
            frozenset({True}): "curves more",
            frozenset(): "curves neither measurably more nor less",
        }.get(frozenset(signs), "curves less by one measure and more by the other")
        shares = [f"{WHAT[k]} trace {_share(change, first, block, k)}" for k in ("gauss_newton", "hessian")]
        ratio = (model["weight_norm"] / first["weight_norm"]) ** 2 if first["weight_norm"] else 1.0
        found.append(
            f"The loss of {model['name']} {curves} than that of {first['name']} around their weights "
            f"({' and '.join(shares)}, {WHERE[block]}); it is {number(model['loss'])} against {number(first['loss'])} "
            f"per training image, and the squared norm of the final layers' weights is {ratio:.2f} times as large."
        )
    return found


def _share(change: dict[str, Any], first: dict[str, Any], block: str, key: str) -> str:
    """Return a difference as a share of the first model's trace, with its standard error."""
    e, scale = change["trace"][block][key], abs(first["trace"][block][key]["estimate"]) or 1.0
    return f"{e['estimate'] / scale:+.1%} ± {e['stderr'] / scale:.1%}"
