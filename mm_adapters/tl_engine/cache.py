"""TransformerLens' ActivationCache for a model of several towers, and for one of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformer_lens import ActivationCache


class TowerCache(ActivationCache):
    """One tower's activations under TransformerLens' own names; the tower's prefix is allowed."""

    model: Any

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, str):
            key = key.removeprefix(f"{self.model.name}.")
        return super().__getitem__(key)

    def __contains__(self, key: str) -> bool:
        return key.removeprefix(f"{self.model.name}.") in self.cache_dict

    # TransformerLens stacks what each block has or adds. Each raises MissingSiteError where stages differ.
    def accumulated_resid(self, *args: Any, **kwargs: Any) -> Any:
        self.model._mounted.check_one_stream()
        return super().accumulated_resid(*args, **kwargs)

    def decompose_resid(self, *args: Any, **kwargs: Any) -> Any:
        self.model._mounted.check_one_stream()
        return super().decompose_resid(*args, **kwargs)

    def stack_activation(self, *args: Any, **kwargs: Any) -> Any:
        self.model._mounted.check_one_stream()
        return super().stack_activation(*args, **kwargs)

    def stack_head_results(self, *args: Any, **kwargs: Any) -> Any:
        self.model._mounted.check_one_stream()
        return super().stack_head_results(*args, **kwargs)

    def stack_neuron_results(self, *args: Any, **kwargs: Any) -> Any:
        self.model._mounted.check_one_stream()
        return super().stack_neuron_results(*args, **kwargs)

    def get_full_resid_decomposition(self, *args: Any, **kwargs: Any) -> Any:
        self.model._mounted.check_one_stream()
        return super().get_full_resid_decomposition(*args, **kwargs)


class ModelCache(ActivationCache):
    """Every tower's activations by full name; `cache.vision` (or any tower) is that tower's cache.

    Shorthand needs a tower: `cache.vision["pattern", 3]`. A model of one tower needs none.
    """

    model: Any

    def tower(self, name: str) -> TowerCache:
        """The cache of one tower, a view: it holds the same tensors."""
        prefix = f"{name}."
        of_tower = {k.removeprefix(prefix): v for k, v in self.cache_dict.items() if k.startswith(prefix)}
        return TowerCache(of_tower, self.model.tower(name), has_batch_dim=self.has_batch_dim)

    def __getattr__(self, name: str) -> TowerCache:
        if name != "model" and name in self.model.tower_names:
            return self.tower(name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")

    def __getitem__(self, key: Any) -> Tensor:
        if isinstance(key, str) and key in self.cache_dict:
            return self.cache_dict[key]
        names = self.model.tower_names
        if len(names) == 1:
            return self.tower(names[0])[key]
        raise KeyError(
            f"{key!r} is not in this cache. Names begin with a tower ({', '.join(names)}); "
            f"shorthand goes through one: cache.{names[0]}[{key!r}]."
        )

    def __contains__(self, key: str) -> bool:
        return key in self.cache_dict
