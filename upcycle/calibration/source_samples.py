"""Reads the tokens that show what each of several sources is for: its prompts, or a sample text of its domain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from upcycle.architectures.stock import load_tokenizer
from upcycle.errors import UsageError
from upcycle.ffn.source_samples import Samples
from upcycle.recipe.recipe_parts import SourceRecipe
from upcycle.text.mixture import mixed_windows
from upcycle.text.reading.plain_text import read_text

if TYPE_CHECKING:
    from upcycle.checkpoints.checkpoint import Checkpoint, DenseCheckpoint
    from upcycle.planning.expert_job import ExpertJob


def read_samples(job: ExpertJob, checkpoint: DenseCheckpoint) -> Samples:
    """Read the prompts or the texts that the job's router is made from.

    Raises:
        UsageError: a text cannot be read, or is shorter than one window; a prompt is longer than the model's context.
    """
    tokenizer = load_tokenizer(checkpoint.source.path)
    assert job.mixing is not None
    recipes = job.mixing.source_recipes(job.recipe.sources)
    sources = [recipes[i] for i in job.members]
    if job.router.samples == "text":
        return _from_texts(job, tokenizer, sources)
    return from_prompts(tokenizer, sources, job.dense.max_position_embeddings, job.router.last_token)


def from_prompts(tokenizer: Any, sources: list[SourceRecipe], most: int, last: bool = False) -> Samples:
    """Return a window per prompt, padded on the right, where a causal model does not see the padding.

    A source's positive prompts weigh 1 in all and its negative ones -1, each prompt the same; a prompt's weight is divided
    evenly among its tokens. Special tokens weigh nothing: the first token's state is hundreds of times longer than the others'
    in many models, and says nothing about the prompt. With ``last``, only the last token that is not special counts, which has
    seen the whole prompt.

    Args:
        tokenizer: the base model's.
        sources: the sources, with their prompts.
        most: the longest prompt in tokens that the model takes.
        last: whether only a prompt's last token counts.

    Raises:
        UsageError: a prompt has no tokens but special ones, or more than ``most``.
    """
    rows: list[torch.Tensor] = []
    owners: list[int] = []
    shares: list[torch.Tensor] = []
    special = torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.long)
    for owner, source in enumerate(sources):
        for prompts, sign in ((source.positive_prompts, 1.0), (source.negative_prompts, -1.0)):
            for prompt in prompts:
                ids = torch.tensor(tokenizer(prompt, verbose=False)["input_ids"], dtype=torch.long)
                counts = ~torch.isin(ids, special)
                if last:
                    counts &= counts.flip(0).cumsum(0).flip(0) == 1
                if not counts.any() or len(ids) > most:
                    raise UsageError(
                        f"sources: a prompt of {source.name} has {int(counts.sum())} tokens, and it must have 1 to {most}: "
                        f"'{prompt[:40]}'",
                        hint="write another prompt",
                    )
                rows.append(ids)
                owners.append(owner)
                shares.append(sign * counts / (counts.sum() * len(prompts)))
    width = max(map(len, rows))
    windows, share = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width)
    for i, (ids, each) in enumerate(zip(rows, shares, strict=True)):
        windows[i, : len(ids)] = ids
        share[i, : len(ids)] = each
    return Samples(windows, torch.tensor(owners).repeat_interleave(width), share.flatten())


def _from_texts(job: ExpertJob, tokenizer: Any, sources: list[SourceRecipe]) -> Samples:
    """Return equally many windows of each source's texts, in turns, so that every domain has some among those held out."""
    wanted = job.recipe.calibration
    window = min(wanted.window, job.dense.max_position_embeddings)
    texts = [{name: read_text(name) for name in source.texts} for source in sources]
    each = max(window, wanted.tokens // len(sources))
    pieces = [mixed_windows(named, tokenizer, each, window) for named in texts]
    return in_turns(pieces)


def sampled_text(source: SourceRecipe, checkpoint: Checkpoint, tokens: int, window: int) -> Samples:
    """Return windows of the sample text of one source, as many as there are up to a number of tokens.

    Args:
        source: the source.
        checkpoint: whose tokenizer reads the text.
        tokens: the number wanted.
        window: tokens per window, ``W``.

    Raises:
        UsageError: the text cannot be read, or is shorter than one window.
    """
    texts = {name: read_text(name) for name in source.texts}
    return in_turns([mixed_windows(texts, load_tokenizer(checkpoint.source.path), tokens, window)])


def in_turns(pieces: list[torch.Tensor]) -> Samples:
    """Return the windows ``[n_i, W]`` of every owner in turns, the k-th of each before the next of any.

    Each owner's tokens weigh 1 in all.
    """
    order = sorted((k, owner) for owner, piece in enumerate(pieces) for k in range(len(piece)))
    windows = torch.stack([pieces[owner][k] for k, owner in order])
    width = windows.shape[1]
    owner = torch.tensor([owner for _, owner in order]).repeat_interleave(width)
    counts = torch.tensor([float(piece.numel()) for piece in pieces])
    return Samples(windows, owner, 1 / counts[owner])
