"""A Mixture-of-Experts of real fine-tunes: SmolLM2-135M-Instruct fine-tuned three times, and mixed with itself.

Adapters (LoRA on the FFNs) are trained on documentation, on code and on science (``domains.py``), one each. The model and the model
with each adapter become four experts (``branch_train_mix``), two per token, chosen by routers fitted to samples of the three texts
(``domain_ridge``). Nothing is trained afterwards. It is kept in the cache of the benchmarks.

    python -P tests/benchmarks/compressing/smollm2_mix.py --out docs/measured/smollm2_mix.md

prints the perplexities of all models, and the mix's folder last. What compressions of it lose:

    python -P tests/benchmarks/compressing/compress_quality.py --model smollm2-mix --tokens 4096 --measured 1024 \\
        --methods reap m_smoe slim --refits none down --out docs/measured/compress_smollm2_mix.md
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path
from statistics import fmean

sys.path[:0] = [str(Path(__file__).resolve().parents[i] / "support") for i in (1, 2)]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "training")]

from domains import DOMAINS, FOREIGN, parted, texts
from smollm2 import cache_folder, dense_folder
from training_curves import cosine, run_recipe, write_domains

import upcycle

TOKENS = 20_000  # of each fine-tune
LENGTH, BATCH = 256, 4
SAMPLE_CHARACTERS = 60_000  # of each domain, for the routers
OWN = "SmolLM2"


def adapter(domain: str, tokens: int, work: Path) -> Path:
    """The folder of a domain's adapter, trained where it is not there."""
    done, run = work / domain, work / f"{domain}-run"
    if not done.exists():
        steps = -(-tokens // (LENGTH * BATCH))
        data = write_domains(work / "text", {domain: parted(domain)})
        more = {"adapter": {"rank": 16, "alpha": 32, "targets": ["ffn"]}, "output": str(run)}
        stage, often = cosine(steps, 5e-4), {"validated": steps, "saved": steps, "export": True}
        recipe = run_recipe(dense_folder(), data, stage, (LENGTH, BATCH), **often, **more)
        upcycle.train(recipe, print)
        (run / "adapter").rename(done)
        shutil.rmtree(run)
    return done


def smollm2_mix(tokens: int = TOKENS) -> Path:
    """Return the folder of the mix; it and the adapters are made where they are not in the cache."""
    work = cache_folder() / f"smollm2-mix-{tokens}"
    work.mkdir(exist_ok=True)
    mix = work / "model"
    if not mix.exists():
        samples = []
        for domain, path in zip(DOMAINS, texts()[0], strict=True):
            samples.append(work / f"{domain}.txt")
            samples[-1].write_text(path.read_text(encoding="utf-8")[:SAMPLE_CHARACTERS], encoding="utf-8")
        own = work / "own.txt"  # the model itself: a little of everything
        own.write_text("\n\n".join(sample.read_text("utf-8")[: SAMPLE_CHARACTERS // 3] for sample in samples), "utf-8")
        dense = str(dense_folder())
        tuned = [f"{dense}+{adapter(domain, tokens, work)}" for domain in DOMAINS]
        upcycle.convert(
            dense,
            mix,
            method="branch_train_mix",
            top_k=2,
            router="domain_ridge",
            sources=[
                {"name": name, "text": str(text)} for name, text in zip([dense, *tuned], [own, *samples], strict=True)
            ],
        )
    return mix


def main() -> int:
    """Make it, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each fine-tune  [default: 20,000]")
    parser.add_argument("--measured", type=int, default=4096, help="tokens of each text  [default: 4,096]")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from compress_quality import perplexities

    kinds = (*DOMAINS, FOREIGN)
    mix = smollm2_mix(options.tokens)
    models = {OWN: dense_folder()}
    for domain in DOMAINS:
        merged = mix.parent / f"{domain}-merged"
        if not merged.exists():
            upcycle.merge(mix.parent / domain, merged, base=str(dense_folder()))
        models[f"fine-tuned on {domain}"] = merged
    models["the mix: four experts, top-2"] = mix
    lines = [
        f"Perplexity of SmolLM2-135M-Instruct, of its fine-tunes on {options.tokens:,} tokens each, and of their mix.",
        "",
        f"| model | {' | '.join(kinds)} | geometric mean of the first three |",
        f"|---|{'---:|' * (len(kinds) + 1)}",
    ]
    for name, model in models.items():
        found = perplexities(model, texts(kinds)[1], options.measured)
        mean = math.exp(fmean(math.log(found[kind]) for kind in DOMAINS))
        lines.append(f"| {name} | {' | '.join(f'{found[kind]:.2f}' for kind in kinds)} | {mean:.2f} |")
        print(lines[-1], flush=True)
    page = "\n".join(lines) + "\n"
    print(page)
    if options.out:
        options.out.write_text(page, encoding="utf-8")
    print(mix)
    return 0


if __name__ == "__main__":
    sys.exit(main())
