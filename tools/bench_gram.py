#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""Rows per second and peak memory of the streaming second moment, against the number of rows.

    python tools/bench_gram.py                          # 10⁴ to 10⁷ rows of d = 320: a minute or two on two CPU cores

Every size runs in a process of its own, so that peak memory is its own. Rows come in float32 in pieces of 8 400, an
image of 640 px in a detector. As yardstick in the same process and in turn: the same products in one `A.T @ A` of one
piece in float64. A second table is of rows in groups that count the same, the default: of more than some megabytes a
sample is drawn; "kept" is its size, and "off by" what it costs, ‖G − exact‖ / ‖exact‖. Results go to
docs/bench/gram.*.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from bench_common import Peak, save, table

PIECE = 8400


def measure(rows: int, d: int, groups: int) -> dict[str, Any]:
    """Return seconds and peak memory for so many rows in so many groups, and the time of the bare products."""
    import torch

    from yolo_sos.core import Moments, RowSample
    from yolo_sos.core.moments import CAPACITY

    generator = torch.Generator().manual_seed(0)
    pieces = [min(PIECE, rows - i) for i in range(0, rows, PIECE)]
    piece = torch.rand(PIECE, d, generator=generator)
    weights, labels = torch.rand(PIECE, max(groups, 1), generator=generator).pow(16).max(1)  # most are small
    given = (piece, labels, weights) if groups else (piece,)
    double = piece.double()
    Moments(d).update(piece)  # warms up
    peak = Peak()
    peak.reset()
    size = max(CAPACITY // (4 * d), d)
    accumulator: Moments | RowSample = RowSample(d, groups, size, generator) if groups else Moments(d)
    seconds = 0.0
    products: list[float] = []
    for i, count in enumerate(pieces):
        fresh = [x[:count].clone() for x in given]  # each piece in memory of its own
        start = time.perf_counter()
        accumulator.update(*fresh)
        middle = time.perf_counter()
        seconds += middle - start
        if i % max(1, len(pieces) // 50) == 0:
            double.T @ double
            products.append((time.perf_counter() - middle) / PIECE)
    start = time.perf_counter()
    found = accumulator.matrix if isinstance(accumulator, Moments) else accumulator.moments.matrix
    seconds += time.perf_counter() - start
    mb = peak.mb
    times = torch.full((PIECE,), len(pieces) - 1.0, dtype=torch.float64)  # that each row of the piece was seen
    times[: pieces[-1]] += 1.0
    if groups:
        times *= weights.double()
        times /= torch.zeros(groups, dtype=torch.float64).index_add_(0, labels, times)[labels]
    exact = (double * times[:, None]).T @ double
    error = float((found - exact).norm() / exact.norm())
    kept = len(accumulator.sample) if isinstance(accumulator, RowSample) else rows
    return {
        "rows": rows,
        "kept": kept,
        "seconds": seconds,
        "mb": mb,
        "product_per_row": median(products),
        "error": error,
    }


def told_sizes(sizes: Sequence[dict[str, Any]]) -> str:
    """Return what was measured for each number of rows as a table."""
    lines = [
        [
            f"{s['rows']:.0e}",
            f"{s['kept']}",
            f"{s['seconds']:.3g}",
            f"{s['rows'] / s['seconds'] / 1e3:.0f}",
            f"{s['mb']:.0f}",
            f"{s['seconds'] / s['rows'] / s['product_per_row']:.2f}",
            f"{s['error']:.0e}",
        ]
        for s in sizes
    ]
    return table(["rows", "kept", "s", "thousand rows / s", "peak MB", "× bare product", "off by"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all sizes and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=320, help="(%(default)s)")
    parser.add_argument("--rows", type=int, nargs="+", default=[10**k for k in range(4, 8)], help="(10⁴ … 10⁷)")
    parser.add_argument("--groups", type=int, default=20, help="of the second table (%(default)s)")
    parser.add_argument("--name", default="gram", help="of the files in docs/bench (%(default)s)")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)  # a worker
    args = parser.parse_args(argv)
    if args.size:
        print(json.dumps(measure(args.size, args.d, args.groups)))
        return
    sizes: dict[int, list[dict[str, Any]]] = {0: [], args.groups: []}
    for groups, found in sizes.items():
        for rows in args.rows:
            worker = [sys.executable, __file__, f"--size={rows}", f"--d={args.d}", f"--groups={groups}"]
            found.append(json.loads(subprocess.run(worker, check=True, stdout=subprocess.PIPE, text=True).stdout))
    body = (
        f"d = {args.d}, one run each.\n\n"
        + told_sizes(sizes[0])
        + f"\n\nIn {args.groups} groups that count the same:\n\n"
        + told_sizes(sizes[args.groups])
    )
    data = {"d": args.d, "sizes": sizes[0], f"sizes in {args.groups} groups": sizes[args.groups]}
    save(args.name, "The streaming second moment", body, data, argv)


if __name__ == "__main__":
    main()
