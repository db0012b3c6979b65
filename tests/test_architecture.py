"""The house as ARCHITECTURE.md draws it, and what importing it costs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def drawn_files() -> set[str]:
    """Paths in the tree of ARCHITECTURE.md."""
    tree = (ROOT / "ARCHITECTURE.md").read_text().split("```")[1]
    paths, folders = set(), {}
    for line in tree.strip().splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        folders[depth] = name
        if not name.endswith("/"):
            paths.add("".join(folders[i] for i in range(depth)) + name)
    return paths


def test_the_tree_in_architecture_md_equals_the_files():
    sources = [path for path in (ROOT / "riformer").rglob("*.*") if path.suffix in (".py", ".cpp", ".h")]
    files = {str(path.relative_to(ROOT)) for path in sources}
    packages = {path for path in files if path.count("/") == 2 and path.endswith("__init__.py")}
    assert len(packages) == 10
    assert drawn_files() == (files - packages) | {"riformer_cli.py"}


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)


def test_importing_is_silent_and_costs_little_more_than_timm():
    """That nothing is printed and nothing heavy imported; seconds are not for a test."""
    result = subprocess.run([sys.executable, "-c", "import riformer"], capture_output=True, text=True, check=True)
    assert result.stdout + result.stderr == ""
    loaded = python(
        "import timm, torch, sys; b = set(sys.modules); import riformer; print(*(set(sys.modules) - b))"
    ).stdout
    assert all(name.startswith("riformer") or name.split(".")[0] in ALLOWED for name in loaded.split()), loaded


ALLOWED = {"difflib", "_pickle", "pickle", "tempfile", "shutil", "json", "bz2", "lzma", "zlib", "_bz2", "_lzma"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_the_console_script_answers_without_importing_the_package(arguments):
    call = f"import sys; sys.argv[1:] = {arguments}; import riformer_cli; riformer_cli.main(); "
    code = call + "print({*sys.modules} & {'torch', 'timm', 'riformer'})"
    output = python(code).stdout
    assert output.strip().endswith("set()")
    assert "riformer" in output


def test_both_tables_of_verbs_are_one():
    import riformer_cli
    from riformer import cli

    assert list(cli.VERBS) == list(riformer_cli.VERBS)
