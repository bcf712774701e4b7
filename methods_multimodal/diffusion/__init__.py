"""A sampling loop, step by step."""

from methods_multimodal.diffusion.denoising import DenoisingSteps, StepReader, decode, frames_of, to_array

__all__ = [
    "DenoisingSteps",
    "StepReader",
    "decode",
    "frames_of",
    "to_array",
]
