"""SAEs from disk: SAELens' folders, its checkpoints, and the layouts of public multimodal SAEs.

Each converter is a `PretrainedSaeDiskLoader` of SAELens: `SAE.load_from_disk(folder, converter=...)`.
Pickled files are not read. Facts: ViT-Prisma (arXiv 2504.19475), PatchSAE (2412.05276),
Discover-then-Name (2407.14499), sdxl-unbox (2410.22366), SAeUron (2501.18052).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE, __version__
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from torch import Tensor

from integrations.sae_lens._fields import check_fields, check_required
from mm_adapters import CheckpointError, InputError
from mm_adapters.store import load_tensors, read_document

State = dict[str, Tensor]
Converted = tuple[dict[str, Any], State]
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")


def load(
    folder: str | Path,
    *,
    format: str | None = None,
    site: str | None = None,
    device: str = "cpu",
    cls: type[SAE[Any]] | None = None,
) -> SAE[Any]:
    """The SAE in a folder, of whichever format it is; `site` says where it lives, if the files do not.

    A training checkpoint (whose architecture only trains) comes back as its training class. `cls`
    (SAE or TrainingSAE) insists on one of the two.

    Raises: CheckpointError if there is nothing to read, the format is unknown, or the class is wrong.
    """
    folder = Path(folder)
    format = format or _format(folder)
    if format == "saelens":
        sae = _saelens(folder, device, cls)
    else:
        if format not in CONVERTERS:
            raise CheckpointError(
                f"There is no format {format!r}: there is saelens, {', '.join(CONVERTERS)}."
            )
        if cls is not None and issubclass(cls, TrainingSAE):
            raise CheckpointError(f"{folder} is a finished SAE ({format}): it cannot be trained further.")
        CONVERTERS[format](folder)  # What is missing or damaged is said here, under our names.
        sae = SAE.load_from_disk(folder, device=device, converter=CONVERTERS[format])
    if site is not None:
        sae.cfg.metadata.hook_name = site
    return sae


def _saelens(folder: Path, device: str, cls: type[SAE[Any]] | None) -> SAE[Any]:
    settings = _config(folder)
    architecture = settings.get("architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{folder}/cfg.json: its architecture is {architecture!r}, and is a name.")
    trains_only = architecture in SAE_TRAINING_CLASS_REGISTRY and architecture not in SAE_CLASS_REGISTRY
    # A checkpoint of "standard" says so in both; only its training fields tell.
    trained = trains_only or "decoder_init_norm" in settings
    if cls is not None and issubclass(cls, TrainingSAE) != trained:
        what = "a training checkpoint" if trained else "a finished SAE"
        raise CheckpointError(
            f"{folder} is {what} ({architecture}), not a {cls.__name__}. Load it with load(folder); training "
            "saves the finished SAE in its folder 'sae'."
        )
    if architecture not in SAE_CLASS_REGISTRY and architecture not in SAE_TRAINING_CLASS_REGISTRY:
        raise CheckpointError(f"{folder} has the architecture {architecture!r}, which SAELens does not have.")
    registry = SAE_TRAINING_CLASS_REGISTRY if trained else SAE_CLASS_REGISTRY
    _check_saelens(folder, registry[architecture][1], settings)
    kind: Any = TrainingSAE if trained else SAE
    try:
        return kind.load_from_disk(folder, device=device)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:  # As SAELens says of weights that lack.
        raise CheckpointError(
            f"{folder} holds no {architecture} SAE that fits its cfg.json: {error}"
        ) from None


def _check_saelens(folder: Path, kind: type[Any], settings: dict[str, Any]) -> None:
    """Raises: CheckpointError for a configuration or weights that this kind of SAE cannot have."""
    values = {k: v for k, v in settings.items() if k in {f.name for f in fields(kind)} and k != "metadata"}
    try:
        check_fields(kind, values)
        check_required(kind, values)
        if any(f.name == "k" for f in fields(kind)) and "k" not in values:
            raise InputError("it does not say k, how many latents are active.")
        if "dtype" not in values:
            raise InputError("it does not say the dtype.")
    except InputError as error:
        raise CheckpointError(f"{folder / 'cfg.json'}: {error}") from None
    if not isinstance(settings.get("metadata", {}), dict):
        raise CheckpointError(f"{folder / 'cfg.json'}: metadata is an object.")
    weights = folder / "sae_weights.safetensors"
    state = _tensors(weights)
    d_in, d_sae = settings["d_in"], settings["d_sae"]
    d_out = settings.get("d_out", d_in)
    for name, shape in (("W_enc", (d_in, d_sae)), ("W_dec", (d_sae, d_out)), ("b_dec", (d_out,))):
        if kind.__name__.startswith(("Temporal", "MatchingPursuit")):
            break  # Which have no such three.
        if name not in state:
            raise CheckpointError(f"{weights} lacks {name}; it has {', '.join(sorted(state))}.")
        if tuple(state[name].shape) != shape:
            raise CheckpointError(
                f"{weights}: {name} is {list(state[name].shape)}, and cfg.json says {list(shape)}."
            )


def _tensors(file: Path) -> State:
    """The weights in a file. Raises: CheckpointError naming it, or a weight that is no finite fraction."""
    state, _ = load_tensors(file)
    for name, value in state.items():
        if not value.is_floating_point():
            raise CheckpointError(f"{file}: {name} is stored as {value.dtype}, whole numbers. Get it again.")
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{file}: {name} holds NaN or infinity. Get it again.")
    return state


def vit_prisma(path: str | Path, device: str = "cpu", cfg_overrides: Any = None) -> Converted:
    """ViT-Prisma: SAELens' names, from its version 2: W_enc, b_enc, W_dec, b_dec; config.json."""
    state, cfg = _read(Path(path))
    weights = {name: state[name] for name in _need(state, ("W_enc", "b_enc", "W_dec", "b_dec"), path)}
    k = cfg.get("k") if cfg.get("activation_fn_str") == "topk" or cfg.get("architecture") == "topk" else None
    more = cfg.get("activation_fn_kwargs")
    k = k or (more.get("k") if isinstance(more, dict) else None)
    hook = cfg.get("hook_point") or cfg.get("hook_name")
    norm = cfg.get("normalize_activations")
    normalise = norm if norm in ("layer_norm", "constant_norm_rescale") else "none"
    return _converted(
        weights,
        "topk" if k else "standard",
        device,
        cfg_overrides,
        k=k,
        tied=True,
        hook=_site(hook),
        normalize_activations=normalise,
        source="ViT-Prisma",
    )


def patch_sae(path: str | Path, device: str = "cpu", cfg_overrides: Any = None) -> Converted:
    """PatchSAE: a CLIP block's class token and patches; W_enc, b_enc, W_dec, b_dec, in `state_dict/`
    or plain; a ReLU after the decoder bias is taken off the input."""
    state, cfg = _read(Path(path))
    weights = {name: state[name] for name in _need(state, ("W_enc", "b_enc", "W_dec", "b_dec"), path)}
    layer = cfg.get("block_layer")
    if layer is not None and type(layer) is not int:
        raise CheckpointError(f"{path}: block_layer is {layer!r}, and is a number.")
    hook = None if layer is None else f"vision.blocks.{layer}.hook_resid_post"
    return _converted(weights, "standard", device, cfg_overrides, tied=True, hook=hook, source="PatchSAE")


def discover_then_name(path: str | Path, device: str = "cpu", cfg_overrides: Any = None) -> Converted:
    """Discover-then-Name, over CLIP's output: encoder.weight [n, latent, d], encoder.bias, decoder.weight
    [n, d, latent], pre_encoder_bias._bias_reference / tied bias [n, d], n = 1."""
    state, cfg = _read(Path(path))
    flat = {k: (v[0] if v.ndim > (2 if k.endswith("weight") else 1) else v) for k, v in state.items()}
    _need(flat, ("encoder.weight", "encoder.bias", "decoder.weight"), path)
    bias = flat.get("tied_bias", flat.get("pre_encoder_bias._bias_reference", flat.get("decoder.bias")))
    if flat["decoder.weight"].ndim != 2 or flat["encoder.weight"].ndim != 2:
        raise CheckpointError(f"{path}: encoder.weight and decoder.weight are matrices.")
    d_in = flat["decoder.weight"].shape[0]
    weights = {
        "W_enc": flat["encoder.weight"].T,
        "b_enc": flat["encoder.bias"],
        "W_dec": flat["decoder.weight"].T,
        "b_dec": torch.zeros(d_in) if bias is None else bias,
    }
    return _converted(
        weights,
        "standard",
        device,
        cfg_overrides,
        tied=True,
        hook=cfg.get("hook_name"),
        source="Discover-then-Name",
    )


def sdxl_unbox(path: str | Path, device: str = "cpu", cfg_overrides: Any = None) -> Converted:
    """sdxl-unbox: encoder.weight [latent, d], decoder.weight [d, latent], pre_bias, latent_bias; k.

    It sees the update of a block, out - in; `hook_name_minus` says so once the site is known.
    """
    state, cfg = _read(Path(path))
    _need(state, ("encoder.weight", "decoder.weight", "pre_bias", "latent_bias"), path)
    weights = {
        "W_enc": state["encoder.weight"].T,
        "b_enc": state["latent_bias"],
        "W_dec": state["decoder.weight"].T,
        "b_dec": state["pre_bias"],
    }
    k = cfg.get("k")
    if k is None:
        raise CheckpointError(f"{path}/config.json does not say k, how many latents are active.")
    return _converted(
        weights,
        "topk",
        device,
        cfg_overrides,
        k=k,
        tied=True,
        hook=cfg.get("hook_name"),
        hook_kind="update",
        source="sdxl-unbox",
    )


def saeuron(path: str | Path, device: str = "cpu", cfg_overrides: Any = None) -> Converted:
    """SAeUron, as EleutherAI's sparsify saves: encoder.weight [latent, d], encoder.bias, W_dec, b_dec; k."""
    state, cfg = _read(Path(path))
    _need(state, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), path)
    weights = {
        "W_enc": state["encoder.weight"].T,
        "b_enc": state["encoder.bias"],
        "W_dec": state["W_dec"],
        "b_dec": state["b_dec"],
    }
    # Its encoder's ReLU comes before the k largest are chosen, as SAELens' TopK does after.
    k = cfg.get("k")
    if k is None:
        raise CheckpointError(f"{path}/cfg.json does not say k, how many latents are active.")
    return _converted(
        weights,
        "topk",
        device,
        cfg_overrides,
        k=k,
        tied=True,
        hook=cfg.get("hook_name"),
        guidance_rows="cond",
        source="SAeUron",
    )


CONVERTERS: dict[str, Callable[..., Converted]] = {
    "vit_prisma": vit_prisma,
    "patch_sae": patch_sae,
    "discover_then_name": discover_then_name,
    "sdxl_unbox": sdxl_unbox,
    "saeuron": saeuron,
}


def _converted(
    state: State,
    architecture: str,
    device: str,
    overrides: Any,
    *,
    k: int | None = None,
    tied: bool,
    hook: str | None,
    source: str,
    normalize_activations: str = "none",
    **metadata: Any,
) -> Converted:
    if state["W_enc"].ndim != 2:
        raise CheckpointError(
            f"{source}: the encoder's weights are {list(state['W_enc'].shape)}, not a matrix."
        )
    d_in, d_sae = state["W_enc"].shape
    wanted = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape:
            raise CheckpointError(
                f"{source}: {name} is {list(state[name].shape)}, and its encoder says {list(shape)}."
            )
    if k is not None and (type(k) is not int or not 0 < k <= d_sae):
        raise CheckpointError(f"{source}: k is {k!r}, and there are {d_sae} latents.")
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "float32",
        "device": device,
        "apply_b_dec_to_input": tied,
        "normalize_activations": normalize_activations,
        "reshape_activations": "none",
        # Without a version SAELens takes the file for one of its old ones, and drops what it does not know.
        "metadata": {"sae_lens_version": __version__, "hook_name": hook, "source": source} | metadata,
    }
    if k is not None:
        cfg["k"] = k
    cfg |= overrides or {}
    return cfg, {name: v.float().contiguous().to(device) for name, v in state.items()}


def _read(folder: Path) -> tuple[State, dict[str, Any]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = [p.name for p in folder.iterdir() if p.suffix in _PICKLED] if folder.is_dir() else []
        how = (
            f"It has only {pickled[0]}, a pickle, which can run code as it is read. If you trust it, convert "
            "it once: safetensors.torch.save_file(torch.load(file)['state_dict'], new_file)."
            if pickled
            else "Is it the right folder?"
        )
        raise CheckpointError(f"{folder} has no safetensors file. {how}")
    if len(files) > 1:
        raise CheckpointError(f"{folder} has {len(files)} safetensors files; keep one SAE in a folder.")
    prefix = "state_dict."
    return {k.removeprefix(prefix): v for k, v in _tensors(files[0]).items()}, _config(folder)


def _config(folder: Path) -> dict[str, Any]:
    for name in ("cfg.json", "config.json"):
        if (folder / name).is_file():
            return read_document(folder / name, edited=True)
    return {}


def _format(folder: Path) -> str:
    """What the names of the weights say."""
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}.")
    cfg = _config(folder)
    if (folder / "sae_weights.safetensors").is_file() and "metadata" in cfg:
        return "saelens"
    if (folder / "sae_weights.safetensors").is_file() and not cfg:
        raise CheckpointError(f"{folder} has SAELens' weights and no cfg.json, which says what they are of.")
    state, cfg = _read(folder)
    names = set(state)
    if {"pre_bias", "latent_bias"} <= names:
        return "sdxl_unbox"
    if {"encoder.weight", "W_dec"} <= names:
        return "saeuron"
    if {"encoder.weight", "decoder.weight"} <= names:
        return "discover_then_name"
    if {"W_enc", "W_dec"} <= names:
        return "patch_sae" if "block_layer" in cfg else "vit_prisma"
    raise CheckpointError(
        f"{folder} holds {', '.join(sorted(names)[:6])}, which is no SAE known here "
        f"({', '.join(CONVERTERS)})."
    )


def _need(state: State, names: tuple[str, ...], path: Any) -> tuple[str, ...]:
    missing = [n for n in names if n not in state]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; it has {', '.join(sorted(state))}.")
    return names


def _site(hook: str | None) -> str | None:
    """ViT-Prisma's hooks are TransformerLens', of a vision tower alone.

    Raises: CheckpointError for a hook that is no name.
    """
    if hook is not None and not isinstance(hook, str):
        raise CheckpointError(f"The SAE's hook is {hook!r}, and is a name.")
    return None if hook is None else hook if hook.startswith("vision.") else f"vision.{hook}"
