"""Training with SAELens' trainers on any site of a model; killed and resumed, to the same weights."""

from __future__ import annotations

import copy
import dataclasses
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, BatchTopKTrainingSAEConfig, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

from integrations.sae_lens._data import items_of
from integrations.sae_lens._fast import FastBatchTopK
from integrations.sae_lens._fit import Evaluator, Fit, check_width
from integrations.sae_lens._providers import FromIterator, FromModel, FromStore, Provider
from integrations.sae_lens._settings import check, trainer_config
from integrations.sae_lens._sites import Tokens, find_site
from integrations.sae_lens.collect import batches, collect
from mm_adapters import InputError, Model
from mm_adapters.store import Store, atomic_write, exclusive, provenance


def train(
    model: Model,
    site: str | Sequence[str],
    cfg: TrainingSAEConfig | Mapping[str, TrainingSAEConfig],
    *,
    data: Any,
    tokens: Tokens = "all",
    steps: Iterable[int] | None = None,
    trainer: SAETrainerConfig | None = None,
    folder: str | Path | None = None,
    on_disk: bool = True,
    inputs: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    checkpoint_every: int = 1000,
    log_every: int = 50,
    evaluator: Evaluator | None = None,
    fast: bool = True,
    centre: bool = False,
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
) -> Any:
    """The SAE of one site; a dict of them for several sites; a transcoder for "IN -> OUT".

    In `folder`: `metrics.jsonl`, `checkpoints/`, `activations/`, and the finished SAEs, as SAELens
    saves them, in `sae/` (or `sae/SITE/`). SIGTERM and Ctrl-C write a checkpoint first. Called again,
    training goes on from the last checkpoint, to the same weights as without the stop.

    Args:
        cfg: SAELens' training config (of any of its architectures), one for all sites or one for each.
        data: What `collect` takes, a `Store`, or an endless iterator of tensors [row, d_in].
        tokens, steps, inputs, batch_size: As `collect` takes them.
        trainer: SAELens' trainer config; None: 2,000 steps of 1,024 rows.
        folder: None: a temporary one.
        on_disk: Rows go through a store in `folder`; False: straight from the model, mixed in memory.
        checkpoint_every, log_every: In training steps.
        evaluator: Called with the SAEs at every tenth log; its numbers join the metrics.
        fast: Uses the sparse training step where there is one (BatchTopK), with the same gradients.
        centre: Starts the decoder's bias at the mean of the rows, as Bricken et al. 2023 do with their
            median: where rows lie far from zero, most latents else die in learning the mean.
        seed: Of the weights, and of the order of rows.
        resume: Goes on from the last checkpoint in `folder`.

    Raises: InputError, MissingSiteError before heavy work; StoreError if `folder` has other training (of
    another model, of other data, with other settings), or another process trains there.
    """
    names = [site] if isinstance(site, str) else list(site)
    configs = {n: copy.deepcopy(cfg[n] if isinstance(cfg, Mapping) else cfg) for n in names}
    trainer_cfg = trainer_config(trainer)
    for name, config in configs.items():
        check(name, config, trainer_cfg)
    with _work_folder(folder) as work, exclusive(work):
        provider, about = _provider(
            model,
            names,
            data,
            work,
            tokens=tokens,
            steps=steps,
            size=trainer_cfg.train_batch_size_samples,
            seed=seed,
            on_disk=on_disk,
            inputs=inputs,
            batch_size=batch_size,
            needed=trainer_cfg.total_training_samples,
            progress=progress,
            configs=configs,
        )
        trainers = _trainers(model, configs, trainer_cfg, tokens, steps, seed, fast)
        about |= {
            "sites": names,
            "trainer": _as_json(trainer_cfg),
            "seed": seed,
            "saes": {n: _as_json(c) for n, c in configs.items()},
            "fast": fast,
        }
        about |= {"centre": True} if centre else {}
        fit = Fit(
            trainers,
            provider,
            work,
            about,
            checkpoint_every=checkpoint_every,
            log_every=log_every,
            evaluator=evaluator,
            progress=progress,
            centre=centre,
        )
        fit.run(resume)
        saved = {}
        for name, one in trainers.items():
            target = work / "sae" / (name.replace(" ", "") if len(trainers) > 1 else "")
            with atomic_write(target) as draft:
                one.sae.save_inference_model(draft)
            saved[name] = SAE.load_from_disk(target, device=trainer_cfg.device)
    return saved if not isinstance(site, str) else saved[site]


def _trainers(
    model: Model,
    configs: Mapping[str, Any],
    trainer_cfg: SAETrainerConfig,
    tokens: Tokens,
    steps: Any,
    seed: int,
    fast: bool,
) -> dict[str, SAETrainer[Any, Any]]:
    trainers: dict[str, SAETrainer[Any, Any]] = {}
    for i, (name, cfg) in enumerate(configs.items()):
        cfg.device = trainer_cfg.device
        _describe(model, cfg, name, tokens, steps)
        plain = type(cfg) is BatchTopKTrainingSAEConfig
        cls = FastBatchTopK if fast and plain else get_sae_training_class(cfg.architecture())[0]
        with torch.random.fork_rng():
            torch.manual_seed(seed + i)
            sae = cls(cfg)
        # SAELens' own logging writes to wandb only; ours writes everywhere.
        quiet = dataclasses.replace(trainer_cfg.logger, log_to_wandb=False)
        one = SAETrainer(cfg=dataclasses.replace(trainer_cfg, logger=quiet), sae=sae, data_provider=iter(()))
        one.cfg.logger.log_to_wandb = False
        if fast:
            for group in one.optimizer.param_groups:
                group["fused"], group["foreach"] = True, False
        trainers[name] = one
    first = next(iter(trainers.values()))
    first.cfg.logger = trainer_cfg.logger
    return trainers


def _describe(model: Model, cfg: TrainingSAEConfig, name: str, tokens: Tokens, steps: Any) -> None:
    """What SAELens' metadata says of where the SAE lives."""
    source, _, target = (part.strip() for part in name.partition("->"))
    sae_site = find_site(model, source)
    meta = cfg.metadata
    meta.hook_name = sae_site.site.name
    if target:
        meta.hook_name_out = find_site(model, target).site.name
    if sae_site.minus is not None:
        meta.hook_name_minus = sae_site.minus.name
    meta.model_name = model.record.name
    meta.model_class_name = "mm_adapters"
    meta.tower = sae_site.site.tower
    meta.hook_kind = "update" if sae_site.minus is not None else "value"
    meta.layout = "NCHW" if sae_site.is_map else "NLC"
    meta.token_kind = tokens if isinstance(tokens, str) else list(tokens)
    meta.steps = None if steps is None else list(steps)
    meta.guidance_rows = "cond" if sae_site.site.tower in model.loops() else None


def _provider(
    model: Model,
    names: Sequence[str],
    data: Any,
    work: Path,
    *,
    tokens: Tokens,
    steps: Any,
    size: int,
    seed: int,
    on_disk: bool,
    inputs: Any,
    batch_size: int,
    needed: int,
    progress: bool,
    configs: Mapping[str, Any],
) -> tuple[Provider, dict[str, Any]]:
    columns = list(dict.fromkeys(part.strip() for name in names for part in name.split("->")))
    sae_sites = [find_site(model, column) for column in columns]
    models = {"model": model}
    if isinstance(data, Store):
        missing = [c for c in columns if c not in data.columns]
        if missing:
            raise InputError(f"{data.folder} has no column {missing}; it has {list(data.columns)}.")
        return FromStore(data, columns, size, seed), {"data": data.about, "content": data.content}
    if hasattr(data, "__next__") or isinstance(data, Tensor):
        if len(columns) > 1:
            raise InputError(
                "An iterator gives the rows of one site. Pass a store, or items to collect from."
            )
        return FromIterator(data, columns[0], needed), {"data": "iterator"} | provenance(models=models)
    items = items_of(data)
    steps = None if steps is None else sorted(set(steps))
    one = next(batches(model, sae_sites, items[:1], tokens, steps, 1, inputs))
    for name, cfg in configs.items():  # Before all of them are run.
        check_width(name, sum(one[part.strip()].shape[-1] for part in name.split("->")), cfg)
    if on_disk:
        store = collect(
            model,
            columns,
            data,
            work / "activations",
            tokens=tokens,
            steps=steps,
            batch_size=batch_size,
            inputs=inputs,
            progress=progress,
        )
        return FromStore(store, columns, size, seed), {"data": store.about, "content": store.content}
    streamed = FromModel(
        model, sae_sites, items, size, seed, tokens=tokens, steps=steps, batch_size=batch_size, inputs=inputs
    )
    return streamed, {
        "data": provenance(
            models=models,
            data=items,
            sites=columns,
            tokens=tokens,
            steps=steps,
            batch_size=batch_size,
            inputs=dict(inputs or {}),
        )
    }


def _as_json(cfg: Any) -> dict[str, Any]:
    fields = cfg.to_dict() if hasattr(cfg, "to_dict") else dataclasses.asdict(cfg)
    return json.loads(json.dumps({k: v for k, v in fields.items() if k != "metadata"}, default=str))


@contextmanager
def _work_folder(folder: str | Path | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="mm_interp_sae_") as temporary:
            yield Path(temporary)
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    yield Path(folder)
