"""The text of an added expert: some of either side judges, however short it is."""

from __future__ import annotations

import pytest
import torch

from upcycle.calibration.compressing.fit_added import judging_tokens


@pytest.mark.parametrize(
    ("windows", "judging"),
    [
        (16, [*range(7 * 16, 8 * 16), *range(15 * 16, 16 * 16)]),  # every eighth
        (8, [*range(7 * 16, 8 * 16)]),
        (7, [*range(98, 112)]),  # an eighth of 112 tokens
        (1, [14, 15]),
    ],
)
def test_some_tokens_of_every_text_judge(windows: int, judging: list[int]) -> None:
    assert judging_tokens(torch.zeros(windows, 16)).nonzero().flatten().tolist() == judging
