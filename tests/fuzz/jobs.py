"""Every job that resumes from a folder, small: what it is given, what it counts, what it leaves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

import mm_adapters as mm

SITE = "vision.blocks.1.hook_resid_post"
PROMPT = "a large red circle in the middle on a white background"
CHANGES = ("weights", "data", "settings")


@dataclass(frozen=True)
class Setting:
    """What a job is started with; `changed` is None, or which of `CHANGES` is not as before."""

    folder: Path
    pictures: Path
    changed: str | None = None

    def model(self, name: str) -> Any:
        """The model, with one weight a little larger if that is what was changed."""
        return _model(name, self.changed == "weights")

    def files(self, n: int) -> list[Path]:
        """Pictures; with changed data, others of the same names, sizes and times."""
        where = self.pictures / ("b" if self.changed == "data" else "a")
        return sorted(where.iterdir())[:n]

    def pick(self, usual: Any, other: Any) -> Any:
        """One of two values of a setting."""
        return other if self.changed == "settings" else usual

    def seed(self) -> int:
        """Of data that are drawn."""
        return int(self.changed == "data")


Count = Callable[[int], None]


@dataclass(frozen=True)
class Job:
    """`run(setting, count)` works in the setting's folder, and counts what it does; `left` is what stays."""

    name: str
    run: Callable[[Setting, Count], None]
    left: tuple[str, ...]
    without: tuple[str, ...] = ()

    def artefact(self, folder: Path) -> dict[str, bytes]:
        """The files of the result, by name."""
        files = [p for pattern in self.left for p in sorted(folder.glob(pattern)) if p.is_file()]
        return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def pictures(folder: Path, n: int = 96) -> Path:
    """Two folders of noise, alike in all but the pixels."""
    for seed, name in enumerate("ab"):
        (folder / name).mkdir(parents=True)
        rng = np.random.default_rng(seed)
        for i in range(n):
            file = folder / name / f"{i:04d}.bmp"
            Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(file)
            os.utime(file, ns=(10**18, 10**18))
    return folder


@cache
def _model(name: str, changed: bool) -> Any:
    model = mm.load(name, device="cpu")
    with contextlib.suppress(AttributeError):
        model.wrapped.set_progress_bar_config(disable=True)
    if changed:
        module = model.wrapped if isinstance(model.wrapped, nn.Module) else model.wrapped.unet
        weight = dict(module.named_parameters())[_LAST_WEIGHT[name]]
        weight.data.view(-1)[-1] *= 1.01  # As peft's merging writes: no counter of torch sees it.
    return model


_LAST_WEIGHT = {
    "tiny-clip": "vision_model.encoder.layers.0.mlp.fc1.weight",
    "tiny-sd": "conv_in.weight",
    "tiny-llava": "model.language_model.layers.0.mlp.up_proj.weight",
}


@contextlib.contextmanager
def counted(module: nn.Module, count: Count) -> Iterator[None]:
    """Counts the rows that a module is run on."""

    def hook(_: Any, args: Any, kwargs: Any) -> None:
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim]
        count(len(tensors[0]))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _collect(setting: Setting, count: Count) -> None:
    from integrations.sae_lens import collect

    model = setting.model("tiny-clip")
    with counted(model.wrapped.vision_model, count):
        tokens = setting.pick("class", "patch")
        collect(model, SITE, setting.files(96), setting.folder, batch_size=4, tokens=tokens, progress=False)


def _sae(setting: Setting, count: Count) -> None:
    from sae_lens import BatchTopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    from integrations import sae_lens as mm_sae

    real = SAETrainer.step

    def step(self: Any, rows: Any) -> Any:
        count(1)
        return real(self, rows)

    trainer = SAETrainerConfig(
        total_training_samples=64 * 150, train_batch_size_samples=64, lr=1e-3, lr_end=1e-4,
        lr_warm_up_steps=0, lr_decay_steps=0, dead_feature_window=50, n_batches_for_norm_estimate=2,
        device="cpu", autocast=False, n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
        feature_sampling_window=100, lr_scheduler_name="constant", n_restart_cycles=1, adam_beta1=0.9,
        adam_beta2=0.999, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    cfg = BatchTopKTrainingSAEConfig(d_in=128, d_sae=64, k=setting.pick(4, 5))
    try:
        SAETrainer.step = step  # type: ignore[method-assign]
        mm_sae.train(
            setting.model("tiny-clip"), SITE, cfg, data=setting.files(16), trainer=trainer,
            folder=setting.folder, progress=False, fast=False,
        )  # fmt: skip
    finally:
        SAETrainer.step = real  # type: ignore[method-assign]


def _name_heads(setting: Setting, count: Count) -> None:
    from methods_multimodal.text_explanations import name_heads, vocabulary

    model = setting.model("tiny-clip")
    with counted(model.wrapped.vision_model, count):
        found = name_heads(
            model, setting.files(64), vocabulary("world"), n_texts=setting.pick(2, 3), folder=setting.folder,
            batch_size=2,
        )  # fmt: skip
    found.save(setting.folder / "result.safetensors")


def _dissect(setting: Setting, count: Count) -> None:
    from methods_multimodal.dissection.naming import collect
    from methods_multimodal.dissection.units import Units

    model, files = setting.model("tiny-clip"), setting.files(64)
    judge = _model("tiny-clip", False)
    batches = [({"images": files[i : i + 2], "text": ["a"]}, files[i : i + 2]) for i in range(0, 64, 2)]
    with counted(model.wrapped.vision_model, count):
        pool = setting.pick("mean", "max")
        collect([Units(model, SITE)], batches, judge, setting.folder, pool=pool, progress=False)


def _task(setting: Setting, count: Count) -> Any:
    from methods_multimodal.data_attribution.diffusion import denoiser_task

    pipe = setting.model("tiny-sd").wrapped
    task = denoiser_task(pipe.unet, pipe.scheduler, timesteps=2, parameters="conv_out*")

    def rows(batch: Any, draws: range) -> Any:
        count(len(batch["latents"]) * len(draws))
        return task.rows(batch, draws)

    return replace(task, rows=rows)


def _examples(setting: Setting, n: int, seed: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed + 100 * setting.seed())
    unet = setting.model("tiny-sd").wrapped.unet
    channels, side, width = unet.config.in_channels, unet.config.sample_size, unet.config.cross_attention_dim
    return {
        "latents": torch.randn(n, channels, side, side, generator=g),
        "encoder_hidden_states": torch.randn(n, 4, width, generator=g),
    }


def _featurise(setting: Setting, count: Count) -> None:
    from methods_multimodal.data_attribution import Projection, featurise

    task, projection = _task(setting, count), Projection("sparse", setting.pick(32, 64))
    featurise(
        task, _examples(setting, 120, 0), setting.folder, projection=projection, batch_size=1, progress=False
    )


def _unlearning(setting: Setting, count: Count) -> None:
    from safetensors.torch import save_file

    from methods_multimodal.data_attribution import unlearning_scores

    queries = _examples(setting, 1, 7) | {"index": torch.arange(1)}
    scores = unlearning_scores(
        _task(setting, count), _examples(setting, 40, 0), queries, step=setting.pick(0.01, 0.02),
        folder=setting.folder, batch_size=1, max_rows=8,
    )  # fmt: skip
    save_file({"scores": scores}, setting.folder / "scores.safetensors")


def _prompt(setting: Setting) -> str:
    return PROMPT.replace("large", "small") if setting.changed == "data" else PROMPT


def _write(report: Any, folder: Path) -> None:
    report.write(folder / "page.png")


def _denoised(model: Any, count: Count) -> contextlib.AbstractContextManager[None]:
    """Counts the rows that the denoiser computes: by its first layer, for what is kept passes it by."""
    return counted(model.wrapped.unet.conv_in, count)


def _words(setting: Setting, count: Count) -> None:
    from methods_multimodal.report import words_report

    model = setting.model("tiny-sd")
    with _denoised(model, count):
        report = words_report(
            model, _prompt(setting), seed=setting.pick(0, 1), folder=setting.folder / "work"
        )
    _write(report, setting.folder)


def _trace(setting: Setting, count: Count) -> None:
    from methods_multimodal.cross_attention.metrics import clip_contrast
    from methods_multimodal.report import trace_report

    model, prompt = setting.model("tiny-sd"), _prompt(setting)
    metric = clip_contrast(_model("tiny-clip", False), prompt, prompt.replace("red", "blue"))
    with _denoised(model, count):
        report = trace_report(
            model, prompt, "red", "blue", metric, seeds=range(2), steps=setting.pick(4, 3), n_groups=1,
            folder=setting.folder / "work",
        )  # fmt: skip
    _write(report, setting.folder)


def _report(setting: Setting, count: Count) -> None:
    from methods_multimodal.report import contrastive_report

    model = setting.model("tiny-clip")
    texts = ["a red circle", setting.pick("a blue square", "a star")]
    with counted(model.wrapped.vision_model, count):
        report = contrastive_report(model, setting.files(2), texts, folder=setting.folder / "work")
    _write(report, setting.folder)


def _vlm_report(setting: Setting, count: Count) -> None:
    from methods_multimodal.report import vlm_report

    model = setting.model("tiny-llava")
    question = setting.pick("what colour is the circle?", "what shape is it?")
    with counted(model.wrapped.model.language_model, count):
        report = vlm_report(model, setting.files(2), question, folder=setting.folder / "work")
    _write(report, setting.folder)


def _diffusion_report(setting: Setting, count: Count) -> None:
    from methods_multimodal.report import diffusion_report

    model, seed = setting.model("tiny-sd"), setting.pick(0, 1)
    with _denoised(model, count):
        report = diffusion_report(model, _prompt(setting), seed=seed, folder=setting.folder / "work")
    _write(report, setting.folder)


def _patch_words(setting: Setting, count: Count) -> None:
    from methods_multimodal.cross_attention import Case, grid, patch_words
    from methods_multimodal.cross_attention.metrics import colour

    model, prompt = setting.model("tiny-sd"), _prompt(setting)
    cases = [Case(prompt, "red", prompt.replace("red", "blue"), "blue", seed) for seed in range(2)]
    with _denoised(model, count):
        effects = patch_words(
            model, cases, colour(setting.pick((1.0, 0.0, 0.0), (0.0, 0.0, 1.0))), grid(model), batch=5,
            options={"num_inference_steps": 2}, folder=setting.folder / "work",
        )  # fmt: skip
    effects.save(setting.folder / "effects.safetensors")


def _zoo(setting: Setting, count: Count) -> None:
    from mm_adapters.zoo import vae

    with _losses_counted(vae, count):
        model = vae.train(setting.folder, steps=setting.pick(24, 16), seed=setting.seed(), resume=True)
    _save_weights(model, setting.folder)


def _zoo_llava(setting: Setting, count: Count) -> None:
    from mm_adapters.zoo import llava, models_at, path

    clip, _ = models_at.load(path("tiny-clip"), "tiny-clip")
    if setting.changed == "weights":
        dict(clip.named_parameters())[_LAST_WEIGHT["tiny-clip"]].data.view(-1)[-1] *= 1.01
    with _losses_counted(llava, count):
        model = llava.train(
            setting.folder, clip, steps=setting.pick(24, 16), seed=setting.seed(), resume=True
        )
    _save_weights(model, setting.folder)


@contextlib.contextmanager
def _losses_counted(recipe: Any, count: Count) -> Iterator[None]:
    """Counts the steps of one of the zoo's trainings."""
    real = recipe.loss

    def loss(*args: Any) -> Any:
        count(1)
        return real(*args)

    n_threads = torch.get_num_threads()
    try:
        recipe.loss = loss
        torch.set_num_threads(1)
        yield
    finally:
        recipe.loss = real
        torch.set_num_threads(n_threads)


def _save_weights(model: nn.Module, folder: Path) -> None:
    from mm_adapters.store import save_tensors

    save_tensors(folder / "done.safetensors", dict(model.state_dict()), {})


_STORE = ("*.safetensors", "manifest.json")
_PAGE = ("page.png", "page.json")
JOBS = (
    Job("collect", _collect, _STORE),
    Job("sae", _sae, ("sae/*", "metrics.jsonl")),
    Job("name_heads", _name_heads, ("result.safetensors",)),
    Job("dissect", _dissect, _STORE),
    Job("featurise", _featurise, _STORE),
    Job("unlearning", _unlearning, ("scores.safetensors",)),
    Job("words", _words, _PAGE),
    Job("trace", _trace, _PAGE),
    Job("report", _report, _PAGE),
    Job("vlm_report", _vlm_report, _PAGE),
    Job("diff_report", _diffusion_report, _PAGE),
    Job("patch_words", _patch_words, ("effects.safetensors",)),
    Job("zoo", _zoo, ("done.safetensors",), without=("weights",)),
    Job("zoo_llava", _zoo_llava, ("done.safetensors",)),
)
BY_NAME = {job.name: job for job in JOBS}
