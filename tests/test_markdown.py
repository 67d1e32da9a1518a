# yolo-sos, AGPL-3.0
"""Tables in Markdown, and the figures in them."""

import pytest

from yolo_sos.markdown import markdown_table, mean_std


def test_columns_are_aligned():
    assert markdown_table([["arm", "mAP"], ["baseline", "0.5"], ["", "-0.125"]]) == (
        "| arm      |    mAP |\n| -------- | -----: |\n| baseline |    0.5 |\n|          | -0.125 |\n"
    )
    assert markdown_table([["a", "b"]], texts=2).splitlines()[1] == "| --- | --- |"
    with pytest.raises(ValueError, match="zip"):  # a line that is too short
        markdown_table([["arm", "mAP"], ["baseline"]])


def test_a_mean_has_a_deviation_where_there_are_several_values():
    assert mean_std([0.25], "+.2f") == "+0.25"
    assert mean_std([1.0, 2.0, 3.0], "+.2f") == "+2.00 ± 1.00"  # of the sample: n − 1
    assert mean_std([1.0, float("inf")], ".2f") == "inf ± nan"
    assert mean_std([1.0, float("nan")], ".2f") == "nan ± nan"
