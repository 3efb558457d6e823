"""A newcomer gets from a checkpoint to a published model by what the screen says, without a step that it did not name."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

import pytest
from hub_server import TOKEN, HubServer
from journeys import JOURNEYS, Journey, Unnamed, walk

MINUTES = 15  # on two cores


@pytest.mark.slow
@pytest.mark.parametrize("title", JOURNEYS)
def test_a_journey_ends_with_a_published_model(title: str, tmp_path: Path) -> None:
    began = monotonic()
    with HubServer().running() as hub:
        journey = walk(title, tmp_path, hub.url, TOKEN)
        (repo,) = hub.repos
    assert repo.startswith("alice/")
    assert "Traceback" not in journey.seen
    assert str(Path.home()) not in journey.seen
    assert monotonic() - began < 60 * MINUTES


def test_a_command_that_nothing_named_is_noticed(tmp_path: Path) -> None:
    journey = Journey("nothing", tmp_path, {})
    journey.seen = "next  upcycle report half\n"
    with pytest.raises(Unnamed, match="upcycle train"):
        journey.named("^upcycle train")
    with pytest.raises(Unnamed, match="again"):
        journey.again("--dry-run")
