"""Says which experts a layer will probably need before it is reached: its router, applied to the state that is there already.

The stream changes little from layer to layer, so that the next layer's router mostly chooses from the present layer's input what it
will choose from its own (Eliseev & Mazur, arXiv 2312.17238, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch

from upcycle.trainers.routing.stock_routers import RouterPlace, bias_argument, find_routers, moe_layers, selection_bias


class ExpectedExperts:
    """Asks the routers of a model. Of one whose routers are not known, nothing is expected.

    Args:
        model: the stock model, with its routers' weights.
        paths: the modules of experts, in the order of the layers.
    """

    def __init__(self, model: Any, paths: list[str]) -> None:
        places = {id(place.block): place for place in find_routers(model)}
        rules = {id(layer.block): layer.rule for layer in _readable(model)}
        blocks = [model.get_submodule(path.rpartition(".")[0]) for path in paths]
        self._places = [places.get(id(block)) for block in blocks]
        self._rules = [rules.get(id(block)) for block in blocks]

    def top_k(self) -> int:
        """Return how many experts a token has; 2 where that is not said."""
        said = [getattr(place.router, "top_k", None) for place in self._places if place is not None]
        return max((k for k in said if isinstance(k, int)), default=2)

    @torch.no_grad()
    def of(self, layer: int, state: torch.Tensor) -> list[int]:
        """Return the experts of a layer that tokens ``[T, d]`` will probably have, the likeliest first."""
        place = self._places[layer] if layer < len(self._places) else None
        if place is None:
            return []
        logits = _logits(place, state)
        if logits is None:
            return []
        rule = self._rules[layer]
        chosen = logits.topk(self.top_k(), dim=-1).indices if rule is None else rule.route(logits)[1]
        return list(dict.fromkeys(chosen.t().flatten().tolist()))


def _readable(model: Any) -> Any:
    from upcycle.errors import UsageError

    try:
        return moe_layers(model)
    except UsageError:  # routers that choose within groups: their logits alone are a guess, too
        return []


def _logits(place: RouterPlace, state: torch.Tensor) -> torch.Tensor | None:
    """Return a router's logits ``[T, E]``, without its hooks: who watches routers must not see guesses."""
    run = type(place.router).forward
    handed = bias_argument(place.router)
    output = run(place.router, state, **({handed: selection_bias(place.block, place.router)} if handed else {}))
    first = output[0] if isinstance(output, tuple) else output
    return first if isinstance(first, torch.Tensor) and first.is_floating_point() else None
