"""`mm-interp` as a user runs it: files are written, numbers are the model's own, mistakes are one line."""

from __future__ import annotations

import errno
import json
import shutil
from contextlib import redirect_stderr
from importlib.metadata import EntryPoint
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import mm_adapters as mm
from mm_adapters import cli, zoo
from mm_adapters.sites.listing import listing, ranges

METHODS = EntryPoint("methods", "methods_multimodal.commands:register", cli.GROUP)


def invoke(*arguments: str, points: tuple[EntryPoint, ...] = (METHODS,)) -> Any:
    return CliRunner().invoke(cli.build(points), list(arguments))


def worked(*arguments: str) -> Any:
    result = invoke(*arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result


def refused(*arguments: str) -> str:
    """What a mistake prints: to stderr, with exit code 2, and no traceback."""
    result = invoke(*arguments)
    assert result.exit_code == 2, f"{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def is_a_picture(path: Path) -> None:
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 500
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500


def test_report_on_images_and_texts_has_the_models_own_logits(tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    out, samples = tmp_path / "r.png", zoo.sample_images()
    names, texts = ("green_triangle", "yellow_star"), ("a green triangle", "a yellow star", "a blue square")
    flags = [f for n in names for f in ("--image", str(samples[n]))] + [
        f for t in texts for f in ("--text", t)
    ]
    result = worked("report", "--model", "tiny-clip", *flags, "--out", str(out))
    assert f"wrote {out}" in result.stdout
    is_a_picture(out)
    numbers = json.loads(out.with_suffix(".json").read_text())

    folder = zoo.path("tiny-clip")
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    images = [Image.open(samples[n]) for n in names]
    given = CLIPProcessor.from_pretrained(folder)(
        text=list(texts), images=images, return_tensors="pt", padding=True
    )
    with torch.no_grad():
        own = model(**given).logits_per_image
    torch.testing.assert_close(torch.tensor(numbers["logits"]), own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(numbers["probabilities"]), own.softmax(-1), rtol=1e-4, atol=1e-4)
    shares = numbers["attribution"]
    torch.testing.assert_close(torch.tensor(shares["sum"]), own, rtol=1e-4, atol=1e-4)
    assert shares["residual"] <= 1e-5
    assert np.shape(shares["heads"]) == (2, 3, 4, 4)
    assert numbers["patching"]["clean"] == pytest.approx(float(own[0, 0] - own[0, 1]), rel=1e-4)
    assert numbers["patching"]["corrupted"] == pytest.approx(float(own[1, 0] - own[1, 1]), rel=1e-4)
    # It knows a triangle from a star, or the rest of this page would mean nothing.
    assert own.argmax(-1).tolist() == [0, 1]


def test_report_needs_no_arguments_and_takes_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a copy"
    shutil.copytree(zoo.path("tiny-clip"), folder)
    monkeypatch.chdir(tmp_path)
    worked("report")
    is_a_picture(tmp_path / "report.png")
    worked("report", "--model", str(folder), "--out", "copy.png")
    first, second = (json.loads((tmp_path / n).read_text()) for n in ("report.json", "copy.json"))
    assert first["logits"] == second["logits"]


def test_one_image_is_compared_with_a_sample_picture(tmp_path: Path) -> None:
    mine = tmp_path / "mine.png"
    Image.new("RGB", (100, 70), "green").save(mine)
    worked("report", "--image", str(mine), "--text", "a red circle", "--out", str(tmp_path / "r.png"))
    numbers = json.loads((tmp_path / "r.json").read_text())
    assert numbers["images"][0] == "mine.png"
    assert numbers["images"][1] in {f"{name}.png" for name in zoo.sample_images()}


def test_report_on_a_question_has_the_models_own_answer(tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    out, samples = tmp_path / "r.png", zoo.sample_images()
    names = ("red_circle_left_of_blue_square", "blue_circle_left_of_red_square")
    flags = [f for n in names for f in ("--image", str(samples[n]))]
    worked(
        "report",
        "--model",
        "tiny-llava",
        *flags,
        "--question",
        "what colour is the circle?",
        "--out",
        str(out),
    )
    is_a_picture(out)
    numbers = json.loads(out.with_suffix(".json").read_text())
    folder = zoo.path("tiny-llava")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = LlavaProcessor.from_pretrained(folder)
    prompt = "<image>\nquestion: what colour is the circle? answer:"
    for name, answer in zip(names, numbers["answers"], strict=True):
        given = processor(text=[prompt], images=[Image.open(samples[name])], return_tensors="pt")
        ids = model.generate(**given, max_new_tokens=16, do_sample=False)[0, given["input_ids"].shape[1] :]
        assert processor.tokenizer.decode(ids, skip_special_tokens=True).strip() == answer
    assert numbers["answers"] == ["red", "blue"]
    assert numbers["attribution"]["residual"] <= 1e-5
    assert numbers["logit_lens"][-1][0]["token"].strip() == "red"
    # The circle stands on the left, so that is where its colour comes from.
    effect = np.array(numbers["patching"]["patches"][0])
    assert effect[:, :4].sum() > effect[:, 4:].sum()


def test_report_on_a_prompt_shows_the_pipelines_own_picture(tmp_path: Path) -> None:
    out = tmp_path / "r.png"
    prompt = "a large red circle on a white background"
    worked(
        "report", "--model", "tiny-sd", "--prompt", prompt, "--steps", "8", "--seed", "3", "--out", str(out)
    )
    is_a_picture(out)
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert set(numbers["words"]) == {"a", "large", "red", "circle", "on", "white", "background"}
    assert np.shape(numbers["attention_by_step"]) == (8, 7)
    assert sum(numbers["attention_by_step"][0]) < 1


def test_sites_lists_names_axes_and_reasons() -> None:
    result = worked("sites", "tiny-clip", "vision.blocks.0.attn.*")
    assert "vision.blocks.0.attn.hook_pattern" in result.stdout
    assert "head=4" in result.stdout
    everything = worked("sites", "tiny-clip", "--meta", "--every").stdout.splitlines()
    assert len(everything) == len(mm.load("tiny-clip").sites())


def test_sites_of_all_layers_are_one_line_whose_name_finds_them() -> None:
    model = mm.load("tiny-clip", device="meta")
    found = model.sites()
    lines = worked("sites", "tiny-clip", "--meta").stdout.splitlines()
    present = [line for line in lines if not line.startswith("absent: ")]
    names = [line.split("  ")[0].strip() for line in present]
    covered = [s.name for name in names for s in model.sites(name) if not s.reason]
    assert sorted(covered) == sorted(s.name for s in found if not s.reason)  # Each once.
    assert len(lines) < len(found) / 2
    (pattern,) = [line for line in lines if line.startswith("vision.blocks.*.attn.hook_pattern")]
    assert pattern.split() == [
        "vision.blocks.*.attn.hook_pattern",
        "0-3",
        "[batch,",
        "head=4,",
        "query,",
        "key]",
    ]


def test_a_list_of_sites_is_no_wider_than_the_window() -> None:
    sites = mm.load("tiny-sd", device="meta").sites()
    for width in (60, 100):
        text = listing(sites, width)
        assert max(map(len, text.splitlines())) <= width
        assert text.replace("\n", "").replace(" ", "") == listing(sites, 9999).replace("\n", "").replace(
            " ", ""
        )
    assert ranges([0, 1, 2, 3]) == "0-3"
    assert ranges([0, 2, 4]) == "0-4 by 2"
    assert ranges([3, 4, 8]) == "3-4, 8"


def test_a_mistake_is_one_line_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mm_adapters.loading.load", lambda *a, **k: pytest.fail("it loaded"))
    assert "no image nowhere.png" in refused("report", "--image", "nowhere.png")
    assert ".png" in refused("report", "--out", str(tmp_path / "r.docx"))
    assert "no folder" in refused("report", "--out", str(tmp_path / "missing" / "r.png"))
    three = [f for path in list(zoo.sample_images().values())[:3] for f in ("--image", str(path))]
    assert "3 were given" in refused("report", *three)


def test_a_mistake_about_the_model_says_what_it_takes(tmp_path: Path) -> None:
    out = str(tmp_path / "r.png")
    assert "takes --image and --text, not --question" in refused(
        "report", "--question", "what?", "--out", out
    )
    assert "tiny-clip" in refused("sites", "tiny-clap")
    assert "no site" in refused("sites", "tiny-clip", "vision.blocks.9.*")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    assert "broken.png" in refused("report", "--image", str(broken), "--out", out)
    assert not Path(out).exists()


def test_a_plugin_that_does_not_load_is_said_and_does_not_take_the_rest_with_it() -> None:
    broken = EntryPoint("broken", "no_such_package.commands:register", cli.GROUP)
    said = StringIO()
    with redirect_stderr(said):
        app = cli.build((broken, METHODS))
    assert "'broken'" in said.getvalue()
    assert "no_such_package" in said.getvalue()
    assert CliRunner().invoke(app, ["report", "--help"]).exit_code == 0


def test_every_error_of_ours_is_a_mistake_the_command_line_knows() -> None:
    from mm_adapters import _errors

    ours = {e for e in vars(_errors).values() if isinstance(e, type) and e.__module__ == _errors.__name__}
    assert all(issubclass(e, cli.MISTAKES) for e in ours)


def test_main_takes_its_arguments_and_gives_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sites", "tiny-clip", "vision.blocks.0.attn.hook_pattern"], (METHODS,)) == 0
    assert "vision.blocks.0.attn.hook_pattern" in capsys.readouterr().out
    assert cli.main(["words", "--out", str(tmp_path / "words.txt")], (METHODS,)) == 2
    assert "mm-interp: --out" in capsys.readouterr().err
    assert cli.main(["--help"], (METHODS,)) == 0
    listed = capsys.readouterr().out
    assert all(
        name in listed
        for name in (
            "report",
            "attribute",
            "circuit",
            "dissect",
            "heads",
            "lens",
            "words",
            "trace",
            "flow",
            "probe",
        )
    )


def ends(error: BaseException) -> tuple[int, str]:
    """The exit code of a command that ends so, and what it printed."""

    def register(app: Any) -> None:
        def fail() -> None:
            raise error

        app.command("fail")(fail)

    point = EntryPoint("failing", "json:loads", cli.GROUP)
    said = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        patch.setattr(EntryPoint, "load", lambda self: register)
        return cli.main(["fail"], (point,)), said.getvalue()


def test_what_the_machine_says_no_to_is_one_line() -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert ends(full) == (2, "mm-interp: No space left on device.\n")
    shut = PermissionError(errno.EACCES, "Permission denied", "a.png")
    assert ends(shut) == (2, "mm-interp: a.png: Permission denied.\n")
    assert ends(mm.InputError("two\nlines")) == (2, "mm-interp: two lines\n")
    with pytest.raises(OSError, match="Connection reset"):  # Ours: it shows where.
        ends(OSError(errno.ECONNRESET, "Connection reset"))


@pytest.mark.parametrize(("code", "exit_code"), [(0, 0), (3, 3), (None, 0), ("a reason", 1)])
def test_a_commands_own_exit_is_the_exit_code(code: Any, exit_code: int) -> None:
    assert ends(SystemExit(code))[0] == exit_code


def test_an_application_that_returns_was_right(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(cli, "build", lambda points: lambda args: asked.append((points, args)))
    assert cli.main(("sites", "x"), ()) == 0
    assert cli.main() == 0
    assert asked == [((), ["sites", "x"]), (None, None)]


@pytest.mark.parametrize(
    "command",
    ["report", "attribute", "circuit", "dissect", "heads", "lens", "words", "trace", "flow", "probe"],
)
def test_every_command_takes_a_model_a_device_and_where_to_write(command: str) -> None:
    options = {o for p in click_command(command).params for o in p.opts}
    assert {"--model", "--device", "--out"} <= options


def click_command(name: str) -> Any:
    import typer.main

    return typer.main.get_command(cli.build((METHODS,))).commands[name]  # type: ignore[attr-defined]
