# yolo-sos, AGPL-3.0
"""Experiments: arms × seeds with a record of each run, and tables made from the records."""
