"""What a method decides for one layer: which neurons each expert takes, how the experts are weighted, the router.

Blueprints are saved beside the output (``blueprint.safetensors``), so that a conversion can be inspected, plotted and
built again without its method.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, Literal

import torch

from upcycle.errors import CheckpointError
from upcycle.ffn.form import MATRICES
from upcycle.ffn.router_network import LINEAR, RouterForm, RouterNetwork, Routes
from upcycle.files.formats.parsing import parse_json
from upcycle.files.formats.tensor_files import SafetensorsFile
from upcycle.files.formats.tensor_spec import CODES, ITEM_SIZE

ZERO_NEURON = -1
DOWN_ONLY = (0.0, 0.0, 1.0)
_BLOCK_BYTES = 1 << 24
# The numbers of an ExpertSpec and their defaults, which are not written.
_OF_EXPERTS = {"source": None, "scale": 1.0, "noise": 0.0}


@dataclass(frozen=True)
class ExpertSpec:
    """One expert: int64 ``[m]`` neuron indices into the dense FFN; ``ZERO_NEURON`` stands for a neuron of zeros.

    ``fresh`` (bool ``[3, m]``: gate, up, down; the first row says nothing of an FFN without a gate) marks the neurons whose
    weights are re-initialised, by the layer's ``Draws``. ``source`` says which model's FFN it is taken from, where several are
    mixed: an index into the recipe's sources, or their number for the recipe's ``source`` itself. ``scale`` multiplies what
    this expert adds: its down projection and down bias. ``noise`` is the standard deviation of normal noise on its gate, up
    and down.
    """

    neurons: torch.Tensor
    fresh: torch.Tensor | None = None
    source: int | None = None
    scale: float = 1.0
    noise: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether it consists of the layer's own neurons, unchanged."""
        return self.fresh is None and self.source is None and self.scale == 1 and not self.noise


@dataclass(frozen=True)
class Draws:
    """How a layer's random weights are drawn when they are built; ``seed`` makes every build the same.

    The new weights of fresh neurons are normal, with the mean and standard deviation of those they replace in their matrix
    (``statistics``), or with mean 0 and the deviation ``std`` (``initializer``; ``None`` until the model's own is known).
    ``noise`` is added to every routed expert's matrices, as a fraction of each one's standard deviation.
    """

    seed: int
    rule: Literal["statistics", "initializer"] = "statistics"
    std: float | None = None
    noise: float = 0.0


@dataclass(frozen=True)
class LayerBlueprint:
    """One MoE layer before its weights exist; or a pruned FFN, which is one shared expert and has no routed ones.

    ``scale`` multiplies what the routed experts' neurons add: gate, up and down by its powers ``spread``, which is the down
    projection alone unless a method says otherwise. ``router`` is fp32 ``[E, d]``; it is ``None`` until a router initialiser
    has filled it in. A router with a hidden layer has ``router`` ``[E, H]`` and ``router_hidden`` ``[H, d]``; ``router_form`` says
    how both are used, and ``rule`` what its logits mean, where that is not the usual top-k of a softmax. (The rule is not saved:
    it is the recipe's.) ``down`` ``[d, (S + E) * m]`` replaces the dense down projection where a refit changed it: one column
    for each of :attr:`neurons`; so do ``gate`` and ``up`` ``[(S + E) * m, d]`` where a reconstruction did. ``draws`` is there
    where weights are random.
    """

    layer: int
    routed: tuple[ExpertSpec, ...]
    top_k: int
    scale: float
    shared: tuple[ExpertSpec, ...] = ()
    router: torch.Tensor | None = field(default=None, compare=False)
    down: torch.Tensor | None = field(default=None, compare=False)
    gate: torch.Tensor | None = field(default=None, compare=False)
    up: torch.Tensor | None = field(default=None, compare=False)
    spread: tuple[float, float, float] = DOWN_ONLY
    draws: Draws | None = None
    router_hidden: torch.Tensor | None = field(default=None, compare=False)
    router_form: RouterForm = LINEAR
    rule: Routes | None = field(default=None, compare=False)

    @property
    def network(self) -> RouterNetwork:
        """The router, which must be there."""
        assert self.router is not None
        return RouterNetwork(self.router, self.router_hidden, self.router_form)

    @property
    def plain_scale(self) -> float:
        """The ``scale`` at which the layer is the plain sum of its shared experts and those that run, if these weigh the same."""
        return float(self.top_k) if self.rule is None else 1 / self.rule.equal_weight(len(self.routed))

    @property
    def intermediate_size(self) -> int:
        """Neurons per expert."""
        return len((self.routed or self.shared)[0].neurons)

    def fitted(self, name: str) -> torch.Tensor | None:
        """Return the projection ``gate``, ``up`` or ``down`` that was fitted in the dense one's place, if one was."""
        return {"gate": self.gate, "up": self.up, "down": self.down}.get(name)

    @property
    def neurons(self) -> torch.Tensor:
        """Int64 ``[(S + E) * m]``: the neurons of all experts, shared experts first; one that two experts hold is there twice."""
        return torch.cat([expert.neurons for expert in self.shared + self.routed])


def save_blueprint(path: Path, blueprint: LayerBlueprint, report: Mapping[str, Any] | None = None) -> None:
    """Write one layer: int32 ``layers.L.routed`` ``[E, m]``, ``layers.L.shared`` ``[S, m]``, fp32 ``layers.L.router``,
    ``layers.L.down`` where there was a refit, ``layers.L.gate`` and ``layers.L.up`` where there was a reconstruction, and bool
    ``layers.L.routed_fresh`` ``[E, 3, m]`` (``shared_fresh``) where weights are re-initialised, fp32 ``layers.L.router_hidden``
    where the router has a hidden layer. ``report`` holds what was
    measured of the layer, as plain data.
    """
    from safetensors.torch import save

    prefix = f"layers.{blueprint.layer}"
    tensors: dict[str, torch.Tensor] = {}
    for kind, experts in (("routed", blueprint.routed), ("shared", blueprint.shared)):
        if experts:
            tensors[f"{prefix}.{kind}"] = torch.stack([e.neurons for e in experts]).to(torch.int32)
        fresh = [e.fresh for e in experts if e.fresh is not None]
        if fresh:
            tensors[f"{prefix}.{kind}_fresh"] = torch.stack(fresh)
    tensors |= {
        f"{prefix}.{name}": weight.float().contiguous()
        for name, weight in (("router", blueprint.router), ("router_hidden", blueprint.router_hidden))
        if weight is not None
    }
    tensors |= {
        f"{prefix}.{name}": fitted.contiguous() for name in MATRICES if (fitted := blueprint.fitted(name)) is not None
    }
    numbers: dict[str, Any] = {"top_k": blueprint.top_k, "scale": blueprint.scale, "report": dict(report or {})}
    if blueprint.router_form != LINEAR:
        numbers["router_form"] = asdict(blueprint.router_form)
    if blueprint.spread != DOWN_ONLY:
        numbers["spread"] = list(blueprint.spread)
    for kind, experts in (("routed", blueprint.routed), ("shared", blueprint.shared)):
        for key, usual in _OF_EXPERTS.items():
            if any(getattr(expert, key) != usual for expert in experts):
                numbers[f"{kind}_{key}"] = [getattr(expert, key) for expert in experts]
    if blueprint.draws is not None:
        numbers["draws"] = asdict(blueprint.draws)
    header = {"layers": {str(blueprint.layer): numbers}}
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(save(tensors, metadata={"upcycle": json.dumps(header, sort_keys=True)}))
    temporary.rename(path)  # a reader finds the whole file or none


def join_blueprints(paths: list[Path], out: Path, recipe: Mapping[str, Any]) -> None:
    """Join the files of single layers into one at ``out``, block by block, and add the recipe."""
    files = [BlueprintFile(path) for path in paths]
    layers = {name: numbers for file in files for name, numbers in file.header["layers"].items()}
    header: dict[str, Any] = {
        "__metadata__": {"upcycle": json.dumps({"layers": layers, "recipe": dict(recipe)}, sort_keys=True)}
    }
    # The widest dtypes come first: then every tensor begins at a multiple of its item size.
    entries = [(file, name, spec) for file in files for name, spec in file.tensors.specs.items()]
    entries.sort(key=lambda entry: -ITEM_SIZE[entry[2].dtype])
    position = 0
    for _, name, spec in entries:
        offsets = [position, position + spec.nbytes]
        header[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        position += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with out.open("wb") as joined:
        joined.write(len(text).to_bytes(8, "little") + text)
        for file, name, _ in entries:
            for block in file.tensors.chunks(name, _BLOCK_BYTES):
                joined.write(block.contiguous().view(-1).view(torch.uint8).numpy().data)


class BlueprintFile:
    """A saved blueprint, of one layer or of all; a layer is read when it is asked for.

    Raises:
        CheckpointError: the file is missing, damaged, or not a blueprint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.tensors = SafetensorsFile(path)
            self.header: dict[str, Any] = parse_json(self.tensors.metadata["upcycle"], "its header")
            self.layers = sorted(map(int, self.header["layers"]))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing", hint="a blueprint is written beside every conversion") from None
        except (KeyError, ValueError, CheckpointError, IsADirectoryError) as error:
            raise CheckpointError(f"{path} is not a blueprint: {error}") from None

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe that the blueprint was made by, without its source."""
        recipe: dict[str, Any] = self.header["recipe"]
        return recipe

    @property
    def reports(self) -> list[dict[str, Any]]:
        """What calibration measured, one entry per layer in order; empty where nothing was calibrated."""
        reports = (self.header["layers"][str(layer)]["report"] for layer in self.layers)
        return [report for report in reports if report]

    def shape(self, layer: int) -> tuple[int, int, int]:
        """Return the number of routed experts, of shared experts, and of neurons in each."""
        found = [self.tensors.specs.get(f"layers.{layer}.{kind}") for kind in ("routed", "shared")]
        routed, shared = (spec.shape[0] if spec else 0 for spec in found)
        return routed, shared, next(spec.shape[1] for spec in found if spec)

    def layer(self, layer: int) -> LayerBlueprint:
        """Read one layer's blueprint."""
        numbers = self.header["layers"][str(layer)]
        found = {
            kind: self.tensors.read(f"layers.{layer}.{kind}")
            for kind in ("routed", "shared", "router", "router_hidden", *MATRICES, "routed_fresh", "shared_fresh")
            if f"layers.{layer}.{kind}" in self.tensors.specs
        }
        return LayerBlueprint(
            layer,
            routed=_specs("routed", found, numbers),
            shared=_specs("shared", found, numbers),
            top_k=numbers["top_k"],
            scale=numbers["scale"],
            router=found.get("router"),
            down=found.get("down"),
            gate=found.get("gate"),
            up=found.get("up"),
            spread=tuple(numbers.get("spread", DOWN_ONLY)),
            draws=Draws(**numbers["draws"]) if "draws" in numbers else None,
            router_hidden=found.get("router_hidden"),
            router_form=RouterForm(**numbers.get("router_form", {})),
        )


def _specs(kind: str, found: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]) -> tuple[ExpertSpec, ...]:
    if kind not in found:
        return ()
    neurons, fresh = found[kind], found.get(f"{kind}_fresh")
    specs = [ExpertSpec(row.long(), None if fresh is None else fresh[i]) for i, row in enumerate(neurons)]
    for key in _OF_EXPERTS:
        if values := numbers.get(f"{kind}_{key}"):
            specs = [replace(spec, **{key: value}) for spec, value in zip(specs, values, strict=True)]
    return tuple(specs)


# The recipe's keys that say how layers are decided and built. All others are the user's own: whether and on what the result is
# verified, and which models and tokenizer it is made from.
_BROUGHT = {
    "method",
    "parameters",
    "experts",
    "top_k",
    "shared",
    "active",
    "pieces",
    "width",
    "always_on",
    "shared_unheld",
    "layers",
    "router",
    "routing",
    "calibration",
    "refit",
    "reconstruction",
    "scale",
    "pad",
    "target",
    "layout",
    "dtype",
    "max_shard_size",
    "seed",
}


def blueprint_recipe(path: Path) -> dict[str, Any]:
    """Return the part of a saved blueprint's recipe that says how its layers were decided.

    Its calibration texts are names of files that were read elsewhere, without their folders: none of them is opened.

    Raises:
        CheckpointError: the file is missing, damaged, or not a blueprint.
    """
    try:
        recipe = dict(BlueprintFile(path).recipe)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path} holds no recipe", hint="name the blueprint.safetensors that lies beside a conversion"
        ) from None
    if (recipe.get("projections") or {}).get("experts"):
        raise CheckpointError(
            f"{path} is of a conversion whose attention became experts, too, and does not hold what these learnt",
            hint="convert again from recipe.yaml",
        )
    found = {key: value for key, value in recipe.items() if key in _BROUGHT}
    texts = found.get("calibration")
    if isinstance(texts, dict) and texts.get("text"):
        named = texts["text"] if isinstance(texts["text"], list) else [texts["text"]]
        found["calibration"] = {
            **texts,
            "text": [PurePath(str(name)).name if _is_path(name) else name for name in named],
        }
    return found


def _is_path(name: Any) -> bool:
    """Whether a calibration text is named by a path, and not as an embedded text or a dataset of the hub."""
    return not isinstance(name, str) or name.startswith(("/", ".", "~")) or "\\" in name or bool(PurePath(name).suffix)
