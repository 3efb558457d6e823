"""Commands whose many options are printed in groups: what the experts are, what is read and written, how the run goes."""

from __future__ import annotations

import re

import click

MOST_IN_ONE = 14  # a command with as many options or fewer prints them as one list
OTHERS = "Options"
# A group's title, and the Python names of its options; the options of a verb that are in no group come last.
OPTION_GROUPS = {
    "Experts": "method experts top_k shared active pieces width always_on shared_unheld layers sources scale pad param "
    "scale_placement",
    "Compression of a MoE": "keep observations precision__bits precision__attention_bits precision__rounding "
    "precision__allocation",
    "Router": "router__name routing__rule routing__tau router_param",
    "Calibration and refit": "calibration__text calibration__tokens calibration__mode refit reconstruction__passes",
    "What is read and written": "source_flag revision family part target layout dtype max_shard_size tokenizer blueprint "
    "overwrite restart",
    "Verification": "verification__text verification__tokens no_verify",
    "The run": "dry_run timed seed set_ quiet as_json debug help",
}


_EXAMPLE = re.compile(r"^(upcycle .*?\S)  +(\S.*)$", re.MULTILINE)


def examples_within(text: str, width: int) -> str:
    """Return a help text whose examples have what they do beside them, or below them where a line is longer than ``width``."""
    longest = max((len(found[0]) for found in _EXAMPLE.finditer(text)), default=0)
    return text if longest <= width else _EXAMPLE.sub(r"\1\n    \2", text)


class GroupedCommand(click.Command):
    """Prints its options in groups, once there are more than :data:`MOST_IN_ONE`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write every option's help, once, below the title of its group."""
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        records = [
            ("help" if "--help" in option.opts else option.name, option.get_help_record(ctx)) for option in options
        ]
        left = {str(name): record for name, record in records if record is not None}
        if len(left) > MOST_IN_ONE:
            for title, names in OPTION_GROUPS.items():
                found = [left.pop(name) for name in names.split() if name in left]
                if found:
                    with formatter.section(title):
                        formatter.write_dl(found)
        if left:
            with formatter.section(OTHERS):
                formatter.write_dl(list(left.values()))
