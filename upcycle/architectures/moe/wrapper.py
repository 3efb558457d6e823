"""upcycle_moe: the dense model's own stock class, whose FFNs are experts. It holds any dense model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from upcycle.architectures.dense.base import DenseConfig, Family, Feature
from upcycle.architectures.moe.base import ExpertLayout, OutputTensor, Target
from upcycle.ffn.moe_shape import MoeShape, Part, PartKind


class UpcycleMoe(Target):
    """Keeps every tensor outside the FFNs under its own name. What is written loads after ``import upcycle.models``.

    Args:
        family: the dense architecture; without one, the target can only be asked what it holds.
    """

    name, title, architecture = "upcycle_moe", "Any stock class, with experts", "UpcycleMoe"
    holds = frozenset(Feature)
    router_semantics = (
        "softmax over all experts, top-k, and the chosen weights divided by their sum unless told otherwise"
    )
    holds_unnormalized = True
    holds_rules = True
    keeps_names = True
    router, shared = "router", None

    def __init__(self, family: Family | None = None) -> None:
        self._family = family
        if family is not None:
            self.module_paths = family.module_paths

    def of(self, family: Family) -> Target:
        """Return the target for models of one family."""
        return UpcycleMoe(family)

    def remarks(self, dense: DenseConfig) -> list[str]:
        """Return how it is loaded."""
        return [f"{self.name} is upcycle's own architecture: transformers loads it after `import upcycle.models`"]

    def written(self, dense: DenseConfig, name: str) -> str:
        """Return the name under which a tensor is written: that of the source's files, or one with the prefix that they have."""
        assert self._family is not None
        return self._family.written(dense, name)

    def stored(self, dense: DenseConfig) -> DenseConfig:
        """Return the same configuration: the architecture holds all of it."""
        return dense

    def config(self, dense: DenseConfig, shape: MoeShape) -> dict[str, Any]:
        """Return ``base_model_type`` and ``replaced_ffns``, and the dense model's keys."""
        from upcycle.models.own.configuration import wrapped_json
        from upcycle.models.own.replaced_ffn import ReplacedFfn
        from upcycle.models.own.routing.top_k import TopKRule

        assert self._family is not None
        family, alike = self._family, dict[tuple[Any, ...], list[int]]()
        for layer in shape.moe_layers:
            own = shape.at(layer)
            sizes = dense.at(layer)
            kind = (family.ffn_dropout(layer), sizes.hidden_size, sizes.output_size, own.expert_size, own.form)
            alike.setdefault(kind, []).append(layer)
        rule: Any = shape.rule or TopKRule(shape.top_k, normalized=shape.normalized)
        replaced = [
            ReplacedFfn(
                paths=tuple(family.replaced_modules(layer) for layer in layers),
                hidden_size=hidden_size,
                activation=form.activation,
                gated=form.gated,
                biases=block_biases(replace(shape, form=form)),
                widths=(size,) * shape.experts,
                shared_width=shape.shared * size,
                router_bias=shape.router.bias is not None,
                rule=rule,
                dropout=dropout,
                router=shape.router,
                output_size=output_size,
            )
            for (dropout, hidden_size, output_size, size, form), layers in alike.items()
        ]
        return wrapped_json(family.rewritten(dense.raw), replaced)

    def full_config(self, dense: DenseConfig, shape: MoeShape, dtype: str) -> dict[str, Any]:
        """Return the dense model's ``config.json`` with what is replaced, the class, and the dtype that is written."""
        from upcycle.architectures.clean_settings import clean_config
        from upcycle.architectures.stock import build_config
        from upcycle.architectures.stock_auto import class_name

        config: Mapping[str, Any] = clean_config(self.config(dense, shape))
        kept = {key: value for key, value in config.items() if key != "torch_dtype"}
        return {
            **kept,
            "architectures": [f"{self.architecture}{class_name(build_config(dense.raw, 'config.json'))}"],
            "dtype": dtype,
        }

    def moe_tensors(self, dense: DenseConfig, shape: MoeShape, layer: int, layout: ExpertLayout) -> list[OutputTensor]:
        """Return the router's tensors, the packed experts, and the shared expert's projections; there is one layout only."""
        assert self._family is not None
        return block_tensors(self._family.module_paths.block_of(layer), dense.hidden_size, dense.ffn_output, shape)


def block_tensors(prefix: str, d: int, out: int, shape: MoeShape) -> list[OutputTensor]:
    """Return the tensors of one block: the router's, the packed experts, and the shared expert's projections.

    Args:
        prefix: the module's path.
        d: the length of its inputs.
        out: the length of its outputs.
        shape: its numbers.
    """
    form, m, s = shape.form, shape.expert_size, shape.shared * shape.expert_size
    everyone, rows = range(shape.experts), 2 if form.gated else 1
    up: PartKind = "gate_up" if form.gated else "up"
    up_bias: PartKind = "gate_up_bias" if form.gated else "up_bias"

    def each(kind: PartKind) -> tuple[Part, ...]:
        return tuple(Part(kind, e) for e in everyone)

    router, own = shape.router, block_biases(shape)
    tensors = [
        OutputTensor(f"{prefix}.router.weight", (shape.experts, router.width or d), (Part("router"),)),
        OutputTensor(f"{prefix}.experts.{up}", (rows * m * shape.experts, d), each(up)),
        OutputTensor(f"{prefix}.experts.down", (m * shape.experts, out), each("down_rows")),
    ]
    if not router.linear:
        tensors.append(OutputTensor(f"{prefix}.router.hidden.weight", (router.width, d), (Part("router_hidden"),)))
    if router.bias is not None:
        filled = Part("filled", factor=router.bias, size=shape.experts)
        tensors.append(OutputTensor(f"{prefix}.router.bias", (shape.experts,), (filled,)))
    if getattr(shape.rule, "predicts_choice", False):  # nothing is learnt of it yet
        for name, size in (("weight", (shape.experts, d)), ("bias", (shape.experts,))):
            zeros = Part("filled", factor=0.0, size=math.prod(size))
            tensors.append(OutputTensor(f"{prefix}.router.choice.{name}", size, (zeros,)))
    if "output" in own:
        tensors.append(OutputTensor(f"{prefix}.output_bias", (out,), (Part("output_bias"),)))
    if form.biases & {"gate", "up"}:
        tensors.append(OutputTensor(f"{prefix}.experts.up_bias", (rows * m * shape.experts,), each(up_bias)))
    if "down" in own:
        tensors.append(OutputTensor(f"{prefix}.experts.down_bias", (shape.experts, out), each("down_bias")))
    if not s:
        return tensors
    sizes = {"gate": (s, d), "up": (s, d), "down": (out, s)}
    kinds: dict[str, PartKind] = {"gate": "shared_gate", "up": "shared_up", "down": "shared_down"}
    biases: dict[str, PartKind] = {"gate": "shared_gate_bias", "up": "shared_up_bias", "down": "shared_down_bias"}
    for matrix in form.matrices:
        name = f"{prefix}.shared_{matrix}"
        tensors.append(OutputTensor(f"{name}.weight", sizes[matrix], (Part(kinds[matrix]),)))
        if matrix in own:
            tensors.append(OutputTensor(f"{name}.bias", sizes[matrix][:1], (Part(biases[matrix]),)))
    return tensors


def block_biases(shape: MoeShape) -> frozenset[Any]:
    """Return the biases that a block has.

    A down bias is every expert's own where weights sum to 1, and is added once; by another rule it is the block's, not an expert's.
    """
    rule: Any = shape.rule
    if "down" not in shape.form.biases or rule is None or rule.sums_to_one(shape.experts):
        return frozenset(shape.form.biases)
    return frozenset(shape.form.biases - {"down"} | {"output"})
