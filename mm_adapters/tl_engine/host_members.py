"""What else TransformerLens' models have: members that a tower has too, and those that it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

from mm_adapters._errors import HostMemberError, InputError
from mm_adapters.sites.tower_view import TowerView

_PROCESSING = (
    "a tower leaves the model's weights as they are. tower.folded has them folded and centred as "
    "TransformerLens does; ActivationCache applies the norm's own gain"
)
_TRAINING = "a tower is a part of a trained model. Make the model with its own library, and wrap it"
_LOADING = "a tower is a part of a loaded model: mm_adapters.load(name).language, or mm_adapters.wrap(model)"
_DATA = "this package knows no model's training data. Load a dataset, and tokenise it with to_tokens"

# Public members of HookedTransformer and TransformerBridge that a tower does not have, and why.
REFUSED = {
    **dict.fromkeys(
        (
            "center_unembed", "center_writing_weights", "fill_missing_keys", "fold_layer_norm",
            "fold_value_biases", "load_and_process_state_dict", "process_weights_", "process_weights",
            "refactor_factored_attn_matrices",
        ),
        _PROCESSING,
    ),
    "init_weights": _TRAINING,
    **dict.fromkeys(
        ("from_pretrained", "from_pretrained_no_processing", "boot_transformers", "boot_native",
         "check_model_support", "list_supported_models"),
        _LOADING,
    ),
    **dict.fromkeys(("dataset", "sample_datapoint", "load_sample_training_dataset"), _DATA),
    "diffusion_generate": "no language tower here denoises its words",
    "clear_hook_registry": "a tower's points are the model's sites, and stay. reset_hooks takes hooks off",
    "hook_tokens": "no site of the model holds its tokens: change them before the call",
}  # fmt: skip


class HostMembers:
    """Members of HookedTransformer and of TransformerBridge that are short to say over a tower."""

    cfg: Any
    name: str
    blocks: nn.ModuleList
    hook_dict: dict[str, Any]
    _root: Any
    _mounted: TowerView
    forward: Callable[..., Any]
    tl_parameters: Callable[[], dict[str, Tensor]]

    def __getattr__(self, name: str) -> Any:
        if name in REFUSED:
            refuse(name)
        return super().__getattr__(name)  # type: ignore[misc]

    # -- HookedTransformer's

    def input_to_embed(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        past_kv_cache: Any = None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Int[Tensor, "batch pos"], None, Tensor | None]:
        """What enters the first block; the tokens; None; the attention mask, None if all is attended to."""
        tower: Any = self
        texts = [input] if isinstance(input, str) else input if isinstance(input, list) else None
        tokens: Any = input if texts is None else tower.to_tokens(texts, prepend_bos, padding_side)
        tokens = tokens if tokens.ndim == 2 else tokens[None]
        if attention_mask is None:
            attention_mask = tower.attended_tokens(tokens, texts, prepend_bos, padding_side)
        stream = self.forward(
            tokens, stop_at_layer=0, attention_mask=attention_mask, past_kv_cache=past_kv_cache
        )
        if past_kv_cache is not None:
            attention_mask = past_kv_cache.previous_attention_mask
        return stream, tokens, None, attention_mask

    def get_residual(
        self,
        embed: Float[Tensor, "batch pos d_model"],
        pos_offset: int,
        prepend_bos: bool | None = None,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        tokens: Int[Tensor, "batch pos"] | None = None,
        return_shortformer_pos_embed: bool = True,
        device: Any = None,
    ) -> Any:
        """Embeddings with their positions added, where the tower has a table of positions.

        Args:
            embed: The words' embeddings.
            pos_offset: How many positions came before.
            prepend_bos: Nothing: TransformerLens takes it and leaves it.
            attention_mask: 0 at padding on the left.
            tokens: Only their number counts; None: that of the embeddings.
            return_shortformer_pos_embed: Returns None beside the stream, as TransformerLens does.
            device: Where to compute; None: where the embeddings are.
        """
        tower: Any = self
        stream = embed if device is None else embed.to(device)
        if "pos_embed" in tower._modules:
            stream = stream + tower.pos_embed(
                embed[..., 0] if tokens is None else tokens, pos_offset, attention_mask
            )
        return (stream, None) if return_shortformer_pos_embed else stream

    def get_pos_offset(self, past_kv_cache: Any, batch_size: int) -> int:
        """How many positions a key-value cache holds; 0 of None. Raises: InputError if of other rows."""
        if past_kv_cache is None:
            return 0
        n_rows, n_held = past_kv_cache[0].past_keys.shape[:2]
        if n_rows != batch_size:
            raise InputError(f"past_kv_cache is of {n_rows} rows, not {batch_size}.")
        return n_held

    def move_model_modules_to_device(self) -> None:
        """Nothing: modules are where the model has put them."""

    def mps(self) -> Any:
        """Moves the tower to Apple's GPU."""
        tower: Any = self
        return tower.to("mps")

    # -- TransformerBridge's

    def enable_compatibility_mode(
        self, disable_warnings: bool = False, no_processing: bool = False, **processing: Any
    ) -> None:
        """Nothing with `no_processing`: a tower's names are HookedTransformer's.

        Raises: HostMemberError without it: the weights would be processed.
        """
        if not no_processing:
            raise HostMemberError(
                f"enable_compatibility_mode processes weights: {_PROCESSING}. With no_processing=True there "
                "is nothing to do."
            )

    @property
    def original_model(self) -> Any:
        """The wrapped model, untouched."""
        return self._root.wrapped

    @property
    def hook_aliases(self) -> dict[str, str]:
        """Empty: every point has one name."""
        return {}

    def get_params(self) -> dict[str, Tensor]:
        """Every weight under TransformerLens' name."""
        return self.tl_parameters()

    def tl_named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight with TransformerLens' name."""
        yield from self.tl_parameters().items()

    def get_hook_point(self, hook_name: str) -> Any:
        """The point of this name; None if there is none."""
        return self.hook_dict.get(hook_name)

    def blocks_with(self, submodule: str) -> list[tuple[int, Any]]:
        """The blocks that have a part of this name, each with its number."""
        return [(i, block) for i, block in enumerate(self.blocks) if submodule in block._modules]

    def block_submodules(self, layer_idx: int) -> list[str]:
        """The parts of a block."""
        from mm_adapters.tl_engine.parts import Part

        return [name for name, part in self.blocks[layer_idx].named_children() if isinstance(part, Part)]

    def block_hooks(self, layer_idx: int) -> list[str]:
        """The points of a block, from the block."""
        start = f"blocks.{layer_idx}."
        return sorted(name.removeprefix(start) for name in self.hook_dict if name.startswith(start))

    def layer_types(self) -> list[str]:
        """What each block is made of, such as "attn+mlp"."""
        kinds = [
            [n for n in self.block_submodules(i) if not n.startswith("ln")] for i, _ in enumerate(self.blocks)
        ]
        return ["+".join(kind) for kind in kinds]

    def stack_params_for(
        self, submodule: str, attr_path: str, reshape_fn: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[list[int], Tensor]:
        """A weight of the blocks that have a part: their numbers, and the weights [block, ...].

        Raises: InputError if none has it.
        """
        found = self.blocks_with(submodule)
        if not found:
            raise InputError(
                f"No block of the {self.name} tower has {submodule!r}: {set(self.layer_types())}."
            )
        weights: list[Tensor] = []
        for _, block in found:
            value: Any = block
            for step in attr_path.split("."):
                value = getattr(value, step)
            weights.append(value if reshape_fn is None else reshape_fn(value))
        return [i for i, _ in found], torch.stack(weights)

    def QK_for_attn_layers(self) -> tuple[list[int], FactoredMatrix]:
        """W_Q W_K^T of each head of each block with an attention."""
        layers, queries = self.stack_params_for("attn", "attn.W_Q")
        return layers, FactoredMatrix(queries, self.stack_params_for("attn", "attn.W_K")[1].mT)

    def OV_for_attn_layers(self) -> tuple[list[int], FactoredMatrix]:
        """W_V W_O of each head of each block with an attention."""
        layers, values = self.stack_params_for("attn", "attn.W_V")
        return layers, FactoredMatrix(values, self.stack_params_for("attn", "attn.W_O")[1])

    def composition_layer_indices(self) -> list[int]:
        """The blocks that have an attention."""
        return [i for i, _ in self.blocks_with("attn")]

    @property
    def attn_head_labels(self) -> list[str]:
        """A label for each head of those blocks."""
        return [f"L{i}H{j}" for i in self.composition_layer_indices() for j in range(self.cfg.n_heads)]

    def prepare_multimodal_inputs(self, text: Any, images: Any = None) -> dict[str, Any]:
        """Text and images as the model's own arguments; with `tower.given(...)` a tower runs on them."""
        return self._root.prepare(text=text, images=images)


def refuse(name: str) -> NoReturn:
    """Raises: HostMemberError with why a tower does not have a member of TransformerLens' models."""
    raise HostMemberError(f"A tower has no {name}: {REFUSED[name]}.")
