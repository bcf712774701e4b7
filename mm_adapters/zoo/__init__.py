"""Small models that really learned something, and the rendered world they learned it in."""

from pathlib import Path

from mm_adapters._errors import InputError

__all__ = ["NAMES", "path", "sample_images"]

NAMES = ("tiny-clip", "tiny-llava", "tiny-sd")

_HERE = Path(__file__).parent


def path(name: str) -> Path:
    """The folder of one of the zoo's checkpoints, for any `from_pretrained`."""
    if name not in NAMES:
        raise InputError(f"zoo: no model {name!r}; there is {', '.join(NAMES)}.")
    return _HERE / "models" / name


def sample_images() -> dict[str, Path]:
    """The sample pictures that come with the zoo, by name, such as `red_circle`."""
    return {file.stem: file for file in sorted((_HERE / "samples").glob("*.png"))}
