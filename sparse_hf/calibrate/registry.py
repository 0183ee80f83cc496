"""The calibrations by name. Each lies in a module of its own, which is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module

from sparse_hf.calibrate.framework import Calibrator

_CLASSES = {
    "xattention": "sparse_hf.calibrate.xattention:XAttentionCalibrator",
    "flexprefill": "sparse_hf.calibrate.flexprefill:FlexPrefillCalibrator",
    "minference": "sparse_hf.calibrate.minference:MInferenceCalibrator",
    "triangle": "sparse_hf.calibrate.triangle:TriangleCalibrator",
    "scores": "sparse_hf.calibrate.scores:ScoresCalibrator",
}


def available_calibrators() -> tuple[str, ...]:
    return tuple(_CLASSES)


def calibrator_class(name: str) -> type[Calibrator]:
    """The class of a calibration.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in _CLASSES:
        raise ValueError(f"unknown calibration {name!r}; known: {', '.join(_CLASSES)}")
    module, _, attribute = _CLASSES[name].partition(":")
    found: type[Calibrator] = getattr(import_module(module), attribute)
    return found
