#!/usr/bin/env python
# yolo-sos, AGPL-3.0
"""Run ``yolo-sos eval`` from a checkout; ``python tools/eval_voc.py --help`` lists the options."""

import sys

from yolo_sos.evaluate.command import main

if __name__ == "__main__":
    sys.exit(main(command="python tools/eval_voc.py"))
