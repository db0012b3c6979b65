"""The verb: names, keys, and one line for what is wrong."""

import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import riformer_cli
from riformer_runtime.cli.serve import KEY_VARIABLE, api_key, named


def test_models_have_names(tmp_path):
    (tmp_path / "a=b").mkdir()
    odd = str(tmp_path / "a=b")
    assert named(["runs/photos-seed0", "t.1=x/y=z", odd, "one.onnx"]) == {
        "photos-seed0": "runs/photos-seed0",
        "t.1": "x/y=z",
        "a-b": odd,
        "one": "one.onnx",
    }
    assert named(["."]) == {Path.cwd().name: "."}
    for given, message in (
        (["a b=c"], "'a b' in 'a b=c' is no name"),
        (["=c"], "no name"),
        (["x/m", "y/m"], "name them"),
    ):
        with pytest.raises(ValueError, match=message):
            named(given)


def test_a_key_is_one_word_of_a_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "key"
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert api_key("") == ""
    monkeypatch.setenv(KEY_VARIABLE, "from-environment")
    file.write_text("from-file\n")
    assert (api_key(""), api_key(str(file))) == ("from-environment", "from-file")
    for text in ("", " \n", "two words", "naïve"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="has no key"):
            api_key(str(file))
    monkeypatch.setenv(KEY_VARIABLE, "")
    with pytest.raises(ValueError, match=KEY_VARIABLE):
        api_key("")


def test_what_is_wrong_is_one_line(serve, artifacts, tmp_path, capsys):
    port = urlsplit(serve(artifacts["student"]).url).port
    path = str(artifacts["student"])
    for arguments, message in (
        ([path, "--port", str(port)], f"cannot listen on 127.0.0.1, port {port}: Address already in use"),
        ([path, "--host", "192.0.2.1"], "cannot listen on 192.0.2.1, port 8000"),
        ([path, "--host", "no such host"], "cannot listen on no such host"),
        ([path, path], "two models have the name student"),
        ([path, "--api-key-file", str(tmp_path / "absent")], "absent"),
        ([str(tmp_path / "absent"), "--port", "0"], "absent"),
        ([path, "--port", "0", "--engine", "openvino"], "has nothing for openvino"),
    ):
        assert riformer_cli.run("serve", arguments) == 1
        said = capsys.readouterr().err
        assert message in " ".join(said.split())
        assert "Traceback" not in said
    for option in (
        "--batch-size",
        "--max-mib",
        "--max-files",
        "--max-pixels",
        "--max-requests",
        "--max-wait-ms",
        "--port",
    ):
        with pytest.raises(SystemExit):
            riformer_cli.run("serve", [path, option, "-1"])
        assert f"{option} is -1; it must be" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_extra_that_brings_it(artifacts):
    """In a process in which FastAPI cannot be imported; without it the other verbs work."""
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "import riformer_cli\n"
        f"sys.exit(riformer_cli.run(sys.argv[1], [{str(artifacts['student'])!r}]))"
    )
    failed = subprocess.run([sys.executable, "-c", code, "serve"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr == "riformer serve: serving needs fastapi: pip install 'riformer[serve]'\n"
    assert subprocess.run([sys.executable, "-c", code, "check"], capture_output=True).returncode == 0


def test_the_help_teaches(capsys):
    with pytest.raises(SystemExit):
        riformer_cli.run("serve", ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--max-wait-ms", "/metrics", "/ready", "side by side", KEY_VARIABLE, "127.0.0.1", "SIGTERM", "curl"):
        assert words in text
