#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""Time every way to solve one layer against others' solvers and against the floor, with the error beside each time.

    python tools/bench_solver.py                        # about four minutes on two CPU cores
    python tools/bench_solver.py --device=0 --repeats=21

Every contender gets the same A (n, d) and V (out, d) in float64, n = d/2 rows, as `rows` draws them by default, and
n = 2d. They run in turn within each repeat. Floors: one QR of the same matrix (the taller of A and Aᵀ, Q included), one
`eigh` of G (d, d) for the spectral methods, and one pass over the bytes of A. Where n < d, no solver comes round a
product like V Q Qᵀ, which a QR does not hold: "product" is that, with a Q at hand. Error: ‖A(V*−V)ᵀ‖ / ‖AVᵀ‖, 0 in
exact arithmetic for all that keep the outputs; norm: ‖V*‖ over that of the SVD, above 1 where the solution is not the
smallest. One thread, unless asked otherwise. Results go to docs/bench/solver.*.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from bench_common import save, spread, table
from torch import Tensor

from yolo_sos.core import Moments, budgeted_shift, expected_shift, minimum_norm_shift, principal_shift

HEADS = {  # name: (d, out) of a final layer; of detectors with 80 classes, box and class layers
    "yolov5 box": (64, 64),
    "yolov5n cls": (80, 80),
    "yolov5s cls": (128, 80),
    "yolov5m cls": (192, 80),
    "yolov5l cls": (256, 80),
    "yolov5x cls": (320, 80),
    "ViT-S": (384, 1000),
    "ResNet-18": (512, 1000),
    "YOLO cls": (1280, 1000),
}
OURS = ("svd", "gauss")
SPECTRAL = ("principal", "expected", "budget")
LARGE = 768  # from here on three repeats must do, and gauss, a loop over rows in Python, is left out


def naive(a: Tensor, v: Tensor) -> Tensor:
    """Return V Aᵀ (A Aᵀ)⁻¹ A, the paper's formula as it stands."""
    return v @ a.T @ torch.linalg.inv(a @ a.T) @ a


def lstsq(a: Tensor, v: Tensor) -> Tensor:
    """Return SciPy's least-norm solution of A X = A Vᵀ."""
    from scipy.linalg import lstsq as solve

    return torch.from_numpy(solve(a.numpy(), (a @ v.T).numpy(), check_finite=False)[0]).T


def contenders(a: Tensor, v: Tensor, moments: Moments) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by name."""
    n, d = a.shape
    tall = a if n >= d else a.T
    found: dict[str, Callable[[], Any]] = {
        "one pass": lambda: a.sum(),
        "QR": lambda: torch.linalg.qr(tall),
        "eigh": lambda: torch.linalg.eigh(moments.matrix),
    }
    if n < d:  # else V* = V
        q = torch.linalg.qr(tall).Q
        found["product"] = lambda: v @ q @ q.T
    for solver in OURS:
        if solver != "gauss" or d < LARGE:
            found[solver] = lambda solver=solver: minimum_norm_shift(a, v, solver=solver).weight
    found["pinv"] = lambda: v @ torch.linalg.pinv(a) @ a
    if a.device.type == "cpu":
        found["lstsq"] = lambda: lstsq(a, v)
    if n <= d:  # else A Aᵀ has no inverse
        found["naive"] = lambda: naive(a, v)
    found["principal"] = lambda: principal_shift(moments, v, rank=d // 2).weight
    found["expected"] = lambda: expected_shift(moments, v, rows=d // 2).weight
    found["budget"] = lambda: budgeted_shift(moments, v, budget=0.01).weight
    return found


def measure(d: int, out: int, n: int, repeats: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Return seconds, error and norm of each contender on one problem."""
    generator = torch.Generator().manual_seed(0)
    # Decaying columns: like features, and unlike noise, some directions carry more than others.
    scale = torch.logspace(0, -2, d, dtype=torch.float64)
    a = (torch.randn(n, d, generator=generator, dtype=torch.float64) * scale).to(device)
    v = torch.randn(out, d, generator=generator, dtype=torch.float64).to(device)
    runs = contenders(a, v, Moments(d).update(a))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for _ in range(repeats if d < LARGE else min(repeats, 3)):
        for name, run in runs.items():
            run()  # warms up: else what ran before, and left in the caches, would count
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            results[name] = run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    best = results["svd"].norm()
    measured: dict[str, dict[str, float]] = {}
    for name, values in seconds.items():
        measured[name] = spread(values)
        floor = seconds["eigh" if name in SPECTRAL else "QR"]
        # Of each repeat's own floor: what slows the machine down slows both.
        measured[name]["of_floor"] = median(x / y for x, y in zip(values, floor, strict=True))
        if isinstance(results[name], Tensor) and results[name].shape == v.shape:
            x = results[name]
            measured[name]["error"] = float((a @ (x - v).T).norm() / (a @ v.T).norm())
            measured[name]["norm"] = float(x.norm() / best)
    return measured


def hard(d: int = 320, out: int = 80) -> dict[str, dict[str, str]]:
    """Return each solver's error on what is hard: directions that carry a millionth of others, and repeated rows."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(d // 2, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -6, d, dtype=torch.float64)
    v = torch.randn(out, d, generator=generator, dtype=torch.float64)
    found: dict[str, dict[str, str]] = {}
    for name, rows in {"columns decay to 1e-6": a, "and ten rows twice": torch.cat([a[:-10], a[:10]])}.items():
        found[name] = {}
        for method, run in contenders(rows, v, Moments(d)).items():
            if method in (*OURS, "pinv", "lstsq", "naive"):
                try:
                    found[name][method] = f"{float((rows @ (run() - v).T).norm() / (rows @ v.T).norm()):.0e}"
                except torch.linalg.LinAlgError:
                    found[name][method] = "fails"
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run all problems and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, or the number of a GPU (%(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="odd; each after one that warms up (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--heads", nargs="+", default=list(HEADS), choices=HEADS, help="(all)")
    parser.add_argument("--name", default="solver", help="of the files in docs/bench (%(default)s)")
    args = parser.parse_args(argv)
    # SciPy brings threads of its own, which idle in a loop and would slow down whoever comes next.
    os.environ["OPENBLAS_NUM_THREADS"] = str(args.threads)  # read when SciPy is loaded, at the first call
    torch.set_num_threads(args.threads)
    device = torch.device("cpu" if args.device == "cpu" else f"cuda:{args.device}")
    problems = [(head, *HEADS[head], n) for head in args.heads for n in (HEADS[head][0] // 2, 2 * HEADS[head][0])]
    data: dict[str, Any] = {}
    for head, d, out, n in problems:
        data[f"{head}, n={n}"] = {"n": n, "d": d, "out": out, **measure(d, out, n, args.repeats, device)}
        print(head, n, flush=True)
    difficult = hard()
    names = ("one pass", "product", *OURS, "pinv", "lstsq", "naive")
    rows = [
        [
            *(key, r["d"], r["out"], f"{1e3 * r['QR']['median']:.3g}"),
            *(times(r, name) for name in names),
        ]
        for key, r in data.items()
    ]
    spectral = [
        [key, f"{1e3 * r['eigh']['median']:.3g}", times(r, "eigh"), *(times(r, name) for name in SPECTRAL)]
        for key, r in data.items()
    ]
    errors = [[k, *(error(r, m) for m in (*OURS, "pinv", "lstsq", "naive"))] for k, r in data.items()]
    body = (
        f"Medians of {args.repeats} on {device.type}, float64. From A: one QR in ms, all else as a multiple of it.\n\n"
        + table(["A", "d", "out", "QR, ms", *(f"{name} × QR" for name in names)], rows)
        + "\n\nFrom G: one `eigh` in ms and as a multiple of that QR, and the spectral methods as multiples of "
        "`eigh`:\n\n"
        + table(["A", "eigh, ms", "eigh × QR", *(f"{name} × eigh" for name in SPECTRAL)], spectral)
        + "\n\nError ‖A(V*−V)ᵀ‖ / ‖AVᵀ‖, and in brackets ‖V*‖ over that of `svd` where it is not 1 to four digits:\n\n"
        + table(["A", *OURS, "pinv", "lstsq", "naive"], errors)
        + "\n\nError where A is hard (n=160, d=320):\n\n"
        + table(["A", *OURS, "pinv", "lstsq", "naive"], [[k, *r.values()] for k, r in difficult.items()])
    )
    save(
        args.name,
        "One layer's system: every solver against the floor",
        body,
        {"device": device.type, "hard": difficult, **data},
        argv,
    )


def times(row: dict[str, Any], name: str) -> str:
    """Return a contender's time as a multiple of its floor's."""
    return f"{row[name]['of_floor']:.2f}" if name in row else "–"


def error(row: dict[str, Any], name: str) -> str:
    """Return a contender's error, and its norm if that is not the least."""
    if name not in row:
        return "–"
    norm = row[name]["norm"]
    return f"{row[name]['error']:.0e}" + (f" ({norm:.4f})" if abs(norm - 1) > 5e-5 else "")


if __name__ == "__main__":
    main()
