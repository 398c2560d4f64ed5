"""`pvt-hf demo` before there is a page: options, models that cannot be used, and packages that are missing."""

import sys

import pytest

from pvt_hf.commands.demo import DemoArguments, main
from pvt_hf.commands.main import main as pvt_hf_main


def test_only_this_machine_is_served_unless_it_is_asked_for():
    options = DemoArguments()
    assert options.host is None and options.share is False and options.push_to_hub is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--push_to_hub", "me/page"], "--push_to_hub needs --space"),
        (["a", "--private"], "--private is for --push_to_hub"),
        ([], "the following arguments are required: MODELS"),
    ],
)
def test_options_that_do_not_go_together_are_errors(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2 and message in capsys.readouterr().err


def test_a_model_that_is_given_twice_is_an_error():
    with pytest.raises(SystemExit, match="given twice: a"):
        main(["a", "b", "a"])


def test_a_model_that_is_not_there_is_a_line(tmp_path):
    pytest.importorskip("gradio", reason="the extra demo is not installed")
    for more in ([], ["--space", str(tmp_path / "space")]):
        with pytest.raises(SystemExit, match="nowhere cannot be loaded") as exit:
            main([str(tmp_path / "nowhere"), *more])
        assert "\n" not in str(exit.value.code)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["gradio", "pytorch_grad_cam"])
def test_a_missing_package_is_one_line(package, monkeypatch, capsys):
    if package != "gradio":
        pytest.importorskip("gradio", reason="the extra demo is not installed")
    for name in [name for name in sys.modules if name.split(".")[0] == package or name.startswith("pvt_hf.demo.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert pvt_hf_main(["demo", "runs/quickstart"]) == 1
    assert capsys.readouterr().err == (
        f'pvt-hf demo: {package} is missing; install it with: pip install "pvt_hf[demo]"\n'
    )
