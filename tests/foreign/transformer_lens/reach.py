"""Whether a test touched a served model: its attributes, or those of a cache of it."""

from __future__ import annotations

from typing import Any

_KEY = "_served_to_foreign_tests"
touched = False


def watched(model: Any) -> Any:
    """The model, whose use is noticed from now on."""
    model.__dict__[_KEY] = True
    return model


def notice(*classes: type, owner: str | None = None) -> None:
    """Notices attributes of watched objects of these classes; with `owner`, of what has a watched one."""
    for cls in classes:
        _notice(cls, owner)


def _notice(cls: Any, owner: str | None) -> None:
    plain = cls.__getattribute__

    def noticed(self: Any, name: str) -> Any:
        global touched
        if not touched:
            values = object.__getattribute__(self, "__dict__")
            watcher = values if owner is None else getattr(values.get(owner), "__dict__", {})
            if _KEY in watcher:
                touched = True
        return plain(self, name)

    cls.__getattribute__ = noticed
