"""Files and folders are replaced whole, whatever happens, and nothing else is touched."""

import errno
import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny

import riformer
from riformer import atomic
from riformer.atomic import previous, recover, replace_file, replace_folder, write_text


def write_folder(path: Path | str, text: str, **how: bool) -> None:
    with replace_folder(path, **how) as new:
        (new / "a.txt").write_text(text)
        (new / "inner").mkdir()
        (new / "inner" / "b.txt").write_text(text)


def write_file(path: Path | str, text: str) -> None:
    write_text(path, text)


def content(folder: Path) -> str:
    """What `write_folder` wrote there, if all of it is there."""
    first, second = (folder / name for name in ("a.txt", "inner/b.txt"))
    assert first.read_text() == second.read_text()
    return first.read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchanges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file system can exchange two folders; one that cannot is played by a call that always fails."""
    if not request.param:
        monkeypatch.setattr(atomic, "RENAME_EXCHANGE", 1 << 30)
    return request.param


def test_this_system_exchanges_folders(tmp_path: Path) -> None:
    """Without this, all tests here would go by two renames."""
    if sys.platform != "linux":
        pytest.skip("Linux only")
    for name in ("a", "b"):
        (tmp_path / name / name).mkdir(parents=True)
    assert atomic._exchange(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path / "a") == ["b"]


# what is not ours


def test_no_neighbour_is_touched(tmp_path: Path, exchanges: bool) -> None:
    kept = {}
    for name in (".m.123.tmp", "m.previous", ".m.123.old", ".m.backup.tmp", ".m.abcdefgh.tmp", "m.tmp", "new", "old"):
        kept[tmp_path / name / "thesis.txt"] = name
    kept |= {tmp_path / name: name for name in (".m.77.tmp", "m.old", ".m.tmp", ".m.zyxwvuts.tmp")}
    for path, text in kept.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    os.symlink(tmp_path / "m.previous", tmp_path / ".m.12345678.tmp")
    before = names(tmp_path)
    for text in ("1", "2"):
        write_folder(tmp_path / "m", text)
        write_file(tmp_path / "m.json", text)
        assert names(tmp_path) == sorted([*before, "m", "m.json"])
        assert {path: path.read_text() for path in kept} == kept


def test_saving_a_model_keeps_the_users_folders_beside_it(tmp_path: Path) -> None:
    (tmp_path / "m.previous").mkdir()
    (tmp_path / "m.previous" / "thesis.txt").write_text("mine")
    for _ in range(2):
        riformer.save_pretrained(tiny(), tmp_path / "m")
    assert (tmp_path / "m.previous" / "thesis.txt").read_text() == "mine"
    assert names(tmp_path) == ["m", "m.previous"]


def test_hidden_files_of_a_replaced_folder_stay(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", "1")
    (tmp_path / "m" / ".gitattributes").write_text("mine")
    (tmp_path / "m" / ".cache" / "huggingface").mkdir(parents=True)
    write_folder(tmp_path / "m", "2")
    assert content(tmp_path / "m") == "2"
    assert names(tmp_path / "m") == [".cache", ".gitattributes", "a.txt", "inner"]
    assert (tmp_path / "m" / ".gitattributes").read_text() == "mine"
    assert (tmp_path / "m" / ".cache" / "huggingface").is_dir()


@pytest.mark.parametrize("write", [write_folder, write_file])
def test_a_link_stays_a_link(tmp_path: Path, write: Callable[[Path, str], None], exchanges: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    write(target, "1")
    link.symlink_to(target)
    write(link, "2")
    assert link.is_symlink()
    assert link.readlink() == target
    assert (content(target) if target.is_dir() else target.read_text()) == "2"
    assert names(tmp_path) == ["elsewhere", "link"]
    assert names(tmp_path / "elsewhere") == ["target"]
    (tmp_path / "dangling").symlink_to(tmp_path / "not yet" / "there")
    write(tmp_path / "dangling", "3")
    assert (tmp_path / "not yet" / "there").exists()


def test_where_a_path_is_written_does_not_depend_on_its_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for i, path in enumerate(("m", "m/", "./m", "m/../m", str(tmp_path / "m"))):
        write_folder(path, str(i))
        assert content(tmp_path / "m") == str(i)
    assert names(tmp_path) == ["m"]


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path / "m")
    for path in (".", tmp_path / "m", "../m"):
        with pytest.raises(ValueError, match="is the current folder or a mount point"):
            write_folder(path, "1")
    assert names(tmp_path) == ["m"]
    assert os.path.samefile(".", tmp_path / "m")


def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*file: Not a directory"):
        write_folder(tmp_path / "file", "1")
    with pytest.raises(OSError, match=r"cannot write .*folder: Is a directory"):
        write_file(tmp_path / "folder", "1")
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", "text")
    assert os.read(reader, 100) == b"text"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    write_file("/dev/null", "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


# modes


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        riformer.save_pretrained(tiny(), tmp_path / "m")
        riformer.save(tiny(), tmp_path / "m.safetensors")
        write_file(tmp_path / "text", "1")
    finally:
        os.umask(before)
    assert mode(tmp_path / "m") == 0o777 & ~umask
    for name in ("m/config.json", "m/model.safetensors", "m.safetensors", "text"):
        assert mode(tmp_path / name) == 0o666 & ~umask


def test_what_is_replaced_gives_its_mode(tmp_path: Path) -> None:
    write_folder(tmp_path / "m", "1")
    write_file(tmp_path / "text", "1")
    (tmp_path / "m").chmod(0o750)
    (tmp_path / "text").chmod(0o640)
    write_folder(tmp_path / "m", "2")
    write_file(tmp_path / "text", "2")
    assert (mode(tmp_path / "m"), mode(tmp_path / "text")) == (0o750, 0o640)


# a process that is killed


def killed_at(number: int, action: Callable[[], None]) -> bool:
    """Runs `action` in a process that is killed at the number-th event of its auditing; False if it came to its end.

    Python tells an audit hook what is about to happen: a file is opened, renamed, removed, a function of C looked up.
    """
    child = os.fork()
    if not child:
        left = [number]

        def count(event: str, arguments: tuple) -> None:
            if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "ctypes.dlsym"):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        action()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def test_killed_at_any_moment_a_folder_is_whole_old_or_new(tmp_path: Path, exchanges: bool) -> None:
    seen = []
    for number in range(1, 100):
        path = tmp_path / str(number) / "m"
        write_folder(path, "old")
        going_on = killed_at(number, lambda path=path: write_folder(path, "new"))
        if exchanges:
            assert path.exists()
        seen.append(content(recover(path)))
        assert recover(path) == path
        write_folder(path, "newer")
        assert content(path) == "newer"
        assert names(path.parent) == ["m"]  # and what was left behind is gone
        if not going_on:
            break
    assert seen == sorted(seen, reverse=True)  # old, until it is new
    assert {"old", "new"} == set(seen)
    assert len(seen) > 15


def test_killed_at_any_moment_one_of_two_states_is_whole(tmp_path: Path, exchanges: bool) -> None:
    for number in range(1, 100):
        path = tmp_path / str(number) / "last"
        for text in ("1", "2"):
            write_folder(path, text, keep_previous=True)
        going_on = killed_at(number, lambda path=path: write_folder(path, "3", keep_previous=True))
        assert content(recover(path)) in ("2", "3")
        if exchanges or content(recover(path)) == "2":
            assert content(previous(path)) in ("1", "2")
        write_folder(path, "4", keep_previous=True)
        assert names(path.parent) == ["last", "last.previous"]
        if not going_on:
            return
    pytest.fail("never came to its end")


def test_a_first_write_that_is_killed_leaves_nothing_that_a_second_does_not_remove(tmp_path: Path) -> None:
    for number in range(1, 100):
        folder, file = tmp_path / str(number) / "m", tmp_path / str(number) / "f"
        folder.parent.mkdir()
        going_on = killed_at(
            number, lambda folder=folder, file=file: (write_folder(folder, "1"), write_file(file, "1"))
        )
        assert not recover(folder).exists() or content(recover(folder)) == "1"
        write_folder(folder, "2")
        write_file(file, "2")
        assert names(folder.parent) == ["f", "m"]
        if not going_on:
            return
    pytest.fail("never came to its end")


@pytest.mark.parametrize("left", [0, 1])
def test_an_exception_between_two_renames_undoes_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    monkeypatch.setattr(atomic, "RENAME_EXCHANGE", 1 << 30)
    write_folder(tmp_path / "m", "old")

    def rename(*paths: Path, real: Callable = os.rename) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "m", "new")
    assert content(tmp_path / "m") == "old"
    assert names(tmp_path) == ["m"]


def test_what_a_killed_process_moved_away_is_read_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "m", "old")
    (tmp_path / ".m.abcdefgh.tmp").mkdir()
    (tmp_path / "m").rename(tmp_path / ".m.abcdefgh.tmp" / "old")  # without a lock: as on a read-only disk
    assert content(recover(tmp_path / "m")) == "old"
    assert names(tmp_path) == [".m.abcdefgh.tmp"]
    (tmp_path / ".m.abcdefgh.tmp" / "lock").touch()
    assert content(recover(tmp_path / "m")) == "old"
    assert names(tmp_path) == ["m", ".m.abcdefgh.tmp"][::-1]
    assert recover(tmp_path / "never") == tmp_path / "never"


def test_another_process_that_writes_is_left_alone(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "m") as new:
        (new / "a.txt").write_text("slow")
        (new / "inner").mkdir()
        (new / "inner" / "b.txt").write_text("slow")
        write_folder(tmp_path / "m", "fast")
        assert content(tmp_path / "m") == "fast"
    assert content(tmp_path / "m") == "slow"
    assert names(tmp_path) == ["m"]


# errors


def test_the_working_folder_of_another_user_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".m.abcdefgh.tmp").mkdir()

    def listdir(path: Path, real: Callable = os.listdir) -> list[str]:
        if Path(path).name == ".m.abcdefgh.tmp":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", listdir)
    write_folder(tmp_path / "m", "1")
    assert names(tmp_path) == [".m.abcdefgh.tmp", "m"]


def test_a_folder_that_cannot_be_moved_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "m", "1")

    def rename(one: Path, other: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(one), None, str(other))

    monkeypatch.setattr(atomic, "RENAME_EXCHANGE", 1 << 30)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match=rf"^cannot write {tmp_path}/m: Invalid cross-device link$"):
        write_folder(tmp_path / "m", "2")
    assert content(tmp_path / "m") == "1"


def full_disk(number: int = errno.ENOSPC) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize("path", ["m", "m.json"])
def test_an_error_names_path_and_cause_and_leaves_what_was_there(tmp_path: Path, path: str) -> None:
    replace, write = (replace_folder, write_folder) if path == "m" else (replace_file, write_file)
    write(tmp_path / path, "old")
    for cause in (full_disk(), full_disk(errno.EDQUOT), full_disk(errno.EROFS)):
        with pytest.raises(OSError, match=f"^cannot write {tmp_path / path}: {cause.strerror}$") as raised:  # noqa: SIM117
            with replace(tmp_path / path):
                raise cause
        assert raised.value.errno == cause.errno
    for unrelated in (ValueError("wrong"), FileNotFoundError(2, "No such file", "/other"), OSError("disk"), EOFError()):
        with pytest.raises(type(unrelated)) as raised, replace(tmp_path / path):
            raise unrelated
        assert raised.value is unrelated
    assert names(tmp_path) == [path]


def in_child(action: Callable[[], None]) -> str:
    """The message of what `action` raises, in a process whose files may have 20,000 bytes."""
    resource = pytest.importorskip("resource")
    read, write = os.pipe()
    if not os.fork():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            action()
        except Exception as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.close(write)
    os.wait()
    with os.fdopen(read) as pipe:
        return pipe.read()


def test_libraries_that_do_not_say_why_are_asked_again(tmp_path: Path) -> None:
    """Files too large for the process fail like a full disk: torch and safetensors raise errors of their own."""
    large = {"w": torch.zeros(100_000)}

    def write(save: Callable[[Path], object]) -> Callable[[], None]:
        def action() -> None:
            with replace_folder(tmp_path / "m") as new:
                (new / "config.json").write_text("{}")
                save(new / "weights")

        return action

    for save in (
        lambda file: torch.save(large, file),
        lambda file: save_file(large, file),
        lambda file: file.write_bytes(bytes(100_000)),
    ):
        assert in_child(write(save)) == f"OSError: cannot write {tmp_path / 'm'}: File too large"
    assert in_child(write(lambda file: torch.load(tmp_path / "missing"))).startswith("FileNotFoundError: [Errno 2]")
    assert names(tmp_path) == []


def test_a_parent_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"cannot write .*/file/m: Not a directory in .*/file$|File exists in .*/file$"):
        write_folder(tmp_path / "file" / "m", "1")
    if not hasattr(os, "geteuid") or not os.geteuid():
        pytest.skip("root may write everywhere")
    (tmp_path / "parent").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match=r"cannot write .*/parent/m: Permission denied in .*/parent$"):
        write_folder(tmp_path / "parent" / "m", "1")
