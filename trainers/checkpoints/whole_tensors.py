"""Gathers whole weights and optimizer states from a DeepSpeed engine, under the stock model's names, and sets them.

However ZeRO and expert parallelism divide the model, a checkpoint made of whole tensors is the same. So it can be continued
under another division and on another number of ranks. E experts, F intermediate, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn

from upcycle.adapters.live import adapter_of
from upcycle.registry import load
from upcycle.trainers.distributed import expert_parallel
from upcycle.trainers.distributed.gathering import gathered, shape_of
from upcycle.trainers.optimizing.master_weights import stepped_on
from upcycle.trainers.routing.router_control import NOISE_WEIGHT


@dataclass(frozen=True)
class StockTensor:
    """One tensor of the stock model, and the engine's tensors that it is made of.

    ``divided``: each rank holds some of its experts.
    """

    name: str
    parts: tuple[torch.Tensor, ...]
    divided: bool = False

    @property
    def trained(self) -> bool:
        """Whether the optimizer trains it, and keeps states of it."""
        return all(isinstance(part, nn.Parameter) and part.requires_grad for part in self.parts)

    @property
    def exported(self) -> bool:
        """Whether the stock class has it. The weights of learned router noise exist in training alone."""
        return not self.name.endswith(f".{NOISE_WEIGHT}")


class WholeTensors:
    """Reads and sets whole tensors of an engine. All ranks must call every method, in the same order."""

    def __init__(self, engine: Any, keys: Sequence[str]) -> None:
        """``keys``: names of the states that the optimizer keeps of every parameter, such as ``exp_avg``."""
        self.engine, self.keys = engine, tuple(keys)
        held = adapter_of(engine.module)
        kept = None if held is None else set(held.names)  # of a model with an adapter, the adapter alone is kept
        self.stock_tensors = [each for each in _stock_tensors(engine.module) if kept is None or each.name in kept]

    def shape(self, tensor: StockTensor) -> tuple[int, ...]:
        """The whole tensor's shape."""
        shapes = [shape_of(part) for part in tensor.parts]
        if not tensor.divided:
            return shapes[0]
        experts, _, *rest = shapes[0]
        return (experts * self._share(tensor)[1], sum(shape[1] for shape in shapes), *rest)

    @torch.no_grad()
    def weights(self, tensor: StockTensor) -> torch.Tensor:
        """The whole tensor, on this rank's device. What trains is fp32, even if the model computes in bfloat16."""
        return self._joined(tensor, [self._weights(part) for part in tensor.parts])

    @torch.no_grad()
    def state(self, tensor: StockTensor, key: str) -> torch.Tensor:
        """One of the optimizer's states of a tensor, whole and fp32."""
        return self._joined(tensor, [self._state(part, key) for part in tensor.parts])

    @torch.no_grad()
    def set_weights(self, tensor: StockTensor, value: torch.Tensor) -> None:
        """Set the fp32 weights that the optimizer steps on; the model's own weights were set when it was loaded."""
        from deepspeed.utils import safe_set_full_fp32_param

        for part, piece in zip(tensor.parts, self._pieces(tensor, value), strict=True):
            if _is_mapped(part):
                safe_set_full_fp32_param(part, piece.to(part.device, torch.float32))
            elif (master := stepped_on(part)) is not part:
                master.copy_(piece)

    @torch.no_grad()
    def set_state(self, tensor: StockTensor, key: str, value: torch.Tensor) -> None:
        """Set one of the optimizer's states of a tensor, after :meth:`create_states`."""
        from deepspeed.utils import safe_set_full_optimizer_state

        for part, piece in zip(tensor.parts, self._pieces(tensor, value), strict=True):
            if _is_mapped(part):
                safe_set_full_optimizer_state(part, piece.to(part.device, torch.float32), key)
            else:
                self.engine.optimizer.state[stepped_on(part)][key].copy_(piece)

    def create_states(self, steps: int) -> None:
        """Create the states that the optimizer would create at its first step, all zero, and set its step count to ``steps``."""
        outer = self.engine.optimizer
        inner = getattr(outer, "optimizer", outer)
        for flat in _masters(outer):
            state = inner.state[flat]
            for key in self.keys:
                state[key] = torch.zeros_like(flat)
            if "exp_avg" in self.keys:
                by_deepspeed = type(inner).__module__.startswith("deepspeed")
                device = flat.device if inner.defaults.get("fused") else "cpu"
                state["step"] = steps if by_deepspeed else torch.tensor(float(steps), device=device)
        self.link_states()

    def link_states(self) -> None:
        """Link every parameter to its part of the optimizer's flat states.

        DeepSpeed 0.19 does this only once, after the first parameter group has stepped, when the others have no states yet.
        """
        outer = self.engine.optimizer
        if hasattr(outer, "_lazy_init_hp_params_optimizer_state"):
            outer._hp_optimizer_states_linked = False
            outer._lazy_init_hp_params_optimizer_state()

    @property
    def steps_taken(self) -> int:
        """How many steps the optimizer has taken; 0 if it has no states."""
        outer = self.engine.optimizer
        state = getattr(outer, "optimizer", outer).state
        counts = [int(each["step"]) if "step" in each else 1 for each in state.values() if each]
        return max(counts, default=0)

    def _weights(self, part: torch.Tensor) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        if _is_mapped(part) and part.requires_grad:
            full: torch.Tensor = safe_get_full_fp32_param(part)
            return full.view(shape_of(part))
        with gathered(part):
            return stepped_on(part).detach().clone()

    def _state(self, part: torch.Tensor, key: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not _is_mapped(part):
            state: torch.Tensor | None = self.engine.optimizer.state[stepped_on(part)].get(key)
            # No gradient ever reached it, as of routers whose experts always weigh 1, so that the optimizer never saw it.
            return torch.zeros_like(part, dtype=torch.float32) if state is None else state
        full: torch.Tensor = safe_get_full_optimizer_state(part, key)
        return full.view(shape_of(part))

    def _joined(self, tensor: StockTensor, parts: list[torch.Tensor]) -> torch.Tensor:
        mine = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if not tensor.divided:
            return mine
        group, world_size, _ = self._share(tensor)
        mine = mine.contiguous()
        everyone = [torch.empty_like(mine) for _ in range(world_size)]
        distributed.all_gather(everyone, mine, group=group)
        return torch.cat(everyone)

    def _pieces(self, tensor: StockTensor, value: torch.Tensor) -> list[torch.Tensor]:
        if not tensor.divided:
            return [value]
        _, world_size, rank = self._share(tensor)
        return [piece.contiguous() for piece in value.chunk(world_size)[rank].chunk(len(tensor.parts), dim=1)]

    def _share(self, tensor: StockTensor) -> tuple[Any, int, int]:
        """The group of ranks that a tensor's experts are divided among, its size, and this rank's place in it."""
        from deepspeed.utils import groups

        group = groups._get_expert_parallel_group(tensor.parts[0].group_name)  # type: ignore[attr-defined]
        return group, distributed.get_world_size(group), distributed.get_rank(group)


def _stock_tensors(module: Any) -> Iterator[StockTensor]:
    parameters = dict(module.named_parameters())
    stock = {name: name for name in parameters}  # engine's name -> stock name; AutoEP's own parameters are taken out
    computed: set[str] = set()
    for prefix, block in module.named_modules():
        if not expert_parallel.is_parallel(block):
            continue
        router = load("target", module.config.model_type).router
        for name, sources in expert_parallel.stock_names(prefix, router).items():
            # AutoEP's router may be listed under its stock name, an alias.
            alias = name.replace(f"{prefix}.{router}.", f"{prefix}.{router}.gate.")
            held = [source if source in parameters else alias for source in sources]
            yield StockTensor(name, tuple(parameters[each] for each in held), divided=".experts." in name)
            for each in held:
                del stock[each]
        stock |= {name: _shared(name) for name in stock if name.startswith(f"{prefix}.shared_experts")}
        computed.update(f"{prefix}.{name}" for name, _ in block.named_buffers(recurse=False))
    for name, stored in stock.items():
        yield StockTensor(stored, (parameters[name],))
    persistent = set(module.state_dict(keep_vars=True)) - set(parameters) - computed
    for name, buffer in module.named_buffers():
        if name in persistent:
            yield StockTensor(name, (buffer,))


def _shared(name: str) -> str:
    """The stock name of a shared expert's weight: AutoEP says ``shared_experts`` where its targets say ``shared_expert``."""
    return name.replace(".shared_experts_gate.", ".shared_expert_gate.").replace(".shared_experts.", ".shared_expert.")


def _is_mapped(part: torch.Tensor) -> bool:
    """Whether ZeRO keeps the fp32 weights and states of a parameter in flat tensors of its own."""
    return hasattr(part, "ds_id") or hasattr(part, "_hp_mapping")


def _masters(optimizer: Any) -> list[torch.Tensor]:
    """The fp32 tensors that the optimizer steps on: ZeRO's flat ones, or the parameters themselves."""
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
