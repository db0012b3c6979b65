"""Progress of a training on the terminal: a bar with every loss term, accuracy, speed and time left."""

import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

TERMS = ("label", "hard", "soft", "block", "mixer", "relation")
LINE_SECONDS = 10  # without a terminal: at most one line in this time, and the last


class TrainProgress:
    """Shows the lines that `train` reports; a context manager. Without a terminal it prints a line now and then."""

    def __init__(self, console: Console):
        self.console = console
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.printed_at = 0.0
        self.speed = 0.0

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def __call__(self, line: dict[str, Any]) -> None:
        if line["kind"] == "start":
            self.name, self.num_steps, self.val, self.speed = line["name"], line["num_steps"], "", 0.0
            self.task = self.bar.add_task(self.name, total=self.num_steps, completed=line["step"], numbers="")
            if line["step"] and line["step"] < self.num_steps:
                self.console.print(f"going on at step {line['step']} of {self.num_steps} in {line['run']}")
        elif line["kind"] == "step":
            rate = line["images_per_s"]
            self.speed = 0.9 * self.speed + 0.1 * rate if self.speed else rate
            terms = " ".join(f"{name} {line[name]:.3g}" for name in TERMS if name in line)
            numbers = f"loss {line['loss']:.3g} ({terms}) top-1 {line['top1']:.0f}{self.val} {self.speed:,.0f} img/s"
            self.bar.update(self.task, completed=line["step"], numbers=numbers)
            self.numbers = numbers
        else:
            self.val = f", val {line['val_top1']:.1f}"
            last = line["step"] == self.num_steps
            if not self.console.is_terminal and (last or time.monotonic() - self.printed_at > LINE_SECONDS):
                self.printed_at = time.monotonic()
                step = f"{self.name}: epoch {line['epoch'] + 1}, step {line['step']}/{self.num_steps}"
                self.console.print(f"{step}: {self.numbers}, val top-1 {line['val_top1']:.2f}", highlight=False)
