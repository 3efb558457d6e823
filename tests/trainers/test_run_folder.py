"""One run per folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from upcycle.errors import EnvironmentFault, UpcycleError
from upcycle.trainers.data import Batch
from upcycle.trainers.distributed import Ranks
from upcycle.trainers.run_folder import locked, save_batches

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_a_second_run_is_kept_out_until_the_first_has_ended(tmp_path: Path) -> None:
    first = locked(tmp_path / "run", ALONE)
    with first, pytest.raises(UpcycleError, match="another run is writing"), locked(tmp_path / "run", ALONE):
        pass
    with locked(tmp_path / "run", ALONE):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot write"), locked(tmp_path / "file" / "run", ALONE):
        pass


def test_what_was_read_is_kept(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    ids = torch.arange(6).view(2, 3)
    batch = Batch(ids, ids > 0, ids % 3, ("a", "b"))
    found = load_file(save_batches(tmp_path, 7, 1, [batch, batch]))
    assert set(found) == {f"{name}.{number}" for name in ("ids", "mask", "positions") for number in (0, 1)}
    assert torch.equal(found["ids.1"], ids)
    assert torch.equal(found["mask.0"], ids > 0)
