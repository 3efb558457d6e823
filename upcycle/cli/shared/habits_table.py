"""The tables of what routers follow."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upcycle.evaluation.routing_habits import RoutingHabits


def habit_tables(habits: RoutingHabits) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, columns and rows of each table: of all layers, and of earlier models if there are any."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.1%}"

    rows = [
        [
            str(each.layer),
            share(each.by_token),
            share(each.by_majority),
            "" if each.information is None else f"{each.information:.3f}",
            share(each.dropped),
            *map(share, each.dropped_by_part),
        ]
        for each in habits.layers
    ]
    columns = [
        "layer",
        "by token",
        "by majority",
        "information",
        "dropped",
        *(f"fifth {n + 1}" for n in range(len(habits.layers[0].dropped_by_part))),
    ]
    about = (
        f"\nfirst experts of {habits.seen_tokens:,} tokens as their ids say, and choices without room at capacity "
        f"{habits.capacity_factor:g} in windows of {habits.window}"
    )
    tables = [(about, columns, rows)]
    if habits.earlier:
        steps = [
            [
                each.model if each.step is None else f"step {each.step:,}",
                share(each.same),
                *map(share, each.layers),
            ]
            for each in habits.earlier
        ]
        layers = [f"layer {each.layer}" for each in habits.layers]
        tables.append(("\nfirst experts that an earlier model chose, too", ["model", "all", *layers], steps))
    return tables
