"""SAELens' training loop over its trainers, fed by one provider; logged, checkpointed, resumed."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from tqdm.auto import tqdm

from integrations.sae_lens import _checkpoints
from integrations.sae_lens._providers import FromIterator, Provider
from mm_adapters import InputError
from mm_adapters.store import SaveClock, atomic_write

Evaluator = Callable[[dict[str, TrainingSAE[Any]]], Mapping[str, float]]


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
        centre: bool,
    ) -> None:
        self.trainers, self.provider, self.folder, self.about = dict(trainers), provider, folder, about
        self.checkpoint_every, self.log_every = checkpoint_every, log_every
        self.evaluator, self.progress, self.centre = evaluator, progress, centre
        self._first = next(iter(self.trainers.values()))
        self._stop: int | None = None

    def run(self, resume: bool = True) -> None:
        """Trains to the end. Raises: SystemExit on SIGTERM, KeyboardInterrupt on Ctrl-C, once saved."""
        checkpoints = self.folder / "checkpoints"
        checkpoint = _checkpoints.latest(checkpoints) if resume else None
        if checkpoint is not None:
            self.provider.go_to(_checkpoints.load(checkpoint, self.trainers, self.about))
        else:
            self._estimate_scales()
            if self.centre:
                self._start_at_means()
        total = self._first.cfg.total_training_samples
        clock = SaveClock(n=-(-total // self._first.cfg.train_batch_size_samples))
        log = self.folder / "metrics.jsonl"
        _keep_until(log, self._first.n_training_steps)
        with (
            tqdm(
                total=total,
                initial=self._first.n_training_samples,
                desc="SAE",
                unit="row",
                disable=not self.progress,
            ) as bar,
            log.open("a", encoding="utf-8") as metrics,
            self._signals(),
        ):
            while self._first.n_training_samples < total:
                batch = next(self.provider)
                n_rows = self._step(batch, metrics, bar)
                bar.update(n_rows)
                step = self._first.n_training_steps
                is_last = self._first.n_training_samples >= total
                is_due = step % self.checkpoint_every == 0 or self._stop is not None or is_last
                if is_due or clock.is_due():
                    metrics.flush()
                    at = self.provider.position()
                    with clock.saving():
                        _checkpoints.save(checkpoints, self.trainers, self.about, at, durable=is_due)
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
            rows = _input_of(name, batch).to(one.sae.dtype)
            n_rows = len(rows)
            check_width(name, rows.shape[-1], one.sae.cfg)
            output = one.step(rows)
            step = one.n_training_steps + 1
            if step % self.log_every == 0:
                metric = one.build_train_step_log_dict(output, one.n_training_samples)
                row |= {_tagged(k, name, self.trainers): v for k, v in metric.items()}
                bar.set_postfix(
                    loss=f"{metric['losses/overall_loss']:.4g}",
                    explained=f"{metric['metrics/explained_variance']:z.3f}",
                    l0=f"{metric['metrics/l0']:.1f}",
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
            estimate = (
                one.activation_scaler.estimate_scaling_factor
                if kind == "expected_average_only_in"
                else one.activation_scaler.estimate_whitening
            )
            with self._first_batches(name, one) as rows:
                estimate(one.sae.cfg.d_in, rows, one.cfg.n_batches_for_norm_estimate)  # type: ignore[arg-type]

    @torch.no_grad()
    def _start_at_means(self) -> None:
        for name, one in self.trainers.items():
            bias = one.sae.b_dec
            with self._first_batches(name, one) as rows:
                # The last columns: a transcoder's rows are its input, then its target output.
                means = [one.activation_scaler(r.to(bias))[:, -len(bias) :].double().mean(0) for r in rows]
            bias.copy_(torch.stack(means).mean(0))

    @contextmanager
    def _first_batches(self, name: str, one: SAETrainer[Any, Any]) -> Iterator[Iterator[Tensor]]:
        """A trainer's first batches, before it trains on them."""
        start = self.provider.position()
        yield (_input_of(name, next(self.provider)) for _ in range(one.cfg.n_batches_for_norm_estimate))
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


def check_width(name: str, width: int, cfg: Any) -> None:
    """Raises: InputError if rows of this width are not what the config says."""
    if width != cfg.d_in + getattr(cfg, "d_out", 0):
        widths = f"d_in={cfg.d_in}" + (f" and d_out={cfg.d_out}" if hasattr(cfg, "d_out") else "")
        raise InputError(f"{name} has rows of {width} and the config says {widths}.")


def _tagged(key: str, name: str, trainers: Mapping[str, Any]) -> str:
    return key if len(trainers) == 1 else f"{name}/{key}"


def _fold(one: SAETrainer[Any, Any]) -> None:
    """Folds the activations' normalisation into the weights, as SAELens does at the end."""
    scaler = one.activation_scaler
    if scaler.scaling_factor is not None:
        one.sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        scaler.scaling_factor = None
    if scaler.whitening is not None:
        white = scaler.whitening
        one.sae.fold_activation_whitening(white.mean, white.matrix, white.inverse_matrix)
        scaler.whitening = None


def _keep_until(log: Path, step: int) -> None:
    """Drops the metrics of steps that will run again."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # Cut short when the process died, or damaged since.
            break
    with atomic_write(log) as draft:
        draft.write_text("".join(kept), encoding="utf-8")
