"""The page of the keys of ``--json`` and of the Python functions' ``as_dict()``. They are stable: keys are added, never renamed."""

from __future__ import annotations

from upcycle.cli.shared.plugin_tables import markdown_table

# What prints or returns them, and the keys, in their order. A test compares these with what the commands and functions give.
JSON_KEYS = {
    "plan": "sources family target method router calibration_tokens refit promise promise_reason parameters_dense "
    "parameters_total parameters_active bytes_dense bytes_output peak_memory_bytes flops_per_token_dense "
    "flops_per_token kind summary warnings shards time routing",
    "init": "out recipe remarks commands plan",
    "plan forecast": "seconds phases unknown",
    "plan time": "relative device instructions threads dtype prompt_tokens torch transformers error_median error_worst bfloat16",
    "plan train": "kind world ranks device parameters parameters_active flops_per_token steps tokens options own recommended "
    "refused warnings command",
    "plan train options": "zero expert_parallel fits memory communication speed",
    "plan train options memory": "weights gradients optimizer buffers activations parent host loading total",
    "plan train options communication": "all_reduce all_gather reduce_scatter all_to_all total",
    "plan train options speed": "compute memory network bound unoverlapped limit",
    "plan run": "model tokens experts top_k expert_bytes layers seconds all_on_device all_near_data",
    "plan run layers": "layer device share worth_moving seconds all_on_device all_near_data",
    "convert": "out plan verification layers seconds peak_memory_bytes resumed merging",
    "convert merging of a zoo": "sources compare threshold similarity clusters text perplexity steps discarded coefficients",
    "convert merging of posteriors": "sources prior text perplexity posterior coefficients",
    "verify": "verdict explanation promise relative_logit_error tolerance max_logit_difference kl top1_agreement "
    "perplexity_dense perplexity loss_dense loss layer_errors all_experts_error all_experts_reference tokens "
    "text streamed compared_tensors reference rounding_error positions positions_needed far_error unseen "
    "media_error media compared cosine neurons_run",
    "verify with an engine": "engine version transformers verdict explanation dtype prompts tokens equal_tokens near_ties "
    "first_difference gap_error gap_allowed tokenizer positions positions_needed",
    "convert layers": "layer captured random oracle_share chosen error_before error_after strength condition",
    "convert layers with refit blocks": "layer captured random oracle_share chosen error_before error_after strength condition steps "
    "error_trained",
    "convert layers with projections": "layer captured random oracle_share chosen projections",
    "convert layers with projections, projections": "path neurons error active",
    "convert layers of a mix": "layer router_condition own_expert",
    "convert layers of a grown MoE": "layer experts utility",
    "convert layers of an added expert": "layer own_tokens other_tokens unit strength",
    "convert layers of a compressed MoE": "layer experts rows refit",
    "convert layers of a MoE in few bits": "layer experts rows refit precision",
    "convert layers of a narrower model": "layer attention neurons ffn",
    "observe": "out experts top_k tokens layers",
    "observe layers": "layer unused few",
    "merge": "out base adapter dtype changed bytes check",
    "merge check": "error rounding_error change tolerance tokens",
    "pack and unpack": "out bytes bytes_packed ternary bits_per_weight",
    "convert layers of symphony": "layer similarity_stored similarity_aligned",
    "compare": "source dense unseen calibration_tokens evaluation_tokens results skipped timing goal",
    "compare results": "active method router refit baseline perplexity ratio unseen_ratio kl captured parameters_active flops_ratio "
    "seconds peak_memory_bytes times time fastest frontier recommended command",
    "compare of a MoE": "source uncut uncut_bytes unseen calibration calibration_tokens evaluation_tokens continuations "
    "continuation_tokens observe_seconds results skipped timing goal warnings",
    "compare of a MoE, results": "keep method refit baseline perplexity ratio unseen_ratio quality kl agreement experts top_k "
    "expert_width bytes size_ratio speeds speed seconds frontier recommended reason command",
    "compare timing": "device instructions threads dtype batch clock prompt_tokens generated_tokens prefill_seconds decode_seconds",
    "card": "card",
    "push": "repo url revision commit pull_request collection private files skipped bytes_total bytes_to_send mark "
    "dry_run searched",
    "push files": "name size status",
    "evaluate": "model reference window stride texts layers tasks speed embeddings classes retrieval routing",
    "evaluate routing": "tokens window capacity_factor seen_tokens layers earlier",
    "evaluate routing layers": "layer by_token by_majority information dropped dropped_by_part",
    "evaluate routing earlier": "model step same layers",
    "evaluate embeddings": "what items cosine nearest recall",
    "evaluate retrieval": "pairs nearest image_to_text text_to_image reference_image_to_text reference_text_to_image",
    "evaluate classes": "images classes accuracy reference_accuracy agreement",
    "generate": "model prompt text layer experts stopped kernels tokens offload",
    "generate offload": "memory_bytes resident_bytes expert_bytes kept_per_layer ahead prompt written wrong_guesses bytes_read "
    "bytes_copied prompt_seconds tokens_per_second",
    "generate tokens": "id text experts weights prompt",
    "chat, a line for each answer": "said answer stopped",
    "train": "output step tokens stopped loss validation checkpoint model seconds",
    "train --show": "rows",
    "train --show rows": "domain tokens learned padding documents",
    "train --show documents": "text learned",
    "grow": "output stopped seed steps model seconds",
    "grow steps": "step does state model losses",
    "export": "out dtype layout step tokens bytes",
    "export --gguf": "out type bytes",
    "evaluate texts": "text tokens predicted nats_per_token perplexity remark reference_nats_per_token reference_perplexity",
    "evaluate layers": "layer load max_over_mean entropy dead_experts",
    "evaluate tasks": "harness reference limit scores",
    "evaluate tasks scores": "task metric filter samples value stderr higher_is_better reference reference_stderr difference",
    "evaluate speed": "device instructions dtype threads prompt_tokens generated_tokens rounds model reference_name reference "
    "prefill_ratio decode_ratio memory_ratio kernels",
    "evaluate speed kernels": "prefill_tokens_per_second decode_tokens_per_second experts prefill_ratio decode_ratio",
    "evaluate speed model": "prefill_tokens_per_second decode_tokens_per_second peak_memory_bytes experts",
    "report": "out upcycle summary made cost speed exactness quality tasks routing experts training comparison provenance",
    "report summary": "verdict explanation findings answers",
    "report quality": "names ratio domains remarks no_reference samples",
    "report quality domains": "text tokens perplexity relative_logit_error kl top1_agreement perplexity_dense",
    "report routing": "tokens domains layers shown",
    "report routing layers": "layer experts top_k counts load max_violation entropy dead_experts specialisation router_cosine_mean "
    "router_closest",
    "report routing shown": "layer router_cosine coselection domain_load top_tokens",
    "report experts layers": "layer to_dense to_each_other",
}


def json_page() -> str:
    """Return the page of all keys."""
    rows = [[f"`{name}`", ", ".join(f"`{key}`" for key in keys.split())] for name, keys in JSON_KEYS.items()]
    return "\n\n".join(
        [
            "# JSON",
            "Keys of `--json` and of the Python functions' `as_dict()`. They are stable: keys may be added, not renamed.",
            markdown_table(["of", "keys"], rows),
            "A command that fails prints `error` with `message`, `hint` (or null) and `exit_code`, unless its result is printed "
            "already, as that of a `verify` which finds a broken model is; the message is on stderr, too.",
            'A section of a report that cannot be filled is `{"missing": reason}`.',
            "`upcycle plan --json --time` has `forecast`, too: seconds by phase on this machine, or in `unknown` why there are none.",
            "`upcycle list --json` maps each kind to its entries, `upcycle env --json` names to values; `upcycle demo --json` holds "
            "`conversions` (as `convert`), `prompt`, `continuations` and `report` (the page).",
        ]
    )
