"""Progress of trainings on the terminal: a bar each, with every loss term, accuracy, speed and time left."""

import time
from dataclasses import dataclass
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as TimeLeftColumn

from riformer.distill.objective import TERMS

LINE_SECONDS = 15  # without a terminal, a training prints at most one line in this time, and its last


@dataclass
class _Training:
    """What is on display about one run."""

    task: TaskID
    images_per_s: float = 0.0
    val: str = ""
    numbers: str = ""
    printed_at: float = 0.0


class TrainProgress:
    """Shows the lines that `train` reports; a context manager. Without a terminal it prints a line now and then."""

    def __init__(self, console: Console):
        self.console = console
        self.trainings: dict[str, _Training] = {}
        self.bars = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeLeftColumn(),
            TextColumn("left"),
            TextColumn("{task.fields[numbers]}"),
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
            if line["run"] in self.trainings:
                return
            task = self.bars.add_task(line["run"], total=line["num_steps"], completed=line["step"], numbers="")
            self.trainings[line["run"]] = _Training(task)
            if 0 < line["step"] < line["num_steps"]:
                self.console.print(f"{line['run']}: going on at step {line['step']}", highlight=False, soft_wrap=True)
            for pair in line["pairs"]:
                self.console.print(f"{line['run']}: {pair}", highlight=False, soft_wrap=True)
            if line["teacher_outputs"]:
                told = f"{line['run']}: teacher outputs: {line['teacher_outputs']}"
                self.console.print(told, highlight=False, soft_wrap=True)
            return
        training = self.trainings[line["run"]]
        if line["kind"] == "step":
            rate, before = line["images_per_s"], training.images_per_s
            training.images_per_s = 0.9 * before + 0.1 * rate if before else rate
            terms = " ".join(f"{name} {line[name]:.3g}" for name in TERMS if name in line)
            accuracy = f"top-1 {line['top1']:.0f}{training.val}"
            training.numbers = f"loss {line['loss']:.3g} ({terms}) {accuracy} {training.images_per_s:,.0f} img/s"
            self.bars.update(training.task, completed=line["step"], numbers=training.numbers)
            return
        training.val = f" val {line['val_top1']:.1f}" + (", no teacher" if line.get("teacher_batches") == 0 else "")
        finished = line["step"] == line["num_steps"]
        if finished:
            self.bars.update(training.task, visible=len(self.trainings) < 6)
        if not self.console.is_terminal and (finished or time.monotonic() - training.printed_at > LINE_SECONDS):
            training.printed_at = time.monotonic()
            place = f"{line['run']}: step {line['step']}/{line['num_steps']}"
            self.console.print(f"{place}, {training.numbers}", highlight=False, soft_wrap=True)
