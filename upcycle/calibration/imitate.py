"""Makes experts of attention's projections: MLPs that imitate them, split as FFNs are (D2DMoE). T tokens, H neurons, d in, o out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.functional import linear

from upcycle.architectures.projections import applied
from upcycle.calibration.decide_layer import activations_of, generator
from upcycle.errors import CheckpointError
from upcycle.ffn.activations import HELD_OUT_EVERY
from upcycle.ffn.expert_tensors import ExpertTensors
from upcycle.ffn.feed_forward import FeedForward
from upcycle.files.atomic_files import write_whole
from upcycle.files.formats.tensor_files import SafetensorsFile
from upcycle.files.formats.token_files import TokenFile, write_together
from upcycle.files.output.workspace import CALIBRATION_FOLDER, LAYER_BLUEPRINTS
from upcycle.models.layer_runner import LayerRunner
from upcycle.planning.expert_job import ExpertJob
from upcycle.planning.projections import ImitatedProjection
from upcycle.planning.routing_rule import scale_by
from upcycle.recipe.projections_recipe import ProjectionsRecipe

if TYPE_CHECKING:
    from upcycle.checkpoints.output_layout import OutputEntry

_TINY = 1e-15  # in the square Hoyer measure, as in the authors' code
_RIDGE = 1e-4  # of the mean diagonal: enough where neurons are alike or never active


def imitate_layer(
    job: ExpertJob, runner: LayerRunner, states: TokenFile, batch: int, folder: Path, index: int
) -> dict[str, Any]:
    """Learn to imitate the projections of a layer that become experts, split the MLPs, and keep their tensors in ``folder``.

    Each learns on its own, from the states that the dense model gives it, as in the paper.

    Args:
        job: the conversion.
        runner: has loaded the layer.
        states: the layer's inputs, of the dense model.
        batch: tokens at a time.
        folder: the conversion's working folder.
        index: the layer's number.

    Returns:
        For the report the ``projections``, with their errors; empty where there are none.

    Raises:
        CheckpointError: what a projection reads is not finite.
    """
    mine = [one for one in job.projections if one.place.layer == index]
    if not mine:
        return {}
    layer, place = runner.layers[index], folder / CALIBRATION_FOLDER
    files = [TokenFile(place / f"{one.place.path}.{index}", one.place.inputs) for one in mine]
    write_together(files, _inputs(runner, index, [one.place.path for one in mine], states, batch))
    tensors, report = dict[str, torch.Tensor](), []
    for one, inputs in zip(mine, files, strict=True):
        ffn, error, active = _imitation(job, one, inputs, batch, *applied(layer.get_submodule(one.place.path)))
        tensors |= _split(job, one, ffn, inputs, batch)
        report.append({"path": one.place.path, "neurons": one.width, "error": error, "active": active})
        inputs.release()
    from safetensors.torch import save_file

    write_whole(_file(folder, index), partial(save_file, tensors))
    return {"projections": report}


def imitated_tensors(job: ExpertJob, layer: int | None, folder: Path) -> dict[str, Callable[[], torch.Tensor]]:
    """Return what reads the tensors that :func:`imitate_layer` kept of a layer, by their names; empty where there are none."""
    names = [entry.name for one in job.projections if one.place.layer == layer for entry in one.entries]
    if not names or layer is None:
        return {}
    file = SafetensorsFile(_file(folder, layer))
    return {name: partial(file.read, name) for name in names}


def _file(folder: Path, layer: int) -> Path:
    return folder / LAYER_BLUEPRINTS / f"projections.{layer:05d}.safetensors"


def _inputs(
    runner: LayerRunner, index: int, paths: list[str], states: TokenFile, batch: int
) -> Iterator[list[torch.Tensor]]:
    """Yield what every projection reads, fp32 ``[t, d]`` each, batch by batch."""
    seen: dict[str, torch.Tensor] = {}

    def reader(path: str) -> Any:
        def read(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            seen[path] = args[0].detach().reshape(-1, args[0].shape[-1])

        return read

    layer = runner.layers[index]
    hooks = [layer.get_submodule(path).register_forward_pre_hook(reader(path)) for path in paths]
    try:
        for block in states.blocks(batch):
            runner.around(index, block)
            yield [seen[path] for path in paths]
    finally:
        for hook in hooks:
            hook.remove()


def _imitation(
    job: ExpertJob,
    one: ImitatedProjection,
    inputs: TokenFile,
    batch: int,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[FeedForward, float, float]:
    """Return the MLP in the dtype that is stored, its error on tokens kept from it, and the share of its neurons that are active.

    Raises:
        CheckpointError: what the projection reads is not finite.
    """
    asked, rng = job.recipe.projections, generator(job.recipe.seed, one.place.layer, f"imitate {one.place.path}")
    learnt, judged = _examples(inputs, batch, asked.tokens)
    if not all(bool(some.isfinite().all()) for some in (learnt, judged)):
        raise CheckpointError(
            f"layer {one.place.layer}: what {one.place.path} reads is not finite on the calibration text",
            hint="convert in the dtype that the model was trained in",
        )
    mlp = imitation(learnt, linear(learnt, weight, bias), one.width, asked, rng)
    dtype = getattr(torch, one.entries[0].spec.dtype)
    mlp = Mlp(*(part.to(dtype).float() for part in mlp))
    error, active = mlp.judged(judged, linear(judged, weight, bias))
    longest = max(float(block.norm(dim=1).max()) for block in inputs.blocks(batch))
    norm = torch.full((one.place.inputs,), longest / math.sqrt(one.place.inputs))
    up, up_bias, down, down_bias = (part.to(dtype) for part in mlp)
    ffn = FeedForward(
        *(one.place.layer, None, up, down, norm, "relu"), up_bias=up_bias, down_bias=down_bias
    )  # fmt: skip
    return ffn, error, active


def _examples(inputs: TokenFile, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fp32 ``[T, d]``: about so many tokens to learn from, evenly spread, and those of one batch in eight to judge by."""
    there = max(tokens, inputs.tokens * (HELD_OUT_EVERY - 1) // HELD_OUT_EVERY)
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    before = 0
    for number, block in enumerate(inputs.blocks(batch)):
        if number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1:
            parts[1].append(block)
            continue
        counts = torch.arange(before, before + len(block) + 1) * tokens // there  # how many are taken before each
        parts[0].append(block[counts.diff() > 0])
        before += len(block)
    learnt, judged = (torch.cat(part) if part else None for part in parts)
    assert learnt is not None
    return learnt, learnt if judged is None else judged


class Mlp(NamedTuple):
    """``down relu(up x + up_bias) + down_bias``: fp32 ``[H, d]``, ``[H]``, ``[o, H]``, ``[o]``."""

    up: torch.Tensor
    up_bias: torch.Tensor
    down: torch.Tensor
    down_bias: torch.Tensor

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Return the activations ``[T, H]`` for inputs ``[T, d]``."""
        return linear(x, self.up, self.up_bias).relu()

    def judged(self, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
        """Return its error on ``y``, relative to how far ``y`` is from its mean, and the share of neurons that are active."""
        hidden = self.hidden(x)
        error = (linear(hidden, self.down, self.down_bias) - y).double().square().sum()
        spread = (y - y.mean(0)).double().square().sum()
        active = (hidden > 0).double().mean()
        return math.sqrt(float(error / spread.clamp(min=torch.finfo(torch.float64).tiny))), float(active)


def imitation(x: torch.Tensor, y: torch.Tensor, width: int, asked: ProjectionsRecipe, rng: torch.Generator) -> Mlp:
    """Return an MLP of so many neurons that makes ``y`` ``[T, o]`` of ``x`` ``[T, d]``, as nearly as it learns to.

    The loss is the mean squared error and, with ``hoyer``, the square Hoyer measure of each token's activations over the number of
    neurons, ``|a|_1^2 / (H |a|_2^2)``, from 1/H to 1, whose coefficient grows over the first half of the steps. Adam's rate falls
    along half a cosine. At the end the second layer is solved for in closed form.

    Deviations from the paper's code: inputs and targets are learnt in multiples of their root mean square, and the closed form.

    Args:
        x: what the projection reads; finite.
        y: what it makes of that.
        width: H.
        asked: epochs, batch, rate and coefficient.
        rng: draws the first weights and the order of tokens.
    """
    wide, far = _size(x), _size(y - y.mean(0))
    x, y = x / wide, y / far
    with torch.enable_grad():
        start = _start(x.shape[1], width, y, rng)
        weights = [part.requires_grad_() for part in start]
        mlp = Mlp(*weights)
        optimizer = torch.optim.Adam(weights, lr=asked.rate)
        steps, step = asked.epochs * math.ceil(len(x) / asked.batch), 0
        for _ in range(asked.epochs):
            for some in torch.randperm(len(x), generator=rng).split(asked.batch):
                optimizer.param_groups[0]["lr"] = asked.rate * 0.5 * (1 + math.cos(math.pi * step / steps))
                hidden = mlp.hidden(x[some])
                loss = (linear(hidden, mlp.down, mlp.down_bias) - y[some]).square().mean()
                if asked.hoyer:
                    loss = loss + asked.hoyer * min(1.0, 2 * step / steps) * hoyer_share(hidden).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                step += 1
    up, up_bias, _, _ = (part.detach() for part in weights)
    down, down_bias = _solved(mlp.hidden(x).detach(), y)
    return Mlp(up / wide, up_bias, down * far, down_bias * far)


def hoyer_share(hidden: torch.Tensor) -> torch.Tensor:
    """Return the square Hoyer measure of ``[T, H]`` over H, ``[T]``: about the share of neurons that are active."""
    return hidden.sum(1).square() / (hidden.square().sum(1) + _TINY) / hidden.shape[1]


def _start(inputs: int, width: int, y: torch.Tensor, rng: torch.Generator) -> list[torch.Tensor]:
    """Return random matrices as a new ``torch.nn.Linear`` has them, and the mean as the last bias."""
    up = torch.empty(width, inputs).uniform_(-(inputs**-0.5), inputs**-0.5, generator=rng)
    down = torch.empty(y.shape[1], width).uniform_(-(width**-0.5), width**-0.5, generator=rng)
    return [up, torch.zeros(width), down, y.mean(0)]


def _solved(hidden: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the second layer of least squares, ``[o, H]`` and ``[o]``, with a slight ridge; the sums are in fp64."""
    count, mean, centre = hidden.shape[1], hidden.double().mean(0), y.double().mean(0)
    gram, cross = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, y.shape[1], dtype=torch.float64)
    for h, wanted in zip(hidden.split(4096), y.split(4096), strict=True):
        centred = h.double() - mean
        gram += centred.T @ centred
        cross += centred.T @ (wanted.double() - centre)
    gram += torch.eye(count, dtype=torch.float64) * (_RIDGE * gram.diagonal().mean()).clamp(min=_TINY)
    down = torch.cholesky_solve(cross, torch.linalg.cholesky(gram)).T
    return down.float().contiguous(), (centre - down @ mean).float()


def _size(values: torch.Tensor) -> float:
    return max(values.double().square().mean().sqrt().item(), torch.finfo(torch.float32).tiny)


def _split(
    job: ExpertJob, one: ImitatedProjection, ffn: FeedForward, inputs: TokenFile, batch: int
) -> dict[str, torch.Tensor]:
    """Return the tensors of the experts that the MLP is split into, by the job's method, with a router of the job's kind."""
    seed, layer, path = job.recipe.seed, one.place.layer, one.place.path
    activations = activations_of(ffn, inputs, batch)
    scale = scale_by(job.method, "sum", one.shape)
    blueprint = job.method.blueprint(ffn, one.shape, scale, generator(seed, layer, f"method {path}"), activations)
    blueprint = replace(blueprint, rule=one.shape.rule)
    made = job.router.network(blueprint, ffn, generator(seed, layer, f"router {path}"), activations)
    blueprint = replace(
        blueprint, router=job.method.tie(made.rows), router_hidden=made.hidden, router_form=one.shape.router
    )
    experts = ExpertTensors(ffn, blueprint)
    return {entry.name: _whole(entry, experts) for entry in one.entries}


def _whole(entry: OutputEntry, experts: ExpertTensors) -> torch.Tensor:
    assert entry.built is not None
    made = torch.cat([experts.part(part) for part in entry.built.parts])
    return made.view(entry.spec.shape).to(getattr(torch, entry.spec.dtype)).contiguous()
