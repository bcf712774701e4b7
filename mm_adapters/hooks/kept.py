"""What is kept of one module's tensor until a reader at a later module of the same forward uses it."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from torch import Tensor

V = TypeVar("V")


class Kept(Generic[V]):
    """One value, from where it passes until it is used."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: V | None = None

    def take(self) -> V:
        """The value, which is kept no longer."""
        value, self.value = self.value, None
        assert value is not None
        return value


class Consumer(Protocol):
    """What uses a kept value: a reader, or a module hook."""

    @property
    def live(self) -> bool: ...


class Keep(Generic[V]):
    """Called with a module's tensor, it fills or empties what is kept for a consumer, while that is live."""

    def __init__(self, consumer: Consumer, kept: Kept[V]) -> None:
        self.consumer = consumer
        self.kept = kept

    @property
    def live(self) -> bool:
        return self.consumer.live

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class KeepInput(Keep[Tensor]):
    """Keeps the tensor."""

    def __call__(self, x: Tensor) -> Tensor:
        self.kept.value = x
        return x


class KeepLength(Keep[int]):
    """Keeps how many positions the tensor has."""

    def __call__(self, x: Tensor) -> Tensor:
        self.kept.value = x.shape[1]
        return x


class CarryResidual(Keep[Tensor]):
    """Adds to the stream, where it comes out of a module, what an edit has moved it by on the way."""

    def __call__(self, x: Tensor) -> Tensor:
        moved, self.kept.value = self.kept.value, None
        return x if moved is None else x + moved
