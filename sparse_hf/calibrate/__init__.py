"""Calibration: each method's parameters from a model and some text, ending in an artefact."""
