"""Runs timm's own model tests on the models of this package: `make timm-tests`.

timm ships its tests in its source distribution only, so that of the installed version is fetched, once, into build/.
The tests run as they are, but for this package's module and models standing in their lists of what to test.
"""

import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import timm

from riformer.model.variants import GFNETS, VARIANTS

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build" / "timm-tests"
NAMES = [*VARIANTS, *GFNETS]

# Their list of modules whose models have intermediates is by file name: ours is variants.py.
MODULES = (r"^FEAT_INTER_FILTERS = \[\n", "    'variants',\n")
# These tests of theirs name the models themselves, one of each kind.
NAMED = ("test_reset_classifier_keeps_pool", "test_prune_intermediate_layers_params_used")

# Not selected: the two tests that fetch pretrained weights.
SELECTED = f"({' or '.join(NAMES)}) and not load_pretrained and not features_pretrained"
# These two want three maps or more, and micro has two.
LEFT_OUT = [f"test_model_forward_{test}[1-riformer_micro]" for test in ("features", "intermediates")]


def fetch() -> Path:
    """The unpacked tests of the installed timm, fetched where they are not there yet."""
    name = f"timm-{timm.__version__}"
    archive = CACHE / f"{name}.tar.gz"
    if not archive.is_file():
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
        done = subprocess.run([*pip, "--no-binary", "timm", "--dest", CACHE, f"timm=={timm.__version__}"])
        if done.returncode or not archive.is_file():
            sys.exit(f"timm-tests: the source distribution of {name} could not be fetched; put it at {archive}")
    with tarfile.open(archive) as tar:
        tests = [m for m in tar if m.name == f"{name}/pyproject.toml" or m.name.startswith(f"{name}/tests/")]
        tar.extractall(CACHE, tests, filter="data")
    return CACHE / name


def list_ours(text: str) -> str:
    """Their test_models.py with our module and names at the head of its lists; nothing else changes."""
    names = "".join(f"    '{name}',\n" for name in NAMES)
    named = [(rf"^@pytest.mark.parametrize\('model_name', \[(?=[^@]*\)\ndef {test}\()", names) for test in NAMED]
    for pattern, entries in (MODULES, *named):
        text, count = re.subn(pattern, lambda match, entries=entries: match[0] + entries, text, flags=re.MULTILINE)
        if count != 1:
            sys.exit(f"timm-tests: test_models.py of timm {timm.__version__} has {count} lists like {pattern}, not 1")
    return text


def main() -> None:
    folder = fetch()
    tests, results = folder / "tests" / "test_models.py", CACHE / "results.xml"
    tests.write_text(list_ours(tests.read_text()))
    results.unlink(missing_ok=True)
    left_out = [f"--deselect={tests.relative_to(folder)}::{test}" for test in LEFT_OUT]
    # `-p riformer` registers the models before the tests list them. Their time limits need a plugin, and go unheeded.
    command = [sys.executable, "-m", "pytest", tests, "-p", "riformer", "-p", "no:cacheprovider", "-W", "ignore", "-q"]
    command += ["-n", "2", "-k", SELECTED, *left_out, f"--junitxml={results}", "--durations=5", *sys.argv[1:]]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("GITHUB_ACTIONS", None)  # there they leave tests out
    code = subprocess.run(command, cwd=folder, env=env).returncode
    if not results.is_file():
        sys.exit(f"timm-tests: pytest ended with status {code} before it had results")
    cases = list(ElementTree.parse(results).iter("testcase"))
    passed = [case.attrib["name"] for case in cases if len(case) == 0]
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts = Counter(re.search("|".join(NAMES), name)[0] for name in passed)
    ran = f"{len(passed)} passed, {skipped} skipped, of {len(cases)}; {len(LEFT_OUT)} left out"
    print(f"timm {timm.__version__}'s own model tests: {ran}")  # noqa: T201
    print("  " + ", ".join(f"{name} {counts[name]}" for name in NAMES))  # noqa: T201
    if code or len(counts) < len(NAMES):
        sys.exit("timm-tests: a test failed, or a model had none")


if __name__ == "__main__":
    main()
