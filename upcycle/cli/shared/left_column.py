"""A column of progress bars: what is left of all work where that is known, else of the phase that runs."""

from __future__ import annotations

from rich.progress import Task, TimeRemainingColumn
from rich.text import Text


class LeftColumn(TimeRemainingColumn):
    """Shows the field ``left`` of a task, and where it is empty what the phase's own pace says."""

    def render(self, task: Task) -> Text:
        """Return the column's text."""
        left = task.fields.get("left")
        return Text(left, style="progress.remaining") if left else super().render(task)
