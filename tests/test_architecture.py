"""The house as ARCHITECTURE.md draws it, and what importing it costs."""

import ast
import re
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


def source_files(*suffixes: str) -> list[Path]:
    """Files of both packages."""
    return [
        path
        for package in ("riformer", "riformer_runtime")
        for path in (ROOT / package).rglob("*.*")
        if path.suffix in suffixes and "compiled" not in path.parts
    ]


def test_the_tree_in_architecture_md_equals_the_files():
    files = {str(path.relative_to(ROOT)) for path in source_files(".py", ".cpp", ".h")}
    packages = {path for path in files if path.count("/") == 2 and path.endswith("__init__.py")}
    assert len(packages) > 12
    assert drawn_files() == (files - packages) | {"riformer_cli.py"}


PACKAGES = ("riformer", "riformer_runtime")

# Imports of the package inside a function, each with its reason; avoiding an import circle is not one.
LATE_IMPORTS = {
    ("riformer/runtime/optimize.py", "riformer.runtime.cuda"),  # needs Triton, which a PyTorch for CPUs does not have
    # FastAPI and uvicorn are an extra, and take longer to import than the verb's other steps take together.
    *(
        ("riformer_runtime/cli/serve.py", f"riformer_runtime.serve.{name}")
        for name in ("app", "limits", "samples", "server", "service")
    ),
}


def test_no_import_of_the_package_hides_in_a_function():
    late = set()
    for path in source_files(".py"):
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, FUNCTIONS)]
        for node in (inner for function in functions for inner in ast.walk(function)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            late |= {(str(path.relative_to(ROOT)), name) for name in names if name.split(".")[0] in PACKAGES}
    assert late == LATE_IMPORTS


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def test_a_file_has_350_lines_or_a_reason_in_architecture_md():
    """The reasons are a paragraph that begins with "Longer than 350 lines:" and has the paths in backticks."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    reasons = re.search(r"^Longer than 350 lines: (.*?)(?:\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    excused = set(re.findall(r"`([\w/]+\.\w+)`", reasons[1] if reasons else ""))
    suffixes = (".py", ".cpp", ".h", ".html", ".css", ".js")
    long = {str(path.relative_to(ROOT)) for path in source_files(*suffixes) if len(path.read_text().splitlines()) > 350}
    assert long == excused


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)


def test_importing_is_silent_and_costs_little_more_than_timm():
    """That nothing is printed and nothing heavy imported; seconds are not for a test."""
    result = python("import timm, torch, sys; b = set(sys.modules); import riformer; print(*(set(sys.modules) - b))")
    loaded = result.stdout
    assert (loaded.count("\n"), result.stderr) == (1, "")
    assert all(name.startswith("riformer") or name.split(".")[0] in ALLOWED for name in loaded.split()), loaded


ALLOWED = {"difflib", "_pickle", "pickle", "tempfile", "shutil", "json", "bz2", "lzma", "zlib", "_bz2", "_lzma"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_the_console_script_answers_without_importing_the_package(arguments):
    call = f"import sys, riformer_cli\nsys.argv[1:] = {arguments}\ntry: riformer_cli.main()\nexcept SystemExit: pass\n"
    code = call + "print({*sys.modules} & {'torch', 'timm', 'numpy', 'rich', 'riformer', 'riformer_runtime'})"
    output = python(code).stdout
    assert output.strip().endswith("set()")
    assert "riformer" in output


def test_both_tables_of_verbs_are_one():
    import riformer_cli
    from riformer import cli
    from riformer_runtime import cli as runtime

    assert set(riformer_cli.WITHOUT_TORCH) == set(runtime.VERBS)
    assert set(riformer_cli.VERBS) == {*cli.VERBS, *runtime.VERBS}
    assert not set(cli.VERBS) & set(runtime.VERBS)
