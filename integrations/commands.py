"""`mm-interp sae train`: an SAE on any site of any model that can be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mm_adapters import InputError, load
from mm_adapters.inputs.images import image_files, readable_files
from mm_adapters.store import read_text

_TRAINER = ("total_training_samples", "train_batch_size_samples")


def register(app: typer.Typer) -> None:
    """Adds this package's commands to `mm-interp`."""
    sae = typer.Typer(no_args_is_help=True, help="Sparse autoencoders, with SAELens.")
    sae.callback()(lambda: None)
    sae.command("train")(train)
    app.add_typer(sae, name="sae")


def train(
    site: Annotated[
        str, typer.Option(help="Where: mm-interp sites MODEL lists them. 'A -> B': a transcoder.")
    ],
    config: Annotated[
        Path, typer.Option(help="YAML or JSON: architecture and SAELens' fields; trainer: {...}.")
    ],
    out: Annotated[Path, typer.Option(help="Checkpoints, metrics and the finished SAE go here.")] = Path(
        "sae"
    ),
    model: Annotated[str, typer.Option(help="A shipped model, a folder, or an id on the hub.")] = "tiny-clip",
    images: Annotated[Path | None, typer.Option(help="A folder of images.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file, a prompt a line.")] = None,
    tokens: Annotated[str, typer.Option(help="class, patch, image, word, pad, ... or all.")] = "all",
    steps: Annotated[str | None, typer.Option(help="Of a sampling loop: '3' or '0-9'.")] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="List pictures that cannot be read, and go on.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; the first GPU if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of rows.")] = 0,
) -> None:
    """Collects activations and trains an SAE on them; run again after a stop, it goes on."""
    settings = read_config(config)
    if (images is None) == (prompts is None):
        raise InputError("Pass --images FOLDER or --prompts FILE, one of the two.")
    step_numbers = _steps(steps)
    data: Any = None
    if prompts is not None:
        if not prompts.is_file():
            raise FileNotFoundError(f"There is no file {prompts}.")
        data = [line.strip() for line in read_text(prompts).splitlines() if line.strip()]
        if not data:
            raise InputError(f"{prompts} holds no prompt: give one a line.")
    check_folder(out)
    from integrations import sae_lens as mm_sae

    cfg, trainer = parse_config(settings)
    if images is not None:
        found = image_files(images, verify=not skip_unreadable)
        data, skipped = readable_files(found, skip_unreadable=skip_unreadable)
        for path, why in skipped:
            typer.echo(f"skipped {path}: {why}")
    sae = mm_sae.train(
        load(model, device=device),
        site,
        cfg,
        data=data,
        tokens=tokens,
        steps=step_numbers,
        trainer=trainer,
        folder=out,
        seed=seed,
    )
    meta = sae.cfg.metadata
    typer.echo(f"{meta.hook_name}: {sae.cfg.d_sae} latents, L0 {meta.l0:.1f}, {meta.num_dead_features} dead")
    typer.echo(f"wrote {out / 'sae'}")


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file (JSON is YAML). Raises: InputError if it does not hold one."""
    import yaml

    if not path.is_file():
        raise InputError(f"There is no config {path}.")
    try:
        settings = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # A date of month 13 is a ValueError.
        raise InputError(f"{path} is not valid YAML: {error}.") from None
    if not isinstance(settings, dict) or "architecture" not in settings:
        raise InputError(f"{path} needs a line 'architecture: batchtopk' (or another of SAELens').")
    return settings


def parse_config(settings: dict[str, Any]) -> tuple[Any, Any]:
    """SAELens' configs of a mapping: the SAE's fields, and the trainer's under `trainer`.

    Raises: InputError for an unknown architecture or field, listing those there are.
    """
    from sae_lens.config import SAETrainerConfig
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    from integrations import sae_lens as _  # noqa: F401  Registers the transcoder.
    from integrations.sae_lens._fields import check_fields, check_required

    settings = dict(settings)
    architecture, trainer = settings.pop("architecture"), settings.pop("trainer", None)
    if not isinstance(architecture, str) or architecture not in SAE_TRAINING_CLASS_REGISTRY:
        known = ", ".join(sorted(SAE_TRAINING_CLASS_REGISTRY))
        raise InputError(f"There is no architecture {architecture!r} to train; there is {known}.")
    if trainer is not None and not isinstance(trainer, dict):
        raise InputError(f"trainer: holds fields and values, not {trainer!r}.")
    cls = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    for kind, values in ((cls, settings), (SAETrainerConfig, trainer or {})):
        texts = [k for k in values if not isinstance(k, str)]
        if texts:
            raise InputError(f"A field's name is a text, not {texts[0]!r}.")
        check_fields(kind, values)
    check_required(cls, settings)
    if trainer is not None:
        missing = [k for k in _TRAINER if k not in trainer]
        if missing:
            raise InputError(f"trainer: needs {', '.join(missing)}.")
    return cls(**settings), None if trainer is None else SAETrainerConfig(**trainer)


def check_folder(out: Path) -> None:
    """Raises: InputError if a folder of results would take the place of a file."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; give a folder.")


def _steps(text: str | None) -> list[int] | None:
    if text is None:
        return None
    first, _, last = text.partition("-")
    if not first.isdigit() or (last and not last.isdigit()):
        raise InputError(f"--steps {text}: a number, or a range like 0-9.")
    return list(range(int(first), int(last or first) + 1))
