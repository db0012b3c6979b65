"""The house as ARCHITECTURE.md draws it, and what importing it costs."""

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from riformer.config import Recipe

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
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "riformer").rglob("*.py")}
    packages = {path for path in files if path.count("/") == 2 and path.endswith("__init__.py")}
    assert len(packages) == 5
    assert drawn_files() == (files - packages) | {"riformer_cli.py"}


def test_every_knob_is_read_somewhere():
    code = "".join(
        p.read_text() for p in (ROOT / "riformer").rglob("*.py") if p.name not in ("config.py", "recipes.py")
    )
    sections = [kind for kind in get_type_hints(Recipe).values() if is_dataclass(kind)]
    knobs = [field.name for section in sections for field in fields(section)]
    assert len(knobs) > 40
    unread = [name for name in knobs if not re.search(rf"\.{name}\b", code) and not read_by_its_name(name, code)]
    assert unread == []


def read_by_its_name(name: str, code: str) -> bool:
    """Weights and sizes are read with getattr, by names that stand in a tuple."""
    return f'"{name.removesuffix("_weight")}"' in code


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)


def test_importing_is_silent_and_costs_little_more_than_timm():
    """A generous bound: how long it takes is for benchmarks to say, that nothing heavy is imported is for this test."""
    seconds = "import time, timm, torch; t = time.perf_counter(); import riformer; print(time.perf_counter() - t)"
    result = subprocess.run([sys.executable, "-c", seconds], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    assert float(result.stdout) < 1.0
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
