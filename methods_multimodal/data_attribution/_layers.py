"""How one layer's gradient comes apart by row: from what went in, and the gradient of what came out.

The gradient of a linear or convolutional weight is a sum over positions of outer products, so the
gradient of each example costs one small matrix product, and a projection of both sides can be taken
before the product is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer: its input and the gradient of its output, the row first in both."""

    input: Tensor
    gradient: Tensor


Direct = Callable[[nn.Module, LayerCall, int], dict[str, Tensor]]


def rule_for(module: nn.Module) -> Direct | None:
    """The rule for a layer's per-example gradients, or None.

    A subclass that computes in its own way has none.
    """
    for cls, rule in _RULES.items():
        if isinstance(module, cls) and type(module).forward is cls.forward:
            if isinstance(module, nn.Conv1d | nn.Conv2d) and (
                module.padding_mode != "zeros" or _is_lopsided(module)
            ):
                return None
            return rule
    return None


def has_factors(module: nn.Module) -> bool:
    """Whether the weight's gradient is a sum of outer products over positions."""
    if isinstance(module, nn.Conv2d):
        return rule_for(module) is not None and module.groups == 1
    return isinstance(module, nn.Linear) and rule_for(module) is not None


def projected(
    module: nn.Module,
    call: LayerCall,
    n: int,
    into: Float[Tensor, "in_width in_dim"] | None,
    out_of: Float[Tensor, "out_width out_dim"] | None,
    bias: bool,
) -> Float[Tensor, "example out_dim in_dim"]:
    """The weight's gradient with both sides projected, summed over an example's rows and positions.

    With `bias` the bias is a further column of the weight, whose input is one. None projects nothing.
    """
    if isinstance(module, nn.Conv2d):
        back = rearrange(call.gradient, "(n k) o h w -> n (k h w) o", n=n)
        inputs = rearrange(_patches(module, call.input, into, bias), "(n k) i p -> n (k p) i", n=n)
    else:
        back = _positions(call.gradient, n)
        inputs = _positions(call.input, n)
        if bias:
            inputs = F.pad(inputs, (0, 1), value=1.0)
        inputs = inputs if into is None else inputs @ into
    back = back if out_of is None else back @ out_of
    return back.transpose(1, 2) @ inputs


def _patches(
    module: nn.Conv2d, inputs: Tensor, into: Tensor | None, bias: bool
) -> Float[Tensor, "row width position"]:
    """The inputs of the kernel at each position, projected by running the projection as a kernel."""
    if into is None:
        patches = F.unfold(inputs, module.kernel_size, module.dilation, _padding(module), module.stride)
        return F.pad(patches, (0, 0, 0, 1), value=1.0) if bias else patches
    width = module.weight[0].numel()
    kernel = into[:width].T.reshape(-1, *module.weight.shape[1:])
    last = into[width] if bias else None
    return F.conv2d(inputs, kernel, last, module.stride, _padding(module), module.dilation).flatten(2)


def _is_lopsided(module: nn.Conv1d | nn.Conv2d) -> bool:
    """Whether padding to the same size adds more on one side than on the other."""
    return module.padding == "same" and any(reach % 2 for reach in _reach(module))


def _reach(module: nn.Conv1d | nn.Conv2d) -> tuple[int, ...]:
    """How far a kernel's last place lies behind its first, in each direction."""
    return tuple(d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))


def _padding(module: nn.Conv2d) -> tuple[int, int]:
    if not isinstance(module.padding, str):
        return module.padding  # type: ignore[return-value]
    if module.padding == "valid":
        return (0, 0)
    return tuple(reach // 2 for reach in _reach(module))  # type: ignore[return-value]


def _positions(value: Tensor, n: int) -> Float[Tensor, "example position width"]:
    """All positions of an example's rows as one axis."""
    return value.reshape(n, -1, value.shape[-1])


def _linear(module: nn.Module, call: LayerCall, n: int) -> dict[str, Tensor]:
    back = _positions(call.gradient, n)
    return {"weight": back.transpose(1, 2) @ _positions(call.input, n), "bias": back.sum(1)}


def _conv(module: nn.Module, call: LayerCall, n: int) -> dict[str, Tensor]:
    assert isinstance(module, nn.Conv2d)
    weight = _by_windows(module, call, n) if _has_windows(module, call) else _by_patches(module, call, n)
    bias = call.gradient.sum((2, 3)).unflatten(0, (n, -1)).sum(1)
    return {"weight": weight.reshape(n, *module.weight.shape), "bias": bias}


def _by_patches(module: nn.Conv2d, call: LayerCall, n: int) -> Float[Tensor, "example group out patch"]:
    """The inputs of the kernel laid out position by position, and one product with them."""
    inputs = F.unfold(call.input, module.kernel_size, module.dilation, _padding(module), module.stride)
    inputs = inputs.unflatten(1, (module.groups, -1))
    back = call.gradient.flatten(2).unflatten(1, (module.groups, -1))
    if back.shape[2] <= back.shape[3]:  # A product for each row is smaller than its patches laid out anew.
        return (back @ inputs.mT).unflatten(0, (n, -1)).sum(1)
    return rearrange(back, "(n k) g o p -> n g o (k p)", n=n) @ rearrange(
        inputs, "(n k) g i p -> n g (k p) i", n=n
    )


def _has_windows(module: nn.Conv2d, call: LayerCall) -> bool:
    """Whether `_by_windows` can be taken, and is sooner done: it lays nothing out, but counts the margins."""
    if module.stride not in (1, (1, 1)):
        return False
    high, wide = _spans(module, call)
    places = call.gradient.shape[2] * call.gradient.shape[3]
    margins = high * wide / places - 1
    # Measured: laying out costs about what a product with 64 more channels does.
    return margins * call.gradient.shape[1] / module.groups < 64


def _spans(module: nn.Conv2d, call: LayerCall) -> tuple[int, int]:
    """The height and width that a kernel passes over: the output's, and the kernel's reach."""
    (high, wide), (down, right) = call.gradient.shape[2:], _reach(module)
    return high + down, wide + right


def _by_windows(
    module: nn.Conv2d, call: LayerCall, n: int
) -> Float[Tensor, "example_group out in high wide"]:
    """One product for each place of the kernel, with the input moved by as much: a slice of it, not a copy.

    Both sides stand in frames of the size that the kernel passes over, an example's one behind the other;
    the output's gradient is zero in the margins, so what a slice shows there does not count.
    """
    high, wide = _spans(module, call)
    top, left = _padding(module)

    def framed(value: Tensor, top: int, left: int) -> Tensor:
        """[example group, channel, row's frame one behind the other]"""
        channels = value.shape[1] // module.groups
        value = rearrange(value, "(n k) (g c) h w -> n g c k h w", n=n, g=module.groups)
        frames = value.new_zeros(n, module.groups, channels, value.shape[3], high, wide)
        shown = value[..., : high - top, : wide - left]
        frames[..., top : top + shown.shape[-2], left : left + shown.shape[-1]] = shown
        return frames.flatten(3).flatten(0, 1)

    inputs, back = framed(call.input, top, left), framed(call.gradient, 0, 0)
    (down, right), (n_high, n_wide) = module.dilation, module.kernel_size
    moves = [y * down * wide + x * right for y in range(n_high) for x in range(n_wide)]
    length = back.shape[2] - moves[-1]
    products = [back[:, :, :length] @ inputs[:, :, move : move + length].mT for move in moves]
    return torch.stack(products, -1).unflatten(-1, (n_high, n_wide))


def _layer_norm(module: nn.Module, call: LayerCall, n: int) -> dict[str, Tensor]:
    assert isinstance(module, nn.LayerNorm)
    shape = list(module.normalized_shape)
    plain = F.layer_norm(call.input, shape, eps=module.eps)
    return {
        "weight": (plain * call.gradient).reshape(n, -1, *shape).sum(1),
        "bias": call.gradient.reshape(n, -1, *shape).sum(1),
    }


def _group_norm(module: nn.Module, call: LayerCall, n: int) -> dict[str, Tensor]:
    assert isinstance(module, nn.GroupNorm)
    plain = F.group_norm(call.input, module.num_groups, eps=module.eps)
    return {
        "weight": rearrange((plain * call.gradient).flatten(2), "(n k) c p -> n c (k p)", n=n).sum(2),
        "bias": rearrange(call.gradient.flatten(2), "(n k) c p -> n c (k p)", n=n).sum(2),
    }


def _embedding(module: nn.Module, call: LayerCall, n: int) -> dict[str, Tensor]:
    assert isinstance(module, nn.Embedding)
    ids, back = call.input.reshape(n, -1), _positions(call.gradient, n)
    if module.padding_idx is not None:
        back = back * (ids != module.padding_idx)[..., None]
    gradients = back.new_zeros(n, *module.weight.shape)
    return {"weight": gradients.scatter_add_(1, ids[..., None].expand_as(back), back)}


_RULES: dict[type[nn.Module], Direct] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
}


def add_to(total: dict[str, Tensor], part: dict[str, Tensor]) -> None:
    """Adds one call's gradients to those of the calls before, in place."""
    for name, value in part.items():
        total[name] = total[name].add_(value) if name in total else value


def owned(names: tuple[str, ...], module: nn.Module) -> dict[str, dict[str, str]]:
    """Which of the named parameters each layer owns: layer path -> {own name: full name}."""
    owners: dict[str, dict[str, str]] = {}
    for name in names:
        path, _, name_in_layer = name.rpartition(".")
        owners.setdefault(path, {})[name_in_layer] = name
    assert all(module.get_submodule(path) is not None for path in owners)
    return owners
