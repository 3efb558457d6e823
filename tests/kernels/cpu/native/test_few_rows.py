"""The compiled kernel for a few tokens: against the specification in fp64, its bits beside other tokens, and how it is had."""

from __future__ import annotations

import logging
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from expert_cases import apart, make_weights, random_ids, rounding

from upcycle.kernels.cpu import few_tokens
from upcycle.kernels.cpu.native import compile, few_rows
from upcycle.kernels.entry.process_state import forget
from upcycle.kernels.layout import reference
from upcycle.kernels.layout.expert_weights import ACTIVATIONS, ExpertWeights, unpack

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _run(x: torch.Tensor, weights: ExpertWeights, ids: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
    assert few_rows.takes(weights, ids)
    found = few_rows.few_rows_output(x, weights, ids, scores)
    assert found is not None
    return found


@needs_compiler
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("gated", "interleaved"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "hidden", "width"),
    [(1, 1, 1, 8, 8), (1, 2, 5, 37, 29), (5, 3, 3, 64, 17), (9, 1, 2, 131, 5), (16, 4, 64, 48, 40), (7, 2, 2, 3, 1)],
)
def test_the_specification(
    tokens: int, top_k: int, experts: int, hidden: int, width: int, gated: bool, interleaved: bool, dtype: torch.dtype
) -> None:
    weights = make_weights("stacked", gated, dtype=dtype, experts=experts, hidden=hidden, width=width)
    if interleaved:
        weights = unpack(weights, interleaved=True)
    ids = random_ids(tokens, top_k, experts, seed=tokens)
    x = torch.randn(tokens, hidden).to(dtype)
    scores = torch.rand(tokens, top_k)
    exact = replace(weights, up=weights.up.double(), down=weights.down.double())
    for given in (scores, None):
        expected = reference.experts_output(x.double(), exact, ids, given)
        assert apart(_run(x, weights, ids, given), expected) < rounding(dtype, hidden + width)


@needs_compiler
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str) -> None:
    weights = make_weights(activation=activation, dtype=torch.float32, hidden=16, width=24)
    x, ids = 4 * torch.randn(3, 16), random_ids(3, 2, 5)
    exact = replace(weights, up=weights.up.double(), down=weights.down.double())
    assert apart(_run(x, weights, ids, None), reference.experts_output(x.double(), exact, ids)) < rounding(x.dtype, 40)
    x[1, 3] = torch.nan
    assert _run(x, weights, ids, None).isnan().any(1).tolist() == [False, True, False]


@needs_compiler
@pytest.mark.usefixtures("threads", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_has_the_same_bits_beside_others_and_on_any_number_of_threads(dtype: torch.dtype) -> None:
    weights = make_weights(dtype=dtype, experts=4, hidden=331, width=203)
    ids, scores = random_ids(13, 3, 4), torch.rand(13, 3)
    x = torch.randn(13, 331).to(dtype)
    torch.set_num_threads(1)
    alone = torch.cat([_run(x[t : t + 1], weights, ids[t : t + 1], scores[t : t + 1]) for t in range(13)])
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert torch.equal(_run(x, weights, ids, scores), alone)


@needs_compiler
@pytest.mark.usefixtures("poisoned")
def test_of_dropped_slots_nothing_is_read() -> None:
    weights = make_weights(dtype=torch.float32)
    weights.up[2:].fill_(torch.nan)
    ids = torch.tensor([[0, 5], [9, 1], [5, 7]])
    scores = torch.tensor([[0.5, torch.nan], [torch.inf, 0.25], [torch.nan, torch.nan]])
    x = torch.randn(3, 12)
    found = _run(x, weights, ids, scores)
    assert torch.equal(found[:2], _run(x[:2], weights, torch.tensor([[0], [1]]), torch.tensor([[0.5], [0.25]])))
    assert not found[2].any()


@needs_compiler
def test_wrong_ids_are_left_to_who_can_explain_them() -> None:
    weights, x = make_weights(dtype=torch.float32), torch.randn(1, 12)
    assert few_rows.few_rows_output(x, weights, torch.tensor([[0, -1]]), None) is None


@needs_compiler
def test_memory_that_was_given_back_is_not_read() -> None:
    """As of weights that are divided among ranks between two uses: their shape stays, their memory does not."""
    weights, x = make_weights(dtype=torch.float32), torch.randn(1, 12)
    ids = torch.tensor([[0, 1]])
    assert few_rows.few_rows_output(x, weights, ids, None) is not None
    weights.up.untyped_storage().resize_(0)
    assert few_rows.few_rows_output(x, weights, ids, None) is None


@needs_compiler
def test_strided_inputs() -> None:
    weights = make_weights(dtype=torch.float32)
    x, ids = torch.randn(12, 4).T, random_ids(6, 4, 5)[::2, ::2].int()
    ids, x = ids[:3], x[:3]
    assert torch.equal(_run(x, weights, ids, None), _run(x.contiguous(), weights, ids.contiguous().long(), None))
    assert not few_rows.takes(replace(weights, up=weights.up.transpose(1, 2).contiguous().transpose(1, 2)), ids)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Path]:
    """An empty place for what is compiled, and nothing known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    caplog.set_level(logging.INFO, "upcycle.kernels")
    monkeypatch.setattr(compile, "ALWAYS", ("-O0", "-std=c++17", "-fPIC", "-shared"))  # takes a second, not six
    forget()
    yield tmp_path / "upcycle"
    forget()


@needs_compiler
def test_it_is_compiled_once_and_kept_where_others_cannot_write(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert few_rows.few_rows() is not None
    (library,) = fresh.glob("*.so")
    assert stat.S_IMODE(fresh.stat().st_mode) == stat.S_IMODE(library.stat().st_mode) == 0o700
    forget()
    monkeypatch.setattr(compile, "_compile", lambda *_: pytest.fail("compiled again"))
    assert few_rows.few_rows() is not None


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize("what", ["folder", "library"])
def test_what_others_could_have_written_is_not_loaded(what: str, fresh: Path) -> None:
    assert few_rows.few_rows() is not None
    (library,) = fresh.glob("*.so")
    library.unlink()  # what is loaded stays
    library.write_bytes(b"not a library")
    (fresh if what == "folder" else library).chmod(0o777)
    forget()
    assert few_rows.few_rows() is not None


@pytest.mark.long
@needs_compiler
def test_a_cut_library_is_never_run_and_made_again(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def compile_quickly(*arguments: object) -> None:
        made.append(arguments)
        compile_it(*arguments)  # type: ignore[arg-type]

    compile_it = compile._compile
    assert few_rows.few_rows() is not None
    (library,) = fresh.glob("*.so")
    whole, (digest,) = library.read_bytes(), fresh.glob("*.sha256")
    monkeypatch.setattr(compile, "_compile", compile_quickly)
    # A copy is damaged and put in its place: what is loaded is the file that was there before.
    for damaged in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        (fresh / "damaged").write_bytes(damaged)
        (fresh / "damaged").chmod(0o700)
        (fresh / "damaged").replace(library)
        assert not compile._whole(library)
    digest.unlink()
    forget()
    assert few_rows.few_rows() is not None
    assert len(made) == 1
    assert compile._whole(library)


@needs_compiler
def test_a_user_without_a_home_has_it_for_the_time_being(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(compile, "cache_folder", lambda: None)
    assert few_rows.few_rows() is not None
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("UPCYCLE_COMPILE", "0", "UPCYCLE_COMPILE is 0"),
        ("CXX", "/no/such/compiler", "/no/such/compiler does not run"),
        ("PATH", "", "there is no C++ compiler"),
    ],
)
def test_without_it_torch_multiplies_and_says_why(
    variable: str,
    value: str,
    reason: str,
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(variable, value)
    weights, x, ids = make_weights(dtype=torch.float32), torch.randn(2, 12), random_ids(2, 2, 5)
    exact = replace(weights, up=weights.up.double(), down=weights.down.double())
    found = few_tokens.forward(x, weights, ids, None)
    assert apart(found, reference.experts_output(x.double(), exact, ids)) < rounding(torch.float32, 20)
    assert reason in caplog.text
    assert not fresh.exists() or not list(fresh.iterdir())


def test_a_compiler_that_fails_leaves_nothing(
    fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    script = tmp_path / "compiler"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit 0\necho "line 7: no" >&2; exit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert few_rows.few_rows() is None
    assert "does not compile few_rows.cpp: line 7: no" in caplog.text
    assert not list(fresh.iterdir())
