# yolo-sos, AGPL-3.0
"""docs/faults.md lists what the suite tests, no more and no less."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from faults_table import FAULTS_ELSEWHERE, FEATURES_ELSEWHERE, ROOT, TABLE, collected, table

from yolo_sos.files import write_text


def test_the_committed_table_is_that_of_the_suite(pytestconfig):
    items = pytestconfig.stash[collected]
    missing = {p.name for p in Path(__file__).parent.glob("test_*.py")} - {item.path.name for item in items}
    if missing or any("::" in arg for arg in pytestconfig.args):
        pytest.skip("only a part of the suite was collected")
    made = table(items)
    if os.environ.get("YOLO_SOS_WRITE_FAULTS"):
        write_text(TABLE, made)
    assert TABLE.read_text(encoding="utf-8") == made


def test_there_are_forty_faults_and_more():
    faults = TABLE.read_text(encoding="utf-8").split("## Faults and bad input")[1]
    rows = re.findall(r"^\| (?!what|---)(.+?) \|", faults, re.MULTILINE)
    assert len(set(rows)) == len(rows) >= 40


@pytest.mark.parametrize("test", [*FEATURES_ELSEWHERE, *FAULTS_ELSEWHERE])
def test_tests_elsewhere_exist(test):
    file, name = test.split("::")
    assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")
