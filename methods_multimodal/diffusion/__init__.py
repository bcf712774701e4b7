"""A sampling loop, step by step."""

from methods_multimodal.diffusion.denoising import (
    DenoisingSteps,
    StepPredictions,
    StepReader,
    frames_of,
    step_reader,
)
from methods_multimodal.diffusion.pictures import decode, pictures_of, to_array

__all__ = [
    "DenoisingSteps",
    "StepPredictions",
    "StepReader",
    "decode",
    "frames_of",
    "pictures_of",
    "step_reader",
    "to_array",
]
