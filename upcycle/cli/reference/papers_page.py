"""The page of papers: which plug-in of which name is a paper's, and which files cite it."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import upcycle
from upcycle.cli.reference.plugin_pages import source_file
from upcycle.cli.shared.plugin_tables import markdown_table, plugins

_CITED = re.compile(r"(?:arxiv\.org/abs/|arXiv:? ?)(\d{4}\.\d{5})")
_FOLDERS = ("upcycle", "splitters", "trainers", "kernels", "configs")
TITLES = {
    "1909.05858": "CTRL: A Conditional Transformer Language Model for Controllable Generation",
    "1810.04805": "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
    "2106.09685": "LoRA: Low-Rank Adaptation of Large Language Models",
    "2305.02869": "Masked Structural Growth for 2x Faster Language Model Pre-training",
    "2312.03732": "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA",
    "2402.01739": "OpenMoE: An Early Effort on Open Mixture-of-Experts Language Models",
    "2402.09353": "DoRA: Weight-Decomposed Low-Rank Adaptation",
    "1910.14659": "Masked Language Model Scoring",
    "2201.10890": "One Student Knows All Experts Know: From Sparse to Dense",
    "2402.17762": "Massive Activations in Large Language Models",
    "2406.02500": "Demystifying the Compression of Mixture-of-Experts Through a Unified Framework",
    "2408.09632": "MoDeGPT: Modular Decomposition for Large Language Model Compression",
    "1503.02531": "Distilling the Knowledge in a Neural Network",
    "1608.03983": "SGDR: Stochastic Gradient Descent with Warm Restarts",
    "1611.01144": "Categorical Reparameterization with Gumbel-Softmax",
    "1701.06538": "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer",
    "1707.06168": "Channel Pruning for Accelerating Very Deep Neural Networks",
    "1910.10683": "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
    "2001.08361": "Scaling Laws for Neural Language Models",
    "2006.16668": "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding",
    "2101.03961": "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity",
    "2102.05426": "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction",
    "2109.08668": "Primer: Searching for Efficient Transformers for Language Modeling",
    "2110.01786": "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts",
    "2202.08906": "ST-MoE: Designing Stable and Transferable Sparse Expert Models",
    "2202.09368": "Mixture-of-Experts with Expert Choice Routing",
    "2207.09094": "MoEC: Mixture of Expert Clusters",
    "2208.03306": "Branch-Train-Merge: Embarrassingly Parallel Training of Expert Language Models",
    "2208.11580": "Optimal Brain Compression: A Framework for Accurate Post-Training Quantization and Pruning",
    "2210.17323": "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    "2212.05055": "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints",
    "2301.00774": "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    "2305.14705": "Mixture-of-Experts Meets Instruction Tuning: A Winning Combination for Large Language Models",
    "2305.17888": "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models",
    "2305.18290": "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    "2306.11695": "A Simple and Effective Pruning Approach for Large Language Models",
    "2310.01334": "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy",
    "2310.04361": "Exploiting Activation Sparsity with Dense to Dynamic-k Mixture-of-Experts Conversion",
    "2310.06694": "Sheared LLaMA: Accelerating Language Model Pre-training via Structured Pruning",
    "2310.16795": "QMoE: Practical Sub-1-Bit Compression of Trillion-Parameter Models",
    "2312.12379": "Mixture of Cluster-conditional LoRA Experts for Vision-language Instruction Tuning",
    "2312.17238": "Fast Inference of Mixture-of-Experts Language Models with Offloading",
    "2401.02731": "Parameter-Efficient Sparsity Crafting from Dense to Mixture-of-Experts for Instruction Tuning on General Tasks",
    "2401.04088": "Mixtral of Experts",
    "2401.06066": "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language Models",
    "2401.15947": "MoE-LLaVA: Mixture of Experts for Large Vision-Language Models",
    "2402.14800": "Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts Large Language Models",
    "2403.07816": "Branch-Train-MiX: Mixing Expert LLMs into a Mixture-of-Experts LLM",
    "2404.05089": "SEER-MoE: Sparse Expert Efficiency through Regularization for Mixture-of-Experts",
    "2404.02258": "Mixture-of-Depths: Dynamically allocating compute in transformer-based language models",
    "2404.05567": "Dense Training, Sparse Inference: Rethinking Training of Mixture-of-Experts Language Models",
    "2404.06395": "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies",
    "2404.10830": "Fewer Truncations Improve Language Modeling",
    "2405.05949": "CuMo: Scaling Multimodal LLM with Co-Upcycled Mixture-of-Experts",
    "2405.15319": "Stacking Your Transformers: A Closer Look at Model Growth for Efficient LLM Pre-Training",
    "2405.18832": "MoNDE: Mixture of Near-Data Experts for Large-Scale Sparse Models",
    "2406.04801": "MoE Jetpack: From Dense Checkpoints to Adaptive Mixture of Experts for Vision Tasks",
    "2406.06563": "Skywork-MoE: A Deep Dive into Training Techniques for Mixture-of-Experts Language Models",
    "2406.08155": "Examining Post-Training Quantization for Mixture-of-Experts: A Benchmark",
    "2406.16554": "LLaMA-MoE: Building Mixture-of-Experts from LLaMA with Continual Pre-training",
    "2407.10671": "Qwen2 Technical Report",
    "2408.11855": "FactorLLM: Factorizing Knowledge via Mixture of Experts for Large Language Models",
    "2408.15664": "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
    "2408.15881": "LLaVA-MoD: Making LLaVA Tiny via MoE Knowledge Distillation",
    "2409.12136": "GRIN: GRadient-INformed MoE",
    "2410.05357": "Model-GLUE: Democratized LLM Scaling for A Large Model Zoo in the Wild",
    "2410.06270": "Mixture Compressor for Mixture-of-Experts LLMs Gains More",
    "2410.07524": "Upcycling Large Language Models into Mixture of Experts",
    "2410.08589": "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering",
    "2410.17170": "Self-calibration for Language Model Quantization and Pruning",
    "2411.01016": "MoE-I2: Compressing Mixture of Experts Models through Inter-Expert Pruning and Intra-Expert Low-Rank Decomposition",
    "2411.15708": "LLaMA-MoE v2: Exploring Sparsity of LLaMA from Perspective of Mixture-of-Experts with Post-Training",
    "2412.14711": "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing",
    "2412.19437": "DeepSeek-V3 Technical Report",
    "2502.03009": "Scaling Laws for Upcycling Mixture-of-Experts Language Models",
    "2502.04416": "CMoE: Converting Mixture-of-Experts from Dense to Accelerate LLM Inference",
    "2502.19261": "Drop-Upcycling: Training Sparse Mixture of Experts with Partial Re-initialization",
    "2509.18542": "Symphony-MoE: Harmonizing Disparate Pre-trained Models into a Coherent Mixture-of-Experts",
    "2407.00945": "Efficient Expert Pruning for Sparse Mixture-of-Experts Language Models: Enhancing Performance and Reducing "
    "Inference Costs",
    "2604.04356": "REAM: Merging Improves Pruning of Experts in LLMs",
    "2510.13999": "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression",
    "2512.14080": "SonicMoE: Accelerating MoE with IO and Tile-aware Optimizations",
    "2603.29765": "Training-Free Dynamic Upcycling of Expert Language Models (DUME)",
    "2604.19835": "Expert Upcycling: Shifting the Compute-Efficient Frontier of Mixture-of-Experts",
}


def papers_page() -> str:
    """Return the page: a row per paper that a source file or a shipped recipe cites, by year.

    Raises:
        KeyError: a paper that is cited has no title in :data:`TITLES`.
    """
    named, cited = _named(), _cited()
    rows = []
    for paper in sorted(cited):
        own = named.get(paper, {})
        others = sorted(cited[paper] - set(own.values()))
        link = f"[{TITLES[paper]}](https://arxiv.org/abs/{paper}), {paper}"
        names = ", ".join(f"{kind} [`{name}`]({kinds}.md#{name})" for (kind, kinds, name) in own)
        files = ", ".join(f"`{path}`" for path in [*dict.fromkeys(own.values()), *others])
        rows.append([link, names, files])
    return "\n\n".join(
        [
            "# Papers",
            "What is built on which paper. The docstring of each file says which parts it takes, and where it differs.",
            markdown_table(["paper", "name", "files"], rows),
        ]
    )


def _named() -> dict[str, dict[tuple[str, str, str], str]]:
    """Return, by paper, the plug-ins whose paper it is as (kind, its plural, name), with the file that each is in."""
    found: dict[str, dict[tuple[str, str, str], str]] = defaultdict(dict)
    for kind, kinds in (("method", "methods"), ("router", "routers"), ("loss", "losses")):
        for name, plugin in plugins(kinds).items():
            for paper in _CITED.findall(plugin.paper or ""):
                found[paper][kind, kinds, name] = source_file(kinds, name)
    return found


def _cited() -> dict[str, set[str]]:
    """Return, by paper, the paths in the repository of all files that name it."""
    root = Path(upcycle.__file__).resolve().parents[1]
    found: dict[str, set[str]] = defaultdict(set)
    for folder in _FOLDERS:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".hpp", ".yaml") and path != Path(__file__).resolve():
                for paper in _CITED.findall(path.read_text(encoding="utf-8")):
                    found[paper].add(path.relative_to(root).as_posix())
    return found
