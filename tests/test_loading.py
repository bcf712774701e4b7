"""A checkpoint is loaded as its own library loads it, or refused before any weight is read."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers as made_here
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ElectraConfig,
    ElectraModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from mm_adapters import loading
from mm_adapters._errors import CheckpointError, InputError, UnknownFamilyError
from mm_adapters.checkpoints import shipped
from mm_adapters.checkpoints.checks import check_safetensors, stored_dtype
from mm_adapters.hooked import HookedModel

_SIZE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION = {**_SIZE, "image_size": 28, "patch_size": 14}
RED = Image.new("RGB", (40, 30), "red")


def load(name: Any, **options: Any) -> HookedModel:
    return loading.load(name, device=options.pop("device", "cpu"), **options)


def image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


def save_clip(folder: Path, **options: Any) -> Path:
    tokenizer = made_here.clip()
    text = {**_SIZE, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=8)
    CLIPModel(config).half().save_pretrained(folder, **options)
    CLIPProcessor(image_processor(), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("shards"), max_shard_size="200KB")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = made_here.clip()
    text = CLIPTextConfig(**_SIZE, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        attention_head_dim=2,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
    )
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    made = StableDiffusionPipeline(
        vae,
        CLIPTextModel(text),
        tokenizer,
        unet,
        DDIMScheduler(steps_offset=1, clip_sample=False),
        None,
        None,
        None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("pipeline")
    made.to(torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_json(path: Path, **changes: Any) -> None:
    found = json.loads(path.read_text())
    found.update(changes)
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))


def no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("Weights were read before the error.")

    from diffusers import DiffusionPipeline
    from transformers import PreTrainedModel

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)


# --- what loads -------------------------------------------------------------------------------


def test_a_folder_gives_the_librarys_own_model_ready_for_raw_inputs(clip: Path) -> None:
    model = load(clip)
    own = CLIPModel.from_pretrained(clip, dtype=torch.float32).eval()
    given = CLIPProcessor.from_pretrained(clip)(
        text=["a red circle", "a square"], images=RED, padding=True, return_tensors="pt"
    )
    made = model.inputs.prepare(text=["a red circle", "a square"], images=RED)
    with torch.no_grad():
        want = own(**given).logits_per_image
        assert torch.equal(model.wrapped(**made).logits_per_image, want)
        assert torch.equal(model(text=["a red circle", "a square"], images=RED).logits_per_image, want)
    assert not model.wrapped.training
    assert next(model.wrapped.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float16", "torch.bfloat16", torch.float16, torch.float64])
def test_the_dtype_asked_for_is_the_models(clip: Path, dtype: Any) -> None:
    want = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype.removeprefix("torch."))
    model = load(clip, dtype=dtype).wrapped
    assert {p.dtype for p in model.parameters()} == {want}


def test_options_reach_from_pretrained(clip: Path) -> None:
    assert load(clip, attn_implementation="eager").wrapped.config._attn_implementation == "eager"


def test_shards_load(shards: Path) -> None:
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert load(shards).kind == "contrastive"


def test_a_folder_without_an_architecture_is_loaded_by_its_model_type(
    clip: Path, copy: Callable[[Path], Path]
) -> None:
    folder = copy(clip)
    edit_json(folder / "config.json", architectures=...)
    assert type(load(folder).wrapped) is CLIPModel


def test_a_tower_alone_loads_with_what_is_beside_it(tmp_path: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**_VISION)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"no image_processor.*wrap\(model, image_processor="):
        load(tmp_path).inputs.prepare(images=RED)
    image_processor().save_pretrained(tmp_path)
    model = load(tmp_path)
    assert type(model.wrapped) is CLIPVisionModel
    assert model.inputs.prepare(images=RED)["pixel_values"].shape == (1, 3, 28, 28)


def test_llava_loads_with_its_processor(tmp_path: Path) -> None:
    tokenizer = made_here.llama()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=LlamaConfig(**_SIZE, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    LlavaProcessor(
        image_processor(),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert (model.kind, model.inputs.image_token) == ("vlm", "<image>")
    made = model.inputs.prepare(text="what colour?", images=RED)
    assert (made["input_ids"] == config.image_token_id).sum() == 4


def test_a_pipeline_loads_in_float32_on_the_cpu_and_every_part_is_in_eval_mode(pipeline: Path) -> None:
    model = load(pipeline)
    assert model.kind == "diffusion"
    for part in (model.wrapped.unet, model.wrapped.vae, model.wrapped.text_encoder):
        assert not part.training
        assert {p.dtype for p in part.parameters()} == {torch.float32}
    assert model.inputs.prepare(text="a red circle") == {"prompt": ["a red circle"]}
    with pytest.raises(InputError, match="at most 77"):
        model.inputs.prepare(text="red " * 80)
    half = load(pipeline, dtype="bfloat16").wrapped
    assert {p.dtype for p in half.unet.parameters()} == {torch.bfloat16}


def test_a_component_passed_in_is_not_read(pipeline: Path, copy: Callable[[Path], Path]) -> None:
    folder = copy(pipeline)
    own = load(pipeline).wrapped.vae
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match="lists the component vae"):
        load(folder)
    assert load(folder, vae=own).wrapped.vae is own


def test_open_clip_loads_a_local_file_as_open_clip_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip
    from open_clip import factory

    small = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 28, "layers": 1, "width": 16, "patch_size": 14, "head_width": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", small)
    own = open_clip.create_model("tiny").eval()
    save_file(own.state_dict(), tmp_path / "w.safetensors")
    model = load(f"open_clip:tiny/{tmp_path}/w.safetensors")
    made = model.inputs.prepare(text=["a red circle"], images=RED)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model.wrapped(**made), own(**made), strict=True))
    assert not model.wrapped.training
    torch.save(own.state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w.pt is pickled.*save_file"):
        load(f"open_clip:tiny/{tmp_path}/w.pt")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((tmp_path / "w.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cut short"):
        load(f"open_clip:tiny/{cut}")
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="are not of open_clip's tiny"):
        load(f"open_clip:tiny/{tmp_path}/other.safetensors")


@pytest.mark.parametrize("name", ["clip", "pipeline"])
def test_an_id_loads_from_the_hubs_cache_without_the_hub(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(name)
    shutil.copytree(folder, tmp_path / "models--some--model" / "snapshots" / "abc")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    model, here = load("some/model", cache_dir=str(tmp_path)), load(folder)
    assert model.inputs.context == here.inputs.context
    assert type(model.wrapped) is type(here.wrapped)
    ours, theirs = (m.wrapped if name == "clip" else m.wrapped.unet for m in (model, here))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    with pytest.raises(CheckpointError, match="the hub cannot be reached"):
        load("some/other", cache_dir=str(tmp_path))


def test_the_zoo_comes_first(clip: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shipped, "NAMES", ("tiny-clip", "tiny-gone"))
    monkeypatch.setattr(shipped, "path", lambda name: clip if name == "tiny-clip" else tmp_path / "none")
    (tmp_path / "tiny-clip").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load("tiny-clip").kind == "contrastive"
    with pytest.raises(CheckpointError, match=r"python -m mm_adapters.zoo.train tiny-gone"):
        load("tiny-gone")


@pytest.mark.parametrize("name", ["clip", "pipeline"])
def test_on_the_meta_device_sites_are_listed_and_nothing_has_values(
    name: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(name)
    model = load(folder, device="meta")
    real = load(folder)
    assert [str(s) for s in model.sitemap] == [str(s) for s in real.sitemap]
    part = model.wrapped if name == "clip" else model.wrapped.unet
    assert all(p.is_meta for p in part.parameters())


def test_wrap_keeps_the_module_and_sets_eval_mode(clip: Path) -> None:
    own = CLIPModel.from_pretrained(clip).train()
    model = loading.wrap(own, processor=CLIPProcessor.from_pretrained(clip))
    assert model.wrapped is own
    assert not own.training
    assert next(own.parameters()).dtype == torch.float16
    assert set(model.inputs.prepare(text="a", images=RED)) == {"input_ids", "attention_mask", "pixel_values"}


# --- what does not ----------------------------------------------------------------------------


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _cut_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def _empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _noise(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)


def _bad_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"nope" + bytes(9))


def _too_long(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")


def _pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _bad_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": ["CLIPM')


def _list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def _foreign(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["MyOwnModel"], auto_map={"AutoModel": "m.MyOwnModel"})


def _nameless(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=..., model_type=...)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (_cut, r"model.safetensors is cut short: its header says \d+ bytes and it has \d+"),
        (_cut_header, "cut short: it has 50 bytes"),
        (_empty, "cut short: it has 0 bytes"),
        (_noise, "not a safetensors file"),
        (_bad_header, "not a safetensors file"),
        (_too_long, "too long"),
        (_pointer, "git lfs pull"),
        (_no_weights, "has a configuration and no weights"),
        (_pickled, r"only pickled weights \(pytorch_model.bin\).*save_pretrained"),
        (_no_config, "neither config.json nor model_index.json"),
        (_bad_config, "config.json is not valid JSON"),
        (_list_config, "holds a list, not an object"),
        (_foreign, r"is a MyOwnModel, which transformers [\d.]+ does not have, and code"),
        (_nameless, "neither an architecture nor a model_type"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_broken_folder_is_refused_before_any_weight_is_read(
    clip: Path, copy: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch, harm: Any, says: str
) -> None:
    folder = copy(clip)
    harm(folder)
    no_weights_are_read(monkeypatch)
    with pytest.raises(CheckpointError, match=says):
        load(folder)


def test_a_missing_or_cut_shard_is_named(
    shards: Path, copy: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(shards)
    no_weights_are_read(monkeypatch)
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=f"{last.name} is cut short"):
        load(folder)
    last.unlink()
    with pytest.raises(CheckpointError, match=f"1 are missing: {last.name}"):
        load(folder)


def test_a_pipelines_parts_are_checked_one_by_one(
    pipeline: Path, copy: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(pipeline)
    no_weights_are_read(monkeypatch)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"unet.*cut short"):
        load(folder)
    edit_json(folder / "model_index.json", _class_name="MyPipeline")
    with pytest.raises(CheckpointError, match="is a MyPipeline, which diffusers"):
        load(folder)
    edit_json(folder / "model_index.json", _class_name="StableAudioPipeline")
    with pytest.raises(UnknownFamilyError, match="diffusers:StableAudioPipeline"):
        load(folder)


def test_a_model_of_no_known_family_is_refused_before_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ElectraModel(ElectraConfig(**_SIZE, vocab_size=30))
    model.save_pretrained(tmp_path)
    with pytest.raises(UnknownFamilyError, match="transformers:ElectraModel"):
        loading.wrap(model)
    no_weights_are_read(monkeypatch)
    with pytest.raises(UnknownFamilyError, match="transformers:ElectraModel") as raised:
        load(tmp_path)
    said = str(raised.value)
    assert "mm_adapters/families/README.md" in said
    assert "'bert'" in said.split("The nearest ")[1].split(":")[0]
    assert '("transformers:ElectraModel",)' in said  # test_unknown_class.py runs what it shows.


def test_an_unreadable_tokenizer_is_an_error_and_not_left_out(
    clip: Path, copy: Callable[[Path], Path]
) -> None:
    folder = copy(clip)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(CheckpointError, match=r"processor beside .* cannot be read"):
        load(folder)


def test_an_unknown_name_says_what_there_is_and_what_the_hub_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tiny-clip.*no such folder.*hub.*Did you mean 'tiny-clip'"):
        load("tiny-clp")
    for name in ("nobody/nothing", "./gone/folder", str(tmp_path / "gone"), "a b c"):
        with pytest.raises(CheckpointError, match=r"no such folder.*the hub"):
            load(name)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is one file, and a model is loaded from a folder"):
        load(tmp_path / "weights.safetensors")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("open_clip:ViT-B-23/openai", "no architecture 'ViT-B-23'. The nearest are ViT-B-32"),
        ("open_clip:ViT-B-32", "says no weights.*laion2b_s34b_b79k"),
        ("open_clip:ViT-B-32/nothing", "no weights 'nothing', which is no file.*laion2b_s34b_b79k"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "not in the cache and the hub cannot be reached"),
    ],
)
def test_open_clip_names_that_do_not_exist_say_which_do(name: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        load(name)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"engine": "torch"}, InputError, "no engine 'torch'; there is hooked, nnsight"),
        ({"dtype": "float12"}, InputError, "dtype='float12' is none a model runs in"),
        ({"dtype": "int8"}, InputError, "float32, float16 or bfloat16"),
        ({"dtype": torch.int64}, InputError, "none a model runs in"),
        ({"device": "gpu"}, InputError, "no device 'gpu'"),
        ({"device": "hip"}, InputError, "no device 'hip' here"),
        ({"device": torch.device("cuda", 99)}, InputError, "no device 'cuda:99' here"),
        ({"device": 1.5}, InputError, "no device '1.5' here"),
        ({"dtype": 16}, InputError, "dtype=16 is none a model runs in"),
        ({"trust_remote_code": True}, InputError, "Code that comes with a checkpoint is never run"),
        ({"use_safetensors": False}, InputError, "safetensors only"),
        ({"torch_dtype": torch.float16}, InputError, "It is called dtype"),
    ],
)
def test_wrong_options_are_refused_first(options: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        load("no such model", **options)


def test_the_dtype_most_numbers_are_stored_in_is_read_from_the_header(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(9).half(), "b": torch.zeros(2), "c": torch.zeros(99).long()}, file)
    assert stored_dtype(file) == torch.float16
    assert set(check_safetensors(file)) == {"a", "b", "c"}
    save_file({"c": torch.zeros(99).long()}, file)
    assert stored_dtype(file) == torch.float32
    with pytest.raises(CheckpointError, match="no file"):
        check_safetensors(tmp_path / "none.safetensors")
