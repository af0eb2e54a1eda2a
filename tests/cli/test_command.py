"""The command by itself: what it says without a network, and which functions it takes."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tokenexit import TokenExitError
from tokenexit_cli import Network, _info
from tokenexit_cli.main import main
from tokenexit_cli.network import load

SHOWN = {"size": (8, 8), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


def run(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, **options)


def test_the_installed_entry_says_what_there_is():
    said = dict(line.split("  ", 1) for line in run("-m", "tokenexit_cli", "info").stdout.splitlines())
    assert [name for name in ("tokenexit", "Python", "torch", "devices", "PyTorch adapter") if name not in said] == []
    assert said["Python"].strip().startswith(".".join(map(str, sys.version_info[:3])))
    assert "CPU cores" in said["devices"]


def test_help_imports_no_framework():
    code = (
        "import sys\nfrom tokenexit_cli.main import main\n"
        "try:\n    main(['segment', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'jax', 'PIL', 'matplotlib'} & sys.modules.keys()"
    )
    assert "usage: tokenexit segment" in run("-c", code).stdout


def test_info_without_torch_and_with_a_broken_one(monkeypatch, capsys):
    broken = type(sys)("torch")
    broken.__spec__ = find_spec("torch")
    monkeypatch.setitem(sys.modules, "torch", broken)
    assert main(["info"]) == 0
    assert re.search(r"devices +\d+ CPU cores; torch does not say more: AttributeError", capsys.readouterr().out)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(_info, "_PACKAGES", ("torch", "no-such-package"))
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"devices +\d+ CPU cores\n", said)
    assert re.search(r"no-such-package +not installed", said)
    assert re.search(r"PyTorch adapter +no, for want of torch: pip install 'tokenexit\[torch\]'", said)
    assert main(["show", "mine:build", "a.png"]) == 2
    rule = "error: `tokenexit show` must have torch, by `pip install 'tokenexit[torch]'`, got none\n"
    assert capsys.readouterr().err == rule


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "the following arguments are required: COMMAND (see tokenexit --help)"),
    (["sing"], "invalid choice: 'sing'"),
    (["segment", "mine:build", "--out", "x"], "the following arguments are required: --images (see tokenexit segment --help)"),
    (["assess", "mine:build", "--images", "x", "--at-most", "2"], "argument --at-most: must be a number between 0 and 1, got '2'"),
    (["assess", "mine:build", "--images", "x", "--minutes", "soon"], "argument --minutes: must be a number above 0, got 'soon'"),
    (["calibrate", "mine:build", "--images", "x", "--confidence", "nan"], "argument --confidence: must be"),
    (["segment", "mine:build", "--images", "/no/where", "--out", "x"], "`--images` must be a folder of pictures, got '/no/where'"),
    (["show", "mine:build", "/no/where.png"], "`IMAGE` must be a picture, got '/no/where.png'"),
])  # fmt: skip
def test_errors_of_usage_are_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_a_function_of_the_current_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of_this_folder.py").write_text(
        f"from tokenexit_cli import Network\n\n\ndef build():\n    return Network('a model', **{SHOWN})\n"
    )
    assert load("of_this_folder:build").model == "a model"


@pytest.mark.parametrize(("name", "message"), [
    ("mine", "`MODULE:FUNCTION` must be a module and a function in it, as mine:build, got 'mine'"),
    ("mine:build()", "must be a module and a function in it"),
    (":build", "must be a module and a function in it"),
    ("no_such_module:build", "must have a module in the current folder, .* got 'no_such_module:build': there is no 'no_such_module'"),
    ("no_such.module:build", "there is no 'no_such'"),
    ("tests.cli.small:bulid", "must name a function of .*small.py, which has asking, broken, nothing, got 'tests.cli.small:bulid'"),
    ("tests.cli.small:number", "must name a function of .*small.py, which has"),
    ("tests.cli.small:asking", "must name a function without arguments, got 'tests.cli.small:asking'"),
    ("tests.cli.small:nothing", "must name a function that returns a tokenexit_cli.Network, got .*, which returned NoneType"),
])  # fmt: skip
def test_functions_that_do_not_fit(name, message):
    with pytest.raises(TokenExitError, match=message):
        load(name)


def test_errors_of_the_users_own_keep_their_traceback(tmp_path, monkeypatch):
    with pytest.raises(KeyError, match="of the user's own"):
        load("tests.cli.small:broken")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lacking.py").write_text("import no_such_module\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load("lacking:build")


@pytest.mark.parametrize("where", ["module", "function"])
def test_a_torchvision_of_another_pytorch_is_named(where, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    asked = "raise RuntimeError('operator torchvision::nms does not exist')"
    body = (
        asked
        if where == "module"
        else f"def build():\n    try:\n        {asked}\n    except RuntimeError as error:\n        raise ModuleNotFoundError('no such part') from error"
    )
    (tmp_path / f"unfit_{where}.py").write_text(body + "\n")
    with pytest.raises(
        TokenExitError, match="`torchvision` must fit the installed PyTorch: install the two together, or leave"
    ):
        load(f"unfit_{where}:build")


@pytest.mark.parametrize(("options", "message"), [
    ({"size": None}, "`size` must be given, or `preprocess` instead, got None"),
    ({"std": None}, "`std` must be given, or `preprocess` instead"),
    ({"size": (8, 0)}, "`size` must be a height and a width from 1 up"),
    ({"size": 8}, "`size` must be a height and a width from 1 up"),
    ({"mean": (0.5,)}, "`mean` must be three numbers"),
    ({"std": (1, 1, 0)}, "`std` must be three positive numbers"),
    ({"preprocess": len}, "`size` must be left out beside `preprocess`, which does it all"),
    ({"preprocess": 7}, "`preprocess` must be a function of a picture, got 7"),
    ({"head": 1, "decoder": 2}, "`decoder` must be left out beside a head"),
    ({"taps": (1,)}, "`taps` must be given with `decoder` alone"),
    ({"features": "raw"}, "`features` must be given with `decoder` alone"),
    ({"reads": "patches and prefix"}, "`reads` must be given with `decoder` alone"),
    ({"classes": "road"}, "`classes` must be the names of the classes"),
    ({"classes": (1, 2)}, "`classes` must be the names of the classes"),
    ({"palette": ((0, 0, 256),)}, "`palette` must have a colour for each class, at most 256"),
    ({"palette": ((0, 0, 0),) * 257}, "`palette` must have a colour for each class, at most 256"),
    ({"palette": ((0, 0, 0),), "classes": ("a", "b")}, "`palette` must have as many colours as there are `classes`, 2, got 1"),
])  # fmt: skip
def test_networks_that_do_not_fit(options, message, unchecked):
    with pytest.raises(TokenExitError, match=message):
        Network("a model", **{**SHOWN, **options})
