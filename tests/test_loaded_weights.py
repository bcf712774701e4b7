"""What is loaded is what the checkpoint holds, in the dtypes that its library keeps; advice given works."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from zoo_inputs import INPUTS

import mm_adapters as mm
from mm_adapters import zoo

ENGINES = ("hooked", "nnsight")


def load(folder: Any, engine: str = "hooked", **options: Any) -> Any:
    return mm.load(folder, device="cpu", engine=engine, **options)


def changed(
    tmp_path: Path,
    name: str,
    file: str = "model.safetensors",
    change: Callable[[dict[str, Tensor]], Any] = len,
) -> Path:
    """A shipped model's folder, one weight file of which was changed."""
    folder = Path(shutil.copytree(zoo.path(name), tmp_path / name))
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def first(tensors: dict[str, Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "file", "part"),
    [
        ("tiny-clip", "model.safetensors", "layers.1.mlp.fc1.weight"),
        ("tiny-llava", "model.safetensors", "linear_1.bias"),
        ("tiny-sd", "text_encoder/model.safetensors", "fc2.bias"),
        ("tiny-sd", "unet/diffusion_pytorch_model.safetensors", "conv_in.weight"),
        ("tiny-sd", "vae/diffusion_pytorch_model.safetensors", "conv_out.bias"),
    ],
)
def test_a_missing_weight_is_named(tmp_path: Path, name: str, file: str, part: str, engine: str) -> None:
    folder = changed(tmp_path, name, file, lambda t: t.pop(first(t, part)))
    with pytest.raises(mm.CheckpointError, match=rf"lacks 1 weight of the model: .*{part}") as caught:
        load(folder, engine)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("engine", ["hooked", "nnsight"])
def test_a_missing_weight_is_random_only_on_purpose_and_is_said(tmp_path: Path, engine: str) -> None:
    name = "vision_model.encoder.layers.1.self_attn.q_proj.weight"
    folder = changed(tmp_path, "tiny-clip", change=lambda t: t.pop(name))
    model: Any = mm.load(folder, engine=engine, strict=False)
    assert model.random_weights == (name,)
    assert f"random, not in the checkpoint: {name}" in repr(model)
    assert f"random, not in the checkpoint: {name}" in repr(copy.deepcopy(model))
    whole: Any = mm.load("tiny-clip", engine=engine)
    assert whole.random_weights == ()
    assert "random" not in repr(whole)
    ours, theirs = (m.wrapped.state_dict() for m in (model, whole))
    assert {n for n in theirs if not torch.equal(ours[n], theirs[n])} == {name}
    with pytest.raises(mm.InputError, match="strict"):
        mm.load("tiny-sd", strict=False)


def test_of_one_model_of_diffusers_too(tmp_path: Path) -> None:
    file = "unet/diffusion_pytorch_model.safetensors"
    lacking = ["conv_in.weight", "mid_block.resnets.0.conv1.bias"]
    folder = changed(tmp_path, "tiny-sd", file, lambda t: [t.pop(name) for name in lacking]) / "unet"
    model: Any = mm.load(folder, device="cpu", strict=False)
    assert model.random_weights == tuple(lacking)
    assert f"random, not in the checkpoint: {', '.join(lacking)}" in repr(model)
    whole: Any = mm.load(zoo.path("tiny-sd") / "unet", device="cpu", strict=False)
    assert whole.random_weights == ()
    ours, theirs = (m.wrapped.state_dict() for m in (model, whole))
    assert {n for n in theirs if not torch.equal(ours[n], theirs[n])} == set(lacking)
    assert all(bool(weight.isfinite().all()) for weight in ours.values())
    with pytest.raises(mm.CheckpointError, match="lacks 2 weights"):
        load(folder)
    with pytest.raises(mm.InputError, match="strict=False with device_map"):
        mm.load(folder, strict=False, device_map="auto")


def test_a_misspelt_weight_is_named_with_what_it_was_meant_for(tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        key = first(tensors, "q_proj.weight")
        tensors[key.replace("q_proj", "q_porj")] = tensors.pop(key)

    folder = changed(tmp_path, "tiny-clip", change=rename)
    with pytest.raises(mm.CheckpointError, match=r"q_proj\.weight\. Its files have .*q_porj\.weight"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("name", "file", "named"),
    [
        ("tiny-clip", "model.safetensors", "text_projection.weight"),
        ("tiny-sd", "unet/diffusion_pytorch_model.safetensors", "unet.conv_in.weight"),
    ],
)
def test_a_weight_that_is_no_number_is_named(
    tmp_path: Path, name: str, file: str, named: str, value: float
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[first(tensors, named.removeprefix("unet."))].view(-1)[3] = value

    folder = changed(tmp_path, name, file, spoil)
    with pytest.raises(mm.CheckpointError, match=f"the weight {named} holds NaN or infinity"):
        load(folder)


def test_a_whole_weight_is_refused_and_a_table_of_positions_is_not(tmp_path: Path) -> None:
    def whole(tensors: dict[str, Tensor]) -> None:
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]

    assert load(changed(tmp_path, "tiny-clip", change=whole)).kind == "contrastive"
    shutil.rmtree(tmp_path / "tiny-clip")

    def bad(tensors: dict[str, Tensor]) -> None:
        key = first(tensors, "fc1.weight")
        tensors[key] = tensors[key].to(torch.int8)

    with pytest.raises(mm.CheckpointError, match=r"fc1\.weight is stored as I8, whole numbers"):
        load(changed(tmp_path, "tiny-clip", change=bad))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_weight_and_buffer_has_the_librarys_dtype_and_value(dtype: str, engine: str) -> None:
    own = hf.LlavaForConditionalGeneration.from_pretrained(str(zoo.path("tiny-llava")), dtype=dtype)
    loaded = load("tiny-llava", engine, dtype=dtype).wrapped
    theirs = dict(own.named_parameters()) | dict(own.named_buffers())
    ours = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    assert ours.keys() == theirs.keys()
    assert {n for n, t in theirs.items() if t.dtype == torch.float32}  # The rotary frequencies.
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor)


@pytest.mark.parametrize("engine", ENGINES)
def test_t5_keeps_what_half_precision_breaks(tmp_path: Path, engine: str) -> None:
    config = hf.T5Config(vocab_size=60, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    hf.T5EncoderModel(config).save_pretrained(tmp_path)
    loaded = load(tmp_path, engine, dtype="float16").wrapped
    own = hf.T5EncoderModel.from_pretrained(tmp_path, dtype=torch.float16)
    dtypes = {name: p.dtype for name, p in own.named_parameters()}
    assert set(dtypes.values()) == {torch.float16, torch.float32}
    assert {name: p.dtype for name, p in loaded.named_parameters()} == dtypes


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("part", "cls"), [("unet", UNet2DConditionModel), ("vae", AutoencoderKL)])
def test_a_part_of_a_pipeline_loads_from_its_folder(part: str, cls: Any, engine: str) -> None:
    loaded = load(zoo.path("tiny-sd") / part, engine)
    own = cls.from_pretrained(zoo.path("tiny-sd") / part)
    assert type(loaded.wrapped) is cls
    for name, tensor in own.named_parameters():
        assert torch.equal(loaded.wrapped.get_parameter(name), tensor)
    meta = mm.load(zoo.path("tiny-sd") / part, device="meta")
    assert list(meta.sitemap.sites) == list(loaded.sitemap.sites)


@pytest.mark.parametrize("part", ["scheduler", "tokenizer"])
def test_a_part_without_sites_is_no_model_and_its_pipeline_is_named(part: str) -> None:
    with pytest.raises(mm.CheckpointError, match=r"Load that: mm_adapters\.load\('.*tiny-sd'\)"):
        load(zoo.path("tiny-sd") / part)


def halved(tmp_path: Path, name: str) -> Path:
    folder = Path(shutil.copytree(zoo.path(name), tmp_path / name))
    for file in folder.rglob("*.safetensors"):
        half = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
        save_file(half, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    return folder


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-sd"])
def test_a_folder_of_one_variant_says_which_and_loads_so(tmp_path: Path, name: str) -> None:
    folder = halved(tmp_path, name)
    with pytest.raises(mm.CheckpointError, match='variant="fp16"'):
        load(folder)
    loaded, plain = load(folder, variant="fp16"), load(name)
    weights = dict(loaded.named_parameters())
    assert weights
    for key, tensor in plain.named_parameters():
        assert torch.equal(weights[key], tensor.half().float())


def test_the_advice_for_an_adapter_works(tmp_path: Path) -> None:
    """peft's adapter of tiny-clip: what the message says to do gives the adapted model."""
    base = hf.CLIPModel.from_pretrained(str(zoo.path("tiny-clip")), dtype=torch.float32)
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink(missing_ok=True)
    with pytest.raises(mm.CheckpointError, match=r"is an adapter of .*tiny-clip.*merge_and_unload\(\)"):
        load(tmp_path)
    again = hf.CLIPModel.from_pretrained(str(zoo.path("tiny-clip")), dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(again, str(tmp_path)).merge_and_unload()
    wrapped = mm.wrap(model, processor=load("tiny-clip").inputs.processor)
    given = wrapped.prepare(**INPUTS["tiny-clip"])
    tuned.eval()
    with torch.no_grad():
        right = tuned(**given).logits_per_image
    torch.testing.assert_close(wrapped(**given).logits_per_image, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("pytorch_lora_weights.safetensors", "LoRA adapter of a pipeline.*load_lora_weights"),
        ("learned_embeds.safetensors", "textual inversion.*load_textual_inversion"),
    ],
)
def test_what_is_put_on_a_pipeline_is_no_model(tmp_path: Path, file: str, says: str) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / file)
    with pytest.raises(mm.CheckpointError, match=says):
        load(tmp_path)


def test_one_file_is_told_by_what_is_beside_it(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "pretty.safetensors")
    with pytest.raises(mm.CheckpointError, match=r"from_single_file.*mm_adapters\.wrap"):
        load(tmp_path / "pretty.safetensors")
    (tmp_path / "old.ckpt").write_bytes(b"")
    with pytest.raises(mm.CheckpointError, match="It is pickled"):
        load(tmp_path / "old.ckpt")
    inside = zoo.path("tiny-clip") / "model.safetensors"
    with pytest.raises(mm.CheckpointError, match=r"That is here: mm_adapters.load\('.*tiny-clip'\)"):
        load(inside)


def outputs(model: Any, name: str) -> Tensor:
    output = model.run(INPUTS[name]).output
    for field in ("logits_per_image", "logits", "images"):
        if hasattr(output, field):
            return torch.as_tensor(getattr(output, field))
    raise AssertionError


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["tiny-clip", "tiny-llava", "tiny-sd"])
def test_a_deep_copy_has_weights_of_its_own(name: str, engine: str) -> None:
    model = load(name, engine)
    before = outputs(model, name)
    twin = copy.deepcopy(model)
    assert torch.equal(outputs(twin, name), before)
    wrapped = twin.wrapped
    parts = [wrapped] if isinstance(wrapped, torch.nn.Module) else [wrapped.unet, wrapped.text_encoder]
    with torch.no_grad():
        for p in (p for part in parts for p in part.parameters()):
            p.mul_(0.5)
    assert not torch.equal(outputs(twin, name), before)
    assert torch.equal(outputs(model, name), before)
    site = next(s for s in model.sitemap.sites if s.endswith("blocks.0.hook_resid_post"))
    read = twin.run(INPUTS[name], read=[site])[site]
    assert not torch.equal(read, model.run(INPUTS[name], read=[site])[site])


def test_a_traced_model_is_not_pickled_and_says_what_to_do() -> None:
    model = load("tiny-clip", "nnsight")
    with pytest.raises(mm.InputError, match="save_pretrained"):
        pickle.dumps(model)


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-llava", "tiny-sd"])
def test_a_state_dict_is_the_wrapped_models(name: str) -> None:
    model = load(name)
    before, state = outputs(model, name), {k: v.clone() for k, v in model.state_dict().items()}
    assert not model.load_state_dict(state).missing_keys
    assert torch.equal(outputs(model, name), before)
    model.load_state_dict({k: torch.zeros_like(v) for k, v in state.items()})
    assert not any(p.any() for p in model.parameters())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})
    if name == "tiny-sd":
        assert "unet.conv_in.weight" in state
