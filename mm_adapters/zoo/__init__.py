"""Small models that really learned something, and the rendered world they learned it in."""

from pathlib import Path

from mm_adapters.checkpoints.shipped import NAMES, path

__all__ = ["NAMES", "path", "sample_images"]

_HERE = Path(__file__).parent


def sample_images() -> dict[str, Path]:
    """The sample pictures that come with the zoo, by name, such as `red_circle`."""
    return {file.stem: file for file in sorted((_HERE / "samples").glob("*.png"))}
