"""What the SAE integration refuses, beside the nearest thing that it takes; and branches by hand."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file
from tiny import CASES
from torch import Tensor

import mm_adapters as mm
from integrations import sae_lens as mm_sae
from integrations.commands import _steps, check_folder, parse_config, read_config
from integrations.commands import train as train_command
from integrations.sae_lens import _checkpoints, _fast, _verbs
from integrations.sae_lens._attach import attach, check_attached
from integrations.sae_lens._data import inputs_of, items_of
from integrations.sae_lens._fields import _fits, check_fields, check_required
from integrations.sae_lens._fit import Fit
from integrations.sae_lens._providers import FromIterator, FromModel
from integrations.sae_lens._settings import check
from integrations.sae_lens._sites import SAESite, find_site, mask_of, rows_of
from integrations.sae_lens._special_tokens import SpecialTokens
from integrations.sae_lens.cached import export_cached, import_cached
from integrations.sae_lens.collect import batches
from integrations.sae_lens.evaluate import noise_recovered, recovered
from integrations.sae_lens.load import CONVERTERS, load
from integrations.sae_lens.look import _nearest, top_images
from mm_adapters import CheckpointError, InputError, MissingSiteError, StoreError
from mm_adapters.store import Column, Store, Writer, save_tensors, write_document
from mm_adapters.tokens.layout import vision_layout

SITE = "vision.blocks.1.hook_resid_post"
TEXT = "text.blocks.1.hook_resid_post"


@pytest.fixture
def tiny() -> mm.HookedModel:
    return mm.HookedModel(CASES["clip"]().model)


def sae_at(site: str, d_in: int = 32, d_sae: int = 8, **metadata: Any) -> Any:
    torch.manual_seed(3)
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae))
    sae.cfg.metadata.hook_name = site
    for key, value in metadata.items():
        setattr(sae.cfg.metadata, key, value)
    return sae


# ---- the command ---------------------------------------------------------------------------------


def _config(folder: Path, **more: Any) -> Path:
    path = folder / "sae.json"
    path.write_text(json.dumps({"architecture": "batchtopk", "d_in": 4, "d_sae": 8, "k": 2} | more))
    return path


def test_a_command_s_data_is_a_folder_or_a_file_of_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []

    def stop(model: Any, site: str, cfg: Any, **options: Any) -> None:
        seen.append(options["data"])
        raise StopIteration

    monkeypatch.setattr("integrations.commands.load", lambda name, device: name)
    monkeypatch.setattr(mm_sae, "train", stop)
    pictures, prompts, config = tmp_path / "pictures", tmp_path / "prompts.txt", _config(tmp_path)
    pictures.mkdir()
    Image.new("RGB", (4, 4)).save(pictures / "a.png")
    (pictures / "torn.png").write_bytes((pictures / "a.png").read_bytes()[:30])

    def go(**options: Any) -> None:
        train_command(SITE, config, out=tmp_path / "out", **options)

    for both in ({}, {"images": pictures, "prompts": prompts}):
        with pytest.raises(InputError, match=r"^Pass --images FOLDER or --prompts FILE, one of the two\.$"):
            go(**both)
    with pytest.raises(FileNotFoundError, match=r"^There is no file .*prompts\.txt\.$"):
        go(prompts=prompts)
    prompts.write_text("\n  \n")
    with pytest.raises(InputError, match=r"prompts\.txt holds no prompt: give one a line\.$"):
        go(prompts=prompts)
    prompts.write_text("\n a cat \n\na dog\n")
    with pytest.raises(StopIteration):
        go(prompts=prompts)
    with pytest.raises(InputError, match=r"torn\.png is no picture that can be read"):
        go(images=pictures)
    assert capsys.readouterr().out == ""
    with pytest.raises(StopIteration):
        go(images=pictures, skip_unreadable=True)
    assert capsys.readouterr().out.startswith(f"skipped {pictures / 'torn.png'}: ")
    assert seen == [["a cat", "a dog"], [pictures / "a.png"]]


@pytest.mark.parametrize(
    ("text", "steps"),
    [(None, None), ("3", [3]), ("0-9", list(range(10))), ("2-2", [2]), ("x", 0), ("1-x", 0), ("-3", 0)],
)
def test_steps_are_a_number_or_a_range(text: str | None, steps: Any) -> None:
    if steps == 0:
        with pytest.raises(InputError, match=f"^--steps {text}: a number, or a range like 0-9"):
            _steps(text)
    else:
        assert _steps(text) == steps


def test_a_config_says_what_is_trained_and_how(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^There is no config .*sae\.json\.$"):
        read_config(tmp_path / "sae.json")
    path = _config(tmp_path)
    cfg, trainer = parse_config(read_config(path))
    assert (cfg.architecture(), cfg.d_sae, trainer) == ("batchtopk", 8, None)
    for text in ("d_in: 4", "- architecture"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"sae\.json needs a line 'architecture: batchtopk'"):
            read_config(path)
    path.write_text("architecture: [")
    with pytest.raises(InputError, match=r"sae\.json is not valid YAML"):
        read_config(path)
    base: dict[Any, Any] = {"architecture": "batchtopk", "d_in": 4, "d_sae": 8}
    for trainer in (3, [1]):
        with pytest.raises(InputError, match=r"^trainer: holds fields and values, not (3|\[1\])\.$"):
            parse_config(base | {"trainer": trainer})
    with pytest.raises(InputError, match=r"^A field's name is a text, not 7"):
        parse_config(base | {7: 1})
    with pytest.raises(InputError, match=r"^A field's name is a text, not 7"):
        parse_config(base | {"trainer": {7: 1}})
    with pytest.raises(InputError, match=r"^There is no architecture 'gpt' to train; there is .*batchtopk"):
        parse_config({"architecture": "gpt"})
    needed = {
        "total_training_samples": 8, "train_batch_size_samples": 4, "lr": 0.1, "lr_warm_up_steps": 0,
        "lr_decay_steps": 0, "lr_end": 0.01, "dead_feature_window": 1, "n_batches_for_norm_estimate": 1,
    }  # fmt: skip
    _, found = parse_config(base | {"trainer": needed})
    assert (found.total_training_samples, found.lr) == (8, 0.1)
    with pytest.raises(InputError, match=r"^trainer: needs total_training_samples\.$"):
        parse_config(base | {"trainer": {k: v for k, v in needed.items() if k != "total_training_samples"}})
    with pytest.raises(InputError, match=r"^BatchTopKTrainingSAEConfig needs d_in, d_sae\.$"):
        parse_config({"architecture": "batchtopk"})


def test_results_take_no_file_s_place(tmp_path: Path) -> None:
    check_folder(tmp_path)
    check_folder(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^--out .*file is a file; give a folder"):
        check_folder(tmp_path / "file")


# ---- fields of a config --------------------------------------------------------------------------


_FIELDS: list[Any] = [
    ({"d_in": 0}, "d_in is 0: it is a positive number."),
    ({"k": -1.0}, "k is -1.0: it is a positive number."),
    ({"aux_loss_coefficient": float("inf")}, "aux_loss_coefficient is inf: it is a finite number."),
    ({"k": float("nan")}, "k is nan: it is a positive number."),
    ({"k": 5, "d_sae": 4}, "k is 5, and there are d_sae=4 latents: give k up to 4."),
    ({"dtype": "int32"}, "dtype is 'int32'; give float32, float16 or bfloat16."),
    ({"dtype": "float"}, None),
    ({"dtype": "single number"}, "dtype is 'single number'; give"),
    ({"d_in": 4.0}, "d_in is 4.0, and BatchTopKTrainingSAEConfig takes int."),
    ({"d_in": True}, "d_in is True, and"),
    ({"width": 4}, "BatchTopKTrainingSAEConfig has no 'width'; it has d_in,"),
    ({"d_in": 1, "k": 4, "d_sae": 4, "dtype": "torch.float16", "aux_loss_coefficient": 0}, None),
    ({"normalize_activations": "constant_norm_rescale"}, None),
    ({"normalize_activations": "constant"}, "normalize_activations is 'constant', and"),
]


def test_a_field_has_a_value_that_it_can_have() -> None:
    for values, told in _FIELDS:
        if told is None:
            check_fields(BatchTopKTrainingSAEConfig, values)
            continue
        with pytest.raises(InputError) as failed:
            check_fields(BatchTopKTrainingSAEConfig, values)
        assert str(failed.value).startswith(told)


def test_fields_without_a_default_have_a_value() -> None:
    check_required(BatchTopKTrainingSAEConfig, {"d_in": 1, "d_sae": 2})
    with pytest.raises(InputError, match=r"^BatchTopKTrainingSAEConfig needs d_sae\.$"):
        check_required(BatchTopKTrainingSAEConfig, {"d_in": 1})


_HINTS: list[Any] = [
    (object(), Any, True),
    (3, "a forward name", True),
    (3, Callable[[int], int], False),
    (len, Callable[[int], int], True),
    ("a", Literal["a", 1], True),
    (True, Literal["a", 1], False),
    (None, int | None, True),
    ("a", int | None, False),
    ([1, 2], list[int], True),
    ([1, "a"], list[int], False),
    ([1], list, True),
    ({"a": 1}, dict[str, int], True),
    ([1], dict[str, int], False),
    (1, float, True),
    (True, float, False),
    (1.0, int, False),
    (True, int, False),
    (True, bool, True),
]


def test_a_value_fits_a_hint() -> None:
    for value, hint, fits in _HINTS:
        assert _fits(value, hint) is fits


def _trainer(**options: Any) -> SAETrainerConfig:
    return SAETrainerConfig(
        **{
            "total_training_samples": 8,
            "train_batch_size_samples": 8,
            "lr": 0.1,
            "lr_end": 0.01,
            "lr_warm_up_steps": 0,
            "lr_decay_steps": 0,
            "dead_feature_window": 1,
            "n_batches_for_norm_estimate": 1,
        }
        | options
    )


def test_a_config_is_one_that_can_train_at_its_site() -> None:
    plain = BatchTopKTrainingSAEConfig(d_in=4, d_sae=8, k=2)
    transcoder = mm_sae.BatchTopKTranscoderConfig(d_in=4, d_sae=8, d_out=4, k=2)
    check(SITE, plain, _trainer())
    check(f"{SITE} -> {SITE}", transcoder, _trainer())
    finished: Any = StandardSAEConfig(d_in=4, d_sae=8)
    with pytest.raises(InputError, match=r"^StandardSAEConfig is no training config. Pass one of SAELens'"):
        check(SITE, finished, _trainer())
    with pytest.raises(InputError, match=f"^A transcoder is trained between two sites: .*, not '{SITE}'"):
        check(SITE, transcoder, _trainer())
    with pytest.raises(InputError, match="is a transcoder's: its config is a BatchTopKTranscoderConfig"):
        check(f"{SITE} -> {SITE}", plain, _trainer())
    with pytest.raises(InputError, match=r"^total_training_samples is less than one batch\.$"):
        check(SITE, plain, _trainer(train_batch_size_samples=9))
    for options in ({"apply_b_dec_to_input": True}, {"normalize_activations": "layer_norm"}):
        with pytest.raises(
            InputError, match=r"^A transcoder's decoder bias is of another site than its input"
        ):
            mm_sae.BatchTopKTranscoderConfig(d_in=4, d_sae=8, **options)


# ---- data ----------------------------------------------------------------------------------------


def test_items_are_a_folder_s_images_or_a_list(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert list(items_of(tmp_path)) == list(items_of(str(tmp_path))) == [tmp_path / "a.png"]
    assert items_of(["a cat"]) == ["a cat"]
    with pytest.raises(InputError, match=r"^data='.*a\.png' is no folder of images\. Pass one, or a list"):
        items_of(tmp_path / "a.png")
    for bad in ([], 3, iter(["a"]), {"text": ["a"]}):
        with pytest.raises(InputError, match=r"^data is a folder of images, or a list of images, prompts"):
            items_of(bad)


def _kind(kind: str, loop: str | None = None) -> Any:
    return SimpleNamespace(record=SimpleNamespace(kind=kind, loop=loop))


def test_the_side_that_is_not_given_is_a_blank() -> None:
    picture = Image.new("RGB", (4, 4))
    dual, drawing, talking = _kind("contrastive"), _kind("diffusion", "denoiser"), _kind("vlm")
    assert inputs_of(dual, [picture], [0], {}) == {"images": [picture], "text": ["."]}
    assert inputs_of(dual, [picture], [0], {"text": ["a"]})["text"] == ["a"]
    found = inputs_of(dual, ["a cat", "a dog"], [0, 1], {})
    assert found["text"] == ["a cat", "a dog"]
    assert [(one.size, one.getextrema()) for one in found["images"]] == [((64, 64), ((0, 0),) * 3)]
    both = {"images": picture, "text": "a"}
    assert inputs_of(dual, [both], [0], {}) == {"images": [picture], "text": ["a"]}
    assert inputs_of(talking, ["a"], [0], {}) == {"text": ["a"]}
    assert inputs_of(talking, [picture], [0], {}) == {"images": [picture]}
    expected = {"prompt": ["a", "b"], "seed": [4, 7], "output_type": "latent", "steps": 3}
    assert inputs_of(drawing, ["a", "b"], [4, 7], {"steps": 3}) == expected
    assert inputs_of(drawing, [{"prompt": "a", "seed": 9}], [4], {}) == {
        "prompt": ["a"], "seed": [9], "output_type": "latent",
    }  # fmt: skip
    assert inputs_of(drawing, [{"images": picture, "prompt": "a"}], [4], {})["images"] == [picture]
    with pytest.raises(InputError, match=r"^A pipeline that draws is given prompts, not images"):
        inputs_of(drawing, [picture], [0], {})
    rows = inputs_of(dual, [{"x": torch.ones(2)}, {"x": torch.zeros(2)}], [0, 1], {})
    assert rows["x"].tolist() == [[1, 1], [0, 0]]


def test_an_iterator_goes_on_where_it_was() -> None:
    given = iter([torch.full((2, 3), float(i)) for i in range(5)])
    provider = FromIterator(given, "site", 100)
    provider.go_to({"batch": 3})
    assert provider.position() == {"batch": 3}
    assert float(next(provider)["site"][0, 0]) == 3
    provider.go_to({"batch": 4})
    assert float(next(provider)["site"][0, 0]) == 4
    with pytest.raises(InputError, match=r"^The provider ended after 10 rows and training takes 100"):
        next(provider)


def test_items_give_one_batch_at_least(tiny: mm.HookedModel) -> None:
    pixels = [
        {"pixel_values": row, "input_ids": torch.tensor([58, 3, 59])} for row in torch.randn(2, 3, 28, 28)
    ]
    sites = [find_site(tiny, SITE)]  # Five positions an image.

    def provider(size: int) -> FromModel:
        return FromModel(tiny, sites, pixels, size, 0, tokens="all", steps=None, batch_size=2, inputs=None)

    assert next(provider(10))[SITE].shape == (10, 32)
    with pytest.raises(
        InputError, match=r"^2 items give 10 rows, less than one batch of 11. Give more items"
    ):
        next(provider(11))


def test_a_site_that_a_run_does_not_come_by_is_named() -> None:
    model: Any = SimpleNamespace(
        record=SimpleNamespace(kind="vlm", loop=None),
        loops=dict,
        run=lambda arguments, read: SimpleNamespace(values={"a.x": torch.zeros(1)}),
    )
    sites: Any = [SAESite(name, SimpleNamespace(name=name, tower="a")) for name in ("a.x", "a.y", "a.z")]  # type: ignore[arg-type]
    told = r"^a\.y, a\.z: nothing was read there\. This run does not come by, or not at steps \[3\]\.$"
    with pytest.raises(InputError, match=told):
        next(batches(model, sites, ["a"], "all", [3], 1, None))


def _store(folder: Path, dtype: torch.dtype = torch.float32) -> Store:
    with Writer(folder, {SITE: Column((3,), dtype)}, {}) as writer:
        writer.append({SITE: torch.arange(18.0).reshape(6, 3).to(dtype)}, items=6)
    return Store(folder)


def test_a_column_that_is_there_is_written_as_saelens_reads_it(tmp_path: Path) -> None:
    store = _store(tmp_path / "store")
    with pytest.raises(InputError, match=rf"store has no column 'other'; it has \['{SITE}'\]\.$"):
        export_cached(store, "other", tmp_path / "out", context_size=2)
    half = _store(tmp_path / "half", torch.bfloat16)
    with pytest.raises(InputError, match=r"^SAELens' format has no torch\.bfloat16; collect as float32 or"):
        export_cached(half, SITE, tmp_path / "out", context_size=2)
    with pytest.raises(InputError, match=r"^6 rows are no multiple of context_size=4"):
        export_cached(store, SITE, tmp_path / "out", context_size=4)
    data = export_cached(store, SITE, tmp_path / "out", context_size=3)
    assert torch.equal(import_cached(data, tmp_path / "back").rows()[SITE], store.rows()[SITE])


def test_a_data_set_without_activations_is_refused(tmp_path: Path) -> None:
    from datasets import Dataset

    for name, columns in (("ids", {"token_ids": [[1, 2]]}), ("empty", {SITE: []})):
        Dataset.from_dict(columns).save_to_disk(str(tmp_path / name), num_shards=1)
        with pytest.raises(InputError, match=rf"{name} has no activations\.$"):
            import_cached(tmp_path / name, tmp_path / "back")


def test_training_data_holds_the_site(tiny: mm.HookedModel, tmp_path: Path) -> None:
    store, other = _store(tmp_path / "store"), "vision.blocks.0.hook_resid_post"
    cfg = BatchTopKTrainingSAEConfig(d_in=3, d_sae=6, k=1)
    told = rf"store has no column \['{other}'\]; it has \['{SITE}'\]\.$"
    with pytest.raises(InputError, match=told):
        mm_sae.train(tiny, other, cfg, data=store, trainer=_trainer(), progress=False)
    transcoder = mm_sae.BatchTopKTranscoderConfig(d_in=32, d_sae=6, d_out=32, k=1)
    with pytest.raises(InputError, match=r"^An iterator gives the rows of one site. Pass a store, or items"):
        mm_sae.train(
            tiny,
            f"{other} -> {SITE}",
            transcoder,
            data=iter([torch.zeros(8, 64)]),
            trainer=_trainer(),
            progress=False,
        )


# ---- sites and positions -------------------------------------------------------------------------


def test_an_update_is_within_one_tower(tiny: mm.HookedModel) -> None:
    assert find_site(tiny, f"{SITE} - vision.blocks.1.hook_resid_pre").minus is not None
    with pytest.raises(InputError, match=f"^{SITE} - {TEXT}: an update is within one tower"):
        find_site(tiny, f"{SITE} - {TEXT}")


def test_positions_are_chosen_by_the_roles_they_have(tiny: mm.HookedModel) -> None:
    site = find_site(tiny, SITE)
    for roles in ("all", "patch", ("latent", "image")):
        assert mask_of(None, roles, site, 2, 3).tolist() == [[True] * 3] * 2
    with pytest.raises(InputError, match=rf"^{SITE} has no \['patch', 'word'\]: its positions are all alike"):
        mask_of(None, ("patch", "word"), site, 2, 3)
    layout = vision_layout(2, (1, 2))
    assert mask_of(layout, "class", site, 2, 3).tolist() == [[True, False, False]] * 2
    assert mask_of(layout, ("patch",), site, 2, 3).tolist() == [[False, True, True]] * 2
    assert mask_of(layout, "all", site, 2, 1).tolist() == [[True]] * 2
    with pytest.raises(InputError, match="has one position a row, pooled from 3: it is no 'patch' of them"):
        mask_of(layout, "patch", site, 2, 1)
    for n_rows, n_pos in ((2, 2), (3, 3), (1, 3)):
        told = f"^{SITE} has {n_rows} rows of {n_pos} positions and its layout says 2 of 3. Choose"
        with pytest.raises(InputError, match=told):
            mask_of(layout, "patch", site, n_rows, n_pos)
    with pytest.raises(InputError, match="has no position that is 'word'; it has class, patch, all"):
        mask_of(layout, ("patch", "word"), site, 2, 3)


def test_rows_of_two_sites_are_of_the_same_positions(tiny: mm.HookedModel) -> None:
    sites = [find_site(tiny, name) for name in (SITE, "vision.blocks.0.hook_resid_post")]
    layout = {"vision": vision_layout(2, (1, 2))}
    value = torch.randn(2, 3, 4)
    run: Any = {sites[0].name: value, sites[1].name: -value}
    found = rows_of(tiny, run, sites, "patch", layout)
    assert torch.equal(found[sites[1].name], -value[:, 1:].flatten(0, 1))
    assert found["where"].tolist() == [[0, 1, -1], [0, 2, -1], [1, 1, -1], [1, 2, -1]]
    run[sites[1].name] = value[:, :1]
    told = f"^{SITE} has 6 rows and {sites[1].name} has 2: they are not the same positions. Collect"
    with pytest.raises(InputError, match=told):
        rows_of(tiny, run, sites, "all", layout)


def test_special_tokens_are_those_of_a_text(tiny: mm.HookedModel) -> None:
    told = f"^exclude_special_tokens: the positions of {SITE} are no tokens. Leave it out, or choose"
    with pytest.raises(InputError, match=told):
        SpecialTokens(tiny, find_site(tiny, SITE), [1])
    site = find_site(tiny, TEXT)
    with pytest.raises(InputError, match=r"^exclude_special_tokens=True: this model has no tokenizer. Give"):
        SpecialTokens(tiny, site, True)
    special = SpecialTokens(tiny, site, [58, 59])
    flat = torch.zeros(2, 5, 24)
    with pytest.raises(InputError, match=rf"{TEXT} has positions \[2, 5\], and its tower was called with no"):
        special.mask(flat)
    with special.watched():
        tiny.run(CASES["clip"]().inputs)
    wanted = [[True, False, False, False, True], [True, False, True, True, True]]
    assert special.mask(flat).tolist() == wanted
    with pytest.raises(
        InputError, match=r"has positions \[2, 4\], .* called with token ids \[2, 5\]\. Leave"
    ):
        special.mask(flat[:, :4])


# ---- attached SAEs -------------------------------------------------------------------------------


def test_an_attached_sae_reads_and_writes_one_site(tiny: mm.HookedModel) -> None:
    update = sae_at(SITE, hook_name_minus="vision.blocks.1.hook_resid_pre")
    with pytest.raises(InputError, match=r" is an update's SAE: use splice\(\.\.\.\) and model\.run\(edit="):
        attach(tiny, update, None, False, "all")
    z, q = "vision.blocks.1.attn.hook_z", "vision.blocks.1.attn.hook_q"
    by_head = StandardSAE(StandardSAEConfig(d_in=32, d_sae=8, reshape_activations="hook_z"))
    for site, out in ((SITE, None), (z, q)):
        by_head.cfg.metadata.hook_name, by_head.cfg.metadata.hook_name_out = site, out
        with pytest.raises(
            InputError, match=f"^{site} -> {out or site}: reshape_activations='hook_z' is for"
        ):
            attach(tiny, by_head, None, False, "all")
    by_head.cfg.metadata.hook_name, by_head.cfg.metadata.hook_name_out = z, None
    with pytest.raises(MissingSiteError, match=f"^No SAE is attached to '{z}'. Attached: none is attached"):
        check_attached(tiny, [z])
    attach(tiny, by_head, None, False, "all")
    check_attached(tiny, [z])
    with pytest.raises(MissingSiteError, match=f"^No SAE is attached to '{SITE}'. Attached: {z}"):
        check_attached(tiny, [z, SITE])
    with pytest.raises(MissingSiteError, match="nearest"):
        check_attached(tiny, ["vision.blocks.1.hook_resid_pots"])
    tiny.reset_saes()
    assert not tiny.acts_to_saes


def test_roles_are_known_where_the_inputs_are(tiny: mm.HookedModel) -> None:
    inputs = CASES["clip"]().inputs
    plain = tiny(**inputs).image_embeds
    attach(tiny, sae_at(SITE), None, False, "patch")
    with pytest.raises(InputError, match=r"^tokens= needs to know the inputs: use run_with_saes, or splice"):
        tiny(**inputs)
    tiny.reset_saes()
    attach(tiny, sae_at(SITE), None, False, "all")
    assert not torch.equal(tiny(**inputs).image_embeds, plain)
    tiny.reset_saes()


def test_an_sae_s_point_is_named_by_the_site_it_writes(tiny: mm.HookedModel) -> None:
    one = sae_at(SITE)
    assert tiny.get_sae_hook_name(one) == f"{SITE}.hook_sae_acts_post"
    assert tiny.vision.get_sae_hook_name(one, "hook_sae_input") == "blocks.1.hook_resid_post.hook_sae_input"
    one.cfg.metadata.hook_name_out = "vision.blocks.0.hook_resid_post"
    assert tiny.vision.get_sae_hook_name(one) == "blocks.0.hook_resid_post.hook_sae_acts_post"
    tiny.add_sae(sae_at(SITE))
    assert list(tiny.vision.acts_to_saes) == ["blocks.1.hook_resid_post"]
    assert list(tiny.text.acts_to_saes) == []
    tiny.reset_saes()


def test_a_verb_takes_no_other_s_place(monkeypatch: pytest.MonkeyPatch) -> None:
    _verbs.add_verbs()  # A second time is none.
    monkeypatch.setattr(mm.HookedModel, "add_sae", lambda self: None)
    with pytest.raises(AttributeError, match=r"^HookedModel\.add_sae is there already\.$"):
        _verbs.add_verbs()


# ---- checkpoints ---------------------------------------------------------------------------------


def _checkpoint(folder: Path, name: str, step: int, weights_step: int | None = None) -> Path:
    target = folder / name
    target.mkdir(parents=True)
    save_tensors(
        target / "state.safetensors",
        {"rng": torch.get_rng_state()},
        {"step": str(step if weights_step is None else weights_step)},
    )
    write_document(
        target / "state.json", {"step": step, "about": {}, "trainers": {}, "position": {"at": step}}
    )
    return target


@pytest.mark.parametrize(
    ("recent", "chosen"), [(9, "step_000000010"), (10, "step_000000010"), (11, "recent")]
)
def test_the_newest_checkpoint_is_gone_on_from(tmp_path: Path, recent: int, chosen: str) -> None:
    assert _checkpoints.latest(tmp_path) is None
    there = _checkpoint(tmp_path, "recent", recent)
    assert _checkpoints.latest(tmp_path) == there
    _checkpoint(tmp_path, "step_000000002", 2)
    _checkpoint(tmp_path, "step_000000010", 10)
    found = _checkpoints.latest(tmp_path)
    assert found is not None
    assert found.name == chosen
    weights = there / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    found = _checkpoints.latest(tmp_path)
    assert found is not None
    assert found.name == "step_000000010"


def test_a_checkpoint_is_of_one_step(tmp_path: Path) -> None:
    good = _checkpoint(tmp_path / "checkpoints", "step_000000003", 3)
    assert _checkpoints.load(good, {}, {}) == {"at": 3}
    torn = _checkpoint(tmp_path / "checkpoints", "step_000000004", 4, weights_step=3)
    told = f"^{torn}: its two files are not of one step of training. Or delete {torn} to go on from before it"
    with pytest.raises(StoreError, match=told):
        _checkpoints.load(torn, {}, {})
    (good / "state.json").write_text("{")
    with pytest.raises(StoreError, match=f"Or delete {good} to go on from before it"):
        _checkpoints.load(good, {}, {})
    with pytest.raises(StoreError):
        _checkpoints.load(torn.parent / "none", {}, {})


def test_a_coefficient_goes_on_warming_up_where_it_was(tmp_path: Path) -> None:
    cfg = StandardTrainingSAEConfig(d_in=4, d_sae=8, l1_coefficient=2.0, l1_warm_up_steps=4)
    options: dict[str, Any] = {"total_training_samples": 64}

    def trainer() -> SAETrainer[Any, Any]:
        torch.manual_seed(0)
        given = iter(lambda: torch.randn(8, 4), None)
        return SAETrainer(cfg=_trainer(**options), sae=StandardTrainingSAE(cfg), data_provider=given)

    one, other = trainer(), trainer()
    for _ in range(3):
        one._train_step(sae=one.sae, sae_in=torch.randn(8, 4))
        one.n_training_steps += 1
    place = _checkpoints.save(tmp_path / "checkpoints", {"a": one}, {}, {"batch": 3})
    assert _checkpoints.load(place, {"a": other}, {}) == {"batch": 3}
    (name,) = one.coefficient_schedulers
    values = [t.coefficient_schedulers[name].value for t in (one, other, trainer())]
    assert values[0] == values[1] != values[2]
    assert other.n_training_steps == 3
    assert all(torch.equal(v, other.sae.state_dict()[k]) for k, v in one.sae.state_dict().items())


def test_metrics_go_to_wandb_in_a_run_of_their_own_or_the_one_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []
    wandb: Any = SimpleNamespace(
        run=None,
        init=lambda **options: calls.append(options),
        log=lambda row, step: calls.append((row, step)),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logger = SimpleNamespace(log_to_wandb=True, wandb_project="p", wandb_entity="e", run_name="n")
    fit: Any = SimpleNamespace(_first=SimpleNamespace(cfg=SimpleNamespace(logger=logger)))
    Fit._to_wandb(fit, {"loss": 1.0}, 3)
    assert calls == [{"project": "p", "entity": "e", "name": "n"}, ({"loss": 1.0}, 3)]
    wandb.run = "there"
    Fit._to_wandb(fit, {"loss": 2.0}, 4)
    assert calls[2:] == [({"loss": 2.0}, 4)]
    logger.log_to_wandb = False
    Fit._to_wandb(fit, {"loss": 3.0}, 5)
    assert len(calls) == 3


def test_where_a_mask_is_true_on_either_device() -> None:
    mask = torch.tensor([False, True, True, False, True])
    assert _fast._where(mask).tolist() == [1, 2, 4]
    away: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), nonzero=mask.nonzero)
    assert _fast._where(away).tolist() == [1, 2, 4]


# ---- looking at one ------------------------------------------------------------------------------


def test_latents_are_the_positions_of_their_own_stream() -> None:
    model = mm.wrap(CASES["stable_diffusion_3"]().model)
    site = "denoiser.blocks.0.hook_resid_post"
    options = {"num_inference_steps": 1, "guidance_scale": 1.0}
    d_in = model.run({"prompt": ["a"], "seed": [0], "output_type": "latent"} | options, read=[site])[
        site
    ].shape[-1]
    score = lambda output, numbers: output.images.flatten(1).mean(1)  # noqa: E731
    found = [
        recovered(
            model, sae_at(site, d_in), ["a", "b"], score, mean=torch.ones(d_in), tokens=tokens, inputs=options
        )
        for tokens in ("all", "latent")
    ]
    assert found[0] == found[1]
    assert len({found[0].plain, found[0].sae, found[0].zero, found[0].mean}) == 4


def test_what_is_looked_at_has_a_loop_a_grid_or_a_clip(tiny: mm.HookedModel, clip: Any) -> None:
    with pytest.raises(InputError, match=f"^{SITE} is not in a sampling loop"):
        noise_recovered(tiny, sae_at(SITE), ["a"], [0])
    item = {"pixel_values": torch.zeros(3, 28, 28), "input_ids": torch.tensor([58, 3, 59])}
    drawing, site = mm.wrap(CASES["stable_diffusion"]().model), "denoiser.blocks.0.hook_resid_post"
    with pytest.raises(InputError, match=f"^{site} has no grid of patches to draw"):
        top_images(drawing, sae_at(site, 16), ["a"], [0], n=1, inputs={"num_inference_steps": 1})
    with pytest.raises(InputError, match=f"^{TEXT} has no grid of patches to draw"):  # Its layout has none.
        top_images(clip, sae_at(TEXT), [Image.new("RGB", (64, 64))], [0], n=1)
    (found,) = top_images(tiny, sae_at(SITE), [item], [0], n=1)
    assert found.maps.shape[1:] == (2, 2)
    other: Any = SimpleNamespace(kind="vlm", name="a talker")
    with pytest.raises(InputError, match=r"^Words are ranked by a CLIP, and a talker is not one: pass clip="):
        _nearest(["a"], other, [1], [1])
    assert _nearest([], other, [1], [1]) == _nearest(["a"], other, [], [1]) == ()


# ---- SAEs on disk --------------------------------------------------------------------------------


def _saved(folder: Path, sae: Any = None) -> Path:
    (sae_at(SITE) if sae is None else sae).save_model(folder)
    return folder


def _edit(folder: Path, **values: Any) -> None:
    """Changes the config as a stranger would; None takes a field out."""
    path = folder / "cfg.json"
    settings = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def _weights(folder: Path, **values: Tensor | None) -> None:
    (path,) = folder.glob("*.safetensors")
    state: dict[str, Any] = load_file(path) | values
    save_file({k: v for k, v in state.items() if v is not None}, path)


_WRONG_CONFIGS: list[Any] = [
    ({"architecture": 3}, "/cfg.json: its architecture is 3, and is a name."),
    ({"architecture": None}, "/cfg.json: its architecture is None, and is a name."),
    ({"architecture": "gpt"}, " has the architecture 'gpt', which SAELens does not have."),
    ({"architecture": "topk"}, "/cfg.json: it does not say k, how many latents are active."),
    ({"dtype": None}, "/cfg.json: it does not say the dtype."),
    ({"metadata": [1]}, "/cfg.json: metadata is an object."),
    ({"d_in": 31}, "/sae_weights.safetensors: W_enc is [32, 8], and cfg.json says [31, 8]."),
    ({"d_sae": 9}, "/sae_weights.safetensors: W_enc is [32, 8], and cfg.json says [32, 9]."),
    ({"d_sae": None}, "/cfg.json: StandardSAEConfig needs d_sae."),
]


def test_a_config_that_cannot_be_names_its_file(tmp_path: Path) -> None:
    for settings, told in _WRONG_CONFIGS:
        folder = _saved(tmp_path / "sae")
        assert load(folder).cfg.metadata.hook_name == SITE
        _edit(folder, **settings)
        with pytest.raises(CheckpointError) as failed:
            load(folder)
        assert str(failed.value) == f"{folder}{told}"


def test_weights_that_cannot_be_name_their_file(tmp_path: Path) -> None:
    whole = load_file(_saved(tmp_path / "whole") / "sae_weights.safetensors")
    w_dec, b_dec = whole["W_dec"], whole["b_dec"]
    nan, infinite = w_dec.clone(), w_dec.clone()
    nan[0, 0], infinite[1, 1] = float("nan"), float("inf")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"W_dec": None}, "/sae_weights.safetensors lacks W_dec; it has W_enc, b_dec, b_enc."),
        (
            {"W_dec": w_dec[:, :31].clone()},
            "/sae_weights.safetensors: W_dec is [8, 31], and cfg.json says [8, 32].",
        ),
        ({"b_dec": b_dec[:31].clone()}, "/sae_weights.safetensors: b_dec is [31], and cfg.json says [32]."),
        (
            {"b_dec": b_dec.int()},
            "/sae_weights.safetensors: b_dec is stored as torch.int32, whole numbers. Get it again.",
        ),
        ({"W_dec": nan}, "/sae_weights.safetensors: W_dec holds NaN or infinity. Get it again."),
        ({"W_dec": infinite}, "/sae_weights.safetensors: W_dec holds NaN or infinity. Get it again."),
        ({"b_enc": None}, " holds no standard SAE that fits its cfg.json: "),
    ]
    for number, (values, told) in enumerate(cases):
        folder = _saved(tmp_path / str(number))
        _weights(folder, **values)
        with pytest.raises(CheckpointError) as failed:
            load(folder)
        assert str(failed.value).startswith(f"{folder}{told}")


def test_a_top_k_sae_says_its_k(tmp_path: Path) -> None:
    sae = TopKSAE(TopKSAEConfig(d_in=4, d_sae=8, k=3))
    folder = _saved(tmp_path / "sae", sae)
    assert load(folder).cfg.k == 3  # type: ignore[attr-defined]
    _edit(folder, k=None)
    with pytest.raises(CheckpointError, match="it does not say k"):
        load(folder)


def test_a_folder_holds_one_sae_of_a_format_that_is_known(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "sae")
    known = ", ".join(CONVERTERS)
    with pytest.raises(CheckpointError, match=f"^There is no format 'gguf': there is saelens, {known}"):
        load(folder, format="gguf")
    with pytest.raises(CheckpointError, match=r"sae is a finished SAE \(vit_prisma\): it cannot be trained"):
        load(folder, format="vit_prisma", cls=TrainingSAE)
    assert load(folder, format="vit_prisma", site="vision.x").cfg.metadata.hook_name == "vision.x"
    with pytest.raises(CheckpointError, match=r"sae is a finished SAE .*, not a TrainingSAE"):
        load(folder, cls=TrainingSAE)
    os.remove(folder / "cfg.json")
    with pytest.raises(CheckpointError, match=r"sae has SAELens' weights and no cfg.json, which says what"):
        load(folder)
    two = tmp_path / "two"
    two.mkdir()
    for name in "ab":
        save_file({"W_enc": torch.zeros(1, 1)}, two / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"two has 2 safetensors files; keep one SAE in a folder\.$"):
        load(two)
    with pytest.raises(CheckpointError, match=r"^There is no folder .*none\.$"):
        load(tmp_path / "none")


_PRISMA = {
    "W_enc": torch.randn(3, 5),
    "b_enc": torch.randn(5),
    "W_dec": torch.randn(5, 3),
    "b_dec": torch.randn(3),
}
_NAMED = {
    "encoder.weight": torch.randn(1, 5, 3),
    "encoder.bias": torch.randn(1, 5),
    "decoder.weight": torch.randn(1, 3, 5),
}
_UNBOX = {
    "encoder.weight": torch.randn(5, 3), "decoder.weight": torch.randn(3, 5),
    "pre_bias": torch.randn(3), "latent_bias": torch.randn(5),
}  # fmt: skip
_SAEURON = {
    "encoder.weight": torch.randn(5, 3), "encoder.bias": torch.randn(5), "W_dec": torch.randn(5, 3),
    "b_dec": torch.randn(3),
}  # fmt: skip


def _public(folder: Path, state: dict[str, Tensor], cfg: dict[str, Any], name: str = "cfg.json") -> Path:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "sae.safetensors")
    (folder / name).write_text(json.dumps(cfg))
    return folder


_WRONG_PUBLIC_SAES: list[Any] = [
    (_PRISMA, {"block_layer": "3"}, "{folder}: block_layer is '3', and is a number."),
    (_PRISMA, {"block_layer": True}, "{folder}: block_layer is True, and is a number."),
    (_PRISMA, {"hook_point": 3}, "The SAE's hook is 3, and is a name."),
    (
        _PRISMA | {"W_enc": torch.zeros(1, 3, 5)},
        {},
        "ViT-Prisma: the encoder's weights are [1, 3, 5], not a matrix.",
    ),
    (_PRISMA | {"b_enc": torch.zeros(4)}, {}, "ViT-Prisma: b_enc is [4], and its encoder says [5]."),
    (
        _PRISMA | {"W_dec": torch.zeros(3, 5)},
        {},
        "ViT-Prisma: W_dec is [3, 5], and its encoder says [5, 3].",
    ),
    (_PRISMA | {"b_dec": torch.zeros(5)}, {}, "ViT-Prisma: b_dec is [5], and its encoder says [3]."),
    (_PRISMA, {"architecture": "topk", "k": 6}, "ViT-Prisma: k is 6, and there are 5 latents."),
    (_PRISMA, {"architecture": "topk", "k": 2.0}, "ViT-Prisma: k is 2.0, and there are 5 latents."),
    (
        {k: v for k, v in _PRISMA.items() if k[0] == "W"},
        {},
        "{folder} lacks b_enc, b_dec; it has W_dec, W_enc.",
    ),
    (
        _NAMED | {"decoder.weight": torch.zeros(3)},
        {},
        "{folder}: encoder.weight and decoder.weight are matrices.",
    ),
    (
        _NAMED | {"encoder.weight": torch.zeros(3)},
        {},
        "{folder}: encoder.weight and decoder.weight are matrices.",
    ),
    (_UNBOX, {}, "{folder}/config.json does not say k, how many latents are active."),
    (_UNBOX, {"k": 0}, "sdxl-unbox: k is 0, and there are 5 latents."),
    (_SAEURON, {}, "{folder}/cfg.json does not say k, how many latents are active."),
]


def test_a_public_sae_that_cannot_be_is_named(tmp_path: Path) -> None:
    for state, cfg, told in _WRONG_PUBLIC_SAES:
        folder = _public(tmp_path / "sae", state, cfg)
        with pytest.raises(CheckpointError) as failed:
            load(folder)
        assert str(failed.value) == told.format(folder=folder)


@pytest.mark.parametrize(
    ("state", "cfg", "hook", "k"),
    [
        (_PRISMA, {"block_layer": 3}, "vision.blocks.3.hook_resid_post", None),
        (_PRISMA, {"hook_point": "blocks.1.hook_mlp_out"}, "vision.blocks.1.hook_mlp_out", None),
        (_PRISMA, {"hook_name": "vision.hook_embed", "architecture": "topk", "k": 5}, "vision.hook_embed", 5),
        (_PRISMA, {"activation_fn_kwargs": {"k": 1}}, None, 1),
        (_NAMED, {"hook_name": "a.b"}, "a.b", None),
        (_UNBOX, {"k": 1}, None, 1),
        (_SAEURON, {"k": 5}, None, 5),
    ],
)
def test_a_public_sae_reconstructs_as_its_weights_say(
    tmp_path: Path, state: dict[str, Tensor], cfg: Any, hook: str | None, k: int | None
) -> None:
    sae = load(_public(tmp_path / "sae", state, cfg, "config.json"))
    assert sae.cfg.metadata.hook_name == hook
    assert getattr(sae.cfg, "k", None) == k
    flat = {name: v[0] if state is _NAMED else v for name, v in state.items()}
    encoder = flat["W_enc"].T if "W_enc" in flat else flat["encoder.weight"]
    decoder = flat["W_dec"].T if "W_dec" in flat else flat["decoder.weight"]
    b_dec = flat.get("b_dec", flat.get("pre_bias", torch.zeros(3)))
    b_enc = next(flat[name] for name in ("b_enc", "encoder.bias", "latent_bias") if name in flat)
    x = torch.randn(4, 3)
    acts = ((x - b_dec) @ encoder.T + b_enc).relu()
    if k is not None:
        acts = torch.where(acts >= acts.topk(k).values[:, -1:], acts, 0)
    torch.testing.assert_close(sae(x), acts @ decoder.T + b_dec)
