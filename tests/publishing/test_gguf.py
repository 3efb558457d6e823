"""GGUF files are llama.cpp's own: here stand-ins of its two programs say how they were called."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from upcycle.cli.main import cli
from upcycle.errors import EnvironmentFault, RefusalError, UpcycleError, UsageError
from upcycle.publishing.gguf import CONVERTED, QUANTIZED, export_gguf

CONVERTER = """
import sys
if "--outtype" not in sys.argv: sys.exit(3)
kind, out = sys.argv[sys.argv.index("--outtype") + 1], sys.argv[sys.argv.index("--outfile") + 1]
if kind == "f16":
    print("ERROR:hf-to-gguf:Model MixtralForCausalLM is not supported", file=sys.stderr); sys.exit(1)
open(out, "w").write(f"GGUF {sys.argv[1]} {kind}")
"""
QUANTIZER = """
import sys
source, out, kind, threads = sys.argv[1:]
assert int(threads) > 0 and open(source).read().startswith("GGUF")
if kind == "IQ1_S":
    print("this quantization requires an imatrix!", file=sys.stderr); sys.exit(1)
open(out, "w").write(open(source).read() + f" {kind}")
"""


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "llama.cpp"
    (folder / "build" / "bin").mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    quantizer = folder / "build" / "bin" / "llama-quantize"
    quantizer.write_text(f"#!{sys.executable}\n{QUANTIZER}")
    quantizer.chmod(0o755)
    monkeypatch.setenv("LLAMA_CPP", str(folder))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return folder


@pytest.fixture
def model(pico_moe: Callable[..., Path]) -> Path:
    return pico_moe("mixtral")


@pytest.mark.parametrize(("kind", "words"), [("q8_0", "q8_0"), ("q4_k_m", "f32 Q4_K_M"), ("Q6_K", "f32 Q6_K")])
def test_both_programs_are_called_with_llama_cpps_names(
    kind: str, words: str, llama_cpp: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.gguf"
    result = CliRunner().invoke(cli, ["export", "--gguf", str(model), str(out), "--type", kind, "--json"])
    assert result.exit_code == 0, result.output
    assert out.read_text() == f"GGUF {model} {words}"
    assert json.loads(result.output) == {"out": str(out), "type": kind.lower(), "bytes": out.stat().st_size}
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    with pytest.raises(UsageError, match="is there already"):
        export_gguf(model, out)
    export_gguf(model, out, type="bf16", overwrite=True)
    assert out.read_text() == f"GGUF {model} bf16"


def test_what_is_missing_or_refused_is_said(
    llama_cpp: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "m.gguf"

    def refused(kind: type[UpcycleError], words: str, hint: str, source: Path = model, **keys: str) -> None:
        with pytest.raises(kind, match=words) as caught:
            export_gguf(source, keys.pop("out", str(out)), **keys)  # type: ignore[arg-type]
        assert hint in str(caught.value.hint)
        assert not out.exists()

    refused(UsageError, "no type 'q4_k_n'", "did you mean 'q4_k", type="q4_k_n")
    refused(UsageError, "does not end in .gguf", "OUT.gguf", out=str(tmp_path / "m.bin"))
    refused(UsageError, "is no folder that can be written", "make it", out=str(tmp_path / "none" / "m.gguf"))
    refused(UsageError, "no such folder", "stock model", tmp_path / "none")
    refused(RefusalError, "requires an imatrix", "another --type", type="iq1_s")
    refused(RefusalError, "MixtralForCausalLM is not supported", "newer", type="f16")
    other = tmp_path / "notes.gguf"
    other.write_text("mine")
    with pytest.raises(UsageError, match="is no GGUF file"):
        export_gguf(model, other, overwrite=True)
    assert other.read_text() == "mine"
    (llama_cpp / "build" / "bin" / "llama-quantize").unlink()
    refused(EnvironmentFault, "llama-quantize was not found", "cmake", type="q4_k_m")
    (llama_cpp / "convert_hf_to_gguf.py").unlink()
    refused(EnvironmentFault, "convert_hf_to_gguf.py was not found", "git clone", type="q8_0")


def test_types_are_of_gguf_files_alone(model: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["export", str(model), str(tmp_path / "out"), "--type", "q8_0"])
    assert isinstance(result.exception, UsageError)
    assert "add --gguf" in str(result.exception.hint)
    assert len(set(CONVERTED) | set(QUANTIZED)) == len(CONVERTED) + len(QUANTIZED)
