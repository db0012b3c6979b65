"""The command line ends with one message and the right exit code, whatever happens to it and to its streams."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tiny import tiny, tiny_recipe

import riformer
import riformer_cli
from riformer import cli
from riformer.train.loop import train
from riformer.train.run import Run
from riformer_runtime import cli as runtime_cli  # noqa: F401
from riformer_runtime.cli.console import Console

ROOT = Path(__file__).parents[1]


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException, verb: str = "list") -> None:
    """Makes a verb fail."""

    def action(argv: list[str]) -> int:
        raise error

    monkeypatch.setitem(cli.VERBS, verb, action)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (SafetensorError("header too large"), "header too large"),
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 7 TiB"), "Unable to allocate 7 TiB"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (torch.distributed.DistNetworkError("connection refused"), "connection refused"),
        (ValueError("a[bold]b \udcff"), r"a[bold]b \udcff"),
        (ValueError(), "ValueError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_mend_is_one_message(monkeypatch, capsys, error: Exception, message: str) -> None:
    raising(monkeypatch, error)
    assert cli.run("list", []) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("riformer list: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_the_error_of_a_worker_is_shown_without_its_traceback(monkeypatch, capsys) -> None:
    class Failing(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, i: int) -> int:
            raise ValueError("photos/a.png: not an image\nsecond line")

    with pytest.raises(ValueError, match="Original Traceback") as raised:
        list(torch.utils.data.DataLoader(Failing(), num_workers=1))
    raising(monkeypatch, raised.value)
    assert cli.run("list", []) == 1
    assert capsys.readouterr().err == "riformer list: photos/a.png: not an image\nsecond line\n"


def test_other_exceptions_are_defects_and_keep_their_traceback(monkeypatch) -> None:
    raising(monkeypatch, KeyError("defect"))
    with pytest.raises(KeyError):
        cli.run("list", [])


@pytest.mark.parametrize(("verb", "advice"), [("train", "; run the same command again to resume"), ("list", "")])
def test_an_interrupt_says_whether_there_is_anything_to_resume(monkeypatch, capsys, verb: str, advice: str) -> None:
    raising(monkeypatch, KeyboardInterrupt(), verb)
    assert cli.run(verb, []) == 130
    assert capsys.readouterr().err == f"riformer {verb}: interrupted{advice}\n"


@pytest.mark.parametrize(("verb", "table"), [("check", "riformer_runtime.cli.VERBS"), ("list", "riformer.cli.VERBS")])
def test_an_interrupt_reaches_a_verb_that_runs(monkeypatch, capsys, verb: str, table: str) -> None:
    """While modules are imported it ends the process; a verb can then save or show what it has done."""

    def action(argv: list[str]) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return 0

    module, _, name = table.rpartition(".")
    monkeypatch.setitem(getattr(sys.modules[module], name), verb, action)
    assert riformer_cli.run(verb, []) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["closed", "full", "no reader"])
def test_an_error_that_cannot_be_printed_still_gives_its_exit_code(monkeypatch, kind: str) -> None:
    raising(monkeypatch, ValueError("wrong"))
    read, write = os.pipe()
    os.close(read)
    stream = open("/dev/full", "w") if kind == "full" else os.fdopen(write, "w")  # noqa: SIM115
    if kind == "closed":
        stream.close()
    else:
        with pytest.raises(OSError, match=r"No space|Broken pipe"):  # a control
            os.write(stream.fileno(), b"x")
    monkeypatch.setattr("riformer_runtime.cli.options.errors", Console(file=stream))
    before = os.dup(1)  # which rich closes when nobody reads
    try:
        assert cli.run("list", []) == 1
    finally:
        os.dup2(before, 1)
        os.close(before)


# processes


def start(code: str, **settings: object) -> subprocess.Popen:
    """A process in which `code` runs after `import riformer_cli`, without the package."""
    lines = ["import os, signal, sys, types", f"sys.path.insert(0, {str(ROOT)!r})", "import riformer_cli", code]
    command = [sys.executable, "-c", "\n".join(lines)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, **settings)


FAKE = """
cli = types.ModuleType("riformer.cli")
package = types.ModuleType("riformer")
package.cli = cli
sys.modules.update({"riformer": package, "riformer.cli": cli})
"""


def test_an_interrupt_while_modules_load_ends_quietly(tmp_path: Path) -> None:
    (tmp_path / "riformer").mkdir()
    (tmp_path / "riformer" / "__init__.py").write_text(
        "import sys, time\nprint('loading', flush=True)\ntry:\n    time.sleep(60)\nexcept BaseException: pass\n"
    )
    process = start(f"sys.path.insert(0, {str(tmp_path)!r})\nsys.argv = ['riformer', 'list']\nriformer_cli.main()")
    assert process.stdout.readline() == b"loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 130


def test_an_ignored_interrupt_stays_ignored() -> None:
    code = """signal.signal(signal.SIGINT, signal.SIG_IGN)
with riformer_cli.interrupts_end_the_process():
    os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)
print("alive")"""
    process = start(code)
    assert process.communicate(timeout=30) == (b"alive\n", b"")


def test_after_loading_interrupts_are_exceptions_again() -> None:
    code = """with riformer_cli.interrupts_end_the_process():
    pass
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("exception")"""
    assert start(code).communicate(timeout=30) == (b"exception\n", b"")


@pytest.mark.parametrize(
    ("redirect", "code", "message"),
    [
        ("> /dev/full", 1, "riformer: cannot write standard output: No space left on device\n"),
        ("| true", 0, ""),
        ("2> /dev/full", 0, ""),
        (">&-", 0, ""),
    ],
)
def test_a_standard_output_that_takes_nothing(redirect: str, code: int, message: str) -> None:
    command = f"{sys.executable} {ROOT / 'riformer_cli.py'} --help {redirect}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, message)


def test_a_reader_that_leaves_early_ends_a_verb_quietly() -> None:
    code = (
        FAKE
        + """
from rich.console import Console
def run(verb, argv):
    console = Console()
    for i in range(100000):
        console.print("line", i)
    return 0
cli.run = run
sys.argv = ["riformer", "list"]
riformer_cli.main()"""
    )
    process = start(code)
    assert process.stdout.readline() == b"line 0\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_what_a_stream_cannot_encode_is_escaped() -> None:
    code = FAKE + 'cli.run = lambda verb, argv: print("é–\\udcff") or print("ü", file=sys.stderr) or 0\n'
    code += 'sys.argv = ["riformer", "list"]\nriformer_cli.main()'
    process = start(code, env={**os.environ, "PYTHONIOENCODING": "ascii", "LANG": "C"})
    assert process.communicate() == (rb"\xe9\u2013\udcff" + b"\n", rb"\xfc" + b"\n")
    assert process.returncode == 0


def test_an_unknown_verb_is_refused_before_anything_is_loaded(capsys) -> None:
    with pytest.raises(SystemExit, match="did you mean train"):
        riformer_cli.run("trian", [])
    assert riformer_cli.run("--version", []) == 0
    assert capsys.readouterr().out == f"riformer {riformer.__version__}\n"


# disks


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_recipe(epochs=1), tmp_path_factory.mktemp("errors") / "run").path


def in_limited_process(action: Callable[[], int], limit: int) -> int:
    """The exit code of `action` in a process whose files may have `limit` bytes."""
    if not (child := os.fork()):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = 77
        try:
            code = action()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("verb", ["train", "fuse", "publish", "convert", "report"])
def test_a_full_disk_is_one_line_with_the_path(trained: Path, tmp_path: Path, capfd, verb: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    if verb == "train":
        shutil.rmtree(run / "last")
        shutil.rmtree(run / "best")
        (run / "metrics.jsonl").unlink()
    arguments = {
        "train": ["--resume", str(run)],
        "fuse": [str(run), str(tmp_path / "out.safetensors")],
        "publish": [str(run), str(tmp_path / "out")],
        "convert": [str(run / "best"), str(tmp_path / "out.safetensors")],
        "report": [str(run), "--out", str(tmp_path / "out.html")],
    }
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    if verb == "train":  # not in a fork, where autograd refuses to work once it has used threads
        command = [sys.executable, "-m", "riformer", verb, *arguments[verb]]
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (4000, 4000))
        assert subprocess.run(command, preexec_fn=limit).returncode == 1
    else:
        assert in_limited_process(lambda: cli.run(verb, arguments[verb]), 4000) == 1
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith(f"riformer {verb}: ")]
    assert f"cannot write {tmp_path}" in line
    assert "File too large" in line
    if verb != "train":
        assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_an_evaluation_that_cannot_be_recorded_is_shown(trained: Path, tmp_path: Path, capfd) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert in_limited_process(lambda: cli.run("eval", [str(run)]), 4000) == 0
    assert "student" in capfd.readouterr().out
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_an_interrupted_first_epoch_leaves_a_run_that_says_to_train_it(tmp_path: Path, capsys) -> None:
    run = Run(tmp_path / "run")
    run.begin(tiny_recipe(), world_size=1)
    for verb, rest in (("eval", []), ("fuse", [str(tmp_path / "out")]), ("publish", [str(tmp_path / "out")])):
        assert cli.run(verb, [str(run.path), *rest]) == 1
        assert capsys.readouterr().err == f"riformer {verb}: {run.path} has no best/ yet: train it first\n"
    assert cli.run("fuse", [str(tmp_path / "none"), str(tmp_path / "out")]) == 1


def test_models_saved_here_are_read_by_all_verbs(tmp_path: Path, capsys) -> None:
    """A control for the tests above: without a limit nothing fails."""
    riformer.save(tiny(), tmp_path / "m")
    assert in_limited_process(lambda: cli.run("fuse", [str(tmp_path / "m"), str(tmp_path / "o.safetensors")]), -1) == 0
