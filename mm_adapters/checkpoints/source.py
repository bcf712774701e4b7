"""A checkpoint, wherever it is: a folder here, or a repository on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_adapters._errors import CheckpointError, UnfitCheckpointError

# What from_pretrained and hf_hub_download both take.
_SHARED = ("revision", "cache_dir", "token", "local_files_only", "force_download")


@dataclass(frozen=True)
class Source:
    """`name` is what from_pretrained is given; `folder` is set if the checkpoint is here."""

    name: str
    folder: Path | None = None
    where: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def at_hub(cls, name: str, options: Mapping[str, Any]) -> Source:
        """A repository on the hub, at the revision and in the cache that `options` say."""
        return cls(name, None, {k: options[k] for k in _SHARED if k in options})

    def file(self, name: str) -> Path | None:
        """One small file of the checkpoint, here; None if the checkpoint has none of this name.

        Raises: CheckpointError, with the hub's reason, if there is no such repository or no way to
        it.
        """
        if self.folder is not None:
            return self.folder / name if (self.folder / name).is_file() else None
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(hf_hub_download(self.name, name, **self.where))
        except errors.LocalEntryNotFoundError as error:
            if self._is_cached():  # Offline, and this file was never asked for.
                return None
            raise CheckpointError(f"the hub cannot be reached ({_first_line(error)})") from None
        except errors.EntryNotFoundError:
            return None
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            raise CheckpointError(f"the hub says: {_first_line(error)}") from None

    def has_any(self, names: Iterable[str]) -> bool:
        """Whether the checkpoint has a file of one of these names."""
        return any(self.file(name) is not None for name in names)

    def read(self, method: Any, **options: Any) -> Any:
        """What a library's from_pretrained makes of it: from safetensors, running no code of its own.

        Raises: CheckpointError, with the library's reason; UnfitCheckpointError if that is a ValueError.
        """
        safe = {"use_safetensors": True, "trust_remote_code": False, **self.where}
        try:
            return method(self.name, **safe | options)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            kind = UnfitCheckpointError if isinstance(error, ValueError) else CheckpointError
            raise kind(f"{self.name} cannot be loaded: {error}") from None

    def _is_cached(self) -> bool:
        from huggingface_hub import try_to_load_from_cache

        here = {k: self.where[k] for k in ("cache_dir", "revision") if k in self.where}
        return any(
            isinstance(try_to_load_from_cache(self.name, name, **here), str)
            for name in ("config.json", "model_index.json")
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
