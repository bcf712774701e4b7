"""What is stored on disk, small: how each kind is written and read, and what in it can be damaged how."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import mm_adapters as mm

SITE = "vision.blocks.1.hook_resid_post"


@dataclass(frozen=True)
class Kind:
    """`write(folder)` makes it, `read(folder)` gives what is in it, as plain values to compare.

    `sealed` files carry a checksum: whatever is done to their bytes is an error, or changes nothing. Of the
    others, which users write and other programs, only what cannot be meant is an error.
    """

    name: str
    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    sealed: bool
    rewrites: bool = False


@cache
def model() -> Any:
    return mm.load("tiny-clip", device="cpu")


@cache
def _images() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)) for _ in range(4)]


def values_of(value: Any) -> Any:
    """Tensors as lists, so that equal content is equal."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), value.double().flatten().tolist()]
    if isinstance(value, dict):
        return {str(k): values_of(v) for k, v in value.items()}
    return [values_of(v) for v in value] if isinstance(value, list | tuple) else value


def _write_store(folder: Path) -> None:
    from mm_adapters.store import Column, Writer

    rows = torch.arange(60.0).view(20, 3)
    with Writer(folder / "store", {"a": Column((3,)), "b": Column(())}, {"x": 1}, shard_bytes=100) as writer:
        for i in range(0, 20, 4):
            writer.append({"a": rows[i : i + 4], "b": rows[i : i + 4, 0]}, items=4)


def _read_store(folder: Path) -> Any:
    from mm_adapters.store import Store

    store = Store(folder / "store")
    return values_of([store.rows(), store.about, store.n_items])


def _half_store(folder: Path) -> None:
    from mm_adapters.store import Column, Writer

    with contextlib.suppress(InterruptedError), Writer(folder / "store", {"a": Column((3,))}, {}) as writer:
        for i in range(3):
            writer.append({"a": torch.full((4, 3), float(i))}, items=4)
        raise InterruptedError


def _resume_store(folder: Path) -> Any:
    from mm_adapters.store import Column, Store, Writer

    with Writer(folder / "store", {"a": Column((3,))}, {}) as writer:
        for i in range(writer.appends, 5):
            writer.append({"a": torch.full((4, 3), float(i))}, items=4)
    return values_of(Store(folder / "store").rows())


def _write_record(folder: Path) -> None:
    from methods_multimodal.text_explanations.moments import Moments

    outer, total = torch.randn(1, 2, 3, 3, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64)
    Moments(5, total, outer, None).save(folder / "record.safetensors")


def _read_record(folder: Path) -> Any:
    from methods_multimodal.text_explanations.moments import Moments

    record = Moments.load(folder / "record.safetensors")
    return values_of([record.count, record.total, record.outer])


def _heads(folder: Path) -> Any:
    from methods_multimodal.text_explanations import Vocabulary, name_heads

    words = Vocabulary(("a", "b", "c"), ("a", "b", "c"), ("", "", ""))
    found = name_heads(model(), _images(), words, n_texts=1, top=1, batch_size=2, folder=folder / "work")
    return values_of([found.chosen, found.scores, found.variance])


def _write_sae(folder: Path) -> None:
    from sae_lens import TopKSAE, TopKSAEConfig

    torch.manual_seed(0)
    TopKSAE(TopKSAEConfig(d_in=8, d_sae=16, k=4)).save_model(folder / "sae")


def _read_sae(folder: Path) -> Any:
    from integrations import sae_lens as mm_sae

    sae = mm_sae.load(folder / "sae")
    return values_of([sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k, dict(sae.state_dict())])


def _write_foreign_sae(folder: Path) -> None:
    from safetensors.torch import save_file

    g = torch.Generator().manual_seed(0)
    (folder / "sae").mkdir()
    weights = {
        "encoder.weight": torch.randn(16, 8, generator=g), "encoder.bias": torch.zeros(16),
        "W_dec": torch.randn(16, 8, generator=g), "b_dec": torch.zeros(8),
    }  # fmt: skip
    save_file(weights, folder / "sae" / "sae.safetensors")
    (folder / "sae" / "cfg.json").write_text(json.dumps({"k": 4, "hook_name": "denoiser.blocks.0.hook_out"}))


def _train(folder: Path) -> Any:
    from sae_lens import BatchTopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    from integrations import sae_lens as mm_sae
    from mm_adapters.store import Column, Store, Writer

    if not (folder / "rows").exists():
        rows = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
        with Writer(folder / "rows", {SITE: Column((128,))}) as writer:
            writer.append({SITE: rows})
    trainer = SAETrainerConfig(
        total_training_samples=64, train_batch_size_samples=16, lr=1e-3, lr_end=1e-4, lr_warm_up_steps=0,
        lr_decay_steps=0, dead_feature_window=50, n_batches_for_norm_estimate=2, device="cpu", autocast=False,
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False, feature_sampling_window=100,
        lr_scheduler_name="constant", n_restart_cycles=1, adam_beta1=0.9, adam_beta2=0.999,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    cfg = BatchTopKTrainingSAEConfig(d_in=128, d_sae=16, k=2)
    sae = mm_sae.train(
        model(), SITE, cfg, data=Store(folder / "rows"), trainer=trainer, folder=folder / "work",
        progress=False, checkpoint_every=2,
    )  # fmt: skip
    return values_of(dict(sae.state_dict()))


def _write_interventions(folder: Path) -> None:
    import pyvene as pv

    from integrations import pyvene as mm_pv

    torch.manual_seed(0)
    one = mm_pv.intervention(model(), SITE, pv.LowRankRotatedSpaceIntervention, low_rank_dimension=2)
    mm_pv.MMIntervenableModel(pv.IntervenableConfig([one]), model()).save(folder / "saved")


def _read_interventions(folder: Path) -> Any:
    from integrations import pyvene as mm_pv

    with contextlib.redirect_stdout(io.StringIO()):  # pyvene prints.
        found = mm_pv.MMIntervenableModel.load(folder / "saved", model())
    (key,) = found.interventions
    place = found.representations[key]
    state = {k: v for k, v in found.interventions[key].state_dict().items() if v is not None}
    return values_of([key, place.layer, place.component, place.unit, state])


def _write_pictures(folder: Path) -> None:
    (folder / "images").mkdir()
    for i, image in enumerate(_images()[:2]):
        image.save(folder / "images" / f"{i}.png")


def _write_coco(folder: Path) -> None:
    _write_pictures(folder)
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 16, "height": 16} for i in range(2)],
        "categories": [{"id": 1, "name": "circle", "supercategory": "shape"}, {"id": 2, "name": "red"}],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 1, "segmentation": [[0, 0, 9, 0, 9, 9]]},
            {
                "id": 2,
                "image_id": 1,
                "category_id": 2,
                "segmentation": {"size": [16, 16], "counts": [6, 4, 246]},
            },
        ],
    }
    for one in document["annotations"]:
        one |= {"iscrowd": int(isinstance(one["segmentation"], dict)), "area": 1, "bbox": [0, 0, 9, 9]}
    (folder / "coco.json").write_text(json.dumps(document))


def _read_coco(folder: Path) -> Any:
    from methods_multimodal.dissection.masks import read_masks

    masks, concepts = read_masks(folder / "coco.json", sorted((folder / "images").iterdir()))
    return [concepts.names, concepts.categories, [{k: v.tolist() for k, v in one.items()} for one in masks]]


def _write_maps(folder: Path) -> None:
    _write_pictures(folder)
    (folder / "masks").mkdir()
    (folder / "masks" / "legend.json").write_text('{"colour": {"1": "red", "2": "white"}}')
    for i in range(2):
        Image.new("L", (16, 16), 1 + i).save(folder / "masks" / f"{i}.png")


def _read_maps(folder: Path) -> Any:
    from methods_multimodal.dissection.masks import read_masks

    masks, concepts = read_masks(folder / "masks", sorted((folder / "images").iterdir()))
    return [concepts.names, [{k: v.tolist() for k, v in one.items()} for one in masks]]


def _write_words(folder: Path) -> None:
    (folder / "concepts.txt").write_text("colour\tred\ncolour\tblue\nshape\tcircle\n")
    (folder / "words.txt").write_text("[colour]\na red thing\na blue thing\n# a note\n[shape]\na circle\n")


def _read_words(folder: Path) -> Any:
    from methods_multimodal.dissection.concepts import read_concepts
    from methods_multimodal.text_explanations import vocabulary

    concepts, words = read_concepts(folder / "concepts.txt"), vocabulary(folder / "words.txt")
    return [concepts.names, concepts.categories, words.texts, words.groups]


def _write_captions(folder: Path) -> None:
    _write_pictures(folder)
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in range(2)]
    (folder / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _read_captions(folder: Path) -> Any:
    from methods_multimodal.data_attribution.pictures import read_pictures

    found = read_pictures(folder / "images")
    return [found.captions, [list(image.getdata()) for image in found.images()]]


def _write_settings(folder: Path) -> None:
    text = "architecture: batchtopk\nd_in: 128\nd_sae: 64\nk: 3\ntrainer:\n  total_training_samples: 2048\n"
    (folder / "sae.yaml").write_text(f"{text}  train_batch_size_samples: 64\n  lr: 0.001\n")


def _read_settings(folder: Path) -> Any:
    from integrations.commands import parse_config, read_config

    cfg, trainer = parse_config(read_config(folder / "sae.yaml"))
    return [type(cfg).__name__, cfg.d_in, cfg.d_sae, cfg.k, trainer.lr, trainer.total_training_samples]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


KINDS = (
    Kind("store", _write_store, _read_store, sealed=True),
    Kind("open store", _half_store, _resume_store, sealed=True, rewrites=True),
    Kind("record", _write_record, _read_record, sealed=True),
    Kind("progress", _heads, _heads, sealed=True, rewrites=True),
    Kind("sae", _write_sae, _read_sae, sealed=False),
    Kind("another's sae", _write_foreign_sae, _read_sae, sealed=False),
    Kind("training", _train, _train, sealed=True, rewrites=True),
    Kind("interventions", _write_interventions, _read_interventions, sealed=True),
    Kind("coco", _write_coco, _read_coco, sealed=False),
    Kind("index maps", _write_maps, _read_maps, sealed=False),
    Kind("word lists", _write_words, _read_words, sealed=False),
    Kind("captions", _write_captions, _read_captions, sealed=False),
    Kind("settings", _write_settings, _read_settings, sealed=False),
)
