"""What a neuron does to an image's embedding through all later attention, factored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.core.batches import batches
from methods_multimodal.core.model import check_pool, check_sites
from methods_multimodal.core.record import Record
from methods_multimodal.text_explanations.sparse_coding import solve
from methods_multimodal.text_explanations.tower_parts import TowerParts, tower_parts
from mm_adapters import InputError, MissingSiteError, Model, Read


@dataclass(frozen=True)
class SecondOrder(Record):
    """The second-order effects of one MLP layer's neurons, as a product of two factors.

    A neuron's effect through one later head is a number for each image (`amounts`) times a direction
    that only weights make: its own output vector (`writes`) through the head's matrices (`paths`).
    Layer normalisation is frozen at what it was; biases are no neuron's.
    """

    amounts: Float[Tensor, "image path neuron"]
    writes: Float[Tensor, "neuron d_model"]
    paths: Float[Tensor, "path d_model width"]
    layer: int
    neurons: tuple[int, ...]

    def directions(self, which: slice) -> Float[Tensor, "neuron path width"]:
        """The direction of each path, for some of the neurons."""
        return einsum(self.writes[which], self.paths, "n m, p m w -> n p w")

    def effects(self, which: slice) -> Float[Tensor, "neuron image width"]:
        """The effects on every image, for some of the neurons."""
        return einsum(self.amounts[:, :, which], self.directions(which), "b p n, n p w -> n b w")


@dataclass(frozen=True)
class NeuronDirections(Record):
    """Each neuron's principal direction (unit), and how large its centred effect is on each image.

    `explained` is the share of the square of its largest effects that lies along it.
    """

    directions: Float[Tensor, "neuron width"]
    sizes: Float[Tensor, "image neuron"]
    explained: Float[Tensor, " neuron"]
    neurons: tuple[int, ...]
    layer: int


@torch.no_grad()
def second_order(
    model: Model,
    *,
    images: Any,
    layer: int,
    neurons: range | None = None,
    tower: str = "vision",
    batch_size: int = 16,
) -> SecondOrder:
    """The effect of each neuron of one MLP on the embedding, through the attention of all later layers.

    For a later head it is the sum over tokens of attention to the token times the neuron's activation
    there over the norm's scale: one number, and no tensor of tokens by neurons by width is ever made.

    Source: Gandelsman et al. 2024, arXiv 2406.04341, equation 5; the factoring is ours.
    Raises: InputError if there is no such layer, or none after it; MissingSiteError if the summary is
    not that of the first or the last position.
    """
    view = model.check_tower(tower)
    check_sites(model, [f"{tower}.blocks.0.{part}" for part in ("mlp.hook_post", "ln1.hook_scale")])
    check_pool(view, "first", "last")
    parts = tower_parts(model, tower)
    if any("W_V" not in view.weights(i).names("attn") for i in range(parts.n_layers)):
        raise MissingSiteError(
            f"{tower}: its blocks' attn has no W_V: one fused projection makes the values."
        )
    if not 0 <= layer < parts.n_layers - 1:
        raise InputError(f"Layer {layer} has no attention after it; layers 0 to {parts.n_layers - 2} have.")
    position = 0 if parts.pool == "first" else -1
    later = range(layer + 1, parts.n_layers)
    writes, paths = _weights(parts, layer, later)
    which = range(len(writes)) if neurons is None else neurons
    span = slice(which.start, which.stop, which.step)
    reads = [Read(parts.site("mlp.hook_post", layer), lambda x: x[..., span].float())]
    for i in later:
        reads.append(Read(parts.site("ln1.hook_scale", i), lambda x: x[..., 0].float()))
        reads.append(Read(parts.site("attn.hook_pattern", i), lambda x: x[:, :, position].float()))
    reads.append(Read(parts.site("ln_final.hook_scale"), lambda x: x[:, position].float()))
    rows = []
    for inputs in batches(model, parts.tower, images, batch_size):
        run = model.run(inputs, read=reads)
        active = run[parts.site("mlp.hook_post", layer)]
        products = [
            (run[parts.site("attn.hook_pattern", i)] / run[parts.site("ln1.hook_scale", i)].unsqueeze(1))
            @ active
            for i in later
        ]
        rows.append(torch.cat(products, 1) / run[parts.site("ln_final.hook_scale")].unsqueeze(-1))
    if not rows:
        raise InputError("There is no image.")
    return SecondOrder(torch.cat(rows), writes[span], paths, layer, tuple(which))


def _weights(parts: TowerParts, layer: int, later: range) -> tuple[Tensor, Tensor]:
    """What each neuron writes, and what each later head makes of a residual: the norm's gain and centring,
    values, output, and the final reader."""
    writes = parts.tower.weights(layer).names("mlp")["W_out"]().detach().float()
    paths = []
    for i in later:
        block = parts.tower.weights(i)
        gain = block.names("ln1")["w"]().detach().float()
        value = block.names("attn")["W_V"]().detach().float()
        value = gain.reshape(1, -1, 1) * value
        if parts.tower.record.norm == "LN":
            value = value - value.mean(1, keepdim=True)
        paths.append(value @ parts.head_readers(i)[0])
    return writes, torch.cat(paths)


@torch.no_grad()
def principal_directions(effects: SecondOrder, top: int = 100, at_once: int = 64) -> NeuronDirections:
    """Each neuron's one direction: the first right singular vector of its `top` largest effects.

    Effects have their mean over images taken off first; the sign is that of most of the largest.

    Source: Gandelsman et al. 2024, arXiv 2406.04341, section 4.1.
    """
    n_images, n_neurons = effects.amounts.shape[0], effects.amounts.shape[2]
    directions, sizes, explained = [], [], []
    for start in range(0, n_neurons, at_once):
        which = slice(start, start + at_once)
        amounts = rearrange(effects.amounts[:, :, which], "b p n -> n b p")
        amounts = amounts - amounts.mean(1, keepdim=True)
        # Orthonormal coordinates of a neuron's paths: everything but the last step is that narrow.
        frame, triangle = torch.linalg.qr(effects.directions(which).mT)
        narrow = amounts @ triangle.mT
        size = narrow.norm(dim=-1)
        largest = size.topk(min(top, n_images), dim=1).indices
        rows = narrow.gather(1, largest.unsqueeze(-1).expand(-1, -1, narrow.shape[-1]))
        _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
        axis = vectors[:, 0]
        votes = torch.sign((rows @ axis.unsqueeze(-1)).squeeze(-1)).sum(1)
        axis = axis * torch.where(votes < 0, -1.0, 1.0).unsqueeze(1)
        directions.append((frame @ axis.unsqueeze(-1)).squeeze(-1))
        sizes.append(size.T)
        explained.append(values[:, 0] ** 2 / values.square().sum(1).clamp_min(1e-30))
    return NeuronDirections(
        torch.cat(directions), torch.cat(sizes, 1), torch.cat(explained), effects.neurons, effects.layer
    )


def text_codes(
    directions: Float[Tensor, "neuron width"], texts: Float[Tensor, "text width"], l1: float = 0.2
) -> Float[Tensor, "neuron text"]:
    """Each direction as a sparse sum of texts (unit, their mean taken off), of either sign.

    The dictionary's rows are of length one; in the published code they are not, which favours long texts.
    """
    rows = torch.nn.functional.normalize(texts, dim=1)
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    aims = torch.nn.functional.normalize(directions, dim=1)
    both = solve(aims, torch.cat([rows, -rows]), l1)
    return both[:, : len(rows)] - both[:, len(rows) :]
