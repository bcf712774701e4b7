"""One tower's residual stream: what each node adds to it, and what each reader of it would feel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from methods_multimodal.circuits.nodes import prefix_of
from methods_multimodal.core.model import check_sites
from mm_adapters import InputError, MissingSiteError, Model, TowerView
from mm_adapters.records import Norm

_ATTENTION = (
    *("ln1.hook_scale", "ln1.hook_normalized"),
    *("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z"),
)
_MLP = ("ln2.hook_scale", "ln2.hook_normalized", "mlp.hook_pre", "hook_mlp_out")
_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Reader:
    """An input of a node, and the metric's gradient there as a direction of the stream."""

    name: str
    node: str
    grad: Float[Tensor, "row pos d_model"]


@dataclass(frozen=True)
class Stream:
    """The blocks of one tower in which every node adds to one residual stream, each behind a norm of its own.

    `end` is what the stream runs into: "logits", or "p" where a projector takes it on.
    """

    view: TowerView
    prefix: str
    end: str
    kinds: tuple[str, ...]
    gated: bool

    @classmethod
    def of(cls, model: Model, view: TowerView, end: str) -> Stream:
        """Raises: MissingSiteError unless the tower has one stack of such blocks, with their sites."""
        if set(view.stacks) != {"blocks"}:
            have = ", ".join(view.stacks) or "none"
            raise MissingSiteError(
                f"{view.name}: edges are of one stream through {view.name}.blocks.*; its stacks: {have}."
            )
        view.check_one_stream()
        n = view.n_layers()
        parts = (*_ATTENTION, *_MLP, *_STREAM)
        check_sites(model, [f"{view.name}.blocks.{i}.{part}" for i in range(n) for part in parts])
        crossed = [s.name for s in model.sites(f"{view.name}.blocks.*.cross_attn.hook_z") if s.reason is None]
        if crossed:
            raise MissingSiteError(
                f"{view.name}: edges of cross-attention are not scored ({crossed[0]}); score its nodes."
            )
        for layer in range(n):
            check_weights(view, layer)
        norms = [model.check_site(f"{view.name}.blocks.0.ln{k}.hook_scale").location for k in (1, 2)]
        kinds = tuple(norm.kind for norm in norms if isinstance(norm, Norm))
        gated = any(s.reason is None for s in model.sites(f"{view.name}.blocks.0.mlp.hook_pre_linear"))
        return cls(view, prefix_of(view), end, kinds, gated)

    def site(self, layer: int, part: str) -> str:
        """The name of one of its sites."""
        return f"{self.view.name}.blocks.{layer}.{part}"

    def value_sites(self) -> list[str]:
        """The sites whose values say what each node adds."""
        last = self.view.n_layers()
        parts = ("attn.hook_z", "hook_mlp_out", *_STREAM)
        return [self.site(layer, part) for layer in range(last) for part in parts]

    def norm_sites(self) -> list[str]:
        """The sites with what each norm did."""
        parts = [f"ln{k}.hook_{what}" for k in (1, 2) for what in ("scale", "normalized")]
        return [self.site(layer, part) for layer in range(self.view.n_layers()) for part in parts]

    def grad_sites(self) -> list[str]:
        """The sites at which gradients are wanted."""
        up = ("mlp.hook_pre_linear",) if self.gated else ()
        parts = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "mlp.hook_pre", *up, *_STREAM)
        return [self.site(layer, part) for layer in range(self.view.n_layers()) for part in parts]

    def heads(self, layer: int, moved: Mapping[str, Tensor]) -> Float[Tensor, "head row pos d_model"]:
        """What each head's change adds to the stream.

        Raises: InputError if the heads do not add up to what the attention adds.
        """
        out = self.view.weights(layer).names("attn")["W_O"]().float()
        added = einsum(moved[self.site(layer, "attn.hook_z")].float(), out, "r p h d, h d m -> h r p m")
        whole = moved[self.site(layer, "hook_resid_mid")] - moved[self.site(layer, "hook_resid_pre")]
        self._check(layer, "heads' outputs", added.sum(0), whole)
        return added

    def mlp(self, layer: int, moved: Mapping[str, Tensor]) -> Float[Tensor, "row pos d_model"]:
        """What the MLP's change adds. Raises: InputError if that is not its output."""
        added = moved[self.site(layer, "hook_mlp_out")].float()
        whole = moved[self.site(layer, "hook_resid_post")] - moved[self.site(layer, "hook_resid_mid")]
        self._check(layer, "MLP's output", added, whole)
        return added

    def attention_readers(
        self, layer: int, grads: Mapping[str, Tensor], values: Mapping[str, Tensor]
    ) -> list[Reader]:
        """The queries of each head, and the keys and values of each, or of each group that shares them.

        Raises: InputError if they do not add up to what the block feels of its stream.
        """
        weights = self.view.weights(layer).names("attn")
        readers: list[Reader] = []
        for letter in "QKV":
            grad = grads[self.site(layer, f"attn.hook_{letter.lower()}")].float()
            matrix = weights[f"W_{letter}"]().float()
            matrix = matrix[:: matrix.shape[0] // grad.shape[2]]  # Of a group all heads have the same.
            back = einsum(grad, matrix, "r p h d, h m d -> h r p m")
            back = self._through_norm(back, layer, 1, values)
            unit = "h" if grad.shape[2] == self.n_heads(layer) else "g"
            for head, of_head in enumerate(back):
                node = f"{self.prefix}a{layer}.{unit}{head}"
                readers.append(Reader(f"{node}<{letter.lower()}>", node, of_head))
        total = reduce([r.grad for r in readers], "n r p m -> r p m", "sum")
        passed = grads[self.site(layer, "hook_resid_mid")]
        self._check(layer, "gradient", total + passed, grads[self.site(layer, "hook_resid_pre")])
        return readers

    def mlp_reader(self, layer: int, grads: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Reader:
        """The MLP's input. Raises: InputError if it is not all that the block's second half feels."""
        weights = self.view.weights(layer).names("mlp")
        gate = weights["W_gate" if self.gated else "W_in"]().float()
        back = grads[self.site(layer, "mlp.hook_pre")].float() @ gate.T
        if self.gated:
            back = back + grads[self.site(layer, "mlp.hook_pre_linear")].float() @ weights["W_in"]().float().T
        back = self._through_norm(back[None], layer, 2, values)[0]
        passed = grads[self.site(layer, "hook_resid_post")]
        self._check(layer, "gradient", back + passed, grads[self.site(layer, "hook_resid_mid")])
        return Reader(f"{self.prefix}m{layer}", f"{self.prefix}m{layer}", back)

    def last_layer(self, grads: Mapping[str, Tensor]) -> int:
        """The last layer that matters: what reads the stream takes it behind that one.

        Raises: InputError if none does.
        """
        alive = [i for i in layers_of(self) if bool(grads[self.site(i, "hook_resid_mid")].any())]
        if not alive:
            raise InputError(f"The metric does not depend on the {self.view.name} tower: leave it out.")
        return alive[-1]

    def n_heads(self, layer: int) -> int:
        """How many heads attend in a layer."""
        return self.view.weights(layer).names("attn")["W_O"]().shape[0]

    def _through_norm(
        self, grad: Float[Tensor, "n row pos d_model"], layer: int, number: int, values: Mapping[str, Tensor]
    ) -> Float[Tensor, "n row pos d_model"]:
        scale = values[self.site(layer, f"ln{number}.hook_scale")].float()
        normal = values[self.site(layer, f"ln{number}.hook_normalized")].float()
        gain = self.view.weights(layer).names(f"ln{number}")["w"]().float()
        grad = grad * gain
        if self.kinds[number - 1] == "LN":
            grad = grad - grad.mean(-1, keepdim=True)
        return (grad - normal * (grad * normal).mean(-1, keepdim=True)) / scale

    def _check(self, layer: int, what: str, sum_of_parts: Tensor, whole: Tensor) -> None:
        if _apart(sum_of_parts, whole) > _TOLERANCE:
            raise InputError(
                f"{self.view.name}.blocks.{layer}: the {what} of its parts do not add up to the block's "
                f"(apart by {_apart(sum_of_parts, whole):.1%}): it is no block in which each part adds to "
                "the stream behind one norm. Score its nodes instead."
            )


def check_weights(view: TowerView, layer: int) -> None:
    """Raises: MissingSiteError if a block lacks one of the matrices that its nodes read and write by."""
    weights = view.weights(layer)
    needed = {"attn": ("W_Q", "W_K", "W_V", "W_O"), "mlp": ("W_in",), "ln1": ("w",), "ln2": ("w",)}
    for part, names in needed.items():
        missing = [name for name in names if name not in weights.names(part)]
        if missing:
            raise MissingSiteError(f"{view.name}.blocks.{layer}.{part} has no {missing[0]}: no edges there.")


def edge_products(
    added: Float[Tensor, "source row pos d_model"], readers: Sequence[Reader]
) -> Float[Tensor, "row source reader"]:
    """What each source adds, times what each reader would feel of it."""
    felt = rearrange([reader.grad for reader in readers], "t r p m -> r (p m) t")
    return rearrange(added, "s r p m -> r s (p m)") @ felt


def layers_of(stream: Stream) -> Iterator[int]:
    """The layers of a stream, in order."""
    yield from range(stream.view.n_layers())


def _apart(one: Tensor, two: Tensor) -> float:
    """How far two tensors are apart, by the larger one's size."""
    size = max(float(one.abs().max()), float(two.abs().max()))
    return float((one.float() - two.float()).abs().max()) / size if size > 0 else 0.0
