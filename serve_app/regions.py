"""Which parts of the model are compiled.

Compiled are the blocks inside the repeated layers that do not know which layer they are: MLPs,
projections, norms; the adapter's matrices are in them. Attention itself is left out: it hands
`layer_idx` to the paged cache, dynamo guards on that number, and so would compile it once per layer
until it hits the recompile limit and silently runs eager. Blocks of the same kind share one graph,
so 30 layers compile as fast as one.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def compile_regions(model: nn.Module) -> int:
    """Compile every region of `model` in place, for any number of tokens. Returns how many."""
    regions = list(find_regions(model))
    for region in regions:
        region.compile(dynamic=True)
    return len(regions)


def find_regions(model: nn.Module) -> Iterator[nn.Module]:
    """The largest blocks inside repeated layers that do not depend on the layer's number."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                yield from _position_free(layer)


def _position_free(module: nn.Module) -> Iterator[nn.Module]:
    if not any(hasattr(part, "layer_idx") for part in module.modules()):
        if not isinstance(module, nn.ModuleList):
            yield module
        return
    for child in module.children():
        yield from _position_free(child)
