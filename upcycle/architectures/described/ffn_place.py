"""Where stock classes keep an FFN, and in which form: plain data, checked by numbers in a contract test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from upcycle.architectures.module_paths import LayerPlace, ListedPaths, ModulePaths

Reads = Literal["text", "images", "sounds", "pairs", "speech", "images and text"]


@dataclass(frozen=True)
class FfnPlace:
    """Describes one FFN per layer, of the layers that have its ``up`` and ``gate``; all paths but the first are below a layer.

    Where the FFN is a module that maps ``x`` to its output, ``whole`` names it. Elsewhere a layer calls projection, activation and
    projection itself (and adds a residual or norms in between): then experts take the place of the first projection, ``up``, and
    activation and second projection do nothing any more.

    Attributes:
        layer: a layer's path below the base model, with ``{}`` for its number (in groups of layers, for each of both).
        up: the projection from d to F; where ``fused`` is set, the one to 2 F.
        down: the projection back.
        gate: the projection whose output goes through the activation, where that is not ``up``.
        fused: the order of the halves of ``up``, where it holds the gate as well.
        whole: see above.
        act: the activation, where there is no ``whole``.
        norm: the norm whose output the FFN reads, or several with ``|`` between them, of which the first that a layer has counts;
            None: it reads the residual stream.
        norm_add: what that norm adds to its stored weight.
        columns: matrices are stored ``[in, out]``, as transformers' ``Conv1D`` does.
        activation: the configuration's key with the activation's name, or that name after ``=``.
        config: the part of the configuration that has that key.
        when: a key of the configuration and its value, where another description says what layers have with another one.
        learned: the activation, where it has weights of its own.
        unless: a module that a layer of this description does not have, where another description says what it has with it.
        dropout: the configuration's key of a dropout at the end of ``whole``, which goes with it, or its probability after ``=``.
        closing: the norm behind the sum of the stream and the FFN's output; None: that sum is the layer's output. Where ``paths``
            are given, these say it.
    """

    layer: str
    up: str
    down: str
    gate: str | None = None
    fused: Literal["gate up", "up gate"] | None = None
    whole: str | None = None
    act: str | None = None
    norm: str | None = None
    norm_add: float = 0.0
    columns: bool = False
    activation: str = "hidden_act"
    config: str | None = None
    dropout: str | None = None
    learned: str | None = None
    when: tuple[str, object] | None = None
    unless: str | None = None
    closing: str | None = None

    @property
    def replaced(self) -> tuple[str, ...]:
        """The modules that go, below a layer: experts stand where the first was."""
        if self.whole is not None:
            return (self.whole,)
        assert self.act is not None
        return (self.up, self.act, self.down)

    @property
    def gated(self) -> bool:
        """Whether neurons have a gate."""
        return self.gate is not None or self.fused is not None


@dataclass(frozen=True)
class DescribedModel:
    """Describes an architecture of transformers by its FFNs alone.

    Attributes:
        name: its ``model_type``.
        title: its name in prose.
        ffns: its FFNs; several where it has several towers.
        paths: where its parts are, where all its layers are one list; None: they are where ``ffns`` say.
        refused: settings under which its FFNs are not what this says: key -> (the values that it may have, why).
        multipliers: what multiplies all that blocks add to the stream, or the logits: the name in ``DenseConfig`` -> the
            configuration's key.
        added: where FFNs read the stream itself, the norms of all that a layer adds to it, the attention's first.
        uncalibrated: why layers cannot be calibrated one by one.
        pauses: whether its layers are no single row that is run from one end to the other: they are calibrated in passes of the
            whole model that pause at each (:mod:`upcycle.models.paused_passes`).
        encoder: whether it attends in both directions, and has no logits of a next token.
        reads: what a model reads: ``pairs`` of texts, ``speech`` with a text.
        parts: its towers, and how the paths of their layers begin; empty: it has one.
        both_ways: the configuration's key that makes an encoder of a causal model.
        counts_from_padding: whether positions begin behind the number of the padding token.
        returns_tuple: whether a layer returns a tuple, whose first entry is the stream.
    """

    name: str
    title: str
    ffns: tuple[FfnPlace, ...]
    paths: ModulePaths | None = None
    refused: dict[str, tuple[tuple[object, ...], str]] = field(default_factory=dict)
    uncalibrated: str | None = None
    pauses: bool = False
    returns_tuple: bool = False
    encoder: bool = False
    reads: Reads = "text"
    parts: tuple[tuple[str, str], ...] = ()
    counts_from_padding: bool = False
    added: tuple[str, ...] = ()
    both_ways: str | None = None
    multipliers: dict[str, str] = field(default_factory=dict)

    @property
    def module_paths(self) -> ModulePaths:
        """Where its parts are."""
        if self.paths is not None:
            return self.paths
        places = (
            (f.layer, f.replaced[0], f.replaced[-1] if len(f.replaced) > 1 else None, f.closing) for f in self.ffns
        )
        return ListedPaths(places=tuple(LayerPlace(*place) for place in places))
