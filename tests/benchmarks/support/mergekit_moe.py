"""mergekit-moe as a peer: its environment, its command, and what it wrote against what upcycle wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from measure import Row

MERGEKIT = ("torch==2.13.0", "mergekit==0.1.5")
TITLE = MERGEKIT[-1].replace("==", " ")


def program(environment: Path) -> Path:
    """``mergekit-moe`` in a virtual environment of its own, installed when it is not there yet."""
    ready = environment / "ready"
    wanted = "\n".join(MERGEKIT)
    if not ready.exists() or ready.read_text(encoding="utf-8") != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        for requirement in MERGEKIT:
            pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", requirement]
            subprocess.run(pip, check=True, stdout=sys.stderr)
        ready.write_text(wanted, encoding="utf-8")
    return environment / "bin" / "mergekit-moe"


def smollm2_folder() -> Path:
    """SmolLM2-135M's dense folder; made in a process of its own, which may need torch (see ``measure.py``)."""
    smollm2 = [sys.executable, str(Path(__file__).resolve().parents[2] / "support" / "smollm2.py")]
    made = subprocess.run(smollm2, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    return Path(made.stdout.splitlines()[-1])


def difference_rows(ours: Path, theirs: Path, label: str = "") -> list[Row]:
    """Count the tensors whose bits differ; of the routers only shape and dtype must agree."""
    import torch

    a, b = fused(ours), fused(theirs)
    differing: dict[bool, list[str]] = {True: [], False: []}
    total = dict.fromkeys(differing, 0)
    for name in sorted(a.keys() | b.keys()):
        is_expert = ".experts." in name
        total[is_expert] += 1
        same = name in a and name in b and a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        if same and not name.endswith("mlp.gate.weight"):
            same = torch.equal(a[name].view(torch.int16), b[name].view(torch.int16))
        if not same:
            print(f"differs: {name}", file=sys.stderr)
            differing[is_expert].append(name)
    return [
        Row(f"{label}{kind} tensors that differ", "", "", f"{len(names)} of {total[is_expert]}", "none", not names)
        for kind, (is_expert, names) in zip(("expert", "other"), differing.items(), strict=True)
    ]


def routers(folder: Path) -> Any:
    """The routers of all layers ``[L, E, d]``, in the dtype that was written."""
    import torch

    named = {name: tensor for name, tensor in fused(folder).items() if name.endswith("mlp.gate.weight")}
    return torch.stack([named[f"model.layers.{layer}.mlp.gate.weight"] for layer in range(len(named))])


def fused(folder: Path) -> dict[str, Any]:
    """The weights with all experts of a layer in one tensor, as transformers 5 keeps them and mergekit writes them."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace(".block_sparse_moe.", ".mlp."): tensor for name, tensor in tensors.items()}
    for first in [name for name in renamed if name.endswith(".experts.0.w1.weight")]:
        prefix = first.removesuffix(".0.w1.weight")
        count = sum(name.startswith(f"{prefix}.") and name.endswith(".w1.weight") for name in renamed)
        w1, w2, w3 = ([renamed.pop(f"{prefix}.{e}.{w}.weight") for e in range(count)] for w in ("w1", "w2", "w3"))
        renamed[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(w1, w3, strict=True)])
        renamed[f"{prefix}.down_proj"] = torch.stack(w2)
    return renamed
