"""``upcycle export``: turns a training checkpoint into a folder that stock transformers loads, or a model into a GGUF file."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from upcycle.cli.shared.options import common_options, quiet_option
from upcycle.cli.shared.output import ProgressBars, print_facts, print_json
from upcycle.errors import UsageError
from upcycle.formatting import size


@click.command("export", short_help="Write a checkpoint for transformers")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["keep", "bfloat16", "float16", "float32"]),
    default="keep",
    show_default=True,
    help="dtype of the weights; keep: as in the model that training began with",
)
@click.option(
    "--layout",
    type=click.Choice(["keep", "per-expert", "fused"]),
    default="keep",
    show_default=True,
    help="how experts are stored; keep: as in the model that training began with",
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="largest weight file")
@click.option("--gguf", is_flag=True, help="write a GGUF file OUT.gguf, by llama.cpp's converter")
@click.option("--type", "kind", help="with --gguf: llama.cpp's name of a type, such as q4_k_m  [default: q8_0]")
@click.option("--engine-python", metavar="PATH", help="with --gguf: the Python that llama.cpp's converter runs in")
@click.option("--overwrite", is_flag=True, help="replace an OUT that upcycle wrote, once the new model is complete")
@quiet_option
@common_options
def command(
    checkpoint: Path,
    out: Path,
    dtype: str,
    layout: str,
    max_shard_size: str,
    gguf: bool,
    kind: str | None,
    engine_python: str | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Write the model of CHECKPOINT into the folder OUT as stock transformers stores it.

    CHECKPOINT is a checkpoint of a run, such as run/checkpoints/step-00000100, or the run's folder, which stands for its newest
    checkpoint. upcycle verify and upcycle evaluate read OUT. How many ranks trained the model, and how they divided it, makes
    no difference to OUT.

    With --gguf, CHECKPOINT may be any stock model's folder, too, and OUT is a GGUF file. That takes llama.cpp: its folder is named by
    the environment variable LLAMA_CPP; types other than f32, f16, bf16 and q8_0 also take its llama-quantize.

    \b
    upcycle export run ./moe
    upcycle export --gguf ./moe moe.gguf --type q4_k_m
    """
    if not gguf and (kind or engine_python):
        raise UsageError(f"--{'type' if kind else 'engine-python'} is of GGUF files", hint="add --gguf")
    if gguf:
        _export_gguf(checkpoint, out, dtype, kind or "q8_0", engine_python, overwrite, quiet, as_json)
        return
    from upcycle.trainers.checkpoints.export import export

    result = export(
        checkpoint,
        out,
        dtype=dtype,
        layout=layout,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=ProgressBars(quiet),
    )
    if as_json:
        print_json(result.as_dict())
        return
    print_facts(
        [
            ("output", f"{result.out} ({size(result.bytes)}, {result.dtype}, {result.layout})"),
            ("trained", f"{result.step:,} steps, {result.tokens:,} tokens"),
            ("next", f"upcycle evaluate {result.out}"),
        ]
    )


def _export_gguf(
    model: Path, out: Path, dtype: str, kind: str, python: str | None, overwrite: bool, quiet: bool, as_json: bool
) -> None:
    """Write a GGUF file of a model, or of a checkpoint that is exported first."""
    from upcycle.files.output.ownership import is_run
    from upcycle.files.output.scratch import scratch
    from upcycle.publishing.gguf import export_gguf
    from upcycle.trainers.checkpoints.export import export
    from upcycle.trainers.checkpoints.write import STATE_FILE

    progress = ProgressBars(quiet)
    with ExitStack() as stack:
        if is_run(model) or (model / STATE_FILE).is_file():
            stock = stack.enter_context(scratch("export")) / "model"
            export(model, stock, dtype=dtype, progress=progress)
            model = stock
        written = export_gguf(model, out, type=kind, python=python, overwrite=overwrite, progress=progress)
    if as_json:
        print_json(written.as_dict())
        return
    print_facts([("output", f"{out} ({size(written.bytes)}, {written.type})"), ("next", f"llama-cli -m {out}")])
