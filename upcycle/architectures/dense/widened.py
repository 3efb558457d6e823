"""Describes a dense model that got wider and deeper in the same architecture: each tensor's first block is a smaller model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upcycle.architectures.dense.base import DenseConfig, Family
from upcycle.architectures.dense.narrowed import MadeTensor
from upcycle.errors import UsageError
from upcycle.files.formats.parsing import read_json
from upcycle.files.names import DECISION_FILE

if TYPE_CHECKING:
    import torch

# Families whose blocks read the stream through RMSNorms of its whole width, and whose function depends on that width in no other way.
WIDENED = ("llama", "mistral", "qwen2", "qwen3")
MASKS = "masks"  # the key of what is new in the file of a growth step


@dataclass(frozen=True)
class GrownTensor(MadeTensor):
    """The origin of a tensor of ``shape`` whose first block is the stored tensor ``name``, and whose other elements are new.

    Attributes:
        std: the standard deviation of new elements, if they are drawn.
        fill: the value of new elements, if they are equal; None: they are drawn.
        seed: of what is drawn, together with the tensor's name in the result.
    """

    std: float = 0.0
    fill: float | None = None
    seed: int = 0

    def grown(self, written: str, old: torch.Tensor) -> torch.Tensor:
        """Return the tensor that is written as ``written``, in the dtype of ``old``, the stored one."""
        import torch

        from upcycle.ffn.random_weights import stream

        new = torch.empty(self.shape, dtype=torch.float32)
        if self.fill is None:
            new.normal_(0.0, self.std, generator=stream(self.seed, written, "grown"))
        else:
            new.fill_(self.fill)
        new = new.to(old.dtype)
        first_block(new, old.shape).copy_(old)
        return new


def first_block(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return the block of ``shape`` at the beginning of every dimension of a tensor."""
    return tensor[tuple(slice(0, size) for size in shape)]


@dataclass(frozen=True)
class WideSizes:
    """The sizes that masked growth changes: hidden size, neurons of an FFN, attention heads, heads of keys and values."""

    hidden: int
    intermediate: int
    heads: int
    key_heads: int

    @classmethod
    def of(cls, dense: DenseConfig) -> WideSizes:
        """Return the sizes of a model."""
        return cls(dense.hidden_size, dense.intermediate_size, dense.num_attention_heads, dense.num_key_value_heads)


def widened_config(family: Family, dense: DenseConfig, raw: Mapping[str, Any], sizes: WideSizes) -> dict[str, Any]:
    """Return ``raw`` with other sizes; heads keep their dimensions."""
    own = {
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.key_heads,
    }
    config = {**raw, **{family.aliases.get(key, key): value for key, value in own.items()}}
    if sizes.hidden != dense.hidden_size or sizes.heads != dense.num_attention_heads:
        config["head_dim"] = dense.head_dim
    return config


@dataclass(frozen=True)
class NewParts:
    """What of a model is new.

    Attributes:
        hidden: the hidden size before; None: it did not grow, as below.
        intermediate: the neurons of an FFN before.
        heads: the attention heads before.
        layers: the numbers of the layers that are new.
    """

    hidden: int | None = None
    intermediate: int | None = None
    heads: int | None = None
    layers: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the file of the growth step."""
        return {**asdict(self), "layers": list(self.layers)}


def new_parts(folder: Path) -> NewParts | None:
    """What is new in the model of a folder, and masked until it was trained; None: nothing."""
    path = folder / DECISION_FILE
    found = read_json(path).get(MASKS) if path.is_file() else None
    return None if found is None else NewParts(**{**found, "layers": tuple(found["layers"])})


def refuse_masked(folder: Path, name: str) -> None:
    """Refuse a model that was grown, and has not been trained since: without its masks it is no model yet.

    Args:
        folder: the model's.
        name: its name in the message.

    Raises:
        UsageError: it is such a model.
    """
    if new_parts(folder) is not None:
        raise UsageError(
            f"{name} was grown by masked_growth, and its new parts are random: they are of use once training has unmasked them",
            hint=f"upcycle train masked_growth --model {name} --output RUN, and take RUN/model",
        )
