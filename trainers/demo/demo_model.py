"""Trains the embedded demo model: a small Llama on the text every CPython carries.

    python -m upcycle.trainers.demo.demo_model configs/train/demo_model.yaml OUT

Writes OUT/model (bf16 safetensors, tokenizer, card) and OUT/text (the validation texts). Plain PyTorch on purpose:
3.4 million parameters need no DeepSpeed, and a reader can check in one screen how the model was made.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from pathlib import Path

import torch
from pydantic import Field
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from upcycle.files.formats.parsing import read_yaml
from upcycle.plugins import StrictSettings
from upcycle.trainers.demo.demo_text import Document, demo_documents

END_OF_TEXT = "<|endoftext|>"


class DemoRecipe(StrictSettings):
    """Every number that shapes the demo model; see ``configs/train/demo_model.yaml``."""

    seed: int
    vocabulary_size: int = Field(gt=256)
    context: int = Field(gt=0)
    tokens: int = Field(gt=0)
    batch_windows: int = Field(gt=0)
    peak_learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int

    @property
    def steps(self) -> int:
        """Number of optimizer steps to see ``tokens`` tokens."""
        return math.ceil(self.tokens / (self.batch_windows * self.context))


def train_tokenizer(documents: list[Document], recipe: DemoRecipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the training documents."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=recipe.context,
        clean_up_tokenization_spaces=False,
    )


def training_windows(
    documents: list[Document], tokenizer: PreTrainedTokenizerFast, recipe: DemoRecipe, rng: torch.Generator
) -> torch.Tensor:
    """The training text in windows, int64 ``[windows, context + 1]``.

    Documents are shuffled anew in every epoch, and each is closed by end-of-text.
    """
    encoded = [
        torch.tensor([*tokenizer(document.text, verbose=False).input_ids, tokenizer.eos_token_id])
        for document in documents
    ]
    wanted = recipe.steps * recipe.batch_windows * (recipe.context + 1)
    parts: list[torch.Tensor] = []
    have = 0
    while have < wanted:
        order = torch.randperm(len(encoded), generator=rng).tolist()
        epoch = torch.cat([encoded[i] for i in order])
        windows = epoch[: len(epoch) // (recipe.context + 1) * (recipe.context + 1)].view(-1, recipe.context + 1)
        # Shuffle the windows, too, or a batch would be eight neighbouring pieces of one file.
        parts.append(windows[torch.randperm(len(windows), generator=rng)])
        have += parts[-1].numel()
        print(f"one epoch has {len(epoch):,} tokens", file=sys.stderr)
    return torch.cat(parts)[: recipe.steps * recipe.batch_windows]


def learning_rate(step: int, recipe: DemoRecipe) -> float:
    """The learning rate of a step: linear warm-up, then a cosine down to a tenth of the peak."""
    if step < recipe.warmup_steps:
        return recipe.peak_learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.peak_learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def train_demo_model(model: LlamaForCausalLM, windows: torch.Tensor, recipe: DemoRecipe) -> None:
    """Train ``model`` on all ``windows`` once, with AdamW in fp32."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, betas=(0.9, 0.95), eps=1e-8)
    model.train()
    started = time.monotonic()
    for step, batch in enumerate(windows.split(recipe.batch_windows)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        logits = model(batch[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == recipe.steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step}/{recipe.steps}  loss {loss.item():.3f}  {seconds:.0f} s", file=sys.stderr, flush=True)


def main(recipe_path: str, out: str) -> None:
    """Train, write OUT/model and OUT/text, and record the facts in OUT/training.json."""
    recipe = DemoRecipe.model_validate(read_yaml(Path(recipe_path)))
    torch.manual_seed(recipe.seed)
    rng = torch.Generator().manual_seed(recipe.seed)
    training, validation = demo_documents()
    tokenizer = train_tokenizer(training, recipe)
    windows = training_windows(training, tokenizer, recipe, rng)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_hidden_layers,
            num_attention_heads=recipe.num_attention_heads,
            num_key_value_heads=recipe.num_key_value_heads,
            max_position_embeddings=recipe.context,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
    )
    train_demo_model(model, windows, recipe)
    folder = Path(out)
    model.bfloat16().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for domain in ("prose", "code"):
        texts = [document.text for document in validation if document.domain == domain]
        (folder / "text" / f"{domain}.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    facts = {
        "python": platform.python_version(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": windows[:, 1:].numel(),
        "training_documents": len(training),
        "validation_documents": [document.name for document in validation],
        "recipe": recipe.model_dump(),
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m upcycle.trainers.demo.demo_model RECIPE.yaml OUT")
    main(*sys.argv[1:])
