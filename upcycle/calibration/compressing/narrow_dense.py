"""Makes the layers of a dense model narrower, one after another, and fits each to what the dense model's stream lacks.

Two streams run side by side: the dense model's, and that of the layers narrowed so far, on which everything is decided. Of every
layer, first the heads are cut and the output projection is fitted, then the neurons and down. With e(x) what is missing of the dense
stream behind the attention (or the layer), and a(x) what the projection reads, the update D minimises
``sum_t ||e(x_t) - D a(x_t)||^2 + strength * ||D||^2``. Where a norm follows the FFN, the stream is no linear function of D, and e is
what is missing of the FFN's own output.

N windows of W tokens, F neurons, D dimensions per head, d the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.architectures.dense.narrowed import KeptPairs, NarrowSizes, ffn_parts, head_parts, pair_rows
from upcycle.architectures.module_paths import module_paths_of
from upcycle.architectures.stock import build_config, empty_model
from upcycle.calibration.compressing.made_parts import held_out_tokens
from upcycle.calibration.compressing.moe_walk import MoeWalk
from upcycle.calibration.compressing.refit_cut import MOST_JOINT
from upcycle.calibration.compressing.refit_dense import module_inputs, module_outputs
from upcycle.errors import CheckpointError
from upcycle.ffn.refit import REFIT_STRENGTHS
from upcycle.ffn.ridge_sums import RidgeSums
from upcycle.files.atomic_files import write_whole
from upcycle.files.output.workspace import LAYER_BLUEPRINTS
from upcycle.methods.compressing.inside.heads import pair_scores, value_directions
from upcycle.methods.compressing.leverage import nystrom_down
from upcycle.models.stock_layers import compute_buffers, compute_layer_buffers, layers_of
from upcycle.progress import Progress

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import DenseCheckpoint


ChooseNeurons = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Returns ascending int64 ``[K]`` for the products of activations ``[F, F]``, the down projection ``[d, F]``, and K."""


def layer_tensors(folder: Path, layer: int) -> Path:
    """Return the file with the tensors of a layer that are not the dense model's, by their stored names."""
    return folder / LAYER_BLUEPRINTS / f"narrow.{layer:05d}.safetensors"


def choose_pairs(
    checkpoint: DenseCheckpoint, head: int, dtype: str, windows: torch.Tensor, progress: Progress
) -> KeptPairs:
    """Choose the pairs of dimensions that all heads keep, in one pass of the dense model over the text.

    Args:
        checkpoint: the dense model.
        head: the dimensions to keep.
        dtype: the dtype that the result is written in, as a recipe means it.
        windows: the text, token ids ``[N, W]``.
        progress: where to report.
    """
    config, family = checkpoint.config, checkpoint.family
    walk = MoeWalk(layers_of(checkpoint, dtype), windows.shape[1])
    scores = torch.zeros(config.head_dim // 2, dtype=torch.float64)
    with progress.phase("choosing dimensions", len(walk.layers)):
        states = torch.cat([walk.embed(windows[batch]) for batch in walk.batches(len(windows))])
        for index in range(len(walk.layers)):
            names = head_parts(family, config, index)
            sums = {part: torch.zeros((), dtype=torch.float64) for part in ("q", "k")}
            with walk.loaded(index):
                modules = [_module(walk, index, names[part]) for part in sums]
                for batch in walk.batches(len(windows)):
                    with module_outputs(modules[0]) as queries, module_outputs(modules[1]) as keys:
                        states[batch] = walk.run(index, states[batch])
                    for part, made in (("q", queries), ("k", keys)):
                        sums[part] = sums[part] + made[0].double().square().sum(0).view(-1, config.head_dim)
            scores += pair_scores(sums["q"], sums["k"])
            progress.advance()
    best = torch.sort(scores, descending=True, stable=True).indices[: head // 2].sort().values
    rotary: Any = module_paths_of(walk.model.config).body_in(walk.model).rotary_emb
    periods = (1.0 / rotary.inv_freq.float())[best]
    return KeptPairs(tuple(best.tolist()), tuple(periods.tolist()), float(rotary.attention_scaling))


def narrow_layers(
    checkpoint: DenseCheckpoint,
    config: Mapping[str, Any],
    sizes: NarrowSizes,
    pairs: tuple[int, ...],
    choose: ChooseNeurons,
    ridge: float,
    refits: bool,
    dtype: str,
    windows: torch.Tensor,
    folder: Path,
    progress: Progress,
) -> dict[int, dict[str, Any]]:
    """Narrow every layer, and write what is new of it to :func:`layer_tensors`.

    Args:
        checkpoint: the dense model.
        config: the ``config.json`` of the result.
        sizes: its sizes.
        pairs: the pairs of dimensions that its heads keep.
        choose: chooses neurons.
        ridge: the regularisation of Nystrom's fit.
        refits: whether projections are fitted to the dense stream afterwards.
        dtype: the dtype that it is written in, as a recipe means it.
        windows: the text, token ids ``[N, W]``.
        folder: where the files are written.
        progress: where to report.

    Returns:
        For every layer the ``neurons`` that are kept, and of ``attention`` and ``ffn`` what was missing of the dense stream before
        and after the fit, on held-out tokens (on all where there are fewer than eight windows), relative to what the dense module
        had added, both squared; and the strength of the last fit that helped (0: none did).

    Raises:
        CheckpointError: states or fits are not finite.
    """
    from safetensors.torch import save_file

    whole = MoeWalk(layers_of(checkpoint, dtype), windows.shape[1])
    narrow = MoeWalk(_NarrowLayers(whole, config), windows.shape[1])
    reports: dict[int, dict[str, Any]] = {}
    (folder / LAYER_BLUEPRINTS).mkdir(exist_ok=True)
    with progress.phase("narrowing layers", len(whole.layers)):
        theirs = torch.cat([whole.embed(windows[batch]) for batch in whole.batches(len(windows))])
        ours = theirs.clone()
        for index in range(len(whole.layers)):
            with whole.loaded(index), narrow.loaded(index):
                layer = _Layer(checkpoint, whole, narrow, index, dtype, theirs, ours)
                report: dict[str, Any] = {}
                if sizes.head != checkpoint.config.head_dim:
                    report["attention"] = layer.cut_heads(sizes.head, pairs, refits)
                if sizes.width != checkpoint.config.intermediate_size:
                    report |= layer.cut_neurons(sizes.width, choose, ridge, refits)
                write_whole(layer_tensors(folder, index), partial(save_file, layer.made))
                theirs = layer.target
                for batch in narrow.batches(len(windows)):
                    ours[batch] = narrow.run(index, ours[batch])
            if not bool(ours.isfinite().all()):
                raise CheckpointError(
                    f"layer {index}: the calibration states are not finite",
                    hint="compress the checkpoint in the dtype it was trained in",
                )
            reports[index] = report
            progress.advance()
    return reports


class _NarrowLayers:
    """Gives the layers of the narrower model the dense weights, and zeros where the sizes differ."""

    def __init__(self, whole: MoeWalk, config: Mapping[str, Any]) -> None:
        self._whole = whole
        self.model: Any = empty_model(build_config(config, "config.json"), "config.json", torch.float32).eval()
        compute_buffers(self.model)
        self._layers = module_paths_of(self.model.config).layers_in(self.model)

    def load(self, index: int) -> None:
        """See :class:`upcycle.models.stock_layers.Layers`."""
        wanted = self._layers[index].state_dict()
        state = {
            name: tensor if tensor.shape == wanted[name].shape else torch.zeros(wanted[name].shape)
            for name, tensor in self._whole.layers[index].state_dict().items()
        }
        self._layers[index].load_state_dict(state, strict=True, assign=True)
        compute_layer_buffers(self.model, index)

    def drop(self, index: int) -> None:
        """See :class:`upcycle.models.stock_layers.Layers`."""
        self._layers[index].to("meta")


class _Layer:
    """Narrows one loaded layer, given both streams ``[N, W, d]`` before it.

    Attributes:
        target: the dense stream behind it.
        made: its new tensors in the dtype that is stored, by their stored names.
    """

    def __init__(
        self,
        checkpoint: DenseCheckpoint,
        whole: MoeWalk,
        narrow: MoeWalk,
        index: int,
        dtype: str,
        theirs: torch.Tensor,
        ours: torch.Tensor,
    ) -> None:
        self._checkpoint, self._family, self._config = checkpoint, checkpoint.family, checkpoint.config
        self._whole, self._narrow, self._index, self._dtype = whole, narrow, index, dtype
        self._theirs, self._ours = theirs, ours
        self._held = held_out_tokens(theirs)
        self._judged = self._held if bool(self._held.any()) else torch.ones_like(self._held)
        self.target = torch.empty_like(theirs)
        for batch in whole.batches(len(theirs)):
            self.target[batch] = whole.run(index, theirs[batch])
        self.made: dict[str, torch.Tensor] = {}

    def cut_heads(self, head: int, pairs: tuple[int, ...], refits: bool) -> dict[str, float]:
        """Keep some pairs of dimensions of queries and keys, and as many directions of values; return the report of the fit."""
        config, names = self._config, head_parts(self._family, self._config, self._index)
        old, groups, sharing = (
            config.head_dim,
            config.num_key_value_heads,
            config.num_attention_heads // config.num_key_value_heads,
        )
        values = _module(self._whole, self._index, names["v"])
        gram = torch.zeros(groups, old, old, dtype=torch.float64)
        for batch in self._whole.batches(len(self._ours)):
            with module_outputs(values) as read:
                self._whole.run(self._index, self._ours[batch])
            own = read[0].double().view(-1, groups, old).transpose(0, 1)
            gram += own.mT @ own
        stored = {part: self._weight(self._whole, name).double() for part, name in names.items()}
        attention, cut = (walk.layers[self._index].self_attn for walk in (self._whole, self._narrow))
        factors = {
            "q": attention.scaling / cut.scaling,
            "k": 1.0,
        }  # the class divides by the root of the head's dimensions
        for part, count in (("q", config.num_attention_heads), ("k", groups)):
            rows = pair_rows(count, old, pairs)
            for name in (part, f"{part}_bias"):
                if name in stored:
                    self._set(names[name], stored[name][rows] * factors[part])
        # [G, sharing, D, d]: what each head's dimensions add to the output
        read_by = stored["o"].T.reshape(groups, sharing, old, -1)
        found = [value_directions(g, torch.cat([*heads], 1), head) for g, heads in zip(gram, read_by, strict=True)]
        inward, outward = (torch.stack(parts) for parts in zip(*found, strict=True))
        for name in ("v", "v_bias"):
            if name in stored:
                self._set(
                    names[name],
                    (inward.mT @ stored[name].reshape(groups, old, -1)).reshape(groups * head, *stored[name].shape[1:]),
                )
        self._set(names["o"], (outward[:, None] @ read_by).reshape(-1, read_by.shape[-1]).T)
        dense = _module(self._whole, self._index, names["o"])
        return self._fit(names["o"], dense, refits)

    def cut_neurons(self, width: int, choose: ChooseNeurons, ridge: float, refits: bool) -> dict[str, Any]:
        """Keep ``width`` neurons; return them, and the report of the fit."""
        parts = ffn_parts(self._family, self._config, self._index)
        down = next(name for name, kinds in parts.items() if kinds == ["down"])
        block = module_paths_of(self._whole.model.config).block
        layer, own = self._narrow.layers[self._index], self._narrow.layers[self._index].get_submodule(block)
        gram = torch.zeros(self._config.intermediate_size, self._config.intermediate_size)
        # The narrow layer runs with the whole FFN, so that what its neurons read is what they will read.
        layer.set_submodule(block, self._whole.layers[self._index].get_submodule(block))
        try:
            for batch in self._narrow.batches(len(self._ours)):
                with module_inputs(_module(self._whole, self._index, down)) as hidden:
                    self._narrow.run(self._index, self._ours[batch])
                gram += hidden[0].T @ hidden[0]
        finally:
            layer.set_submodule(block, own)
        kept = choose(gram, self._weight(self._whole, down), width)
        for name, kinds in parts.items():
            stored = self._weight(self._whole, name)
            if name == down:
                self._set(name, nystrom_down(gram, kept, stored, ridge))
            else:
                self._set(name, torch.cat([piece[kept] for piece in stored.chunk(len(kinds))]))
        del gram
        return {"neurons": kept.tolist(), "ffn": self._fit(down, None, refits)}

    def _fit(self, name: str, attention: torch.nn.Module | None, refits: bool) -> dict[str, float]:
        """Fit a projection that adds to the stream, in place, and return the report.

        Args:
            name: its stored name.
            attention: the dense layer's module, if the stream behind the attention is fitted, and not that behind the layer.
            refits: whether to fit it at all.
        """
        module, strength = _module(self._narrow, self._index, name), 0.0
        before, scale = self._missing(module, attention)
        for columns in torch.arange(module.weight.shape[1]).split(MOST_JOINT) if refits else ():
            sums = RidgeSums(len(columns), module.weight.shape[0], torch.float32)
            for features, left, _, rows in self._seen(module, attention):
                for outside in (False, True):
                    taken = self._held[rows] == outside
                    if bool(taken.any()):
                        sums.add(
                            features[taken][:, columns], left[taken], torch.ones(int(taken.sum())), held_out=outside
                        )
            choice = sums.best(REFIT_STRENGTHS)
            if sums.finite and choice.held_out_loss < 1:
                strength = choice.strength
                update = sums.solve(strength, everything=False).weights.T
                weight = module.weight.detach().double()
                weight[:, columns] += update
                self._set(name, weight)
        after = self._missing(module, attention)[0] if strength else before
        return {"missing_before": before / scale, "missing_after": after / scale, "strength": strength}

    def _missing(self, module: torch.nn.Module, attention: torch.nn.Module | None) -> tuple[float, float]:
        """Return the square of what is missing, and that of what the dense module added, over the tokens that judge."""
        missing = added = 0.0
        for _, left, dense, rows in self._seen(module, attention):
            missing += left[self._judged[rows]].double().square().sum().item()
            added += dense[self._judged[rows]].double().square().sum().item()
        return missing, added or 1.0

    def _seen(
        self, module: torch.nn.Module, attention: torch.nn.Module | None
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, slice]]:
        """Yield, batch by batch, what a projection reads, what is missing, what the dense module adds ``[t, d]``, and the tokens."""
        width, index = self._ours.shape[1], self._index
        blocks = [
            module_paths_of(walk.model.config).blocks_in(walk.layers[index])[0] for walk in (self._whole, self._narrow)
        ]
        normed = self._family.module_paths.output_norm is not None
        for batch in self._narrow.batches(len(self._ours)):
            dense, made = (attention, module) if attention is not None else blocks
            with module_outputs(dense) as theirs:
                self._whole.run(index, self._theirs[batch])
            with module_inputs(module) as features, module_outputs(made) as ours:
                stream = self._narrow.run(index, self._ours[batch])
            if normed and attention is None:
                left = theirs[0] - ours[0]
            elif attention is None:
                left = _flat(self.target[batch] - stream) / self._config.residual_multiplier
            else:
                left = (
                    theirs[0]
                    - ours[0]
                    + _flat(self._theirs[batch] - self._ours[batch]) / self._config.residual_multiplier
                )
            yield features[0], left, theirs[0], slice(batch.start * width, batch.start * width + len(left))

    def _weight(self, walk: MoeWalk, name: str) -> torch.Tensor:
        module, leaf = _module(walk, self._index, name), name.rpartition(".")[2]
        return torch.as_tensor(getattr(module, leaf)).detach()

    def _set(self, name: str, weight: torch.Tensor) -> None:
        """Give the narrow layer a tensor, rounded as it is stored."""
        stored = weight.to(getattr(torch, self._checkpoint.dtype_of(name, self._dtype)))
        if not bool(stored.isfinite().all()):
            raise CheckpointError(
                f"layer {self._index}: the fit of '{name}' is not finite in {stored.dtype}", hint="--dtype bfloat16"
            )
        self.made[name] = stored.contiguous()
        module, leaf = _module(self._narrow, self._index, name), name.rpartition(".")[2]
        getattr(module, leaf).data = stored.float()


def _module(walk: MoeWalk, index: int, name: str) -> Any:
    """Return the module of a layer that a stored tensor belongs to."""
    prefix = f"{module_paths_of(walk.model.config).layer(index)}."
    return walk.layers[index].get_submodule(name.removeprefix(prefix).rpartition(".")[0])


def _flat(states: torch.Tensor) -> torch.Tensor:
    return states.reshape(-1, states.shape[-1])
