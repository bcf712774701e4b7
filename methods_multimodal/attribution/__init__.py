"""Gradients along a path between two runs: what patching, circuits and neurons attribute with."""

from methods_multimodal.attribution.path import Ends, PathGradients, midpoints, path_gradients

__all__ = ["Ends", "PathGradients", "midpoints", "path_gradients"]
