"""Scorers beside their formulas, their peers, and retraining."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from tiny_attribution import denoiser, pictures, pixel_unet
from torch import Tensor, nn
from torch.nn import functional as F

from methods_multimodal.data_attribution import Task, denoiser_task, module_task
from methods_multimodal.data_attribution.features import Features, featurise, query_features
from methods_multimodal.data_attribution.gradients import per_example_gradients
from methods_multimodal.data_attribution.kronecker import kronecker_scores
from methods_multimodal.data_attribution.projection import Projection
from methods_multimodal.data_attribution.scorers import (
    Cosine,
    DataInf,
    DiffusionReTrac,
    Dot,
    Scorer,
    TracIn,
    scores,
    top_k,
)
from methods_multimodal.data_attribution.task import batch_of
from methods_multimodal.data_attribution.trak import Trak
from mm_adapters import InputError, StoreError
from mm_adapters.store import Column, Store, Writer
from tests.benchmarks._memory import peak

N, M = 12, 4


def both(task: Task, folder: Path, projection: Projection, **more: Any) -> Any:
    """A store of 12 examples and the features of 4 others."""
    every = pictures(N + M)["latents"]
    store = featurise(task, {"latents": every[:N]}, folder, projection=projection, **more)
    index = torch.arange(100, 100 + M)
    queries = query_features(task, {"latents": every[N:], "index": index}, projection=projection, **more)
    return store, queries


def test_dot_cosine_and_tracin_are_what_they_say(tmp_path: Path) -> None:
    points = [pixel_unet(seed).state_dict() for seed in (0, 1)]
    store, queries = both(denoiser(), tmp_path, Projection("none"), checkpoints=points)
    own = [store.rows()[f"loss@{k}"] for k in (0, 1)]
    asked = [queries.columns[f"loss@{k}"] for k in (0, 1)]
    dots = [q @ g.T for q, g in zip(asked, own, strict=True)]
    torch.testing.assert_close(scores(Dot(), store, queries), (dots[0] + dots[1]) / 2)
    torch.testing.assert_close(scores(TracIn((0.1, 0.3)), store, queries), 0.1 * dots[0] + 0.3 * dots[1])
    cosines = [F.cosine_similarity(q[:, None], g[None], -1) for q, g in zip(asked, own, strict=True)]
    torch.testing.assert_close(scores(Cosine(), store, queries), (cosines[0] + cosines[1]) / 2)
    with pytest.raises(InputError, match="2 checkpoints and 1 learning rates"):
        scores(TracIn((0.1,)), store, queries)
    best = top_k(Dot(), store, queries, 3)
    assert torch.equal(best.index, scores(Dot(), store, queries).topk(3, 1).indices)


@pytest.fixture(scope="module")
def few_and_many(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    """Stores of 10,000 and 100,000 examples: one shard, and ten that end within what is read at once."""
    found, rows = [], torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    about = {
        "weights": ["none"], "parameters": "none", "projection": {"kind": "none"}, "draws": "mean",
        "blocks": [["all", 0, 8]],
    }  # fmt: skip
    for n in (10_000, 100_000):
        folder, columns = (
            tmp_path_factory.mktemp("store"),
            {"loss@0": Column((8,)), "value.loss@0": Column(())},
        )
        with Writer(folder, columns, about, shard_bytes=10_000 * 4 * 8) as writer:
            for _ in range(n // 5000):
                writer.append({"loss@0": rows, "value.loss@0": rows[:, 0]})
        found.append(Store(folder))
        for _ in found[-1].views(n):  # What is mapped takes no memory, but is counted when it is mapped.
            pass
    return found


@pytest.mark.parametrize(
    "scorer", [Dot(), Cosine(), TracIn((0.1,)), DataInf(), Trak(), Trak(leverage=True)], ids=repr
)
def test_scoring_ten_times_the_examples_takes_no_byte_more(few_and_many: list[Store], scorer: Scorer) -> None:
    """The best of each query; all scores would be what is asked for."""
    asked = torch.randn(100, 8, generator=torch.Generator().manual_seed(1))
    few, many = (
        peak(lambda s=store: top_k(scorer, s, Features({"loss@0": asked}, json.dumps(s.about)), 10))
        for store in few_and_many
    )
    assert 0 < many <= few


def test_a_step_on_a_helpful_example_lowers_the_querys_loss(tmp_path: Path) -> None:
    task = denoiser()
    store, queries = both(task, tmp_path, Projection("none"))
    found = scores(Dot(), store, queries)
    asked = {"latents": pictures(N + M)["latents"][N:], "index": torch.arange(100, 100 + M)}
    before = task.per_example(asked)["loss"].detach()
    flat = store.rows()["loss@0"]
    for i in (0, 5):
        state = {k: v.detach().clone() for k, v in task.module.named_parameters()}
        parts = flat[i].split([v.numel() for v in state.values()])
        state = {k: v - 1e-4 * g.view_as(v) for (k, v), g in zip(state.items(), parts, strict=True)}
        after = task.per_example(asked, state)["loss"]
        torch.testing.assert_close(
            (before - after) / 1e-4, found[:, i], rtol=0.05, atol=0.05 * float(found.abs().max())
        )


def test_retrac_averages_directions_of_each_timestep(tmp_path: Path) -> None:
    task = denoiser()
    store, queries = both(task, tmp_path / "a", Projection("none"), draws="unit")
    every = pictures(N + M)["latents"]
    expected = torch.zeros(M, N)
    parts: dict[str, list[Tensor]] = {"train": [], "query": []}
    for t in (5, 300):
        one = denoiser_task(task.module, scheduler=DDPMScheduler(), timesteps=[t])
        for side, batch in (
            ("train", batch_of({"latents": every[:N]}, 0, N)),
            ("query", {"latents": every[N:], "index": torch.arange(100, 100 + M)}),
        ):
            grads = per_example_gradients(one, batch)["loss"]
            parts[side].append(F.normalize(torch.cat([g.flatten(1) for g in grads.values()], 1), dim=1))
    expected = 0.2 * torch.stack(parts["query"]).mean(0) @ torch.stack(parts["train"]).mean(0).T
    torch.testing.assert_close(
        scores(DiffusionReTrac((0.2,)), store, queries), expected, rtol=1e-3, atol=1e-5
    )
    plain = both(task, tmp_path / "b", Projection("none"))
    with pytest.raises(InputError, match="draws='unit'"):
        scores(DiffusionReTrac((0.2,)), *plain)


@pytest.mark.parametrize("measure", ["loss", "output_norm"])
def test_trak_and_d_trak_equal_traker_with_its_rescaling_off(tmp_path: Path, measure: str) -> None:
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType
    from trak.score_computers import BasicSingleBlockScoreComputer

    dim, task = 128, denoiser(measure=measure)
    store, queries = both(task, tmp_path / "ours", Projection("traker", dim, seed=3))
    damping = float(store.rows()[f"{measure}@0"].square().sum() / dim)
    net, every = task.module, pictures(N + M)["latents"]
    index = torch.cat([torch.arange(N), torch.arange(100, 100 + M)])
    noisy = task.rows({"latents": every, "index": index}, range(2))
    rows = {k: v.unflatten(0, (N + M, 2)) for k, v in noisy.items()}

    class Output(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        @staticmethod
        def get_output(model: nn.Module, weights: Any, buffers: Any, *example: Tensor) -> Tensor:
            own = dict(zip(("noisy", "target", "timestep"), example, strict=True))
            out = torch.func.functional_call(
                model, (weights, buffers), (own["noisy"], own["timestep"])
            ).sample
            square = (out - own["target"] if measure == "loss" else out).square()
            return square.mean()

        def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
            return torch.ones(len(batch[0]), 1)

    n_parameters = sum(p.numel() for p in net.parameters())
    # traker divides gradients by sqrt(p), and ours are projected with entries of 1 / sqrt(dim).
    unit = n_parameters / dim

    class Plain(BasicSingleBlockScoreComputer):
        def __init__(self, dtype: Any, device: Any, **_: Any) -> None:
            self.dtype, self.device = dtype, device

        def get_xtx(self, grads: Tensor) -> Tensor:
            return grads.T @ grads + damping / unit * torch.eye(dim)

    projector = BasicProjector(n_parameters, dim, 3, ProjectionType("rademacher"), torch.device("cpu"))
    traker = TRAKer(
        model=net,
        task=Output(),
        train_set_size=N,
        save_dir=str(tmp_path / "traker"),
        device="cpu",
        proj_dim=dim,
        projector=projector,
        use_half_precision=False,
        score_computer=Plain,
        logging_level=logging.ERROR,
    )
    batches = [
        tuple(rows[k][part] for k in ("noisy", "target", "timestep"))
        for part in (slice(0, N), slice(N, None))
    ]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        traker.load_checkpoint(net.state_dict(), model_id=0)
        traker.featurize(batches[0], num_samples=N)
        traker.finalize_features()
        traker.start_scoring_checkpoint("e", checkpoint=net.state_dict(), model_id=0, num_targets=M)
        traker.score(batches[1], num_samples=M)
    theirs = torch.as_tensor(traker.finalize_scores("e")).float().T
    ours = scores(Trak(measure, damping=damping, relative=False), store, queries)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def test_a_query_may_be_measured_otherwise_and_many_dampings_share_a_kernel(tmp_path: Path) -> None:
    task = denoiser(measure=["loss", "output_norm"])
    store, queries = both(task, tmp_path, Projection("rademacher", 6))
    phi, asked = store.rows()["output_norm@0"].double(), queries.columns["loss@0"].double()
    fitted = Trak("output_norm", "loss").fit(store)
    for damping in (0.01, 1.0):
        kernel = phi.T @ phi
        kernel += damping * kernel.diagonal().mean() * torch.eye(6)
        expected = (asked @ torch.linalg.inv(kernel) @ phi.T).float()
        torch.testing.assert_close(
            scores(fitted.damped(damping), store, queries), expected, rtol=1e-4, atol=1e-6
        )


def test_logra_uses_each_layers_own_kernel(tmp_path: Path) -> None:
    store, queries = both(denoiser(), tmp_path, Projection("factored", 4))
    phi, asked, expected = (
        store.rows()["loss@0"].double(),
        queries.columns["loss@0"].double(),
        torch.zeros(M, N),
    )
    for _, a, b in store.about["blocks"]:
        kernel = phi[:, a:b].T @ phi[:, a:b]
        kernel += 0.1 * kernel.diagonal().mean() * torch.eye(b - a)
        expected = expected + asked[:, a:b] @ torch.linalg.inv(kernel) @ phi[:, a:b].T
    torch.testing.assert_close(
        scores(Trak(blocks="module"), store, queries), expected.float(), rtol=1e-3, atol=1e-4
    )


def regression(weights: Tensor) -> tuple[nn.Linear, Task]:
    net = nn.Linear(weights.numel(), 1, bias=False).eval()
    with torch.no_grad():
        net.weight.copy_(weights)
    measures = {
        "output": lambda call, b: call(b["x"])[:, 0],
        "residual": lambda call, b: call(b["x"])[:, 0] - b["y"],
    }
    return net, module_task(net, measures)


@pytest.mark.parametrize("ridge", [0.0, 2.5])
def test_influence_equals_exact_leave_one_out_retraining_on_a_linear_model(
    tmp_path: Path, ridge: float
) -> None:
    x, noise = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    y = x @ torch.arange(5.0, dtype=torch.float64) + noise

    def fitted(keep: Tensor) -> Tensor:
        return torch.linalg.solve(x[keep].T @ x[keep] + ridge * torch.eye(5), x[keep].T @ y[keep])

    everything = torch.ones(40, dtype=torch.bool)
    best = fitted(everything)
    _, task = regression(best.float()[None])
    store = featurise(task, {"x": x.float(), "y": y.float()}, tmp_path, projection=Projection("none"))
    asked = torch.randn(6, 5, dtype=torch.float64)
    queries = query_features(task, {"x": asked.float(), "y": torch.zeros(6)}, projection=Projection("none"))
    retrained = torch.empty(6, 40, dtype=torch.float64)
    for i in range(40):
        keep = everything.clone()
        keep[i] = False
        retrained[:, i] = asked @ (fitted(keep) - best)
    # The features are those of the residual, so its value is what weighs them.
    scorer = Trak("residual", "output", damping=ridge, relative=False, weight=lambda r: r, leverage=True)
    found = scores(scorer, store, queries)
    torch.testing.assert_close(found, retrained.float(), rtol=1e-4, atol=1e-5)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def classified(n: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(n)
    return {"x": torch.randn(n, 6, generator=made), "y": torch.randint(3, (n,), generator=made)}


def classifier(net: nn.Module) -> Task:
    return module_task(net, {"loss": lambda call, b: F.cross_entropy(call(b["x"]), b["y"], reduction="none")})


def _dattri(net: nn.Module, points: list[Any]) -> tuple[Any, Any, Any]:
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    def loss(params: Any, data: Any) -> Tensor:
        x, y = data  # One example, with a batch axis or without.
        out = torch.func.functional_call(net, params, (x.reshape(1, 6),))
        return F.cross_entropy(out, y.reshape(1))

    loaders = [
        DataLoader(TensorDataset(*classified(n).values()), batch_size=5, shuffle=False) for n in (N, M)
    ]
    return AttributionTask(loss_func=loss, model=net, checkpoints=points), *loaders


def test_tracin_equals_dattri(tmp_path: Path) -> None:
    from dattri.algorithm.tracin import TracInAttributor

    nets = [Small().eval(), Small().eval()]
    # It loads each into the model, and a state dict is the model's own tensors.
    points = [copy.deepcopy(n.state_dict()) for n in nets]
    task, train, test = _dattri(nets[0], points)
    theirs = TracInAttributor(task, weight_list=torch.tensor([0.1, 0.4]), normalized_grad=False)
    # Without this it projects to 512 dimensions even when told not to.
    theirs.projector_kwargs = None
    expected = theirs.attribute(train, test).T
    none = Projection("none")
    store = featurise(classifier(nets[0]), classified(N), tmp_path, projection=none, checkpoints=points)
    queries = query_features(classifier(nets[0]), classified(M), projection=none, checkpoints=points)
    found = scores(TracIn((0.1, 0.4)), store, queries)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_datainf_equals_dattri(tmp_path: Path) -> None:
    from dattri.algorithm.influence_function import IFAttributorDataInf

    net = Small().eval()
    task, train, test = _dattri(net, [net.state_dict()])
    # With layer_name it splits by the wrong sizes; without, by module.
    theirs = IFAttributorDataInf(task, regularization=0.05)
    theirs.cache(train)
    expected = theirs.attribute(train, test).T.detach()
    none = Projection("none")
    store = featurise(classifier(net), classified(N), tmp_path, projection=none)
    queries = query_features(classifier(net), classified(M), projection=none)
    found = scores(DataInf(0.05, absolute=True), store, queries)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("strategy", ["kfac", "ekfac"])
def test_ekfac_equals_kronfluence_called_directly(tmp_path: Path, strategy: Any) -> None:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task as Direct

    every = pictures(N + M)["latents"]
    task = denoiser(parameters="*attentions*")
    train = {"latents": every[:N]}
    queries = {"latents": every[N:], "index": torch.arange(100, 100 + M)}
    found = kronecker_scores(
        task, train, queries, tmp_path / "a", strategy=strategy, damping=1e-4, batch_size=N
    )

    class Loss(Direct):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            noisy, times, target = batch
            return (model(noisy, times).sample - target).square().mean((1, 2, 3)).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            names = (n for n, m in pixel_unet().named_modules() if isinstance(m, nn.Linear))
            return [n for n in names if "attentions" in n]

    def data(batch: Any) -> Any:
        rows = task.rows(batch, range(2))
        return torch.utils.data.TensorDataset(rows["noisy"], rows["timestep"], rows["target"])

    loss = Loss()
    analyzer = Analyzer(
        "b", prepare_model(pixel_unet(), loss), loss, cpu=True, output_dir=str(tmp_path), disable_tqdm=True
    )
    arguments = FactorArguments(strategy=strategy, use_empirical_fisher=True)
    analyzer.fit_all_factors(strategy, data(batch_of(train, 0, N)), 2 * N, factor_args=arguments)
    analyzer.compute_pairwise_scores(
        strategy,
        strategy,
        data(queries),
        data(batch_of(train, 0, N)),
        2 * M,
        per_device_train_batch_size=2 * N,
        score_args=ScoreArguments(damping_factor=1e-4),
    )
    direct = analyzer.load_pairwise_scores(strategy)["all_modules"].view(M, 2, N, 2).mean((1, 3))
    assert float((found - direct).abs().max() / direct.abs().max()) < 1e-5


def test_queries_made_otherwise_are_refused(tmp_path: Path) -> None:
    store, _ = both(denoiser(), tmp_path, Projection("rademacher", 8))
    for key, task, projection in (
        ("weights", denoiser(1), Projection("rademacher", 8)),
        ("projection", denoiser(), Projection("rademacher", 8, seed=2)),
        ("parameters", denoiser(parameters="conv_in*"), Projection("rademacher", 8)),
    ):
        with pytest.raises(StoreError, match=f"other {key} than the queries"):
            scores(Dot(), store, query_features(task, pictures(2), projection=projection))
    queries = query_features(denoiser(), pictures(2), projection=Projection("rademacher", 8))
    with pytest.raises(StoreError, match="no features of 'output_norm'; there are of loss"):
        scores(Dot("output_norm"), store, queries)
    with pytest.raises(InputError, match="Pass a positive damping"):
        scores(Trak(damping=0.0), *both(denoiser(), tmp_path / "wide", Projection("rademacher", 64)))
