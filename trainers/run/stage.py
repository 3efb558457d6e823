"""One stage of a run, made ready: its model, parent, engine and data, and its part of a checkpoint."""

from __future__ import annotations

import gc
import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from upcycle.adapters.live import adapter_of
from upcycle.errors import UpcycleError, UsageError
from upcycle.files.user_paths import user_path
from upcycle.models.load import load_model, open_layers
from upcycle.models.own.factored_experts import FactoredExperts
from upcycle.models.own.moe_block import PackedExperts
from upcycle.trainers.adapting.peft_folder import description
from upcycle.trainers.adapting.targets import add_adapter, unpaired_warning
from upcycle.trainers.checkpoints.dense_states import DenseStates
from upcycle.trainers.checkpoints.divided_loading import divide_weights, only_in_training
from upcycle.trainers.checkpoints.prepare_model import (
    check_parent,
    parent_folder,
    predicts_masked,
    prepare_model,
)
from upcycle.trainers.checkpoints.read import SavedRun
from upcycle.trainers.checkpoints.whole_tensors import WholeTensors
from upcycle.trainers.data.batches import TokenStream, open_stream, open_validation
from upcycle.trainers.data.open_domain import data_have_images
from upcycle.trainers.data.packed_attention import check_fits, packing_leak
from upcycle.trainers.distillation.expert_targets import recorded_scale
from upcycle.trainers.distillation.frozen_shards import load_parent
from upcycle.trainers.distillation.logit_cache import LogitCache, parent_identity, prepare_cache
from upcycle.trainers.distillation.parent import Parent
from upcycle.trainers.distributed import expert_parallel
from upcycle.trainers.distributed.ranks import Ranks, import_deepspeed
from upcycle.trainers.forecast.flops import training_flops
from upcycle.trainers.optimizing.master_weights import follow_masters, with_masters
from upcycle.trainers.optimizing.optimizers import make_optimizer, state_keys
from upcycle.trainers.optimizing.parameter_groups import frozen_parts, groups, select
from upcycle.trainers.optimizing.router_rates import fitted_routers
from upcycle.trainers.pictures.pictures import Pictures
from upcycle.trainers.recipe.data_recipe import DataRecipe
from upcycle.trainers.recipe.part_recipes import ControlParameters
from upcycle.trainers.recipe.training_recipe import DistillationRecipe, StageRecipe, TrainRecipe, accumulation
from upcycle.trainers.routing.all_parts import part_name, reads_images, train_all_parts
from upcycle.trainers.routing.stock_routers import moe_layers, unread_warning, untaught_warning
from upcycle.trainers.run.deepspeed_config import deepspeed_config
from upcycle.trainers.run.leaf_inputs import give_inputs_gradients
from upcycle.trainers.run.step import Stepper
from upcycle.trainers.run.unmasking import masks_of


class Stage:
    """A stage that is ready to take steps, with its model in a DeepSpeed engine.

    Args:
        recipe: the run's.
        stage_recipe: the stage's, one of ``recipe.stages``.
        origin: the folder of the model that the run starts from.
        saved: the checkpoint whose weights the stage starts from, if any.
        resumed: whether the optimizer's states come from ``saved``, too: the checkpoint lies within this stage.
        ranks: all of them.
        tokenizer: the model's.
        pictures: what it reads of images; ``None``: it reads none.

    Raises:
        UpcycleError: the stage does not fit the model, the data or the ranks.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        stage_recipe: StageRecipe,
        origin: Path,
        saved: SavedRun | None,
        resumed: bool,
        ranks: Ranks,
        tokenizer: Any,
        pictures: Pictures | None = None,
    ) -> None:
        self.recipe, self.stage_recipe = recipe, stage_recipe
        self.passes = accumulation(recipe, ranks.world_size)
        self.steps = recipe.steps_of(stage_recipe)
        self.rates, self.schedule = recipe.rate_and_schedule(stage_recipe)
        # Into the host's memory: DeepSpeed moves to the device what each rank keeps. A checkpoint's fp32 weights follow below.
        dtype = getattr(torch, recipe.dtype)
        # The checkpoints of an adapter hold it alone.
        folder = saved.folder if saved and recipe.adapter is None else origin
        three = recipe.zero_stage(ranks.world_size) == 3
        self.divides = three and ranks.world_size > 1  # whether ranks hold parts of frozen models, too
        # In ZeRO-3, no rank ever holds the whole model: weights are read, and divided, after all that needs their shapes alone.
        layers = open_layers(folder, dtype, recipe.experts, left_out=only_in_training) if three else None
        self.model = (
            layers.model if layers is not None else load_model(folder, dtype, experts=recipe.experts, training=True)
        )
        self.masks = predicts_masked(origin)
        check_fits(self.model.config, tokenizer, recipe.length)
        data = recipe.data_of(stage_recipe)
        self._show(data, pictures)
        # A row has one document for itself, unless it is a preference: two answers.
        apart = data.packing == "alone" and all(domain.chosen is None for domain in data.domains)
        leak = None if apart else packing_leak(self.model.config, recipe.micro_batch)
        checkpointing = recipe.activation_checkpointing
        prepare_model(self.model, checkpointing=checkpointing, activation=stage_recipe.activation, where=recipe.model)
        self.growth = masks_of(recipe, stage_recipe, origin, self.model)
        self.stepper = Stepper(self.model, stage_recipe, ranks, self._parent(origin, ranks), recipe.clip)
        adapted = self._adapt(saved)
        divided = recipe.expert_parallel > 1
        self._check_control(divided)
        self._check_taught(divided)
        if not divided:
            self.stepper.attach()
        self.trained = select(self.model, stage_recipe.train)
        if divided and recipe.zero_stage(ranks.world_size) < 3 and "experts" not in self.trained.values():
            raise UsageError(
                f"stage '{stage_recipe.name}': no expert trains, and below ZeRO's stage 3 DeepSpeed's AutoEP needs one that does",
                hint="set expert_parallel: 1, or zero.stage: 3",
            )
        self.flops = training_flops(self.model, recipe.length)
        if three:
            give_inputs_gradients(moe_layers(self.model))
        if layers is not None:
            divide_weights(layers, deepspeed_config(recipe, self.model, ranks.world_size), ranks)
        begun = saved.state.get("router_factor") if saved and resumed else None
        self.router_factor, self.spared, lost = self._router_rate(origin, begun)
        read = unread_warning(self.model), untaught_warning(self.model), adapted
        self.warnings = [
            text for text in (frozen_parts(self.model), leak, lost, self.stepper.control.unexported, *read) if text
        ]
        self.engine = self._engine(ranks)
        if divided:
            self.stepper.attach()
        self.tensors = WholeTensors(self.engine, state_keys(recipe.optimizer))
        self.stream: TokenStream = open_stream(
            data,
            tokenizer,
            length=recipe.length,
            micro_batch=recipe.micro_batch,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=recipe.seed,
            masks=self.masks,
            pictures=pictures,
        )
        self.held_out = open_validation(data, tokenizer, length=recipe.length, masks=self.masks, pictures=pictures)
        if saved:
            saved.restore(self.tensors, states=resumed)
        elif recipe.dense_states:
            DenseStates(user_path(recipe.dense_states), origin).give(self.tensors)

    @property
    def top_k(self) -> int:
        """Experts per token; 0 in a dense model."""
        return max((layer.rule.top_k for layer in moe_layers(self.model)), default=0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep of losses, balance and data, as JSON."""
        balance, adapter = self.stepper.balance, self.recipe.adapter
        return {
            **({"adapter": description(self.model, adapter, self.recipe.model)} if adapter else {}),
            **({"unmasked": self.growth.value} if self.growth else {}),
            "losses": {loss.label: loss.state() for loss in self.stepper.losses},
            "balance": balance.state() if balance else None,
            "router_factor": self.router_factor,
            "data": self.stream.state(),
        }

    def load_state(self, state: dict[str, Any]) -> list[str]:
        """Continue from :meth:`state`; returns a sentence for every file of the data that has changed since."""
        for loss in self.stepper.losses:
            loss.load_state(state["losses"].get(loss.label, {}))
        if self.stepper.balance and state["balance"]:
            self.stepper.balance.load_state(state["balance"])
        return self.stream.restore(state["data"])

    def unmask(self, done: int) -> None:
        """Set the masks of a grown model, if it has some, to what they are after ``done`` steps of the stage."""
        if self.growth is not None and self.stage_recipe.masks is not None:
            self.growth.at(done, self.stage_recipe.masks.steps)

    def close(self) -> None:
        """Free the model and the engine before the next stage makes its own."""
        self.stepper.detach()
        self.engine.destroy()
        del self.engine, self.tensors, self.model, self.stepper
        gc.collect()

    def _router_rate(self, origin: Path, begun: float | None) -> tuple[float | None, str | None, str | None]:
        """Spare routers that the conversion taught, unless the stage says how fast they train or trains nothing else.

        This is about AdamW, whose steps are as large as the learning rate; SGD's shrink with the gradient.

        Args:
            origin: the folder of the model that the run starts from.
            begun: the factor that the stage began with, if a checkpoint in it says so: routers have grown since.

        Returns:
            The factor on the routers' learning rate, if the recipe does not say it; a sentence on it; and a warning where what the
            recipe says undoes them.
        """
        if self.recipe.optimizer.name == "sgd":
            return None, None, None
        fitted = fitted_routers(self.model, self.rates, origin)
        if "router" in self.stage_recipe.rates or set(self.trained.values()) == {"router"}:
            lost = fitted.warning(self.rates.learning_rate * self.rates.router) if fitted else None
            return None, None, lost
        factor = begun or (fitted.factor if fitted else 1.0)
        self.rates = self.rates.model_copy(update={"router": factor})
        return factor, fitted.spared(factor) if fitted and factor != 1 else None, None

    def _check_control(self, divided: bool) -> None:
        """Refuse a control of routers that are replaced, or of experts whose weights are on other ranks."""
        control = self.stage_recipe.control
        if divided and control != ControlParameters():
            raise UsageError(
                f"stage '{self.stage_recipe.name}': control changes what stock routers decide, and AutoEP replaces those",
                hint="leave control out, or set expert_parallel: 1",
            )
        if control.dense_gradients and self.recipe.zero.stage == 3:
            raise UsageError(
                f"stage '{self.stage_recipe.name}': control.dense_gradients runs every expert a second time, whose weights "
                "ZeRO's stage 3 has on other ranks by then",
                hint="set zero.stage below 3",
            )

    def _check_taught(self, divided: bool) -> None:
        """Refuse targets for single experts where a rank, or the architecture, does not hold them one by one."""
        distillation = self.stage_recipe.distillation
        if distillation is None or not distillation.taught:
            return
        if divided or self.recipe.zero.stage == 3:
            raise UsageError(
                f"stage '{self.stage_recipe.name}': {distillation.taught[0]} runs every expert on every rank, and here a rank "
                "holds only some of them",
                hint="set expert_parallel: 1 and zero.stage below 3",
            )
        if any(isinstance(m, PackedExperts | FactoredExperts) for m in self.model.modules()):
            raise UsageError(
                f"stage '{self.stage_recipe.name}': {distillation.taught[0]} asks every expert for its output, which "
                "upcycle_moe's packed experts do not give one by one",
                hint="distil logits, hidden or ffn, or convert to a stock target",
            )
        if any(p.rule.constant is not None for p in moe_layers(self.model)):
            raise UsageError(
                f"stage '{self.stage_recipe.name}': {distillation.taught[0]} compares experts with pieces of the parent's FFN, on its "
                f"inputs, and experts of a {self.model.config.model_type} model are scaled otherwise and may read another input",
                hint="leave it out, or convert to another target",
            )

    def _show(self, data: DataRecipe, pictures: Pictures | None) -> None:
        """Let every part of the model train, if the data have images."""
        if pictures is not None and data_have_images(data, pictures):
            check_images(self.recipe, self.stage_recipe)
            pictures.most_bad = data.bad_images
            train_all_parts(self.model)

    def _adapt(self, saved: SavedRun | None) -> str | None:
        """Give the model the recipe's adapter, if it has one, as the checkpoint has it; returns a warning, if there is one."""
        recipe = self.recipe.adapter
        if recipe is None:
            return None
        add_adapter(self.model, recipe, self.recipe.seed)
        held = adapter_of(self.model)
        if saved and held:
            saved.load_into({name: self.model.get_parameter(name) for name in held.names})
        return unpaired_warning(self.model, recipe)

    def _parent(self, origin: Path, ranks: Ranks) -> Parent | None:
        distillation = self.stage_recipe.distillation
        if distillation is None:
            return None
        if distillation.taught and distillation.expert_scale is None:
            distillation = distillation.model_copy(update={"expert_scale": recorded_scale(origin)})
        folder = parent_folder(distillation.parent, origin)
        dtype = self.recipe.dtype if distillation.dtype == "auto" else distillation.dtype

        def load() -> Any:
            parent = load_parent(folder, getattr(torch, dtype), ranks, self.divides)
            check_parent(parent, self.model, folder, self.recipe.length)
            return parent

        cache = self._cache(distillation, folder, dtype, ranks)
        return Parent(load, distillation, cache, ranks.any if self.divides else bool)

    def _cache(self, recipe: DistillationRecipe, parent: Path, dtype: str, ranks: Ranks) -> LogitCache | None:
        if recipe.cache is None:
            return None
        folder, error = user_path(recipe.cache), None
        if ranks.first:
            try:
                prepare_cache(folder, parent_identity(parent, dtype, recipe.top_p, recipe.most))
            except UpcycleError as fault:
                error = fault
        ranks.raise_together(error)
        return LogitCache(folder, recipe.top_p, recipe.most)

    def _engine(self, ranks: Ranks) -> Any:
        if reads_images(self.model) and any(part_name(self.model, name) != "language" for name in self.trained):
            check_reduction(self.recipe, self.stage_recipe, ranks.world_size)
        deepspeed = import_deepspeed()
        config = deepspeed_config(self.recipe, self.model, ranks.world_size)

        def optimizer(_: Any) -> torch.optim.Optimizer:
            parts = groups(self.model, self.rates)
            if self.recipe.zero_stage(ranks.world_size):  # ZeRO makes fp32 weights by itself
                return make_optimizer(self.recipe.optimizer, parts)
            made = make_optimizer(self.recipe.optimizer, with_masters(parts))
            follow_masters(made, [weight for part in parts for weight in part["params"]])
            return made

        # DeepSpeed prints while it starts, and stdout is for results.
        with redirect_stdout(io.StringIO()), expert_parallel.compatible_registry():
            engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)
        if ranks.world_size == 1 and not engine.zero_optimization_stage():
            # There are no other ranks to add gradients with. DeepSpeed would still copy all gradients into a bucket and back.
            engine.enable_backward_allreduce = False
        return engine


def check_images(recipe: TrainRecipe, stage: StageRecipe) -> None:
    """Refuse keys that do not go with data that have images.

    Raises:
        UsageError: names the key.
    """
    refused = {
        "distillation.cache": (
            stage.distillation is not None and stage.distillation.cache is not None,
            "a cache knows rows by their tokens, and other images have the same",
        ),
        "zero.stage: 3": (
            recipe.zero.stage == 3,
            "a rank whose rows have no image does not run the encoder, and the others wait",
        ),
        "expert_parallel": (recipe.expert_parallel > 1, "AutoEP replaces experts of the language model alone"),
        "adapter": (recipe.adapter is not None, "pairs of matrices are added to the language model alone"),
    }
    for key, (found, why) in refused.items():
        if found:
            raise UsageError(f"stage '{stage.name}': {key} does not go with images: {why}", hint=f"leave {key} out")


def check_reduction(recipe: TrainRecipe, stage: StageRecipe, world_size: int) -> None:
    """Refuse to add up gradients while they come, where encoder or connector train: their order depends on a rank's rows.

    DeepSpeed adds buckets of them as they are, and on a rank without an image these weights' come at other times: gradients of
    different weights would be added, without an error.

    Raises:
        UsageError: names the key.
    """
    keys = {
        "zero.stage: 2": recipe.zero_stage(world_size) == 2,
        "zero.settings.overlap_comm": bool(recipe.zero.settings.get("overlap_comm")),
    }
    key = next((key for key, found in keys.items() if found), None)
    if world_size > 1 and key:
        raise UsageError(
            f"stage '{stage.name}': {key} adds up gradients in the order in which a rank has them, and encoder or connector, which "
            "train, have theirs at other times on ranks without an image",
            hint="set zero.stage: 1, without overlap_comm",
        )


def check_objective(recipe: TrainRecipe, stage: StageRecipe, masks: bool) -> None:
    """Refuse keys of a stage that do not go with what the model predicts: masked tokens (``masks``), or the next one.

    Raises:
        UsageError: names the key.
    """
    data, distillation = recipe.data_of(stage), stage.distillation
    if data.masking and not masks:
        raise UsageError(
            f"stage '{stage.name}': data.masking is for masked language models, and {recipe.model} predicts the next token",
            hint="leave masking out",
        )
    if masks and distillation and distillation.cache:
        raise UsageError(
            f"stage '{stage.name}': distillation.cache keeps what a parent says of a row, and a row is masked anew whenever it is "
            "read",
            hint="leave cache out",
        )
