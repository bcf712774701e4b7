"""What work is made of: the same text for the same content, another for another."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import mm_adapters as mm
from mm_adapters import InputError, StoreError
from mm_adapters.storage import fingerprint
from mm_adapters.storage.fingerprint import of_data, of_file, of_model, of_module, of_tensors, of_value
from mm_adapters.store import check_same_work, provenance, work_folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("n", [1, 7, 1024, 100_003])
def test_every_changed_bit_of_a_tensor_is_seen(n: int, dtype: torch.dtype) -> None:
    x = torch.randint(0, 2, (n,)).to(dtype)
    first = of_tensors({"a": x})
    assert first == of_tensors({"a": x.clone()})
    raw = x.view(torch.uint8)
    for at in {0, len(raw) // 2, len(raw) - 1}:
        raw[at] ^= 1
        assert of_tensors({"a": x}) != first
        raw[at] ^= 1
    assert of_tensors({"a": x}) == first
    assert of_tensors({"b": x}) != first


def test_changes_that_cancel_in_a_sum_are_seen() -> None:
    """Exchanged places, opposite signs, values moved from one to another: what a plain sum is blind to."""
    x = torch.randn(64, 128)
    texts = {
        of_tensors({"": y})
        for y in (x, x.flip(0), x.flip(1), x.T.contiguous(), -x, x.roll(1), x.view(128, 64))
    }
    two = x.clone()
    two[3, 5], two[9, 1] = -two[3, 5], -two[9, 1]
    assert len({*texts, of_tensors({"": two})}) == 8
    assert of_tensors({"": x}) == of_tensors(
        {"": x.T.contiguous().T}
    )  # Laid out otherwise, the same numbers.
    assert of_tensors({"": torch.cat([torch.zeros(3), x.flatten()])[3:].view(64, 128)}) == of_tensors({"": x})


def test_two_flipped_bits_never_cancel() -> None:
    x = torch.zeros(4096, dtype=torch.int64)
    seen = set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        places = torch.randint(0, 4096, (2,), generator=generator)
        bits = torch.randint(0, 64, (2,), generator=generator)
        y = x.clone()
        for place, bit in zip(places.tolist(), bits.tolist(), strict=True):
            y[place] ^= -(2**63) if bit == 63 else 1 << bit
        seen.add((tuple(sorted(zip(places.tolist(), bits.tolist(), strict=True))), of_tensors({"": y})))
    pairs = {pair for pair, _ in seen if pair[0] != pair[1]}
    assert len({text for pair, text in seen if pair[0] != pair[1]}) == len(pairs)


def _lora(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(model.wrapped.vision_model, LoraConfig(r=2, target_modules=["q_proj"]))


def _set(module: nn.Module, name: str) -> Any:
    return dict(module.named_parameters())[name]


CHANGES: dict[str, Any] = {
    "a weight through .data": lambda m: (
        _set(m.wrapped, "text_model.final_layer_norm.bias").data[0].add_(1e-3)
    ),
    "a weight of another dtype": lambda m: m.wrapped.vision_model.half(),
    "a buffer": lambda m: m.wrapped.vision_model.embeddings.position_ids.add_(1),
    "an adapter": _lora,
    "the configuration": lambda m: setattr(m.wrapped.config.vision_config, "layer_norm_eps", 1e-3),
    "a layer's own setting": lambda m: setattr(
        m.wrapped.vision_model.encoder.layers[0].layer_norm1, "eps", 1e-2
    ),
    "how pictures are prepared": lambda m: setattr(m.preparer.image_processor, "image_mean", [0.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_was_changed_has_another_fingerprint(name: str) -> None:
    model = mm.load("tiny-clip", device="cpu")
    before = of_model(model)
    assert before == of_model(mm.load("tiny-clip", device="cpu", engine="nnsight"))
    CHANGES[name](model)
    assert of_model(model) != before


def test_which_adapter_is_active_is_part_of_the_fingerprint() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    texts = [of_module(model)["adapters"]]
    model.set_adapter("other")
    texts.append(of_module(model)["adapters"])
    with model.disable_adapter():
        texts.append(of_module(model)["adapters"])
    assert len(set(texts)) == 3


@pytest.mark.parametrize("state", ["offloaded", "int8"])
def test_weights_that_are_no_parameters_are_seen(state: str) -> None:
    from accelerate import cpu_offload

    texts = set()
    for value in (0.5, 0.5, 0.25):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        with torch.no_grad():
            net[1].weight[3, 3] = value
        if state == "offloaded":
            cpu_offload(net)
            assert net[1].weight.is_meta
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                net = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, torch.qint8)
        texts.add(of_module(net)["weights"])
    assert len(texts) == 2


def test_a_pipelines_schedule_is_part_of_its_fingerprint() -> None:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    model = mm.load("tiny-sd", device="cpu")
    texts = [of_model(model)]
    model.wrapped.scheduler = EulerDiscreteScheduler.from_config(model.wrapped.scheduler.config)
    texts.append(of_model(model))
    model.wrapped.scheduler = DDIMScheduler.from_config(model.wrapped.scheduler.config, beta_end=0.1)
    texts.append(of_model(model))
    model.run({"prompt": "a red circle", "num_inference_steps": 2, "seed": 0, "output_type": "latent"})
    assert of_model(model) == texts[-1]  # Running it is no change.
    assert len({str(t) for t in texts}) == 3


def test_a_file_is_known_by_its_bytes_whatever_its_name_size_and_time(tmp_path: Path) -> None:
    one, two = tmp_path / "a.bmp", tmp_path / "b.bmp"
    one.write_bytes(b"x" * 100)
    two.write_bytes(b"x" * 100)
    assert of_file(one) == of_file(two)
    first, times = of_file(one), one.stat()
    time.sleep(0.01)
    one.write_bytes(b"x" * 99 + b"y")
    os.utime(one, ns=(times.st_atime_ns, times.st_mtime_ns))  # As cp -p leaves it.
    assert of_file(one) != first


def test_data_is_known_by_content_and_order(tmp_path: Path) -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    kinds: list[list[Any]] = [
        [image], [pixels], [torch.from_numpy(pixels)], ["a", "b"], ["ab"], ["a", ["b"]], [["a"], "b"],
        ["b", "a"],
        [{"text": "a", "seed": 1}], [{"text": "a", "seed": 2}], [1], [1.0], [True], [None], [b"a"],
        [tmp_path / "a.png"],
        [image.rotate(90)], [image.convert("L")],
    ]  # fmt: skip
    texts = [of_data(items) for items in kinds]
    assert len(set(texts)) == len(kinds)
    assert texts == [of_data(items) for items in kinds]
    with pytest.raises(InputError, match="has no content"):
        of_data([object()])


def test_a_picture_that_is_open_is_read_aside(tmp_path: Path) -> None:
    image = Image.effect_noise((8, 8), 50).convert("RGB")
    image.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert of_value(opened) == of_value(image)
        assert opened.tile  # Still not read.
        opened.load()
        assert of_value(opened) == of_value(image)


def test_what_differs_is_named_with_what_to_do(tmp_path: Path) -> None:
    was, now = (provenance(data=["a"], sites=["s"], batch_size=n) for n in (4, 8))
    check_same_work(tmp_path, was, dict(was))
    with pytest.raises(StoreError, match=r"settings\.batch_size differ .*there 4, asked for 8.*afresh"):
        check_same_work(tmp_path, was, now)
    with pytest.raises(StoreError, match=r"settings\.seed, data, sites differ"):
        check_same_work(tmp_path, was, provenance(data=["b"], sites=["t"], batch_size=4, seed=1))


def test_a_folder_is_one_works_and_one_users(tmp_path: Path) -> None:
    made_of = provenance(data=["a"])
    another = pytest.raises(StoreError, match="Another process works in")
    with work_folder(tmp_path / "w", made_of) as folder, another, work_folder(folder, made_of):
        pass
    with work_folder(folder, made_of):
        pass
    with pytest.raises(StoreError, match="data differ"), work_folder(folder, provenance(data=["b"])):
        pass
    (folder / "made_of.json").write_text("{")
    broken = pytest.raises(StoreError, match=r"made_of\.json is not valid JSON.*start afresh")
    with broken, work_folder(folder, made_of):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be a folder"), work_folder(tmp_path / "file", made_of):
        pass


@pytest.mark.parametrize("n_bytes", [8 * 1024 * 3, 8 * 1024 * 70 + 8, 5, 8 * 1024 + 3])
def test_words_are_mixed_row_by_row_as_it_is_said(n_bytes: int) -> None:
    """Stored work is known by these numbers: the same formula in another library, in one piece."""
    raw = np.random.default_rng(n_bytes).integers(0, 256, n_bytes, np.uint8)
    padded = np.concatenate([raw, np.zeros(-n_bytes % (8 * 1024), np.uint8)]).view(np.int64).reshape(-1, 1024)
    factors = np.random.Generator(np.random.PCG64(20)).integers(0, 2**63 - 1, 1024, np.int64) | 1
    with np.errstate(over="ignore"):
        words = ((padded >> 29) ^ padded) * factors
        wanted = ((words >> 32) ^ words).sum(1)
    assert fingerprint._mixed(torch.from_numpy(raw)).tolist() == wanted.tolist()
    shifted = torch.from_numpy(np.append(np.uint8(7), raw))[1:]  # It begins at no word's start.
    assert fingerprint._mixed(shifted).tolist() == wanted.tolist()
