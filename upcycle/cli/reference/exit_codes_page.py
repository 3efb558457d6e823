"""The page of exit codes."""

from __future__ import annotations

from upcycle.cli.shared.plugin_tables import markdown_table

EXIT_CODES = {
    0: "done; an approximate conversion is a success, too",
    1: "a checkpoint that is damaged or was changed, a repository that changed meanwhile, or another failure",
    2: "wrong usage or recipe, a conversion that no target can hold, licences that differ, or a model that was never verified",
    3: "verification failed: a conversion did not keep its promise, or an engine computes something else",
    4: "the environment: disk, memory, permissions, network, the hub's token or its faults, a missing dependency",
    130: "interrupted (`train` by any of SIGINT, SIGTERM, SIGHUP and SIGUSR1); the same `convert`, `train` or `push` continues",
}


def exit_codes_page() -> str:
    """Return the page of all codes that the command ends with."""
    rows = [[str(code), meaning] for code, meaning in EXIT_CODES.items()]
    return "# Exit codes\n\n" + markdown_table(["code", "meaning"], rows)
