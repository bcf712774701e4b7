"""`mm-interp`: the commands that installed packages bring, and `sites`."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mm_adapters import _errors

GROUP = "mm_interp.commands"
MISTAKES = (
    _errors.AttentionUnreachableError,
    _errors.CheckpointError,
    _errors.EditNeverFiredError,
    _errors.InputError,
    _errors.MetaDeviceError,
    _errors.MissingSiteError,
    _errors.HostAssertionError,
    _errors.HostMemberError,
    _errors.ModelBusyError,
    _errors.ModelStateError,
    _errors.NoSuchClassError,
    _errors.ReadNeverFiredError,
    _errors.StateDictError,
    _errors.StoreError,
    _errors.UnfitCheckpointError,
    _errors.UnknownFamilyError,
    FileNotFoundError,
)
# What the machine says no to: no room, no right, too many files.
SYSTEM = (
    errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE,
    errno.ENFILE, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EIO,
)  # fmt: skip


class Friendly(TyperGroup):
    """A user's mistake is one line and exit code 2; anything else is ours, and shows where."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MISTAKES as error:
            typer.echo(f"mm-interp: {_one_line(error)}", err=True)
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno not in SYSTEM:
                raise
            where = f"{error.filename}: " if error.filename else ""
            typer.echo(f"mm-interp: {where}{error.strerror}.", err=True)
            raise typer.Exit(2) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n"))


def sites(
    model: Annotated[str, typer.Argument(help="A shipped model, a folder, or an id on the hub.")],
    pattern: Annotated[str, typer.Argument(help="Which names, as a glob: 'vision.blocks.0.*'.")] = "*",
    meta: Annotated[bool, typer.Option(help="Do not read the weights: faster, for large models.")] = False,
    every: Annotated[bool, typer.Option(help="A line for each layer, with its own name.")] = False,
) -> None:
    """Lists what can be read and edited in a model: names, layers, axes, and what is absent and why.

    A name with * is a pattern: it finds that part of all the layers named beside it.
    """
    from mm_adapters.loading import load
    from mm_adapters.sites.listing import listing

    loaded = load(model, device="meta" if meta else "cpu")
    table = loaded.sites(pattern)
    if not table:
        raise loaded.sitemap.missing(pattern)
    # In a file or a pipe each line is whole.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    typer.echo(listing(table, width, every=every))


def build(points: Iterable[EntryPoint] | None = None) -> typer.Typer:
    """The application, with the commands of each entry point (None: those installed)."""
    app = typer.Typer(
        cls=Friendly,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Look inside multimodal models with TransformerLens' hooks.",
    )
    app.callback()(lambda: None)
    app.command("sites")(sites)
    for point in entry_points(group=GROUP) if points is None else points:
        try:
            register = point.load()
        except (ImportError, AttributeError) as error:
            typer.echo(
                f"mm-interp: the commands of {point.name!r} ({point.value}) do not load: {error}", err=True
            )
            continue
        register(app)
    return app


def main(argv: Sequence[str] | None = None, points: Iterable[EntryPoint] | None = None) -> int:
    """The console command: its exit code. `argv` is what follows `mm-interp` (None: the process's own)."""
    try:
        build(points)(args=None if argv is None else list(argv))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
