#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""Rows per second and peak memory of the streaming second moment, against the number of rows.

    python tools/bench_gram.py                          # 10⁴ to 10⁷ rows of d = 320: a minute or two on two CPU cores

Every size runs in a process of its own, so that peak memory is its own. Rows come in float32 in pieces of 8 400, an
image of 640 px in a detector. As yardstick in the same process and in turn: the same products in one `A.T @ A` of one
piece in float64. A second table sets what weighs all classes alike by one product against one product per class, which
is what it falls back to when there are more rows than it keeps. Results go to results/bench/gram.*.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from bench_common import Peak, save, table, told

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 8400


def measure(rows: int, d: int) -> dict[str, Any]:
    """Return seconds and peak memory for so many rows, and the time of the bare products."""
    import torch

    from yolo_sos.core import Gram

    pieces = [min(PIECE, rows - i) for i in range(0, rows, PIECE)]
    piece = torch.rand(PIECE, d)
    double = piece.double()
    Gram(d).update(piece)  # warms up
    peak = Peak()
    peak.reset()
    gram, seconds = Gram(d), 0.0
    products: list[float] = []
    for i, size in enumerate(pieces):
        start = time.perf_counter()
        gram.update(piece[:size])
        middle = time.perf_counter()
        seconds += middle - start
        if i % max(1, len(pieces) // 50) == 0:
            double.T @ double
            products.append((time.perf_counter() - middle) / PIECE)
    return {"rows": rows, "seconds": seconds, "mb": peak.mb, "product_per_row": median(products)}


def grouped(groups: int, d: int = 80, repeats: int = 3) -> dict[str, Any]:
    """Return seconds of the second moment of rows in so many groups, by one product and by one per group."""
    import torch

    from yolo_sos.core import Gram, GroupedGram

    features, weights = torch.rand(PIECE, d), torch.rand(PIECE, groups)

    def one_product() -> Tensor:
        moment = GroupedGram(d)
        moment.update(features, weights)
        return moment.gram.matrix

    def one_per_group() -> Tensor:
        double = features.double()  # once, not once per group
        return sum(Gram(d).update(double, w).mean().matrix for w in weights.T)  # type: ignore[return-value]

    seconds: dict[str, list[float]] = {"one": [], "each": []}
    for repeat in range(repeats + 1):
        for name, run in (("one", one_product), ("each", one_per_group)):
            start = time.perf_counter()
            run()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    torch.testing.assert_close(one_product(), one_per_group(), rtol=1e-9, atol=0)
    return {"groups": groups, "rows": PIECE, "d": d, **seconds}


def main(argv: Sequence[str] | None = None) -> None:
    """Run all sizes and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=320, help="(%(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[10**k for k in range(4, 8)], help="(10⁴ … 10⁷)")
    parser.add_argument("--name", default="gram", help="of the files in results/bench (%(default)s)")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)  # a worker
    args = parser.parse_args(argv)
    if args.size:
        print(json.dumps(measure(args.size, args.d)))
        return
    sizes = []
    for rows in args.rows:
        worker = [sys.executable, __file__, f"--size={rows}", f"--d={args.d}"]
        sizes.append(json.loads(subprocess.run(worker, check=True, stdout=subprocess.PIPE, text=True).stdout))
    lines = [
        [
            f"{s['rows']:.0e}",
            f"{s['seconds']:.3g}",
            f"{s['rows'] / s['seconds'] / 1e3:.0f}",
            f"{s['mb']:.0f}",
            f"{s['seconds'] / s['rows'] / s['product_per_row']:.2f}",
        ]
        for s in sizes
    ]
    classes = [grouped(groups) for groups in (4, 21, 81, 1001)]
    body = (
        f"d = {args.d}, one run each.\n\n"
        + table(["rows", "s", "thousand rows / s", "peak MB", "× bare product"], lines)
        + f"\n\n{classes[0]['rows']} rows of d = {classes[0]['d']} in groups that count the same, medians "
        "(least–largest):\n\n"
        + table(
            ["groups", "one product, ms", "one per group, ms", "times as fast"],
            [
                [
                    c["groups"],
                    told([1e3 * t for t in c["one"]]),
                    told([1e3 * t for t in c["each"]]),
                    told([b / a for a, b in zip(c["one"], c["each"], strict=True)]),
                ]
                for c in classes
            ],
        )
    )
    save(args.name, "The streaming second moment", body, {"d": args.d, "sizes": sizes, "groups": classes}, argv)


if __name__ == "__main__":
    main()
