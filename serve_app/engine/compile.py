"""Compiles parts of a model: whole decoder layers, or the blocks inside them.

With opaque attention (`serve_app.engine.attention`), whole decoder layers: one graph for all.
Elsewhere the blocks inside repeated layers that do not depend on the layer's number: MLPs,
projections and norms, with the adapter's matrices. Attention itself is left out there: it passes
`layer_idx` to the cache, dynamo guards on that number, so it would compile attention once per layer
until it hits the recompile limit and silently runs eager.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn


def compile_layers(model: nn.Module) -> int:
    """Compiles the repeated layers of `model` in place, for any sizes. Returns how many."""
    return _compile(_repeated(model))


def compile_regions(model: nn.Module) -> int:
    """Compiles every region of `model` in place, for any number of tokens. Returns how many."""
    return _compile(find_regions(model))


def find_regions(model: nn.Module) -> Iterator[nn.Module]:
    """The largest blocks inside repeated layers that do not depend on the layer's number."""
    for layer in _repeated(model):
        yield from _position_free(layer)


def _compile(modules: Iterable[nn.Module]) -> int:
    found = list(modules)
    for module in found:
        module.compile(dynamic=True)
    return len(found)


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost repeated layers."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _repeated(child)


def _position_free(module: nn.Module) -> Iterator[nn.Module]:
    if not any(hasattr(part, "layer_idx") for part in module.modules()):
        if not isinstance(module, nn.ModuleList):
            yield module
        return
    for child in module.children():
        yield from _position_free(child)
