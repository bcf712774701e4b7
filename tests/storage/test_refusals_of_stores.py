"""What a store does not hold is refused with the reason, and nothing of it stays."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mm_adapters import StoreError
from mm_adapters.storage import writer as writing
from mm_adapters.store import Column, Store, Writer

X = {"x": Column((2,))}


def row(value: float = 0.0, n: int = 1) -> dict[str, torch.Tensor]:
    return {"x": torch.full((n, 2), value)}


def no_room(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.quint8])
def test_a_column_is_of_a_dtype_that_files_have(dtype: torch.dtype) -> None:
    says = rf"^A column cannot be {re.escape(str(dtype))}; it can be torch.float16, torch.bfloat16, .*bool\.$"
    with pytest.raises(StoreError, match=says):
        Column((2,), dtype)
    assert Column([2.0, 3], torch.int16).shape == (2, 3)  # type: ignore[arg-type]
    assert Column((2, 3), torch.int16).row_bytes == 12
    assert Column(()).row_bytes == 4


@pytest.mark.parametrize("about", [{"model": object()}, {"rows": {1, 2}}, {"x": torch.zeros(1)}, {(1, 2): 3}])
def test_what_a_store_is_about_is_json(about: dict[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"^`about` goes into a JSON file: .*(serializable|keys must be)"):
        Writer(tmp_path / "s", X, about)
    assert not (tmp_path / "s").exists()
    with Writer(tmp_path / "s", X, {"steps": (0, 1)}) as writer:
        writer.append(row())
    assert Store(tmp_path / "s").about == {"steps": [0, 1]}


def test_a_store_has_a_column_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"^A store needs a column\.$"):
        Writer(tmp_path / "s", {})
    assert not (tmp_path / "s").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=rf"^{re.escape(str(tmp_path))}/file cannot be a store: File exists"):
        Writer(tmp_path / "file", X)


def test_a_name_that_is_no_column_is_refused(tmp_path: Path) -> None:
    with Writer(tmp_path / "s", {**X, "y": Column(())}) as writer:
        writer.append({**row(3.0), "y": torch.ones(1)})
    store = Store(tmp_path / "s")
    assert set(store.rows()) == {"x", "y"}
    assert set(store.rows(columns=["y"])) == {"y"}
    with pytest.raises(StoreError, match=r"/s has no column \['z'\]; it has \['x', 'y'\]"):
        store.rows(columns=["x", "z"])
    with pytest.raises(StoreError, match=r"/s has no column \[\]; it has \['x', 'y'\]"):
        store.rows(columns=[])


@pytest.mark.parametrize(
    ("dtype", "fits", "outside"),
    [(torch.uint8, [0, 255], [256, -1]), (torch.int8, [-128, 127], [128, -129]), (torch.bool, [0, 1], [2])],
)
def test_whole_numbers_are_stored_if_the_column_holds_them(
    dtype: torch.dtype, fits: list[int], outside: list[int], tmp_path: Path
) -> None:
    with Writer(tmp_path / "s", {"n": Column((), dtype)}) as writer:
        for wrong in outside:
            with pytest.raises(
                StoreError, match=f"^'n' has values that {re.escape(str(dtype))} does not hold"
            ):
                writer.append({"n": torch.tensor([0, wrong])})
        writer.append({"n": torch.tensor(fits)})
    assert Store(tmp_path / "s").rows()["n"].long().tolist() == fits


def test_a_number_beyond_the_columns_floats_is_refused_and_an_infinite_one_is_not(tmp_path: Path) -> None:
    with Writer(tmp_path / "s", {"x": Column((2,), torch.float16)}) as writer:
        with pytest.raises(
            StoreError, match=r"^'x' has a value of 6\.56e\+04, more than torch.float16 holds"
        ):
            writer.append(row(-65_600.0))
        writer.append(row(65_504.0))
        writer.append(row(float("inf")))
    assert Store(tmp_path / "s").rows()["x"][:, 0].tolist() == [65_504.0, float("inf")]


@pytest.mark.parametrize("kept", [True, False])
def test_a_store_that_cannot_be_closed_is_not_complete_and_goes_on(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kept`: whether the open shard was saved on the way, as it is when time has passed."""
    monkeypatch.setattr(writing.SaveClock, "is_due", lambda clock: kept)
    writer = Writer(tmp_path / "s", X)
    writer.append(row(1.0, n=3), items=2)
    with monkeypatch.context() as full:
        full.setattr(writing, "write_manifest", no_room)
        with pytest.raises(StoreError) as caught:
            writer.close()
    safe = "3 rows of 2 items" if kept else "0 rows of 0 items"
    says = f"/s could not be written: No space left on device. {safe} are safely stored; make room"
    assert says in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert not writer.complete
    assert writer._files == []
    with Writer(tmp_path / "s", X) as again:  # Its lock was given back.
        assert again.rows == (3 if kept else 0)
        again.append(row(2.0, n=1))
    assert Store(tmp_path / "s").rows()["x"][:, 0].tolist() == ([1, 1, 1, 2] if kept else [2])


def test_a_last_manifest_that_cannot_be_written_leaves_the_rows_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(tmp_path / "s", X)
    writer.append(row(1.0, n=3), items=2)
    real, calls = writing.write_manifest, []

    def second_fails(*args: Any) -> None:
        calls.append(args)
        real(*args) if len(calls) == 1 else no_room()

    monkeypatch.setattr(writing, "write_manifest", second_fails)
    with pytest.raises(StoreError, match=r"No space left on device\. 3 rows of 2 items are safely stored"):
        writer.close()
    assert not writer.complete
    monkeypatch.undo()
    again = Writer(tmp_path / "s", X)
    assert (again.appends, again.items, again.rows, again.complete) == (1, 2, 3, False)
    again.close()
    assert again.complete
    assert Store(tmp_path / "s").rows()["x"].tolist() == [[1, 1]] * 3


@pytest.mark.parametrize(
    ("error", "given", "says"),
    [
        (OSError(5, "Input/output error"), StoreError, "/s could not be written: Input/output error"),
        (StoreError("another store"), StoreError, "^another store$"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "^now$"),
    ],
)
def test_a_writer_that_does_not_begin_gives_its_lock_back(
    error: BaseException, given: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(writing, "write_manifest", fails)
    with pytest.raises(given, match=says):
        Writer(tmp_path / "s", X)
    monkeypatch.undo()
    with Writer(tmp_path / "s", X) as writer:
        writer.append(row())
    assert len(Store(tmp_path / "s")) == 1


def test_files_that_were_opened_are_left_when_a_later_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []

    class File:
        def __init__(self, path: Path, name: str, *_: Any, **__: Any) -> None:
            self.name = name
            if name == "c":
                no_room()

        def leave(self) -> None:
            left.append(self.name)

    with Writer(tmp_path / "s", {n: Column(()) for n in "abcd"}) as writer:
        monkeypatch.setattr(writing, "GrowingFile", File)
        with pytest.raises(StoreError, match="No space left"):
            writer.append({n: torch.ones(1) for n in "abcd"})
        assert left == ["a", "b"]
        monkeypatch.undo()
        writer.append({n: torch.ones(1) for n in "abcd"})
    assert len(Store(tmp_path / "s")) == 1
