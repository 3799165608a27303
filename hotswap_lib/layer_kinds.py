"""Which LoRA layer classes a slot can hold, and what their tensors are.

A class that is not in `KINDS` is refused by name. Supporting another kind of layer means a row
here, and in the support table of this package's README, which a test compares with this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peft.tuners.lora import LoraLayer

from .layout import Padding


@dataclass(frozen=True, slots=True)
class Role:
    """One tensor of a LoRA layer.

    Attributes:
        container: the layer's attribute that holds it for each adapter.
        attribute: the parameter's name there; None where the container holds it itself.
        rank_dim: the dimension that is the rank; None where there is none.
    """

    container: str
    attribute: str | None
    rank_dim: int | None

    @property
    def suffix(self) -> str:
        """The end of its key in a PEFT checkpoint."""
        return self.container if self.attribute is None else f"{self.container}.{self.attribute}"


_MATRICES = (
    Role("lora_A", "weight", rank_dim=0),  # (rank, in), for convolutions (rank, in, *kernel)
    Role("lora_B", "weight", rank_dim=1),  # (out, rank), for convolutions (out, rank, 1, ...)
)
_EMBEDDING = (
    Role("lora_embedding_A", None, rank_dim=0),  # (rank, vocabulary)
    Role("lora_embedding_B", None, rank_dim=1),  # (hidden, rank)
)
LORA_BIAS = Role("lora_B", "bias", rank_dim=None)  # (out,)

# By name, because importing the quantized ones imports their libraries.
KINDS: Mapping[str, tuple[Role, ...]] = {
    "layer.Linear": _MATRICES,  # over torch.nn.Linear and over transformers' Conv1D
    "layer.Embedding": _EMBEDDING,
    "layer.Conv1d": _MATRICES,
    "layer.Conv2d": _MATRICES,
    "layer.Conv3d": _MATRICES,
    # quantized base layers; their adapters are ordinary matrices
    "bnb.Linear8bitLt": _MATRICES,
    "bnb.Linear4bit": _MATRICES,
    "torchao.TorchaoLoraLinear": _MATRICES,
    "gptq.GPTQLoraLinear": _MATRICES,
    "awq.AwqLoraLinear": _MATRICES,
    "aqlm.AqlmLoraLinear": _MATRICES,
    "eetq.EetqLoraLinear": _MATRICES,
    "hqq.HqqLoraLinear": _MATRICES,
    "inc.IncLoraLinear": _MATRICES,
}
_PACKAGE = "peft.tuners.lora."


def kind(layer: LoraLayer) -> str:
    """The layer's class as `KINDS` names it."""
    return f"{type(layer).__module__}.{type(layer).__qualname__}".removeprefix(_PACKAGE)


def roles(layer: LoraLayer, *, lora_bias: bool) -> tuple[Role, ...]:
    """The tensors of a layer of a known kind."""
    found = KINDS[kind(layer)]
    # embeddings have no lora_B module that could hold a bias
    return (*found, LORA_BIAS) if lora_bias and found is _MATRICES else found


def padding(layer: LoraLayer, role: Role, max_rank: int) -> Padding | None:
    """How ranks are padded in one tensor.

    A grouped convolution gives each of its groups an equal share of the ranks
    (peft.tuners.lora.layer._ConvNd: lora_B is grouped and lora_A is not), so each share has to be
    padded where it is.
    """
    if role.rank_dim is None:
        return None
    groups = getattr(layer.get_base_layer(), "groups", 1)
    if role.container == "lora_A":
        return Padding(dim=role.rank_dim, max_rank=max_rank, groups=groups)
    return Padding(dim=role.rank_dim, max_rank=max_rank, per_index=groups)
