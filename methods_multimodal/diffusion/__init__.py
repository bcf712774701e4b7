"""A sampling loop, step by step."""

from methods_multimodal.diffusion.denoising import (
    DenoisingSteps,
    StepPredictions,
    StepReader,
    frames_of,
    step_reader,
)
from methods_multimodal.diffusion.pictures import decode, pictures_of, to_array
from methods_multimodal.diffusion.sampling import sampling_of

__all__ = [
    "DenoisingSteps",
    "StepPredictions",
    "StepReader",
    "decode",
    "frames_of",
    "pictures_of",
    "sampling_of",
    "step_reader",
    "to_array",
]
