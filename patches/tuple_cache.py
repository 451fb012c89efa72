"""CrypTen's offline phase fails on convolutions and runs dry with an IndexError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .patch import Patch, replace, together


def _key(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """A request as a hashable value that torch.save can write and torch.load can read.

    Two spellings of a request must not share a key by accident: a list becomes a tuple,
    nothing else changes.
    """
    return (
        name,
        _frozen(args),
        tuple(sorted((k, _frozen(v)) for k, v in kwargs.items())),
    )


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    return value


def _lookup(self: Any, name: str) -> Any:
    """Attribute access of a provider: trace requests, answer from the cache or compute.

    A cached tuple is handed out once; when there is none left the provider makes one.
    """
    compute = object.__getattribute__(self, name)
    if name not in type(self).TRACEABLE_FUNCTIONS:
        return compute
    if self.tracing:

        def traced(*args: Any, **kwargs: Any) -> Any:
            self.request_cache.append((name, args, kwargs))
            return compute(*args, **kwargs)

        return traced
    if not self.tuple_cache:
        return compute

    def cached(*args: Any, **kwargs: Any) -> Any:
        ready = self.tuple_cache.get(_key(name, args, kwargs))
        return ready.pop() if ready else compute(*args, **kwargs)

    return cached


def _fill_cache(self: Any) -> None:
    """Compute one tuple for each traced request."""
    for name, args, kwargs in self.request_cache:
        made = object.__getattribute__(self, name)(*args, **kwargs)
        self.tuple_cache.setdefault(_key(name, args, kwargs), []).append(made)


def _trace_once(self: Any) -> None:
    """Trace if nothing was traced yet, else stop tracing."""
    self.trace(tracing=not self.request_cache)


def _probe() -> bool:
    from crypten.mpc.provider.provider import TupleProvider

    class Sample(TupleProvider):
        def square(self, size: object, device: object = None) -> object:
            return size

    sample = Sample()
    sample.request_cache = [("square", ([1],), {})]
    try:
        sample.fill_cache()
    except TypeError:
        return True
    return False


def _install() -> Callable[[], None]:
    from crypten.mpc.provider.provider import TupleProvider

    return together(
        replace(TupleProvider, "__getattribute__", _lookup),
        replace(TupleProvider, "fill_cache", _fill_cache),
        replace(TupleProvider, "trace_once", _trace_once),
    )


PATCH = Patch(
    name="tuple_cache",
    broke="crypten.fill_cache: unhashable type 'list' for a converted convolution; an "
    "exhausted cache ends in an IndexError; crypten.trace_once always fails",
    seen_on="crypten 0.4.1, any torch",
    delete_when="CrypTen's provider caches requests that hold lists",
    probe=_probe,
    install=_install,
)
