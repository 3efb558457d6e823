"""The reports of a run: one line per step on the screen, the same numbers in log.jsonl and in trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from upcycle.errors import EnvironmentFault
from upcycle.files.atomic_files import write_text_whole
from upcycle.files.formats.parsing import read_lines
from upcycle.hardware.memory import peak_memory
from upcycle.trainers.routing.bias_balance import Load

LOG = "log.jsonl"


@dataclass(frozen=True)
class StepReport:
    """One step, as it is printed and logged.

    ``utilisation`` is a fraction of the devices' peak, ``memory`` the peak on this rank so far, in bytes, ``experts`` how many a token
    has in the mean, where that varies.
    """

    step: int
    steps: int
    stage: str
    loss: float
    parts: Mapping[str, float]
    learning_rate: float
    gradient_norm: float
    applied: bool
    tokens: int
    tokens_per_second: float
    utilisation: float
    memory: int
    loads: list[Load] = field(default_factory=list)
    dropped: float = 0.0
    experts: float | None = None

    def line(self) -> str:
        """Everything in one line: of the layers' loads, the worst."""
        cells = [
            f"{self.stage} {self.step}/{self.steps}",
            f"loss {self.loss:.4f}",
            *(f"{name} {value:.3g}" for name, value in self.parts.items()),
            f"lr {self.learning_rate:.2e}",
            f"norm {self.gradient_norm:.3g}" + ("" if self.applied else " SKIPPED"),
            f"{self.tokens_per_second:,.0f} tok/s",
            f"{self.utilisation:.0%} of peak",
            f"{self.memory / 1e9:.2f} GB",
        ]
        if self.loads:
            cells.append(f"load {max(load.largest_over_mean for load in self.loads):.2f}x")
            fixed = self.experts is None  # a choice can only be dropped where their number is fixed
            cells.append(f"dropped {self.dropped:.1%}" if fixed else f"experts {self.experts:.2f} per token")
            cells.append(f"dead {sum(load.dead for load in self.loads)}")
        return "  ".join(cells)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for log.jsonl."""
        content = {
            "kind": "step",
            "step": self.step,
            "stage": self.stage,
            "loss": self.loss,
            **{f"loss/{name}": value for name, value in self.parts.items()},
            "learning_rate": self.learning_rate,
            "gradient_norm": self.gradient_norm,
            "applied": self.applied,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "utilisation": self.utilisation,
            "memory": self.memory,
        }
        if self.loads:
            content["load_max_over_mean"] = [load.largest_over_mean for load in self.loads]
            content["dead_experts"] = [load.dead for load in self.loads]
            content["dropped"] = self.dropped
            if self.experts is not None:
                content["experts_per_token"] = self.experts
        return content


class Reports:
    """Where the first rank reports to; other ranks report nothing.

    Args:
        folder: the run's.
        trackers: their names in the recipe.
        say: prints a line.
        first_step: the step that the run continues from. Later lines of log.jsonl are dropped: those steps are run again.

    Raises:
        EnvironmentFault: a tracker is not installed, or does not start: nobody is logged in, or its service is not reached.
    """

    def __init__(self, folder: Path, trackers: list[str], say: Callable[[str], None], first_step: int = 0) -> None:
        self.say = say
        self._trackers = {name: _started(name, folder) for name in trackers}
        self._path = folder / LOG
        kept = [line for line in read_log(self._path) if line["step"] <= first_step] if first_step else []
        write_text_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def step(self, report: StepReport, printed: bool) -> None:
        """Report a step; ``printed``: on the screen, too."""
        if printed:
            self.say(report.line())
        self.record(report.as_dict())

    def record(self, content: Mapping[str, Any]) -> None:
        """Append one line to log.jsonl, and send its numbers to the trackers."""
        plain = {key: _finite(value) for key, value in content.items()}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain) + "\n")
        numbers = {key: value for key, value in plain.items() if isinstance(value, (int, float)) and key != "step"}
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.log(numbers, int(content["step"]))
            except Exception as error:  # a tracker that fails, for whatever reason, must not end the run
                del self._trackers[name]
                self.say(f"warning: {name} failed and gets no further reports: {_first_line(error)}")

    def close(self) -> None:
        """Finish the trackers."""
        for name, tracker in self._trackers.items():
            try:
                tracker.close()
            except Exception as error:
                self.say(f"warning: {name} failed while closing: {_first_line(error)}")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log; a last line that a kill cut short is left out."""
    return read_lines(path) if path.exists() else []


def memory_in_use(device: torch.device) -> int:
    """Peak bytes so far: of the device, or on CPUs of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()


def _finite(value: Any) -> Any:
    # JSON has no NaN and no infinity.
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        module = _installed("torch.utils.tensorboard", "tensorboard")
        self._writer = module.SummaryWriter(str(folder / "tensorboard"))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """wandb; trackio has the same interface."""

    package = "wandb"

    def __init__(self, folder: Path) -> None:
        self._module = _installed(self.package, self.package)
        self._module.init(project=folder.resolve().name)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._module.log(dict(numbers), step=step)

    def close(self) -> None:
        self._module.finish()


class _Trackio(_Wandb):
    package = "trackio"


def _installed(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise EnvironmentFault(
            f"log.trackers: {package} is not installed", hint=f"pip install {package}, or leave it out of log.trackers"
        ) from None


def _started(name: str, folder: Path) -> Any:
    try:
        return _TRACKERS[name](folder)
    except EnvironmentFault:
        raise
    except Exception as error:
        raise EnvironmentFault(
            f"log.trackers: {name} did not start: {_first_line(error)}",
            hint=f"{_HELP[name]}, or leave it out of log.trackers",
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


_HELP = {
    "tensorboard": "check that the run's folder can be written",
    "wandb": "wandb login, or WANDB_MODE=offline to keep its files here",
    "trackio": "see trackio's documentation",
}
_TRACKERS: dict[str, Callable[[Path], Any]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}
