"""What stands inside the wrappers that other libraries put around a module: compiled, adapted, spread."""

from __future__ import annotations

from typing import Any

from mm_adapters._errors import ModelStateError
from mm_adapters.records.registry import key_of

# Each computes what the module inside computes; the name is the attribute that holds it.
_INSIDE = {
    "torch:OptimizedModule": "_orig_mod",
    "torch:DataParallel": "module",
    "torch:DistributedDataParallel": "module",
    "peft:PeftModel": "base_model",
    "peft:PeftMixedModel": "base_model",
    "peft:BaseTuner": "model",
}


def inside(model: Any) -> Any:
    """The module or pipeline itself, out of torch.compile, DataParallel and peft's wrappers.

    Raises: ModelStateError for a wrapper whose own forward adds something (a learned prompt).
    """
    while True:
        attribute = next((a for c in type(model).__mro__ if (a := _INSIDE.get(key_of(c)))), None)
        if attribute is None:
            return model
        config: Any = getattr(model, "active_peft_config", None) if attribute == "base_model" else None
        if getattr(config, "is_prompt_learning", False):
            raise ModelStateError(
                f"{type(model).__name__} puts learned positions ({config.peft_type}) before the model's own, "
                "so no site is where its name says. Use an adapter that changes weights (LoRA), or give the "
                "model inside: model.get_base_model()."
            )
        model = getattr(model, attribute)
