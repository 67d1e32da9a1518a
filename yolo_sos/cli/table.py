# yolo-sos, AGPL-3.0
"""``yolo-sos table``: the table of an experiment's records."""

from __future__ import annotations

from typing import Any

from yolo_sos.arguments import Argument
from yolo_sos.cli.grammar import Mode, refusing

OWN = (
    Argument("experiment", None, "str", "its name, such as voc/yolov5s"),
    Argument("results", "results", "str", "folder of the records"),
)


def run(arguments: dict[str, Any]) -> None:
    """Read the records, and write the table."""
    with refusing():
        from yolo_sos.experiment.table import ResultTable

        ResultTable(**arguments).run()


MODE = Mode(
    "table",
    "tabulate the records of an experiment, with intervals and p",
    ["table voc/yolov5s"],
    lambda: {"Arguments:": OWN},
    run,
    word="experiment",
    result="Writes table.md, .csv, .json and .png into results/<experiment>: mean ± std of each arm, the difference "
    "to the baseline over the same seeds with its 95 % interval and exact p.",
)
