"""Influence through kronfluence: KFAC and EKFAC on a task, without gradients of ours."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from methods_multimodal.data_attribution._layers import has_factors
from methods_multimodal.data_attribution.features import examples_fingerprint, made_of
from methods_multimodal.data_attribution.task import Batch, Examples, Task, batch_of, n_examples
from mm_adapters import InputError
from mm_adapters.store import provenance, work_folder


def kronecker_scores(
    task: Task,
    train: Examples,
    queries: Examples,
    folder: str | Path,
    *,
    strategy: Literal["identity", "diagonal", "kfac", "ekfac"] = "ekfac",
    measure: str | None = None,
    query_measure: str | None = None,
    damping: float | None = None,
    state: Mapping[str, Tensor] | None = None,
    batch_size: int = 8,
) -> Float[Tensor, "query train"]:
    """Influence of each training example on each query; positive is helpful.

    kronfluence fits its factors to the (empirical) Fisher matrix of `measure` over all draws and
    preconditions the query's gradients with them. Parameters are the task's linear and convolutional
    layers, weight and bias together; others are left out. Each (example, draw) counts as one example
    there, and what is given back is the mean over both sides' draws, which is the score of the means.
    `damping` is added to the eigenvalues; None is kronfluence's own choice, a tenth of their mean.
    Factors and scores are kept in `folder`, which kronfluence goes on with.

    Source: Grosse et al. 2023, arXiv 2308.03296; Mlodozeniec et al. 2024, arXiv 2410.13850.
    Raises: InputError if kronfluence is not installed, or no layer can be tracked; StoreError for a folder
    of another run.
    """
    try:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
    except ImportError:
        raise InputError("KFAC and EKFAC need kronfluence: pip install mm-interp[attribution].") from None
    layers = _layers(task)
    measure = measure or task.measures[0]
    query_measure = query_measure or measure
    unknown = {measure, query_measure} - set(task.measures)
    if unknown:
        raise InputError(
            f"The task does not measure {sorted(unknown)}; it measures {', '.join(task.measures)}."
        )
    module = copy.deepcopy(task.module)
    if state is not None:
        module.load_state_dict(dict(state), strict=False)
    facts = made_of(task, state)
    facts |= {"data": examples_fingerprint(train), "queries": examples_fingerprint(queries)}
    settings: dict[str, Any] = {
        "strategy": strategy,
        "measures": [measure, query_measure],
        "damping": damping,
    }
    with work_folder(folder, provenance(job="kronecker", batch_size=batch_size, **settings) | facts) as work:
        tracked = _task(task, layers, measure, query_measure)
        analyzer = Analyzer(
            "mm_interp",
            prepare_model(module, tracked),
            tracked,
            cpu=next(module.parameters()).device.type == "cpu",
            output_dir=str(work),
            disable_tqdm=True,
        )
        analyzer.fit_all_factors(
            factors_name=strategy,
            dataset=_Rows(train),
            factor_args=FactorArguments(strategy=strategy, use_empirical_fisher=True),
            per_device_batch_size=batch_size,
        )
        analyzer.compute_pairwise_scores(
            scores_name=strategy,
            factors_name=strategy,
            query_dataset=_Rows(queries),
            train_dataset=_Rows(train),
            per_device_query_batch_size=batch_size,
            per_device_train_batch_size=batch_size,
            score_args=ScoreArguments(damping_factor=damping),
        )
        pairwise = analyzer.load_pairwise_scores(strategy)
        assert pairwise is not None
        k = task.n_draws
        return pairwise["all_modules"].float().view(n_examples(queries), k, n_examples(train), k).mean((1, 3))


class _Rows(Dataset[dict[str, Tensor]]):
    """Examples one by one, as a loader collates them."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return n_examples(self.examples)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in batch_of(self.examples, i, i + 1).items()}


def _layers(task: Task) -> list[str]:
    owners = dict.fromkeys(n.rpartition(".")[0] for n in task.parameters if n.endswith("weight"))
    paths = [path for path in owners if has_factors(task.module.get_submodule(path))]
    if not paths:
        raise InputError("KFAC needs weights of linear or convolutional layers; the task has none.")
    return paths


def _task(task: Task, layers: list[str], measure: str, query_measure: str) -> Any:
    from kronfluence.task import Task as KronfluenceTask

    class Wanted(KronfluenceTask):
        def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
            assert not sample  # The empirical Fisher matrix samples nothing.
            return _total(batch, model, measure)

        def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
            return _total(batch, model, query_measure)

        def get_influence_tracked_modules(self) -> list[str]:
            return layers

    def _total(batch: Batch, model: nn.Module, name: str) -> Tensor:
        device = next(model.parameters()).device
        rows = {k: v.to(device) for k, v in task.rows(batch, range(task.n_draws)).items()}
        return torch.as_tensor(task.values(model, rows)[name].sum())

    return Wanted()
