"""Training with SAELens' trainers and configs on any site of a lens; killed and resumed, the same weights."""

from __future__ import annotations

import copy
import dataclasses
import json
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, BatchTopKTrainingSAEConfig, TrainingSAE, TrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm.auto import tqdm

from integrations.sae_lens import _checkpoints
from integrations.sae_lens._data import items_of
from integrations.sae_lens._fast import FastBatchTopK
from integrations.sae_lens._places import Tokens, place_of
from integrations.sae_lens._providers import FromIterator, FromLens, FromStore, Provider
from integrations.sae_lens._transcoder import BatchTopKTranscoderConfig
from integrations.sae_lens.collect import collect
from mm_adapters import InputError, Lens
from mm_adapters.store import Store

Evaluator = Callable[[dict[str, TrainingSAE[Any]]], Mapping[str, float]]
_NO_AUXILIARY = ("layer_norm", "constant_norm_rescale")


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
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
) -> Any:
    """The SAE of one site; a dict of them for several sites; a transcoder for "IN -> OUT".

    `cfg` is SAELens' training config (of any of its architectures), one for all sites or one each.
    `data` is what `collect` takes, a `Store`, or an endless iterator of tensors [row, d_in]. Rows go
    through a store in `folder` (`on_disk=False`: straight from the model, mixed in memory).
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
    trainer_cfg = _trainer_config(trainer, evaluator)
    for name, config in configs.items():
        _check(name, config, trainer_cfg)
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
        fit = Fit(
            trainers, provider, work, about,
            checkpoint_every=checkpoint_every, log_every=log_every, evaluator=evaluator, progress=progress,
        )  # fmt: skip
        fit.run(resume)
        saved = {}
        for name, one in trainers.items():
            target = work / "sae" / (name.replace(" ", "") if len(trainers) > 1 else "")
            one.sae.save_inference_model(target)
            saved[name] = SAE.load_from_disk(target, device=trainer_cfg.device)
    return saved if not isinstance(site, str) else saved[site]


class Fit:
    """SAELens' loop over one or several of its trainers, fed by one provider.

    The order of things is that of `SAETrainer.fit`: with one trainer and the same batches the
    weights are the same.
    """

    def __init__(
        self,
        trainers: Mapping[str, SAETrainer[Any, Any]],
        provider: Provider,
        folder: Path,
        about: Mapping[str, Any],
        *,
        checkpoint_every: int,
        log_every: int,
        evaluator: Evaluator | None,
        progress: bool,
    ) -> None:
        self.trainers, self.provider, self.folder, self.about = dict(trainers), provider, folder, about
        self.checkpoint_every, self.log_every = checkpoint_every, log_every
        self.evaluator, self.progress = evaluator, progress
        self._first = next(iter(self.trainers.values()))
        self._stop: int | None = None

    def run(self, resume: bool = True) -> None:
        """Trains to the end. Raises: SystemExit on SIGTERM, KeyboardInterrupt on Ctrl-C, once saved."""
        checkpoints = self.folder / "checkpoints"
        found = _checkpoints.latest(checkpoints) if resume else None
        if found is not None:
            self.provider.go_to(_checkpoints.load(found, self.trainers, self.about))
        else:
            self._estimate_scales()
        total = self._first.cfg.total_training_samples
        log = self.folder / "metrics.jsonl"
        _keep_until(log, self._first.n_training_steps)
        with (
            tqdm(total=total, initial=self._first.n_training_samples, desc="SAE", unit="row",
                 disable=not self.progress) as bar,
            log.open("a", encoding="utf-8") as metrics,
            self._signals(),
        ):  # fmt: skip
            while self._first.n_training_samples < total:
                batch = next(self.provider)
                n_rows = self._step(batch, metrics, bar)
                bar.update(n_rows)
                step = self._first.n_training_steps
                if self._stop is not None or step % self.checkpoint_every == 0:
                    metrics.flush()
                    _checkpoints.save(checkpoints, self.trainers, self.about, self.provider.place())
                if self._stop == signal.SIGTERM:
                    raise SystemExit(128 + self._stop)
                if self._stop is not None:
                    raise KeyboardInterrupt
        for one in self.trainers.values():
            _fold(one)
            one.set_final_sae_metadata()

    def _step(self, batch: Mapping[str, Tensor], metrics: Any, bar: Any) -> int:
        row: dict[str, Any] = {}
        n_rows = 0
        for name, one in self.trainers.items():
            one.maybe_reset_sparsity()
            given = _input_of(name, batch).to(one.sae.dtype)
            n_rows = len(given)
            _check_width(name, given, one.sae.cfg)
            output = one.step(given)
            step = one.n_training_steps + 1
            if step % self.log_every == 0:
                found = one.build_train_step_log_dict(output, one.n_training_samples)
                row |= {_tagged(k, name, self.trainers): v for k, v in found.items()}
                bar.set_postfix(
                    loss=f"{found['losses/overall_loss']:.4g}",
                    explained=f"{found['metrics/explained_variance']:.3f}",
                    l0=f"{found['metrics/l0']:.1f}",
                )
        for one in self.trainers.values():
            one.n_training_steps += 1
        step = self._first.n_training_steps
        if row and self.evaluator is not None and step % (10 * self.log_every) == 0:
            row |= self._evaluate()
        if row:
            metrics.write(json.dumps({"step": step, **row}) + "\n")
            self._to_wandb(row, step)
        return n_rows

    def _evaluate(self) -> dict[str, float]:
        assert self.evaluator is not None
        saes = {name: one.sae.eval() for name, one in self.trainers.items()}
        try:
            return dict(self.evaluator(saes))
        finally:
            for one in self.trainers.values():
                one.sae.train()

    def _to_wandb(self, row: Mapping[str, Any], step: int) -> None:
        settings = self._first.cfg.logger
        if not settings.log_to_wandb:
            return
        import wandb

        if wandb.run is None:
            wandb.init(project=settings.wandb_project, entity=settings.wandb_entity, name=settings.run_name)
        wandb.log(dict(row), step=step)

    def _estimate_scales(self) -> None:
        for name, one in self.trainers.items():
            kind = one.sae.cfg.normalize_activations
            if kind not in ("expected_average_only_in", "covariance_whitening"):
                continue
            start = self.provider.place()
            rows = (_input_of(name, next(self.provider)) for _ in range(one.cfg.n_batches_for_norm_estimate))
            estimate = (
                one.activation_scaler.estimate_scaling_factor
                if kind == "expected_average_only_in"
                else one.activation_scaler.estimate_whitening
            )
            estimate(one.sae.cfg.d_in, rows, one.cfg.n_batches_for_norm_estimate)  # type: ignore[arg-type]
            if not isinstance(self.provider, FromIterator):  # Which cannot go back.
                self.provider.go_to(start)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            self._stop = number

        before = {s: signal.signal(s, note) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _input_of(name: str, batch: Mapping[str, Tensor]) -> Tensor:
    """A trainer's rows: its column, or for a transcoder both of its columns side by side."""
    parts = [part.strip() for part in name.split("->")]
    return batch[parts[0]] if len(parts) == 1 else torch.cat([batch[p] for p in parts], -1)


def _check_width(name: str, rows: Tensor, cfg: Any) -> None:
    wanted = cfg.d_in + getattr(cfg, "d_out", 0)
    if rows.shape[-1] != wanted:
        said = f"d_in={cfg.d_in}" + (f" and d_out={cfg.d_out}" if hasattr(cfg, "d_out") else "")
        raise InputError(f"{name} has rows of {rows.shape[-1]} and the config says {said}.")


def _tagged(key: str, name: str, all_of_them: Mapping[str, Any]) -> str:
    return key if len(all_of_them) == 1 else f"{name}/{key}"


def _fold(one: SAETrainer[Any, Any]) -> None:
    """Puts what normalised the activations into the weights, as SAELens does at the end."""
    scaler = one.activation_scaler
    if scaler.scaling_factor is not None:
        one.sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        scaler.scaling_factor = None
    if scaler.whitening is not None:
        white = scaler.whitening
        one.sae.fold_activation_whitening(white.mean, white.matrix, white.inverse_matrix)
        scaler.whitening = None


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
    place = place_of(lens, given)
    meta = cfg.metadata
    meta.hook_name = place.site.name
    if wanted:
        meta.hook_name_out = place_of(lens, wanted).site.name
    if place.minus is not None:
        meta.hook_name_minus = place.minus.name
    meta.model_name = lens.sitemap.family
    meta.model_class_name = "mm_adapters"
    meta.tower = place.site.tower
    meta.hook_kind = "update" if place.minus is not None else "value"
    meta.layout = "NCHW" if place.is_map else "NLC"
    meta.token_kind = tokens if isinstance(tokens, str) else list(tokens)
    meta.steps = None if steps is None else list(steps)
    meta.guidance_rows = "cond" if place.site.tower == lens.sitemap.mounts.loop else None


def _provider(
    lens: Any, names: Sequence[str], data: Any, work: Path, *, tokens: Tokens, steps: Any, size: int,
    seed: int, on_disk: bool, inputs: Any, batch_size: int, needed: int, progress: bool,
) -> tuple[Provider, dict[str, Any]]:  # fmt: skip
    columns = list(dict.fromkeys(part.strip() for name in names for part in name.split("->")))
    places = [place_of(lens, column) for column in columns]
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
        lens, places, items, size, seed, tokens=tokens, steps=steps, batch_size=batch_size, inputs=inputs
    )
    return streamed, {"data": "streamed", "tokens": tokens, "steps": steps}


def _trainer_config(given: SAETrainerConfig | None, evaluator: Any) -> SAETrainerConfig:
    if given is None:
        return SAETrainerConfig(
            total_training_samples=2000 * 1024, train_batch_size_samples=1024, lr=1e-3, lr_end=1e-4,
            lr_warm_up_steps=50, lr_decay_steps=400, dead_feature_window=200, n_batches_for_norm_estimate=50,
        )  # fmt: skip
    if given.lr_end is None:
        raise InputError(
            "SAETrainerConfig.lr_end is None, which SAELens' trainer does not take. Set it: lr / 10 is what "
            "its runner sets; for a constant rate it is not used."
        )
    return dataclasses.replace(given)


def _check(name: str, cfg: TrainingSAEConfig, trainer: SAETrainerConfig) -> None:
    if not isinstance(cfg, TrainingSAEConfig):
        raise InputError(
            f"{type(cfg).__name__} is no training config. Pass one of SAELens' *TrainingSAEConfig."
        )
    if "->" in name and not isinstance(cfg, BatchTopKTranscoderConfig):
        raise InputError(f"{name} is a transcoder's: its config is a BatchTopKTranscoderConfig.")
    if "->" not in name and isinstance(cfg, BatchTopKTranscoderConfig):
        raise InputError(f"A transcoder is trained between two sites: 'IN -> OUT', not {name!r}.")
    if hasattr(cfg, "aux_loss_coefficient") and cfg.normalize_activations in _NO_AUXILIARY:
        raise InputError(
            f"normalize_activations={cfg.normalize_activations!r} and {cfg.architecture()} do not go "
            "together: SAELens' loss for dead latents stops with an error at the first one. Use "
            "'expected_average_only_in' or 'none'."
        )
    if trainer.total_training_samples < trainer.train_batch_size_samples:
        raise InputError("total_training_samples is less than one batch.")


def _plain(cfg: Any) -> dict[str, Any]:
    found = cfg.to_dict() if hasattr(cfg, "to_dict") else dataclasses.asdict(cfg)
    return json.loads(json.dumps({k: v for k, v in found.items() if k != "metadata"}, default=str))


def _keep_until(log: Path, step: int) -> None:
    """Forgets metrics of steps that will be made again."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # Cut short when the process died.
            break
    log.write_text("".join(kept), encoding="utf-8")


@contextmanager
def _workplace(folder: str | Path | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="mm_interp_sae_") as made:
            yield Path(made)
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    yield Path(folder)
