"""The zoo's commands: which recipe is run with what, what is written where, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import save_file
from transformers import CLIPModel, LlavaForConditionalGeneration

from mm_adapters import InputError, StoreError
from mm_adapters.zoo import (
    NAMES,
    _shapes,
    _training,
    cards,
    clip,
    drawing,
    evaluate,
    judges,
    llava,
    measures,
    path,
    sd,
    train,
    world,
)
from mm_adapters.zoo.measures import Measure
from mm_adapters.zoo.models_at import load


def stage(work: Path, name: str, steps: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    run = json.dumps({"steps_done": steps, "seconds": 1.5, "run": {}})
    save_file({"a": torch.zeros(1)}, work / f"{name}.safetensors", metadata={"run": run})


@pytest.mark.parametrize(
    ("name", "module", "stages"),
    [
        ("tiny-clip", clip, clip.STAGES),
        ("tiny-llava", llava, ("tiny-llava",)),
        ("tiny-sd", sd, ("vae", "sd-first", "tiny-sd")),
    ],
)
def test_a_name_is_trained_by_its_recipe_and_its_history_written(
    name: str, module: Any, stages: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked: dict[str, Any] = {}

    def trained(work: Path, *eye: Any, **options: Any) -> str:
        asked.update(options, work=work, eye=eye)
        for number, one in enumerate(stages):
            stage(work / (one if name == "tiny-sd" else name), one, 10 + number)
        return "the model"

    def saved(model: str, folder: Path) -> None:
        assert model == "the model"
        folder.mkdir(parents=True)

    monkeypatch.setattr(module, "train", trained)
    monkeypatch.setattr(module, "save", saved)
    monkeypatch.setattr(train, "built_on", lambda name, work: f"what {name} is built on in {work}")
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    out = tmp_path / "zoo"
    train.main(name, steps=3, out=out, work=None, seed=4, threads=2, resume=True)
    eye = () if name == "tiny-clip" else (f"what {name} is built on in {out / 'work'}",)
    begin = {} if name == "tiny-llava" else {"begin": None}
    assert asked == {"steps": 3, "seed": 4, "resume": True, "work": out / "work", "eye": eye, **begin}
    assert set_to == [2]
    history = json.loads((out / name / "training.json").read_text())
    assert [(n, s["steps_done"]) for n, s in history["stages"].items()] == [
        (n, 10 + i) for i, n in enumerate(stages)
    ]
    assert (history["seed"], history["device"]) == (4, str(_training.device()))
    assert capsys.readouterr().out == f"{out / name}\n"
    other = tmp_path / "elsewhere"
    train.main(name, steps=None, out=tmp_path / "again", work=other, seed=0, threads=None, resume=False)
    assert (asked["work"], asked["steps"], asked["resume"], set_to) == (other, None, False, [2])


def test_a_checkpoint_from_before_the_last_stages_saves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def trained(work: Path, eye: Any, **options: Any) -> str:
        asked.update(options)
        stage(work / "tiny-sd", "tiny-sd", 7)
        return "the model"

    monkeypatch.setattr(sd, "train", trained)
    monkeypatch.setattr(sd, "save", lambda model, folder: folder.mkdir(parents=True))
    monkeypatch.setattr(train, "built_on", lambda name, work: "an eye")
    begin = tmp_path / "before"
    begin.mkdir()
    stages = {"vae": {"steps_done": 4, "seconds": 1.0}, "tiny-sd": {"steps_done": 5, "seconds": 2.0}}
    (begin / "training.json").write_text(json.dumps({"stages": stages}))
    monkeypatch.setattr(train, "load", lambda folder, name: (f"what {name} was in {folder}", None))
    train.main("tiny-sd", out=tmp_path / "zoo", begin=begin)
    assert asked["begin"] == f"what tiny-sd was in {begin}"
    history = json.loads((tmp_path / "zoo" / "tiny-sd" / "training.json").read_text())
    assert {name: run["steps_done"] for name, run in history["stages"].items()} == {
        "vae": 4,
        "sd-first": 5,
        "tiny-sd": 7,
    }
    with pytest.raises(typer.BadParameter, match="tiny-llava is trained in one stage"):
        train.main("tiny-llava", out=tmp_path / "zoo", begin=begin)


def test_the_last_stage_goes_on_from_what_half_precision_keeps(tmp_path: Path) -> None:
    begin = clip.build(2)
    before = {k: v.clone() for k, v in begin.state_dict().items()}
    with mock.patch.object(clip, "BATCH", 4), mock.patch.object(clip, "EYE_BATCH", 6):
        after = clip.train(tmp_path, steps=1, begin=begin).state_dict()
        torch.manual_seed(77)  # Which work it is does not depend on what was drawn before.
        again = clip.train(tmp_path, steps=1, begin=begin, resume=True).state_dict()
    assert all(torch.equal(begin.state_dict()[k], before[k]) for k in before)
    assert all(torch.equal(again[k], after[k]) for k in after)
    joined = load(tmp_path / "tiny-clip" / "joined", "tiny-clip")[0].state_dict()
    for name, value in before.items():
        if name.startswith("text_model"):  # The first of the three leaves the text tower as it is.
            assert torch.equal(joined[name], value.half().float())
    changed = [k for k in before if not torch.equal(after[k], before[k].half().float())]
    assert {k.split(".")[0] for k in changed} >= {"vision_model", "text_model", "text_projection"}


def test_a_name_that_is_none_is_refused_with_those_there_are(tmp_path: Path) -> None:
    for run in (
        lambda: train.main("tiny-cat", out=tmp_path),
        lambda: evaluate.main(["tiny-cat"], False, None),
    ):
        with pytest.raises(typer.BadParameter, match=f"no model 'tiny-cat'; there is {', '.join(NAMES)}"):
            run()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "stage"), [("tiny-llava", "joined"), ("tiny-sd", "polished")])
def test_a_model_is_built_on_what_was_trained_beside_it_or_on_what_the_shipped_one_holds(
    name: str, stage: str, tmp_path: Path
) -> None:
    shipped = train.built_on(name, tmp_path)
    own = clip.build(5)
    clip.save(own, tmp_path / "tiny-clip" / stage)
    assert torch.equal(
        train.built_on(name, tmp_path).text_projection.weight, own.text_projection.weight.float()
    )
    assert isinstance(shipped, CLIPModel)
    assert not shipped.training
    holder = evaluate.load(path(name), name)[0]
    held = holder.model.vision_tower if name == "tiny-llava" else holder.text_encoder
    tower = shipped.vision_model if name == "tiny-llava" else shipped.text_model
    for one, other in zip(held.state_dict().values(), tower.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_llava_is_written_in_half_precision_with_its_processor(tmp_path: Path) -> None:
    model = llava.build(clip.build(1), 2)
    llava.save(model, tmp_path)
    read = LlavaForConditionalGeneration.from_pretrained(tmp_path, local_files_only=True)
    assert read.dtype == torch.float16
    assert torch.equal(read.lm_head.weight, model.lm_head.weight)
    names = {p.name for p in tmp_path.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Measuring that notes its arguments and finds one number in its bounds, one below and one above."""
    asked: dict[str, Any] = {}

    def measure(kind: str) -> Callable[..., list[Measure]]:
        def of(*arguments: Any) -> list[Measure]:
            asked[kind] = arguments
            return [
                Measure("good", 0.75, 4, 0.5),
                Measure("low", 0.25, 4, 0.5),
                Measure("high", 0.5, 8, at_most=0.2),
            ]

        return of

    for kind in ("clip", "llava", "sd"):
        monkeypatch.setattr(evaluate, f"measure_{kind}", measure(kind))
    monkeypatch.setattr(
        evaluate, "load", lambda folder, name: (f"{name} in {folder}", f"processor of {name}")
    )
    return asked


def test_quick_measures_print_a_table_and_end_with_an_error_for_what_is_missed(
    measured: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as ended:
        evaluate.main(None, quick=True, models=tmp_path)
    assert ended.value.exit_code == 1
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line and line[0] != " "] == list(NAMES)
    assert said.count("    75.00%  n=4     >= 50%   good\n") == 3
    assert said.count("    25.00%  n=4     >= 50%   low  MISSED\n") == 3
    assert said.count("    50.00%  n=8     <= 20%   high  MISSED\n") == 3
    clip_folder, shipped = tmp_path / "tiny-clip", path("tiny-clip")
    assert measured["clip"] == (f"tiny-clip in {clip_folder}", "processor of tiny-clip", 200)
    assert measured["llava"] == (f"tiny-llava in {tmp_path / 'tiny-llava'}", "processor of tiny-llava", 150)
    judge = f"tiny-clip in {shipped}"
    assert measured["sd"] == (f"tiny-sd in {tmp_path / 'tiny-sd'}", judge, "processor of tiny-clip", 16)
    assert not list(tmp_path.rglob("metrics.json"))
    clip_folder.mkdir()
    with pytest.raises(typer.Exit):
        evaluate.main(["tiny-sd"], quick=True, models=tmp_path)
    assert measured["sd"][1] == f"tiny-clip in {clip_folder}"


@pytest.mark.usefixtures("measured")
def test_full_measures_write_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny-clip").mkdir()
    good = [Measure("good", 0.75, 4, 0.5)]
    monkeypatch.setattr(evaluate, "measure_clip", lambda *a: good if a[-1] == 2000 else [])
    with pytest.raises(typer.Exit) as ended:
        evaluate.main(["tiny-clip"], quick=False, models=tmp_path)
    assert ended.value.exit_code == 0
    facts = json.loads((tmp_path / "tiny-clip" / "metrics.json").read_text())
    assert facts == [{"name": "good", "value": 0.75, "n": 4, "at_least": 0.5, "at_most": None}]
    assert "| good | 75.0% | >= 50% | 4 |" in (tmp_path / "tiny-clip" / "README.md").read_text()


def test_the_card_of_a_model_that_draws_has_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []

    def draw(pipeline: Any, texts: list[str]) -> list[Any]:
        drawn.append((pipeline, texts))
        return measures.images_of([world.scene(i) for i in range(len(texts))])

    monkeypatch.setattr(cards, "draw", draw)
    with mock.patch("mm_adapters.zoo.models_at.load", return_value=("the pipeline", None)):
        cards.write("tiny-sd", tmp_path, [])
    ((pipeline, texts),) = drawn
    assert (pipeline, texts) == ("the pipeline", [text for _, text in drawing.prompts_to_draw(24)])
    from PIL import Image

    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.size == (6 * 168 + 8, 4 * (168 + 45) + 8)
    text = (tmp_path / "README.md").read_text()
    assert (
        text.index("(25 steps, guidance 2, none chosen)")
        < text.index("(samples.png)")
        < text.index("## Data")
    )
    assert not (tmp_path / "x").exists()


def test_what_is_not_there_is_refused_with_what_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"no shape 'cat'; there is {', '.join(world.SHAPES)}"):
        _shapes.unit_distance("cat", np.zeros((1, 1)), np.zeros((1, 1)))
    with pytest.raises(InputError, match="no kind 'three'; there is one, two, many"):
        world.scene(0, kind="three")
    model, schedule = torch.nn.Linear(2, 1), _training.Schedule(steps=1, peak_rate=0.1)
    file = tmp_path / "run.safetensors"

    def go(steps: int = 1, seed: int = 0, module: torch.nn.Module = model) -> float:
        plan = schedule if steps == 1 else _training.Schedule(steps=steps, peak_rate=0.1)
        return _training.fit(
            module, lambda _: module(torch.ones(1, 2)).sum(), plan, file, resume=True, seed=seed
        )

    go()
    go()
    with pytest.raises(StoreError, match="of another run: steps differ"):
        go(steps=2)
    with pytest.raises(StoreError, match="of another run: seed differ"):
        go(seed=1)
    with pytest.raises(StoreError, match=r"of another run: the weights \['0.weight', '0.bias'\] differ"):
        go(module=torch.nn.Sequential(torch.nn.Linear(2, 1)))
    file.write_bytes(b"no tensors")
    with pytest.raises(StoreError, match=r"run.safetensors is damaged: .*Delete it to start afresh"):
        go()


def test_the_box_of_a_mask_leaves_out_stray_pixels_unless_it_has_no_others() -> None:
    mask = np.zeros((8, 8), bool)
    mask[2:5, 3:6] = True
    mask[0, 0] = True
    assert judges.box(mask) == (2, 5, 3, 6)
    line = np.zeros((8, 8), bool)
    line[3, 1:5] = True
    assert judges.box(line) == (3, 4, 1, 5)
    assert judges.box(line.T) == (1, 5, 3, 4)
