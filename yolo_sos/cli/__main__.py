# yolo-sos, AGPL-3.0
"""``python -m yolo_sos.cli``."""

from yolo_sos.cli import main

main()
