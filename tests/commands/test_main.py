"""`pvt-hf` itself: the list of commands, how they are started, and packages that are missing."""

import runpy
import sys

import pytest

from pvt_hf.commands import main as main_module
from pvt_hf.commands.main import COMMANDS, main
from tests.support.processes import run_python


def test_help_lists_every_command_in_a_line(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert exit.value.code == 0
    assert all([name, *command.summary.split()] in lines for name, command in COMMANDS.items())


@pytest.mark.process
def test_help_imports_no_command():
    program = "import sys; from pvt_hf.commands.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    program += "print([name for name in sys.modules if name.startswith(('pvt_hf.commands.', 'pvt_hf.training'))])"
    assert run_python(program).splitlines()[-1] == "['pvt_hf.commands.main']"


@pytest.mark.parametrize("name", COMMANDS)
def test_command_says_its_name(name, capsys):
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert exit.value.code == 0 and capsys.readouterr().out.startswith(f"usage: pvt-hf {name} ")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_module_is_a_program(name, monkeypatch, capsys):
    """`python -m` and `accelerate launch -m` run it."""
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit) as exit:
        runpy.run_module(f"pvt_hf.commands.{name.replace('-', '_')}", run_name="__main__")
    assert exit.value.code == 0 and capsys.readouterr().out.startswith(f"usage: pvt-hf {name} ")


def test_unknown_command_is_an_error_that_lists_them(capsys):
    with pytest.raises(SystemExit):
        main(["train"])
    error = capsys.readouterr().err
    assert "invalid choice: 'train'" in error and all(name in error for name in COMMANDS)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("train-detection", "accelerate", "training"), ("train-classification", "timm", "training")],
)
def test_missing_package_is_one_line(name, package, extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert main([name, "--smoke"]) == 1
    assert capsys.readouterr().err == (
        f'pvt-hf {name}: {package} is missing; install it with: pip install "pvt_hf[{extra}]"\n'
    )


@pytest.mark.parametrize(("package", "extra"), [("sklearn", "training"), ("peft", "lora")])
def test_package_that_is_missed_later_is_one_line_too(package, extra, monkeypatch, capsys):
    def command(argv):
        raise ModuleNotFoundError(f"No module named {package!r}", name=f"{package}.module")

    monkeypatch.setattr("pvt_hf.commands.train_classification.main", command)
    assert main(["train-classification"]) == 1
    assert capsys.readouterr().err.endswith(f'{package} is missing; install it with: pip install "pvt_hf[{extra}]"\n')


def test_other_missing_modules_are_errors(monkeypatch):
    def command(argv):
        raise ModuleNotFoundError("No module named 'pvt_hf.x'", name="pvt_hf.x")

    monkeypatch.setattr("pvt_hf.commands.train_classification.main", command)
    with pytest.raises(ModuleNotFoundError):
        main_module.main(["train-classification"])
