"""Refits the FFNs of a dense model made of a Mixture-of-Experts towards the MoE's layers, in closed form, layer by layer.

As in ``refit_cut.py``, with one FFN in the place of the experts: with e(x) what is missing of the MoE's stream
behind a layer, and h(x) the activations of the FFN's neurons, the update D of its down projection minimises
``sum_t ||e(x_t) - D h(x_t)||^2 + strength * ||D||^2``. Wide FFNs are fitted some neurons at a time. With a schedule, all of the FFN
is trained behind that (``train_cut.py``).

Before that, the first tokens prove that the dense architecture is the right one: given the MoE's stream, its layer must hand its FFN
the same input as the MoE's layer hands its experts.

T tokens, F neurons, d the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from upcycle.architectures.module_paths import module_paths_of
from upcycle.calibration.compressing.made_parts import held_out_tokens
from upcycle.calibration.compressing.moe_walk import MoeWalk, Routed
from upcycle.calibration.compressing.refit_cut import MOST_JOINT, with_training, write_fitted
from upcycle.calibration.compressing.result_layers import ResultLayers
from upcycle.errors import CheckpointError
from upcycle.ffn.random_weights import stream
from upcycle.ffn.refit import REFIT_STRENGTHS
from upcycle.ffn.ridge_sums import RidgeSums
from upcycle.methods.growing.base import Piece
from upcycle.models.stock_layers import layers_of
from upcycle.progress import Progress

if TYPE_CHECKING:
    from upcycle.checkpoints.moe_checkpoint import MoeCheckpoint
    from upcycle.ffn.reconstruction import BlockSchedule

# Both layers run the same operations in fp32; kernels may add in another order. A wrong window, multiplier or rotation changes the
# input by a part of itself.
MOST_UNLIKE = 1e-3


def refit_dense(
    checkpoint: MoeCheckpoint,
    config: Mapping[str, Any],
    pieces: Sequence[Piece],
    layers: Sequence[int],
    names: Mapping[int, Mapping[str, str]],
    dtype: str,
    windows: torch.Tensor,
    folder: Path,
    progress: Progress,
    training: BlockSchedule | None = None,
    seed: int = 0,
) -> dict[int, dict[str, float]]:
    """Refit every FFN that was made of experts, and write the new down projections, or all that was trained.

    Args:
        checkpoint: the MoE.
        config: the ``config.json`` of the dense model.
        pieces: its tensors.
        layers: those whose FFN was made of experts.
        names: the names of these layers' matrices in the dense model: ``gate``, ``up`` and ``down``.
        dtype: the dtype that it is written in, as a recipe means it.
        windows: the text, token ids ``[N, W]``.
        folder: where the files are written.
        progress: where to report.
        training: how the FFNs are trained behind the closed form; None: they are not.
        seed: of the training's order of tokens.

    Returns:
        For every layer the same numbers as :func:`.refit_cut.refit_cuts`.

    Raises:
        CheckpointError: the dense model is not the MoE outside the FFN.
    """
    whole = MoeWalk(layers_of(checkpoint, dtype), windows.shape[1])
    made = ResultLayers(checkpoint, config, pieces, dtype)
    dense = MoeWalk(made, windows.shape[1])
    reports: dict[int, dict[str, float]] = {}
    with progress.phase("refitting FFNs", len(whole.layers)):
        theirs = torch.cat([whole.embed(windows[batch]) for batch in whole.batches(len(windows))])
        ours = theirs.clone()
        for index in range(len(whole.layers)):
            with whole.loaded(index), dense.loaded(index):
                if index in layers:
                    linear: dict[str, Any] = {
                        part: dense.layers[index].get_submodule(made.inner(index, name))
                        for part, name in names[index].items()
                    }
                    stored_as = {part: made.dtype_of(name) for part, name in names[index].items()}
                    fit = FfnFit(whole, dense, index, linear["down"])
                    fit.compare_inputs(theirs, checkpoint.source.name)
                    target, reports[index] = fit.solve(theirs, ours)
                    fitted = {"down": linear["down"].weight.detach().to(stored_as["down"])}
                    linear["down"].weight.data = fitted["down"].float()
                    if training is not None:
                        parts = {part: module.weight for part, module in linear.items()}
                        fitted, found = fit.train(parts, stored_as, theirs, ours, training, seed)
                        reports[index] = with_training(reports[index], found)
                    write_fitted(folder, index, {part: weight.contiguous() for part, weight in fitted.items()})
                    theirs = target
                else:
                    for batch in whole.batches(len(windows)):
                        theirs[batch] = whole.run(index, theirs[batch])
                for batch in whole.batches(len(windows)):
                    ours[batch] = dense.run(index, ours[batch])
            progress.advance()
    return reports


class FfnFit:
    """Fits the FFN of one loaded layer; ``down`` is its last projection."""

    def __init__(self, whole: MoeWalk, dense: MoeWalk, index: int, down: torch.nn.Linear) -> None:
        self._whole, self._dense, self._index, self._down = whole, dense, index, down
        self._block = module_paths_of(dense.model.config).blocks_in(dense.layers[index])[0]

    def compare_inputs(self, theirs: torch.Tensor, where: str) -> None:
        """Compare what both layers hand their FFN or experts, given the same stream.

        Raises:
            CheckpointError: it differs.
        """
        batch = next(self._whole.batches(len(theirs)))
        seen: list[Routed] = []
        self._whole.run(self._index, theirs[batch], seen.append)
        with module_inputs(self._block) as given:
            self._dense.run(self._index, theirs[batch])
        own = seen[0].x
        error = (torch.linalg.norm(given[0] - own) / torch.linalg.norm(own).clamp(min=1e-30)).item()
        if not error <= MOST_UNLIKE:
            family = self._dense.model.config.model_type
            raise CheckpointError(
                f"{where}: layer {self._index} computes another input of its experts than a '{family}' model of its FFN: relative "
                f"difference {error:.1e}",
                hint="--target another family (upcycle list families), or a method that keeps the architecture",
            )

    def solve(self, theirs: torch.Tensor, ours: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Set the down projection to the best fit for both streams ``[N, W, d]`` before the layer.

        Returns:
            The MoE's stream behind the layer, and the report.
        """
        target, blocks, added = torch.empty_like(theirs), [], []
        for batch in self._whole.batches(len(theirs)):
            seen: list[Routed] = []
            target[batch] = self._whole.run(self._index, theirs[batch], seen.append)
            added.append(seen[0].block.double().square().sum(1))
            blocks.append(seen[0].block)
        behind = torch.cat(blocks) if self._whole.norm_behind(self._index) is not None else None
        held = held_out_tokens(theirs)
        judged = held if bool(held.any()) else torch.ones_like(held)
        before, strength = self._missing(ours, target, behind, judged), 0.0
        for neurons in torch.arange(self._down.weight.shape[1]).split(MOST_JOINT):
            sums = RidgeSums(len(neurons), self._down.weight.shape[0], torch.float32)

            def see(hidden: torch.Tensor, left: torch.Tensor, rows: slice, own: Any = (sums, neurons)) -> None:
                for outside in (False, True):
                    taken = held[rows] == outside
                    if bool(taken.any()):
                        features = hidden[taken][:, own[1]]
                        own[0].add(features, left[taken], torch.ones(len(features)), held_out=outside)

            self._walk(ours, target, behind, see)
            choice = sums.best(REFIT_STRENGTHS)
            if sums.finite and choice.held_out_loss < 1:
                strength = choice.strength
                update = sums.solve(strength, everything=False).weights.T.float()
                self._down.weight.data[:, neurons] += update
        scale = torch.cat(added)[judged].sum().item() or 1.0
        after = self._missing(ours, target, behind, judged)
        return target, {"missing_before": before / scale, "missing_after": after / scale, "strength": strength}

    def train(
        self,
        parts: dict[str, torch.nn.Parameter],
        stored_as: Mapping[str, torch.dtype],
        theirs: torch.Tensor,
        ours: torch.Tensor,
        schedule: BlockSchedule,
        seed: int,
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Train the FFN's matrices; return them as they are stored, and what was missing before and after."""
        from upcycle.calibration.compressing.train_cut import BlockTraining

        def rounded(part: str, weight: torch.Tensor) -> torch.Tensor:
            return weight.to(stored_as[part])

        rng = stream(seed, str(self._index), "training")
        layer = BlockTraining(self._whole, self._dense, self._index, self._block, parts, schedule, rng)
        report = layer.fit(theirs, ours, rounded)
        return {part: rounded(part, weight.detach()).clone() for part, weight in layer.parts.items()}, report

    def _missing(
        self, ours: torch.Tensor, target: torch.Tensor, behind: torch.Tensor | None, judged: torch.Tensor
    ) -> float:
        """Return the square of what is missing, over the tokens that judge."""
        total = 0.0

        def see(_: torch.Tensor, left: torch.Tensor, rows: slice) -> None:
            nonlocal total
            total += left[judged[rows]].double().square().sum().item()

        self._walk(ours, target, behind, see)
        return total

    def _walk(
        self,
        ours: torch.Tensor,
        target: torch.Tensor,
        behind: torch.Tensor | None,
        see: Callable[[torch.Tensor, torch.Tensor, slice], None],
    ) -> None:
        """Run the dense layer, and show the activations ``[t, F]`` and what is missing ``[t, d]`` of some tokens, and which."""
        width = ours.shape[1]
        for batch in self._dense.batches(len(ours)):
            rows = slice(batch.start * width, batch.stop * width)
            with module_inputs(self._down) as hidden, module_outputs(self._block) as put_out:
                made = self._dense.run(self._index, ours[batch])
            if behind is not None:
                left = behind[rows] - put_out[0]
            else:
                left = ((target[batch] - made) / self._dense.multiplier).reshape(-1, made.shape[-1])
            see(hidden[0], left, rows)


@contextmanager
def module_inputs(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect a module's inputs, fp32 ``[t, size]``, inside the ``with`` block."""
    found: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(
        lambda _, given: found.append(given[0].detach().reshape(-1, given[0].shape[-1]))
    )
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def module_outputs(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect a module's outputs likewise."""
    found: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _, __, made: found.append(made.detach().reshape(-1, made.shape[-1])))
    try:
        yield found
    finally:
        handle.remove()
