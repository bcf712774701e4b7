"""Training with SAELens' trainers and configs on any site of a lens; killed and resumed, the same weights."""

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
from integrations.sae_lens._fit import Evaluator, Fit
from integrations.sae_lens._providers import FromIterator, FromLens, FromStore, Provider
from integrations.sae_lens._settings import check, trainer_config
from integrations.sae_lens._sites import Tokens, place_of
from integrations.sae_lens.collect import collect
from mm_adapters import InputError, Lens
from mm_adapters.store import Store


def train(
    lens: Lens,
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

    `cfg` is SAELens' training config (of any of its architectures), one for all sites or one each.
    `data` is what `collect` takes, a `Store`, or an endless iterator of tensors [row, d_in]. Rows go
    through a store in `folder` (`on_disk=False`: straight from the model, mixed in memory).
    `centre` starts the decoder's bias at the mean of the rows, as Bricken et al. 2023 do with their
    median: where rows lie far from zero, most latents else die in learning the mean.
    `trainer` is SAELens' trainer config; by default 50 epochs' worth is not guessed: 2,000 steps of
    1,024 rows.

    In `folder`: `metrics.jsonl`, `checkpoints/`, `activations/`, and the finished SAEs, as SAELens
    saves them, in `sae/` (or `sae/SITE/`). SIGTERM and Ctrl-C write a checkpoint first. Called again,
    training goes on from the last checkpoint, to the same weights as without the stop. `evaluator`
    is called with the SAEs at every tenth log; its numbers join the metrics.

    Raises: InputError, MissingSiteError before heavy work; CheckpointError if `folder` has other training.
    """
    names = [site] if isinstance(site, str) else list(site)
    configs = {n: copy.deepcopy(cfg[n] if isinstance(cfg, Mapping) else cfg) for n in names}
    trainer_cfg = trainer_config(trainer)
    for name, config in configs.items():
        check(name, config, trainer_cfg)
    with _workplace(folder) as work:
        provider, about = _provider(
            lens, names, data, work,
            tokens=tokens, steps=steps, size=trainer_cfg.train_batch_size_samples, seed=seed,
            on_disk=on_disk, inputs=inputs, batch_size=batch_size,
            needed=trainer_cfg.total_training_samples, progress=progress,
        )  # fmt: skip
        trainers = _trainers(lens, configs, trainer_cfg, tokens, steps, seed, fast)
        about |= {"sites": names, "trainer": _plain(trainer_cfg), "seed": seed,
                  "saes": {n: _plain(c) for n, c in configs.items()}}  # fmt: skip
        about |= {"centre": True} if centre else {}
        fit = Fit(
            trainers, provider, work, about,
            checkpoint_every=checkpoint_every, log_every=log_every, evaluator=evaluator, progress=progress,
            centre=centre,
        )  # fmt: skip
        fit.run(resume)
        saved = {}
        for name, one in trainers.items():
            target = work / "sae" / (name.replace(" ", "") if len(trainers) > 1 else "")
            one.sae.save_inference_model(target)
            saved[name] = SAE.load_from_disk(target, device=trainer_cfg.device)
    return saved if not isinstance(site, str) else saved[site]


def _trainers(
    lens: Any, configs: Mapping[str, Any], trainer_cfg: SAETrainerConfig, tokens: Tokens, steps: Any,
    seed: int, fast: bool,
) -> dict[str, SAETrainer[Any, Any]]:  # fmt: skip
    made: dict[str, SAETrainer[Any, Any]] = {}
    for i, (name, cfg) in enumerate(configs.items()):
        cfg.device = trainer_cfg.device
        _describe(lens, cfg, name, tokens, steps)
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
        made[name] = one
    first = next(iter(made.values()))
    first.cfg.logger = trainer_cfg.logger
    return made


def _describe(lens: Any, cfg: TrainingSAEConfig, name: str, tokens: Tokens, steps: Any) -> None:
    """What SAELens' metadata says of where the SAE lives."""
    given, _, wanted = (part.strip() for part in name.partition("->"))
    sae_site = place_of(lens, given)
    meta = cfg.metadata
    meta.hook_name = sae_site.site.name
    if wanted:
        meta.hook_name_out = place_of(lens, wanted).site.name
    if sae_site.minus is not None:
        meta.hook_name_minus = sae_site.minus.name
    meta.model_name = lens.sitemap.family
    meta.model_class_name = "mm_adapters"
    meta.tower = sae_site.site.tower
    meta.hook_kind = "update" if sae_site.minus is not None else "value"
    meta.layout = "NCHW" if sae_site.is_map else "NLC"
    meta.token_kind = tokens if isinstance(tokens, str) else list(tokens)
    meta.steps = None if steps is None else list(steps)
    meta.guidance_rows = "cond" if sae_site.site.tower in lens.sitemap.loops else None


def _provider(
    lens: Any, names: Sequence[str], data: Any, work: Path, *, tokens: Tokens, steps: Any, size: int,
    seed: int, on_disk: bool, inputs: Any, batch_size: int, needed: int, progress: bool,
) -> tuple[Provider, dict[str, Any]]:  # fmt: skip
    columns = list(dict.fromkeys(part.strip() for name in names for part in name.split("->")))
    sae_sites = [place_of(lens, column) for column in columns]
    if isinstance(data, Store):
        missing = [c for c in columns if c not in data.columns]
        if missing:
            raise InputError(f"{data.folder} has no column {missing}; it has {list(data.columns)}.")
        return FromStore(data, columns, size, seed), {"data": data.about}
    if hasattr(data, "__next__") or isinstance(data, Tensor):
        if len(columns) > 1:
            raise InputError(
                "An iterator gives the rows of one site. Pass a store, or items to collect from."
            )
        return FromIterator(data, columns[0], needed), {"data": "iterator"}
    items = items_of(data)
    steps = None if steps is None else sorted(set(steps))
    if on_disk:
        store = collect(
            lens, columns, data, work / "activations",
            tokens=tokens, steps=steps, batch_size=batch_size, inputs=inputs, progress=progress,
        )  # fmt: skip
        return FromStore(store, columns, size, seed), {"data": store.about}
    streamed = FromLens(
        lens, sae_sites, items, size, seed, tokens=tokens, steps=steps, batch_size=batch_size, inputs=inputs
    )
    return streamed, {"data": "streamed", "tokens": tokens, "steps": steps}


def _plain(cfg: Any) -> dict[str, Any]:
    found = cfg.to_dict() if hasattr(cfg, "to_dict") else dataclasses.asdict(cfg)
    return json.loads(json.dumps({k: v for k, v in found.items() if k != "metadata"}, default=str))


@contextmanager
def _workplace(folder: str | Path | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="mm_interp_sae_") as made:
            yield Path(made)
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    yield Path(folder)
