"""Progress of trainings on the terminal: a bar each, with every loss term, accuracy, speed and time left."""

import time
from dataclasses import dataclass
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

from riformer.distill.objective import TERMS
from riformer_runtime.cli.console import Console, printable

LINE_SECONDS = 15  # without a terminal, a training prints at most one line in this time, and its last


@dataclass
class _Training:
    """What is shown about one run."""

    task: TaskID
    images_per_s: float = 0.0
    losses: str = ""
    top1: float = 0.0
    validation: str = ""
    printed_at: float = 0.0

    @property
    def numbers(self) -> str:
        """The last step, the validation after the last whole epoch, and the speed."""
        return f"{self.losses} top-1 {self.top1:.0f}{self.validation} {self.images_per_s:,.0f} img/s"


class TrainProgress:
    """Shows the lines that `train` reports; a context manager. Without a terminal it prints a line now and then."""

    def __init__(self, console: Console):
        self.console = console
        self.trainings: dict[str, _Training] = {}
        self.bars = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeLeftColumn(),
            TextColumn("left"),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def __call__(self, line: dict[str, Any]) -> None:
        if line["kind"] == "start":
            self._start(line)
        elif line["kind"] == "step":
            self._step(self.trainings[line["run"]], line)
        else:
            self._epoch(self.trainings[line["run"]], line)

    def _start(self, line: dict[str, Any]) -> None:
        if line["run"] in self.trainings:
            return
        run = printable(line["run"])
        task = self.bars.add_task(run, total=line["num_steps"], completed=line["step"], numbers="")
        self.trainings[line["run"]] = _Training(task)
        if 0 < line["step"] < line["num_steps"]:
            self.console.print(f"{run}: going on at step {line['step']}", soft_wrap=True)
        for pair in line["pairs"]:
            self.console.print(f"{run}: {pair}", soft_wrap=True)
        if line["teacher_outputs"]:
            self.console.print(f"{run}: teacher outputs: {line['teacher_outputs']}", soft_wrap=True)

    def _step(self, training: _Training, line: dict[str, Any]) -> None:
        rate, before = line["images_per_s"], training.images_per_s
        training.images_per_s = 0.9 * before + 0.1 * rate if before else rate
        terms = " ".join(f"{name} {line[name]:.3g}" for name in TERMS if name in line)
        training.losses = f"loss {line['loss']:.3g} ({terms})"
        training.top1 = line["top1"]
        self.bars.update(training.task, completed=line["step"], numbers=training.numbers)

    def _epoch(self, training: _Training, line: dict[str, Any]) -> None:
        without = ", no teacher" if line.get("teacher_batches") == 0 else ""
        training.validation = f" val {line['val_top1']:.1f}{without}"
        is_last = line["step"] == line["num_steps"]
        is_shown = not is_last or len(self.trainings) < 6
        self.bars.update(training.task, numbers=training.numbers, visible=is_shown)
        if not self.console.is_terminal and (is_last or time.monotonic() - training.printed_at > LINE_SECONDS):
            training.printed_at = time.monotonic()
            place = f"{printable(line['run'])}: step {line['step']}/{line['num_steps']}"
            self.console.print(f"{place}, {training.numbers}", soft_wrap=True)
