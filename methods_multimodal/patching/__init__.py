"""What changes when a site of one run is given the value of another's."""

from methods_multimodal.patching.activation_patching import (
    ActivationPatching,
    patch_heads,
    patch_positions,
    patch_units,
)

__all__ = [
    "ActivationPatching",
    "patch_heads",
    "patch_positions",
    "patch_units",
]
