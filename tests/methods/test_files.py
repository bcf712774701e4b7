"""A file appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from methods_multimodal.core.files import write_json, write_text
from mm_adapters.store import atomic_write


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_text(path, "one\r\ntwo\n")
    assert path.read_bytes() == b"one\r\ntwo\n"

    def killed() -> None:
        with atomic_write(path, keep_suffix=True) as part:
            part.write_text("half")
            assert (part.suffix, part.parent) == (path.suffix, tmp_path)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert path.read_bytes() == b"one\r\ntwo\n"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_json_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    write_json(path, {"a": [1, "é"]})
    assert json.loads(path.read_text("utf-8")) == {"a": [1, "é"]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text("utf-8")) == {"a": [1, "é"]}
