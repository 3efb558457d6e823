"""``upcycle merge``: adds a LoRA adapter to the weights of its model."""

from __future__ import annotations

import click

from upcycle.cli.shared.options import common_options, quiet_option
from upcycle.cli.shared.output import ProgressBars, print_facts, print_json
from upcycle.formatting import size


@click.command("merge", short_help="Add a LoRA adapter to a model's weights")
@click.argument("adapter")
@click.argument("out")
@click.option("--base", metavar="MODEL", help="the model that it was trained on  [default: as the adapter says]")
@click.option("--revision", help="branch, tag or commit of a base on the hub")
@click.option(
    "--dtype",
    type=click.Choice(["keep", "bfloat16", "float16", "float32"]),
    default="keep",
    show_default=True,
    help="dtype of the weights; keep: as in the base",
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="largest weight file")
@click.option("--no-verify", is_flag=True, help="do not compare the result with the base and the adapter")
@click.option("--overwrite", is_flag=True, help="replace an OUT that upcycle wrote, once the new model is complete")
@quiet_option
@common_options
def command(
    adapter: str,
    out: str,
    base: str | None,
    revision: str | None,
    dtype: str,
    max_shard_size: str,
    no_verify: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    debug: bool,
) -> None:
    """Add the LoRA folder ADAPTER to the weights of its model, and write the stock folder OUT.

    ADAPTER is what peft or upcycle train wrote: adapter_config.json and adapter_model.safetensors. Its model may be dense or a MoE,
    whose routed experts may be stored one by one or fused. The logits of OUT are compared with those of the model with the adapter
    beside its weights.

    \b
    upcycle merge ./math-lora ./math
    upcycle merge ./math-lora ./math --base HuggingFaceTB/SmolLM2-135M
    """
    from upcycle.conversion.merge_adapter import merge

    result = merge(
        adapter,
        out,
        base=base,
        revision=revision,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        verify=not no_verify,
        progress=ProgressBars(quiet),
    )
    if as_json:
        print_json(result.as_dict())
        return
    facts = [
        ("output", f"{result.out} ({size(result.bytes)}, {result.dtype})"),
        ("changed", f"{result.changed:,} tensors of {result.base}"),
    ]
    if result.check:
        rounding = f"; rounding alone changes {result.check.rounding_error:.1e}" if result.check.rounding_error else ""
        facts.append(
            (
                "checked",
                f"logits differ by {result.check.error:.1e} from those of the unmerged model (allowed {result.check.tolerance:.0e})"
                f"{rounding}; the adapter itself changes them by {result.check.change:.1%}",
            )
        )
    print_facts(facts)
