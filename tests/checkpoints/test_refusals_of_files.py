"""A checkpoint that is not what was asked for is refused with the reason; one step inside, it loads."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mm_adapters._errors import CheckpointError, InputError, UnknownFamilyError
from mm_adapters.checkpoints import from_diffusers, from_open_clip, from_transformers
from mm_adapters.checkpoints.from_diffusers import load_diffusers_model, load_pipeline
from mm_adapters.checkpoints.from_transformers import load_module
from mm_adapters.checkpoints.origin import CheckpointRef
from mm_adapters.checkpoints.source import Source
from mm_adapters.storage.tensor_files import load_tensors, save_tensors

CPU, META = torch.device("cpu"), torch.device("meta")


def here(folder: Path) -> Source:
    return Source(str(folder), folder)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet in half precision, the rest in float32."""
    made = tiny.stable_diffusion().model
    made.unet.half()
    folder = tmp_path_factory.mktemp("pipeline")
    made.save_pretrained(folder)
    return folder


def test_a_pipelines_dtype_is_that_of_its_denoisers_file(pipeline: Path) -> None:
    read = load_pipeline(here(pipeline), CPU, None)
    assert {p.dtype for part in (read.unet, read.vae, read.text_encoder) for p in part.parameters()} == {
        torch.float16
    }
    stored = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(read.unet.conv_in.weight, stored["conv_in.weight"])
    own = tiny.stable_diffusion().model.unet
    without = load_pipeline(here(pipeline), CPU, None, unet=own)
    assert without.unet is own
    assert {p.dtype for p in without.text_encoder.parameters()} == {torch.float32}
    asked = load_pipeline(here(pipeline), CPU, torch.bfloat16)
    assert {p.dtype for p in asked.unet.parameters()} == {torch.bfloat16}


def test_a_denoiser_called_transformer_says_the_dtype_too(tmp_path: Path) -> None:
    made = tiny.CASES["pixart"]().model
    made.transformer.to(torch.bfloat16)
    made.save_pretrained(tmp_path)
    read = load_pipeline(here(tmp_path), CPU, None)
    assert {p.dtype for p in read.transformer.parameters()} == {torch.bfloat16}


def test_of_a_denoiser_in_several_files_the_first_says_the_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny.stable_diffusion().model
    made.save_pretrained(tmp_path)
    for file in (tmp_path / "unet").iterdir():
        file.unlink()
    made.unet.save_pretrained(tmp_path / "unet", max_shard_size="20KB")
    asked: list[str] = []
    monkeypatch.setattr(from_diffusers, "stored_dtype", lambda file: asked.append(file.name) or torch.float16)
    assert load_pipeline(here(tmp_path), CPU, None).unet.dtype == torch.float16
    assert [name.partition("-of-")[0] for name in asked] == ["diffusion_pytorch_model-00001"]


def test_a_part_of_a_pipeline_without_weights_says_where_its_pipeline_is(pipeline: Path) -> None:
    scheduler = pipeline / "scheduler"
    config = json.loads((scheduler / "scheduler_config.json").read_text())
    says = (
        rf"is a DDIMScheduler, which has no sites\. Load its pipeline: mm_adapters\.load\('{pipeline}'\)\.$"
    )
    with pytest.raises(CheckpointError, match=says):
        load_diffusers_model(here(scheduler), config, CPU, None)
    with pytest.raises(CheckpointError, match=r"^o/n is a DDIMScheduler.* Load its pipeline\.$"):
        load_diffusers_model(Source("o/n"), config, CPU, None)
    unet = load_diffusers_model(here(pipeline / "unet"), config_of(pipeline / "unet"), CPU, None)
    assert {p.dtype for p in unet.parameters()} == {torch.float16}


def test_a_model_of_diffusers_of_no_known_family_is_refused_by_its_outline(tmp_path: Path) -> None:
    from diffusers import AutoencoderTiny

    model = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    model.save_config(tmp_path)
    with pytest.raises(UnknownFamilyError, match="diffusers:AutoencoderTiny"):
        load_diffusers_model(here(tmp_path), config_of(tmp_path), CPU, None)


def test_a_folder_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(tmp_path))} has no config.json"):
        load_module(here(tmp_path), CPU, None)
    tiny.clip_text().model.save_pretrained(tmp_path)
    assert type(load_module(here(tmp_path), CPU, None)).__name__ == "CLIPTextModel"


def test_strict_false_is_for_models_that_lack_weights(pipeline: Path) -> None:
    unet = here(pipeline / "unet")
    whole, lax = (load_module(unet, CPU, None, strict=strict).conv_in.weight for strict in (True, False))
    assert torch.equal(whole, lax)
    assert load_module(unet, CPU, None, strict=True).conv_in.weight.dtype == torch.float16
    assert load_module(unet, META, None).conv_in.weight.device == META
    with pytest.raises(CheckpointError, match=r"fc1\.weight"):
        tiny_text_without_a_weight(pipeline, strict=True)
    assert tiny_text_without_a_weight(pipeline, strict=False).dtype == torch.float32


def tiny_text_without_a_weight(pipeline: Path, *, strict: bool) -> Any:
    folder = pipeline / "text_encoder"
    file = folder / "model.safetensors"
    whole = load_file(file)
    name = next(n for n in whole if n.endswith("fc1.weight"))
    try:
        save_file({n: t for n, t in whole.items() if n != name}, file, metadata={"format": "pt"})
        return load_module(here(folder), CPU, None, strict=strict)
    finally:
        save_file(whole, file, metadata={"format": "pt"})


def test_a_class_that_cannot_be_built_is_outlined_without_modules(tmp_path: Path) -> None:
    class Picky(nn.Module):
        class config_class:
            @staticmethod
            def from_pretrained(name: str) -> Any:
                raise ValueError(name)

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

    bare = from_transformers._outline(Picky, here(tmp_path))
    assert type(bare) is Picky
    assert not list(bare.children())
    assert repr(bare) == "Picky()"  # torch's own attributes are there.
    Picky.config_class.from_pretrained = staticmethod(lambda name: SimpleNamespace())  # type: ignore[assignment]
    assert from_transformers._outline(Picky, here(tmp_path)).layer.weight.is_meta  # type: ignore[union-attr]


@pytest.mark.parametrize("method", [OSError, RuntimeError, ValueError, KeyError])
def test_a_librarys_reason_is_passed_on(method: type[Exception]) -> None:
    def fails(name: str, **options: Any) -> Any:
        raise method("its reason")

    with pytest.raises(CheckpointError, match=r"^o/n cannot be loaded: '?its reason'?$"):
        Source("o/n").read(fails)
    with pytest.raises(TypeError):
        Source("o/n").read(lambda: None)


def test_a_library_is_told_to_read_safetensors_and_to_run_no_code() -> None:
    told = Source("o/n", where={"revision": "r"}).read(lambda name, **options: (name, options), x=1)
    safe = {"use_safetensors": True, "trust_remote_code": False}
    assert told == ("o/n", {**safe, "revision": "r", "x": 1})


@pytest.mark.parametrize("key", ["[]", '"x"', "{}", '{"repo_id": null}', '{"repo_id": 3}'])
def test_a_key_without_a_name_is_no_checkpoint(key: str) -> None:
    with pytest.raises(InputError, match=rf"{re.escape(repr(key))} names no checkpoint: it has no repo_id"):
        CheckpointRef.parse(key)


def test_a_key_is_read_as_it_was_written() -> None:
    ref = CheckpointRef("o/n", {"revision": "r", "variant": "fp16"})
    assert CheckpointRef.parse(ref.key()) == ref
    assert CheckpointRef.parse('{"repo_id": "o/n", "revision": null}') == CheckpointRef("o/n", {})


# --- open_clip ----------------------------------------------------------------------------------


def test_weights_that_open_clip_has_only_pickled_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    fetched: list[tuple[str, str, Any]] = []
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda folder, filename, cache_dir: fetched.append((folder, filename, cache_dir)),
    )
    for config in ({}, {"hf_hub": ""}, {"url": "u"}):
        with pytest.raises(CheckpointError, match="'openai' only as a pickled file, which is not read"):
            from_open_clip._fetch_safetensors("openai", config, None)
    assert not fetched
    from_open_clip._fetch_safetensors("t", {"hf_hub": "o/n/"}, "kept")
    from_open_clip._fetch_safetensors("t", {"hf_hub": "o/n/some.model.bin"}, None)
    assert fetched == [
        ("o/n", "open_clip_model.safetensors", "kept"),
        ("o/n", "some.model.safetensors", None),
    ]


def refusals() -> dict[str, Exception]:
    import httpx
    from huggingface_hub import errors

    answer = httpx.Response(404, request=httpx.Request("GET", "http://hub"))
    return {
        "is not in the cache and the hub cannot be reached": errors.LocalEntryNotFoundError("away"),
        "The hub gave no open_clip_model.safetensors of o/n for open_clip's 't': none": (
            errors.RemoteEntryNotFoundError("none", response=answer)
        ),
        "The hub gave no open_clip_model.safetensors of o/n for open_clip's 't': shut": (
            errors.HfHubHTTPError("shut", response=answer)
        ),
        "The hub gave no open_clip_model.safetensors of o/n for open_clip's 't': full": OSError("full"),
    }


@pytest.mark.parametrize("says", list(refusals()))
def test_what_the_hub_says_of_open_clips_weights_is_passed_on(
    says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def fails(*_: Any, **__: Any) -> Any:
        raise refusals()[says]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(CheckpointError, match=says):
        from_open_clip._fetch_safetensors("t", {"hf_hub": "o/n/"}, None)


@pytest.mark.parametrize(
    ("tag", "given", "used"),
    [
        ({"quick_gelu": True}, {}, True),
        ({"quick_gelu": False}, {}, False),
        ({"hf_hub": "o/n/"}, {}, False),
        ({"quick_gelu": True}, {"force_quick_gelu": False}, False),
    ],
)
def test_a_tags_activation_is_the_models(
    tag: dict[str, Any], given: dict[str, Any], used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip

    asked: dict[str, Any] = {}
    fetched: list[Any] = []

    def build(arch: str, **options: Any) -> tuple[str, None, str]:
        asked.update(options, arch=arch)
        return "model", None, "transform"

    real = open_clip.create_model_and_transforms
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda arch, name: tag)
    monkeypatch.setattr(from_open_clip, "_fetch_safetensors", lambda *args: fetched.append(args))
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda arch: "tokenizer")
    build.__signature__ = inspect.signature(real)  # type: ignore[attr-defined]
    monkeypatch.setattr(open_clip, "create_model_and_transforms", build)
    read = from_open_clip.load_open_clip("ViT-B-32/some", **given)
    assert read == ("model", "tokenizer", "transform")
    assert fetched == [("some", tag, None)]
    assert asked == {"arch": "ViT-B-32", "pretrained": "some", "device": "cpu", "force_quick_gelu": used}


# --- files of tensors ---------------------------------------------------------------------------


def test_a_file_of_tensors_that_changed_is_named(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "a.safetensors", {"x": torch.arange(4.0)}, {"by": "us"})
    tensors, facts = load_tensors(path)
    assert torch.equal(tensors["x"], torch.arange(4.0))
    assert facts == {"by": "us"}
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))} is damaged"):
        load_tensors(path)
    save_file({"x": torch.ones(1)}, path)  # Another's file has no sum.
    assert load_tensors(path)[1] == {}


@pytest.mark.parametrize("error", [OSError, ValueError, RuntimeError])
def test_a_file_that_cannot_be_opened_is_named(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mm_adapters.storage import tensor_files

    def fails(*_: Any, **__: Any) -> Any:
        raise error("worn out")

    path = save_tensors(tmp_path / "a.safetensors", {"x": torch.arange(4.0)}, {})
    monkeypatch.setattr(tensor_files, "safe_open", fails)
    with pytest.raises(CheckpointError, match=rf"^{re.escape(str(path))} cannot be read: worn out\. Get it"):
        load_tensors(path)
