"""What data attribution refuses, beside the nearest that it takes, and layers' gradients by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from tiny_attribution import pixel_unet
from torch import Tensor, nn
from torch.nn import functional as F
from unchecked import unchecked

import mm_adapters as mm
from methods_multimodal.data_attribution import (
    Projection,
    contrastive_task,
    denoiser_task,
    featurise,
    kronecker_scores,
    module_task,
    nearest,
)
from methods_multimodal.data_attribution._featurise import Featuriser
from methods_multimodal.data_attribution._layers import LayerCall, projected
from methods_multimodal.data_attribution._parameters import select
from methods_multimodal.data_attribution.diffusion import Schedule
from methods_multimodal.data_attribution.encoding import _pixels
from methods_multimodal.data_attribution.evaluation import choose_damping, detection
from methods_multimodal.data_attribution.layer_gradients import NotByLayers, layer_pass
from methods_multimodal.data_attribution.pictures import read_pictures
from methods_multimodal.data_attribution.projection import _traker
from methods_multimodal.data_attribution.task import Task, batch_of, n_examples
from mm_adapters import InputError


class Net(nn.Module):
    """Two layers, of which `tied` may compute with the second's weight without calling it."""

    def __init__(self, tied: bool = False, twice: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(3, 4), nn.Linear(4, 2), nn.Parameter(torch.ones(2))
        self.tied, self.twice = tied, twice

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.tanh(self.first(torch.cat([x, x]) if self.twice else x))[: len(x)]
        out = F.linear(inner, self.second.weight, self.second.bias) if self.tied else self.second(inner)
        return out * self.scale


def _task(net: nn.Module, parameters: Any = "all") -> Task:
    return module_task(
        net.eval(),
        {"sum": lambda call, b: call(b["x"]).sum(1), "square": lambda call, b: call(b["x"]).square().sum(1)},
        parameters,
    )


def _examples(n: int = 5, seed: int = 0) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))}


# ---- what does not go together -------------------------------------------------------------------


def test_draws_projections_and_modes_go_together() -> None:
    sample = batch_of(_examples(), 0, 2)

    def make(kind: Any = "sparse", draws: Any = "mean", mode: Any = "auto", task: Any = None) -> Featuriser:
        projection = Projection(kind, 4)
        return Featuriser(task or _task(Net()), sample, projection, draws=draws, mode=mode, max_rows=8)

    with pytest.raises(InputError, match=r"^Draws are averaged as 'mean' or 'unit', not 'sum'"):
        unchecked(Featuriser.__init__)(
            Featuriser.__new__(Featuriser),
            _task(Net()),
            sample,
            Projection(),
            draws="sum",
            mode="auto",
            max_rows=8,
        )
    for draws, mode in (("unit", "auto"), ("mean", "loop"), ("mean", "vmap"), ("unit", "layers")):
        with pytest.raises(InputError, match=r"^A factored projection goes by layers and averages draws as"):
            make("factored", draws, mode)
        make("sparse", draws, mode, _task(Net(), ["first.*", "second.*"]))
    for mode in ("auto", "layers"):
        assert make("factored", "mean", mode).gradients.mode == "layers"
    with pytest.raises(InputError, match=r"^A factored projection needs weights of linear or convolutional"):
        make("factored", task=_task(Net(), ["scale", "first.bias"]))
    assert make("factored", task=_task(Net(), ["scale", "first.weight"])).gradients.task.parameters == (
        "first.weight",
    )


def test_parameters_are_asked_for_by_names_that_are_there() -> None:
    net = Net()
    assert select(net, ["second.*", "scale"]) == ("scale", "second.weight", "second.bias")
    with pytest.raises(InputError, match=r"^No parameters were asked for\.$"):
        select(net, [])
    with pytest.raises(InputError, match=r"No parameter of Net is 'third'\. It has 5, scale, first\.weight"):
        select(net, ["scale", "third"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dim": 0}, "^A projection has at least one feature, not 0"),
        ({"kind": "factored", "dim": 8}, "^A factored projection has a square number .*, not 8"),
        ({"kind": "factored", "dim": 15}, "not 15"),
        ({"kind": "factored", "dim": 0}, "at least one feature"),
    ],
)
def test_a_projection_is_of_a_kind_and_a_width(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        Projection(**options)


def test_the_narrowest_projections_are_taken_and_no_unknown_kind() -> None:
    unknown = object.__new__(Projection)
    object.__setattr__(unknown, "kind", "dense")
    with pytest.raises(InputError, match=r"^There is no projection 'dense'; there is .*sparse.*factored"):
        unknown.__post_init__()
    for options in ({"dim": 1}, {"kind": "none", "dim": 0}, {"kind": "factored", "dim": 9}, {"dim": 8}):
        Projection(**options)  # type: ignore[arg-type]


def test_a_task_has_measures_and_examples() -> None:
    with pytest.raises(InputError, match=r"^A task needs a measure"):
        module_task(Net(), {})
    assert n_examples([{"x": torch.zeros(2)}]) == 1
    assert n_examples({"x": torch.zeros(1)}) == 1
    with pytest.raises(InputError, match=r"^There are no examples\.$"):
        n_examples([])
    for bad in ({"x": torch.zeros(0)}, {"x": torch.zeros(2), "y": torch.zeros(1)}):
        with pytest.raises(InputError, match="at least 1; these have"):
            n_examples(bad)


def test_a_checkpoint_is_a_file_that_is_there(tmp_path: Path) -> None:
    told = f"^There is no checkpoint {tmp_path / 'none'}"
    with pytest.raises(InputError, match=told):
        featurise(_task(Net()), _examples(), tmp_path / "store", checkpoints=[tmp_path / "none"])
    with pytest.raises(InputError, match=told):
        featurise(_task(Net()), _examples(), tmp_path / "store", checkpoints=[str(tmp_path / "none")])


# ---- denoisers -----------------------------------------------------------------------------------


def test_a_denoiser_s_timesteps_and_noises_are_counted_from_one() -> None:
    net, scheduler = pixel_unet(), DDPMScheduler(num_train_timesteps=20)

    def task(**options: Any) -> Task:
        return denoiser_task(net, scheduler, **options)

    for n in (0, 21):
        with pytest.raises(InputError, match=f"^{n} timesteps cannot be spread over 20"):
            task(timesteps=n)
    assert (task(timesteps=1).n_draws, task(timesteps=20).n_draws) == (1, 20)
    assert (task(timesteps=1).about["timesteps"], task(timesteps=4).about["timesteps"]) == (
        [10],
        [2, 7, 12, 17],
    )
    for steps in ([-1], [20], [], [0, 20]):
        with pytest.raises(InputError, match=r"^Timesteps are 0 to 19, not \["):
            task(timesteps=steps)
    assert task(timesteps=[0, 19], n_noises=2).n_draws == 4
    for noises, own in ((0, 1), (1, 0)):
        with pytest.raises(
            InputError, match=f"^There is at least one noise and timestep, not {noises} and {own}"
        ):
            task(n_noises=noises, n_own=own, timesteps=None)
    assert task(timesteps=None, n_noises=2, n_own=3).n_draws == 6
    for measure in ([], {}):
        with pytest.raises(InputError, match=r"^No measure was asked for; there is loss"):
            task(measure=measure)
    with pytest.raises(InputError, match=r"^There is no measure 'l0'"):
        task(measure=["loss", "l0"])


def test_a_schedule_is_one_that_noise_is_added_by() -> None:
    with pytest.raises(InputError, match=r"^EulerDiscrete has no alphas_cumprod and no flow to train by"):
        Schedule.of(type("EulerDiscrete", (), {"config": {}})())
    assert Schedule.of(EulerDiscreteScheduler()).predicts == "epsilon"
    flow = Schedule.of(FlowMatchEulerDiscreteScheduler(num_train_timesteps=4, shift=3.0))
    sigma = [3 * t / (1 + 2 * t) for t in (0.25, 0.5, 0.75, 1.0)]
    torch.testing.assert_close(flow.noise, torch.tensor(sigma))
    torch.testing.assert_close(flow.signal, 1 - torch.tensor(sigma))
    kept = DDIMScheduler(num_train_timesteps=5)
    plain, scaled = Schedule.of(kept), Schedule.of(kept, 0.5)
    assert (plain.times.tolist(), scaled.times.tolist()) == ([0, 1, 2, 3, 4], [0, 0.5, 1, 1.5, 2])
    torch.testing.assert_close(plain.signal.square() + plain.noise.square(), torch.ones(5))
    torch.testing.assert_close(plain.signal.square(), kept.alphas_cumprod)


def test_what_a_denoiser_predicts_is_a_target_that_is_known() -> None:
    clean, noise, signal, share = (torch.tensor([x]) for x in (2.0, 3.0, 0.6, 0.8))
    targets = {"epsilon": 3.0, "v_prediction": 0.6 * 3 - 0.8 * 2, "sample": 2.0, "flow": 1.0}
    for predicts, target in targets.items():
        schedule = Schedule(torch.ones(1), torch.ones(1), torch.ones(1), predicts)
        torch.testing.assert_close(schedule.target(clean, noise, signal, share), torch.tensor([target]))
    schedule = Schedule(torch.ones(1), torch.ones(1), torch.ones(1), "score")
    with pytest.raises(InputError, match=r"^A denoiser that predicts 'score' has no known target"):
        schedule.target(clean, noise, signal, share)


def test_an_example_brings_its_timestep_where_the_task_has_none() -> None:
    task = denoiser_task(pixel_unet(), DDPMScheduler(), timesteps=None)
    latents = {"latents": torch.randn(2, 3, 8, 8)}
    with pytest.raises(InputError, match=r'^With timesteps=None every example brings its own, as "timestep"'):
        task.per_example(batch_of(latents, 0, 2))
    times = latents | {"timestep": torch.tensor([3, 700])}
    assert task.rows(batch_of(times, 0, 2), range(1))["timestep"].tolist() == [3, 700]
    with pytest.raises(InputError, match=r"timesteps \[2, 1\] and latents \[2, 1, 3, 8, 8\]; n_own is"):
        task.rows(batch_of(times, 0, 2), range(2))


def test_images_of_a_task_are_of_one_size_in_0_to_1() -> None:
    small, wide = Image.new("RGB", (4, 4), (255, 0, 51)), Image.new("RGB", (6, 4))
    found = _pixels([small, small])
    assert found.shape == (2, 3, 4, 4)
    torch.testing.assert_close(found[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.2]))
    with pytest.raises(InputError, match=r"^The images are of several sizes\. Resize them"):
        _pixels([small, wide])
    edges = torch.tensor([0.0, 1.0]).expand(1, 3, 2, 2)
    assert _pixels(edges) is edges
    for bad in (edges - 0.01, edges + 0.01, edges[0]):
        with pytest.raises(InputError, match=r"^Pixels are \[image, 3, height, width\] in 0 to 1"):
            _pixels(bad)


# ---- pairs of images and texts -------------------------------------------------------------------


def test_a_pair_is_measured_alike_however_the_model_gives_its_embeddings() -> None:
    case = tiny.open_clip()
    pairs = {"image": tiny.pixels(2), "text": case.inputs["text"]}
    values = []
    for as_dict in (True, False):
        case.model.output_dict = as_dict
        task = contrastive_task(mm.HookedModel(case.model), pairs, measure=["similarity", "loss"])
        values.append(task.per_example(batch_of(pairs, 0, 2)))
    with torch.no_grad():
        image, text = case.model.encode_image(pairs["image"]), case.model.encode_text(pairs["text"])
    for one in values:
        torch.testing.assert_close(one["similarity"], F.cosine_similarity(image, text))
    assert torch.equal(values[0]["loss"], values[1]["loss"])


def test_a_pair_s_measures_and_embeddings_are_there() -> None:
    case = tiny.clip()
    model = mm.HookedModel(case.model)
    told = r"^There is no measure \['accuracy'\]; there is loss, similarity\.$"
    with pytest.raises(InputError, match=told):
        contrastive_task(model, case.inputs, measure=["loss", "accuracy"])
    with pytest.raises(InputError, match=r"^There is no measure \[\]; there is"):
        contrastive_task(model, case.inputs, measure=[])
    task = contrastive_task(model, case.inputs)
    rows = batch_of(case.inputs, 0, 2)
    assert task.per_example(rows)["loss"].shape == (2,)
    outputs: tuple[dict[str, Any], ...] = (
        {},
        {"image_embeds": None},
        {"image_embeds": torch.ones(2, 3), "text_embeds": None},
    )
    for output in outputs:
        with pytest.raises(InputError, match=r"^SimpleNamespace has no embeddings of images and texts"):
            task.values(lambda **_: SimpleNamespace(**output), rows)  # noqa: B023


# ---- gradients by layers -------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["valid", "same", 1, (0, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_s_gradient_between_two_projections(padding: Any, bias: bool) -> None:
    g = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(2, 3, (3, 5), padding=padding, bias=bias).double()
    inputs = torch.randn(4, 2, 6, 7, generator=g, dtype=torch.float64)
    out = conv(inputs)
    back = torch.randn(out.shape, generator=g, dtype=torch.float64)
    whole = []
    for example in range(2):  # Two rows each.
        rows = slice(2 * example, 2 * example + 2)
        grads = torch.autograd.grad(conv(inputs[rows]), list(conv.parameters()), back[rows])
        weight = grads[0].flatten(1)
        whole.append(torch.cat([weight, grads[1][:, None]], 1) if bias else weight)
    expected = torch.stack(whole)
    call = LayerCall(inputs, back)
    torch.testing.assert_close(projected(conv, call, 2, None, None, bias), expected)
    into = torch.randn(expected.shape[2], 4, generator=g, dtype=torch.float64)
    out_of = torch.randn(3, 2, generator=g, dtype=torch.float64)
    torch.testing.assert_close(projected(conv, call, 2, into, None, bias), expected @ into)
    torch.testing.assert_close(projected(conv, call, 2, None, out_of, bias), out_of.T @ expected)


def test_layers_that_are_not_called_row_by_row_are_noticed() -> None:
    rows = batch_of(_examples(), 0, 5)

    def go(net: Net, n: int = 5) -> Any:
        task = _task(net)
        return layer_pass(task, rows, n, ["first", "second"], dict(net.named_parameters()), {})

    layers, values = go(Net())
    assert {name: list(found) for name, found in layers.items()} == {
        "sum": ["second", "first"], "square": ["second", "first"],
    } or set(layers["sum"]) == {"first", "second"}  # fmt: skip
    assert values["sum"].shape == (5,)
    told = "^first is called with {} rows and gives {}, where {} run$"
    with pytest.raises(NotByLayers, match=told.format(5, 5, 4)):
        go(Net(), 4)
    with pytest.raises(NotByLayers, match=told.format(10, 10, 5)):
        go(Net(twice=True))
    for change, rows_in, rows_out in ((lambda x: torch.cat([x, x]), 5, 10), (lambda x: x[:5], 10, 5)):
        net = Net(twice=rows_in == 10)
        net.first.register_forward_hook(lambda m, args, out, change=change: change(out))
        with pytest.raises(NotByLayers, match=told.format(rows_in, rows_out, 5)):
            go(net)
    with pytest.raises(
        NotByLayers, match=r"^second is not called: something else computes with its weights$"
    ):
        go(Net(tied=True))


# ---- scores --------------------------------------------------------------------------------------


def test_a_damping_is_chosen_from_some_by_parts_of_the_queries() -> None:
    g = torch.Generator().manual_seed(0)
    subsets, losses = torch.rand(6, 5, generator=g) < 0.5, torch.randn(6, 3, generator=g)
    make = lambda damping: torch.randn(3, 5, generator=torch.Generator().manual_seed(1)) * damping  # noqa: E731
    with pytest.raises(InputError, match=r"^There is no damping to choose from\.$"):
        choose_damping(make, [], subsets, losses, folds=2)
    for folds in (1, 4):
        with pytest.raises(InputError, match=f"^3 queries can be parted into 2 to 3 folds, not {folds}"):
            choose_damping(make, [0.1], subsets, losses, folds=folds)
    for folds in (2, 3):
        choose_damping(make, [0.1], subsets, losses, folds=folds)


def test_detection_has_planted_and_other_examples() -> None:
    scores = torch.tensor([0.1, 0.9, 0.4])
    for n, planted in ((0, [False] * 3), (3, [True] * 3)):
        with pytest.raises(
            InputError, match=f"^{n} of 3 examples are planted; at least one must be, and one"
        ):
            detection(scores, torch.tensor(planted))
    with pytest.raises(InputError, match=r"^1 of 2 examples are planted"):
        unchecked(detection)(scores, torch.tensor([True, False]))
    assert detection(scores, torch.tensor([False, True, False])) == 1
    assert detection(scores, torch.tensor([False, True, True])) == 1
    assert detection(scores, torch.tensor([True, True, False])) == 0.5


def test_libraries_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    vectors = torch.randn(4, 3)
    assert nearest(vectors[:1], vectors, k=4).examples[0, 0] == 0
    for k in (0, 5):
        with pytest.raises(InputError, match=f"^The {k} nearest of 4 examples were asked for"):
            nearest(vectors[:1], vectors, k=k)
    for module in ("faiss", "kronfluence.analyzer", "trak.projectors"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"^Searching needs faiss: pip install faiss-cpu"):
        nearest(vectors[:1], vectors, k=1)
    with pytest.raises(InputError, match=r"need kronfluence: pip install mm-interp\[attribution\]"):
        kronecker_scores(_task(Net()), _examples(), _examples(), tmp_path)
    with pytest.raises(InputError, match=r"'traker' needs it: pip install mm-interp\[attribution\]"):
        _traker(3, 2, 0, torch.device("cpu"))


def test_traker_s_own_kernels_are_used_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import trak.projectors

    made: list[Any] = []

    class Fake:
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append((args, options))

        def project(self, gradients: Tensor, model_id: int) -> Tensor:
            return gradients[:, :4] * (model_id + 1)

    monkeypatch.setattr(trak.projectors, "CudaProjector", Fake)
    device = torch.device("cuda")
    project = _traker(10, 4, 3, device)
    ((args, options),) = made
    assert args == (10, 4, 3, trak.projectors.ProjectionType("rademacher"), device)
    assert options == {"max_batch_size": 32}
    gradients = torch.randn(2, 10)
    torch.testing.assert_close(project(gradients, 2), gradients[:, :4] * 3 / 2)
    _traker(10, 4, 3, torch.device("cpu"))
    assert len(made) == 1


def test_kfac_of_a_checkpoint_is_that_of_a_module_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kronfluence.analyzer

    prepared: list[nn.Module] = []

    def stop(module: nn.Module, task: Any) -> None:
        prepared.append(module)
        raise StopIteration

    monkeypatch.setattr(kronfluence.analyzer, "prepare_model", stop)
    net, other = Net(), Net()
    own = {k: v.clone() for k, v in net.state_dict().items()}
    some = {
        k: v for k, v in other.state_dict().items() if k != "scale"
    }  # A state may hold some weights only.
    for state in (None, some):
        task = _task(net, ["first.*", "second.*"])
        with pytest.raises(StopIteration):
            kronecker_scores(task, _examples(), _examples(2), tmp_path / str(len(prepared)), state=state)
    for module, expected in zip(prepared, (own, own | some), strict=True):
        assert all(torch.equal(v, expected[k]) for k, v in module.state_dict().items())
    assert all(torch.equal(v, own[k]) for k, v in net.state_dict().items())
    told = r"^The task does not measure \['l1', 'l2'\]; it measures sum, square\.$"
    with pytest.raises(InputError, match=told):
        kronecker_scores(
            _task(net), _examples(), _examples(2), tmp_path / "bad", measure="l2", query_measure="l1"
        )
    with pytest.raises(
        InputError, match=r"^KFAC needs weights of linear or convolutional layers; the task has"
    ):
        kronecker_scores(_task(net, ["scale", "first.bias"]), _examples(), _examples(2), tmp_path / "none")


@pytest.mark.parametrize(
    "line",
    ['{"file_name": 3, "text": "a"}', '{"file_name": "0.png", "text": ["a"]}', '{"text": "a"}', "[]", "{"],
)
def test_a_line_of_captions_is_a_name_and_a_text(tmp_path: Path, line: str) -> None:
    for i in range(2):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f" a {i}\n")
    table = tmp_path / "metadata.jsonl"
    table.write_text('{"file_name": "1.png", "text": "b"}\n')
    assert read_pictures(tmp_path).captions == ("a 0", "b")
    table.write_text('{"file_name": "1.png", "text": "b"}\n' + line)
    with pytest.raises(InputError, match=r'metadata\.jsonl, line 2: not \{"file_name": \.\.\., "text":'):
        read_pictures(tmp_path)
