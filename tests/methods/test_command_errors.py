"""What the commands refuse before anything is loaded, beside the nearest thing that they take."""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from methods_multimodal.commands.attribute import attribute
from methods_multimodal.commands.dissect import dissect
from methods_multimodal.commands.options import check_folder, check_out, check_work, open_model
from methods_multimodal.commands.report import report
from mm_adapters import InputError

# The package has functions of the same names.
dissecting = importlib.import_module("methods_multimodal.commands.dissect")
reporting = importlib.import_module("methods_multimodal.commands.report")


def _locked(monkeypatch: pytest.MonkeyPatch, folder: Path, lacks: int) -> None:
    """As if in this folder one of the permissions were lacking (a superuser lacks none)."""
    really = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: not (Path(path) == folder.absolute() and mode & lacks) and really(path, mode),
    )


def test_a_picture_goes_into_a_folder_that_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for suffix in (".png", ".PDF", ".svg", ".jpg", ".webp"):
        check_out(tmp_path / f"one{suffix}")
    with pytest.raises(InputError, match=r"one of \.png, \.pdf, \.svg, \.jpg, \.webp\.$"):
        check_out(tmp_path / "one.gif")
    with pytest.raises(FileNotFoundError, match=rf"there is no folder {re.escape(str(tmp_path / 'no'))}\.$"):
        check_out(tmp_path / "no" / "one.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match=r"folder\.png is a folder; give a file in it"):
        check_out(tmp_path / "folder.png")
    check_out(tmp_path / "folder.png" / "one.png")
    (tmp_path / "old.png").touch()
    check_out(tmp_path / "old.png")
    for lacks in (os.W_OK, os.X_OK):
        with monkeypatch.context() as patch:
            _locked(patch, tmp_path, lacks)
            with pytest.raises(InputError, match=r"one\.png: its folder cannot be written to"):
                check_out(tmp_path / "one.png")
            check_out(tmp_path / "folder.png" / "one.png")


def test_results_go_into_a_folder_that_is_there_or_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "folder").mkdir()
    for fits in (tmp_path, tmp_path / "folder", tmp_path / "new", tmp_path / "new" / "newer"):
        check_folder(fits)
        check_work(fits)
    check_work(None)
    with pytest.raises(InputError, match=r"^--out .*file is a file; give a folder"):
        check_folder(file)
    with pytest.raises(InputError, match=r"^--store .*newer: .*file is a file, so it has no folders"):
        check_folder(file / "new" / "newer", "--store")
    with pytest.raises(InputError, match=r"^--work .*file is a file; give a folder"):
        check_work(file)
    for lacks in (os.W_OK, os.X_OK):
        with monkeypatch.context() as patch:
            _locked(patch, tmp_path / "folder", lacks)
            for place in (tmp_path / "folder", tmp_path / "folder" / "new" / "newer"):
                with pytest.raises(InputError, match=r"^--out .*: .*folder cannot be written to"):
                    check_folder(place)
            check_folder(tmp_path / "new")


def test_a_model_of_another_kind_is_named_with_what_it_does_not_do() -> None:
    assert open_model("tiny-clip", "cpu", kind="contrastive", otherwise="?").name.startswith("tiny-clip")
    assert open_model("tiny-clip", "cpu").kind == "contrastive"
    with pytest.raises(InputError, match=r"^tiny-clip does not draw\.$"):
        open_model("tiny-clip", "cpu", kind="diffusion", otherwise="does not draw.")


def _picture(path: Path, size: tuple[int, int] = (8, 8)) -> None:
    Image.new("RGB", size, (200, 0, 0)).save(path)


def test_pictures_that_cannot_be_read_are_listed_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in "ab":
        _picture(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text("a red square")
    (pictures / "torn.png").write_bytes((pictures / "a.png").read_bytes()[:40])
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"torn\.png"):
        attribute("", train=str(pictures), work=tmp_path / "file", out=tmp_path / "out.png")
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match=r"^--work .*file is a file"):
        attribute(
            "", train=str(pictures), skip_unreadable=True, work=tmp_path / "file", out=tmp_path / "out.png"
        )
    assert re.fullmatch(r"skipped torn\.png: [^\n]+\n", capsys.readouterr().out)
    for name in "ab":
        (pictures / f"{name}.txt").unlink()
    with pytest.raises(InputError, match=r"torn\.png"):
        dissect(images=pictures, site="", out=tmp_path / "out")
    with pytest.raises(InputError, match=r"^Give --masks .*, --concepts \(names\), or both\.$"):
        dissect(images=pictures, site="", skip_unreadable=True, out=tmp_path / "out")
    assert re.fullmatch(r"skipped \S+torn\.png: [^\n]+\n", capsys.readouterr().out)


def test_a_list_of_concepts_holds_those_of_the_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "masks").mkdir()
    for name in "ab":
        _picture(tmp_path / "pictures" / f"{name}.png")
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    (tmp_path / "masks" / "legend.json").write_text('{"colour": {"1": "red", "2": "blue", "3": "azure"}}')
    concepts = tmp_path / "concepts.txt"
    opened: list[str] = []

    def stop(name: str, device: str | None) -> None:
        opened.append(name)
        raise StopIteration

    monkeypatch.setattr(dissecting, "open_model", stop)
    given: dict[str, Any] = {
        "images": tmp_path / "pictures",
        "site": "",
        "masks": tmp_path / "masks",
        "out": tmp_path / "out",
    }
    concepts.write_text("red\ngreen\n")
    with pytest.raises(InputError, match=r"concepts\.txt lacks azure, blue, which the masks have\. Add them"):
        dissect(concepts=concepts, **given)
    assert not opened
    legend = {str(i): name for i, name in enumerate("abcdefg", start=1)}
    (tmp_path / "masks" / "legend.json").write_text(json.dumps({"letter": legend | {"9": "red"}}))
    with pytest.raises(InputError, match=r"concepts\.txt lacks a, b, c, d, e, f, which the masks have"):
        dissect(concepts=concepts, **given)
    (tmp_path / "masks" / "legend.json").write_text('{"colour": {"1": "red", "2": "blue", "3": "azure"}}')
    concepts.write_text("red\nblue\ngreen\nazure\n")
    for some in (given | {"concepts": concepts}, given, given | {"concepts": concepts, "masks": None}):
        with pytest.raises(StopIteration):
            dissect(**some)
    assert opened == ["tiny-clip"] * 3


@pytest.mark.parametrize(
    ("roles", "text"),
    [
        (("vision", "projector", "language"), ["what is it?"] * 3),
        (("vision", "text", "language"), ["what is it?"] * 3),
        (("vision", "text"), ["a"]),
        (("vision",), None),
    ],
)
def test_a_dissected_model_gets_a_text_if_it_cannot_do_without(
    roles: tuple[str, ...], text: list[str] | None
) -> None:
    model: Any = SimpleNamespace(towers={f"tower {r}": SimpleNamespace(role=r) for r in roles})
    expected = {"images": [1, 2, 3]} | ({} if text is None else {"text": text})
    assert dissecting._inputs(model, (1, 2, 3), "what is it?") == expected


def test_a_report_takes_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(kind="tower")
    monkeypatch.setattr(reporting, "open_model", lambda name, device: model)
    kinds = ", ".join(reporting._KINDS)
    told = rf"^some is one tower alone, .*\({kinds}\)\. Its sites: mm-interp sites some$"
    with pytest.raises(InputError, match=told):
        report("some", out=tmp_path / "out.png")
    model.kind = "diffusion"
    with pytest.raises(InputError, match=r"^some is .*: it takes --prompt, not --text\.$"):
        report("some", text=["a"], out=tmp_path / "out.png")
