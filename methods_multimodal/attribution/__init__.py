"""Gradients along a path between two runs: what patching, circuits and neurons attribute with."""

from methods_multimodal.attribution.path import (
    Ends,
    PathGradients,
    differentiable_sum,
    midpoints,
    path_gradients,
)

__all__ = ["Ends", "PathGradients", "differentiable_sum", "midpoints", "path_gradients"]
