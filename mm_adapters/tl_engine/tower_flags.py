"""TransformerLens' switches for the points that a tower has only if they are asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mm_adapters._errors import HostAssertionError, InputError
from mm_adapters.records.spec import Input, Norm, Output, Site
from mm_adapters.sites.tower_view import TowerView
from mm_adapters.tl_engine.counted_hooks import names_of
from mm_adapters.tl_engine.derived_points import DerivedPoint, HeadInputs, HeadResults
from mm_adapters.tl_engine.hook_point import SitePoint
from mm_adapters.tl_engine.parts import Part

# Which points each switch is for, from the block.
POINTS = {
    "use_attn_result": ("attn.hook_result",),
    "use_split_qkv_input": ("hook_q_input", "hook_k_input", "hook_v_input"),
    "use_attn_in": ("hook_attn_in",),
    "use_hook_mlp_in": ("hook_mlp_in",),
}


class TowerFlags:
    """`set_use_attn_result(True)` and the others, as HookedTransformer's, for every block."""

    cfg: Any
    blocks: nn.ModuleList
    hook_dict: dict[str, Any]
    name: str
    _mounted: TowerView
    _root: Any
    _derived: dict[str, DerivedPoint]
    _head_inputs: dict[int, HeadInputs]

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Whether `attn.hook_result` [batch, pos, head, d_model] is there: what each head writes."""
        self._switch("use_attn_result", use_attn_result)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Whether `hook_q_input`, ... [batch, pos, head, d_model] are there: what q, k and v are made of."""
        self._switch("use_split_qkv_input", use_split_qkv_input)

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Whether `hook_attn_in` [batch, pos, head, d_model] is there: the stream that each head reads.

        Raises: InputError if keys and values are shared by a group of heads.
        """
        if use_attn_in and self.cfg.n_key_value_heads is not None:
            raise InputError(
                f"The {self.name} tower's heads share keys and values in groups, so they have no one input "
                "each. Use set_use_split_qkv_input(True)."
            )
        self._switch("use_attn_in", use_attn_in)

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Whether `hook_mlp_in` [batch, pos, d_model] is there: the stream that the MLP alone reads."""
        self._switch("use_hook_mlp_in", use_hook_mlp_in)

    def set_ungroup_grouped_query_attention(self, ungroup_grouped_query_attention: bool) -> None:
        """Of grouped heads TransformerLens can show each query's keys and values; here groups stay.

        Raises: InputError if it is asked of a tower whose heads are grouped.
        """
        if ungroup_grouped_query_attention and self.cfg.n_key_value_heads is not None:
            raise InputError(
                f"The {self.name} tower computes {self.cfg.n_key_value_heads} keys and values for "
                f"{self.cfg.n_heads} heads, and its sites show what it computes. W_K and W_V repeat them."
            )

    def check_names(self, names: Any) -> None:
        """Raises: MissingSiteError for a name that is no site; HostAssertionError before its switch is on."""
        for name in names_of(names):
            local = name.removeprefix(f"{self.name}.")
            flag = next((f for f, points in POINTS.items() if local.split(".", 2)[-1] in points), None)
            if flag is not None and local not in self.hook_dict:
                raise HostAssertionError(
                    f"{self.name}.{local} is there only if it is asked for: call set_{flag}(True) first."
                )
        self._root.check_names(names, self.name)

    def _switch(self, flag: str, on: bool) -> None:
        parts = self._mounted.parts.get("blocks", [])
        needed = "mlp.hook_post" if flag == "use_hook_mlp_in" else "attn.hook_z"
        if on and not any(needed in part for part in parts):
            raise InputError(f"The {self.name} tower has no {POINTS[flag][0]}: its blocks have no {needed}.")
        self.cfg.__dict__[flag] = bool(on)
        for layer, _ in enumerate(parts):
            for local in POINTS[flag]:
                self._hang_or_drop(layer, local, on)
        self._root.renamed()

    def _hang_or_drop(self, layer: int, local: str, on: bool) -> None:
        name = f"blocks.{layer}.{local}"
        if local == "hook_mlp_in":
            self._hang_mlp_in(name, layer, on)
        elif not on:
            point = self._derived.pop(name, None)
            if point is not None:
                point.remove_hooks("both", including_permanent=True)
                self._unhang(name)
        elif name not in self._derived and "attn.hook_z" in self._mounted.parts["blocks"][layer]:
            self._derived[name] = self._made(layer, local)
            self._hang(name, self._derived[name])

    def _hang_mlp_in(self, name: str, layer: int, on: bool) -> None:
        site = self._mlp_input(layer)
        if site is None:
            if on:
                raise InputError(
                    f"{self.name}.{name}: this MLP has no one input that the stream does not share."
                )
            return
        if on:
            self._hang(name, self._root.points.add(site))
        elif site.name in self._root.points.by_name:
            self._root.points.drop(site.name)
            self._unhang(name)

    def _made(self, layer: int, local: str) -> DerivedPoint:
        block: Any = self.blocks[layer]
        part: Part = block.attn

        def weights() -> dict[str, Any]:
            return part.weights

        if local == "attn.hook_result":
            out = self._point_of(layer, "hook_attn_out")
            return HeadResults(
                f"blocks.{layer}.{local}", self._point_of(layer, "attn.hook_z"), out, weights
            ).point
        if layer not in self._head_inputs:
            projected = {letter: self._point_of(layer, f"attn.hook_{letter}") for letter in "qkv"}
            self._head_inputs[layer] = HeadInputs(
                f"blocks.{layer}",
                self._point_of(layer, "hook_resid_pre"),
                projected,
                weights,
                self._norm_before(layer),
            )
        inputs = self._head_inputs[layer]
        return inputs.attn_in if local == "hook_attn_in" else inputs.inputs[local.split("_")[1]]

    def _point_of(self, layer: int, local: str) -> SitePoint:
        return self._root.points.by_name[self._root.sitemap.check(f"{self.name}.blocks.{layer}.{local}").name]

    def _norm_before(self, layer: int) -> Any:
        """The norm that an attention's input goes through, without its hooks."""
        if not self._is_pre_norm(layer):
            return lambda x: x
        location = self._mounted.parts["blocks"][layer]["ln1.hook_scale"]
        assert isinstance(location, Norm)

        def norm(x: Tensor) -> Tensor:
            return self._mounted.block(layer).get_submodule(location.path).forward(x)

        return norm

    def _is_pre_norm(self, layer: int) -> bool:
        order = list(self._mounted.parts["blocks"][layer])
        return "ln1.hook_scale" in order and order.index("ln1.hook_scale") < order.index("attn.hook_q")

    def _mlp_input(self, layer: int) -> Site | None:
        """Where the stream enters the MLP's own branch: its norm, or the MLP where the norm comes after."""
        parts = self._mounted.parts["blocks"][layer]
        full = f"{self.name}.blocks.{layer}."
        if self._is_pre_norm(layer):
            order = list(parts)
            norms = [n for n in ("ln2.hook_scale", "ln3.hook_scale") if n in parts]
            start = [n for n in norms if order.index(n) < order.index("mlp.hook_post")][-1:]
        else:
            start = [] if "mlp.hook_pre_linear" in parts else ["mlp.hook_pre"]
        location = parts.get(start[0]) if start else None
        if not isinstance(location, Norm | Output):
            return None
        like = self._root.sitemap.check(full + start[0])
        axes = self._root.sitemap.check(full + "hook_resid_pre").axes
        return replace(
            like, name=full + "hook_mlp_in", part="hook_mlp_in", location=Input(location.path), axes=axes
        )

    def _hang(self, local: str, point: nn.Module) -> None:
        raise NotImplementedError

    def _unhang(self, local: str) -> None:
        raise NotImplementedError
