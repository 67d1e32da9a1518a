# yolo-sos, AGPL-3.0
"""Experiments: arms × seeds, each run with a record, and tables of records."""
