"""Describes a model that nobody described, if its FFNs are found: for ``--family auto-wrap``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from upcycle.architectures.described.family import DescribedFamily
from upcycle.architectures.described.ffn_place import DescribedModel, Reads
from upcycle.architectures.described.find_ffns import find_ffns
from upcycle.architectures.stock import build_config, empty_model, random_stock_model
from upcycle.architectures.stock_auto import ClassFacts, class_facts
from upcycle.errors import EnvironmentFault, RefusalError, UpcycleError
from upcycle.registry import FOUND

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

AUTO_WRAP = "auto-wrap"
_TOKENS, _INPUTS = 12, 2
_LOW = 8  # the number of a token that is among the first


def found_family(
    raw: Mapping[str, Any], where: str, inputs: Callable[[Any, torch.Tensor], dict[str, torch.Tensor]], free: int
) -> DescribedFamily:
    """Try a model with random weights, and return its family by the FFNs that were found; nothing of its files is read.

    Args:
        raw: its ``config.json``.
        where: its name in messages.
        inputs: what makes a model's arguments of token ids, or of seeds.
        free: bytes of memory that are free.

    Raises:
        RefusalError: what was found is not what experts can take the place of; the message says what.
        EnvironmentFault: the model does not fit in memory.
    """
    name = str(raw["model_type"])
    facts = class_facts(raw, name)
    if facts is None:
        said = (raw.get("architectures") or ["nothing"])[0]
        raise RefusalError(
            f"a {name} model cannot be tried: 'architectures' in config.json names {said}, and what it reads is not known here",
            hint="architectures must name a class of transformers that reads text, images or sounds",
        )
    # RoBERTa and its like count positions from behind the padding token: such a limit is within every other one, too.
    counts = facts.encoder and 0 <= (raw.get("pad_token_id") or 0) < _LOW
    reads = cast("Reads", facts.reads)
    FOUND[name] = DescribedModel(name, name, (), encoder=facts.encoder, reads=reads, counts_from_padding=counts)
    try:
        described, remark = _described(raw, where, facts, FOUND[name], inputs, free)
    except BaseException:
        del FOUND[name]
        raise
    FOUND[name] = described
    family = DescribedFamily(described)
    family.remark = remark
    return family


def _described(
    raw: Mapping[str, Any],
    where: str,
    facts: ClassFacts,
    known: DescribedModel,
    inputs: Callable[[Any, torch.Tensor], dict[str, torch.Tensor]],
    free: int,
) -> tuple[DescribedModel, str]:
    import torch

    from upcycle.architectures.described.finder import describe
    from upcycle.architectures.described.recorded_calls import recorded_calls

    config = build_config(raw, where)
    empty = empty_model(config, where)
    size = 4 * sum(weight.numel() for weight in empty.parameters())
    if 2 * size > free:
        raise EnvironmentFault(
            f"a {known.name} model is tried as a whole in fp32, which takes {2 * size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            hint="use a machine with more memory, or describe it (docs/develop/describe_a_model.md)",
        )
    model = random_stock_model(config, seed=0)
    seeded = facts.reads in ("images", "sounds")
    ids = torch.arange(_INPUTS)[:, None] if seeded else _tokens(config)
    try:
        calls = recorded_calls(model, inputs(model, ids))
    except UpcycleError:
        raise
    except Exception as error:  # stock models raise errors of many kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RefusalError(f"a {known.name} model cannot be tried: it does not run on {facts.reads}: {first}") from None
    described, count, remark = describe(known, calls, _activations(config))
    found, layers = find_ffns(empty, described), described.module_paths.found_in(empty).layers_in(empty)
    if not len(found) == len(layers) == count:
        raise RefusalError(
            f"a {known.name} model has FFNs of several forms in layers of one kind, or one FFN under several names: {remark}",
            hint="describe it (docs/develop/describe_a_model.md)",
        )
    return described, remark


def _tokens(config: Any) -> torch.Tensor:
    import torch

    text = getattr(config, "text_config", None) or config
    return torch.randint(int(text.vocab_size), (_INPUTS, _TOKENS), generator=torch.Generator().manual_seed(0))


def _activations(config: Any) -> list[str]:
    """Return the names of activations that a configuration has as values, at any key."""
    from transformers.activations import ACT2FN

    return [
        value for value in dict.fromkeys(v for v in config.to_dict().values() if isinstance(v, str)) if value in ACT2FN
    ]
