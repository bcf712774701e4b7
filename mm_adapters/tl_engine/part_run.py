"""A tower run from one layer on, or up to one: `start_at_layer` and `stop_at_layer`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mm_adapters._errors import InputError
from mm_adapters.sites.tower_view import TowerView
from mm_adapters.tl_engine.hook_point import SitePoint


class Stopped(Exception):
    """A run that has come to where it was to stop, with the stream there."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__()
        self.stream = stream


def layer_number(mounted: TowerView, layer: Any, option: str) -> int:
    """A layer counted from the start, as a slice of the blocks counts it; up to their number.

    Raises: InputError if it is no number, or the tower has not one stream through one stack of blocks.
    """
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise InputError(f"{option}={layer!r}: it is the number of a layer.")
    mounted.check_one_stream()
    if set(mounted.stacks) != {"blocks"}:
        stacks = ", ".join(mounted.stacks) or "none"
        raise InputError(
            f"The {mounted.name} tower takes no {option}: its stacks are {stacks}, not blocks alone."
        )
    n = mounted.n_layers()
    return min(max(layer + n if layer < 0 else layer, 0), n)


@contextmanager
def stopping(point_of: Callable[[str], SitePoint], layer: int) -> Iterator[list[Tensor]]:
    """The run inside ends before `layer`; the list has the stream then, as its hooks have left it."""
    streams: list[Tensor] = []

    def stop(x: Tensor) -> Tensor:
        streams.append(x)
        raise Stopped(x)

    with ExitStack() as stack:
        if layer == 0:
            stack.enter_context(point_of("blocks.0.hook_resid_pre").changed(first=stop))
        else:
            stack.enter_context(point_of(f"blocks.{layer - 1}.hook_resid_post").changed(last=stop))
        try:
            yield streams
        except Stopped as stopped:
            if stopped.stream is not streams[-1]:
                raise


@contextmanager
def starting(
    mounted: TowerView,
    points: dict[str, Any],
    layer: int,
    stream: Float[Tensor, "batch pos d_model"],
) -> Iterator[None]:
    """The run inside goes through no block before `layer`, and `stream` enters that layer.

    Nothing before it has hooks. The first block is run, without hooks, to learn in which form it returns
    the stream; what it returns is replaced.
    """
    with ExitStack() as stack:
        for point in points.values():
            site = point.site
            if (
                site is not None
                and site.tower == mounted.name
                and point.live
                and _is_before(mounted, site, layer)
            ):
                stack.enter_context(point.set_aside())
        if layer == 0:
            first = points[f"{mounted.name}.blocks.0.hook_resid_pre"]
            stack.enter_context(first.changed(first=lambda x: _like(x, stream)))
        else:
            blocks = [mounted.block(i) for i in range(layer)]
            stack.enter_context(_skipped(blocks, stream))
        yield


def _is_before(mounted: TowerView, site: Any, layer: int) -> bool:
    if site.stack is None:
        return site.part in mounted.before
    return site.stack == "blocks" and site.layer < layer


@contextmanager
def _skipped(blocks: list[nn.Module], stream: Tensor) -> Iterator[None]:
    before = [block.__dict__.get("forward") for block in blocks]
    first: Callable[..., Any] = before[0] or type(blocks[0]).forward.__get__(blocks[0])
    form: list[Any] = []

    def run_first(*args: Any, **kwargs: Any) -> Any:
        form[:] = [first(*args, **kwargs)]
        return _with_stream(form[0], stream)

    def pass_over(*args: Any, **kwargs: Any) -> Any:
        return _with_stream(form[0], stream)

    for i, block in enumerate(blocks):
        block.__dict__["forward"] = pass_over if i else run_first
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.__dict__["forward"]
            if forward is not None:
                block.__dict__["forward"] = forward


def _with_stream(output: Any, stream: Tensor) -> Any:
    """A block's output with another stream in its place."""
    if isinstance(output, Tensor):
        return _like(output, stream)
    at = next(i for i, value in enumerate(output) if isinstance(value, Tensor))
    return (*output[:at], _like(output[at], stream), *output[at + 1 :])


def _like(x: Tensor, stream: Tensor) -> Tensor:
    if x.shape != stream.shape:
        raise InputError(
            f"start_at_layer was given a stream of {tuple(stream.shape)}; here it is {tuple(x.shape)}, "
            "[batch, pos, d_model]."
        )
    return stream.to(x.dtype)
