# yolo-sos, AGPL-3.0
"""The fixtures that tests of experiments and of studies share."""

from little_experiment import experiment, weights, workplace  # noqa: F401
