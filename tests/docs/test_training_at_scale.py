"""The command lines, files and numbers of the guide to training at scale."""

import csv
import re
import shlex
import subprocess

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from transformers import AutoModelForImageClassification

import pvt_hf
from tests.docs.test_pages import DOCS, has_option, load_script, read_help

PAGE = (DOCS / "guides" / "training-at-scale.md").read_text()
YAML = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def parse_launch(words: list[str]):
    """By the launcher's own parser, which ends the program for what it does not know."""
    if words[0] == "torchrun":
        return get_args_parser().parse_args(words[1:])
    assert words[:2] == ["accelerate", "launch"]
    return launch_command_parser().parse_args(words[2:])


def test_launchers_know_the_options_of_the_command_lines():
    blocks = "\n".join(re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)).replace("\\\n", " ")
    lines = [line for line in blocks.splitlines() if line.startswith(("torchrun", "accelerate"))]
    assert len(lines) == 5
    for line in lines:
        options = parse_launch(shlex.split(line))
        assert options.module and options.training_script == "pvt_hf.commands.train_detection"


def test_the_file_of_arguments_has_options_of_the_program():
    names = yaml.safe_load(YAML[0])
    assert len(names) > 5 and all(has_option(read_help("train-detection"), f"--{name}") for name in names)


def test_the_job_of_kubernetes_starts_a_launcher_that_waits_long_enough():
    service, job = yaml.safe_load_all(YAML[1])
    pod, spec = job["spec"]["template"]["spec"], job["spec"]
    (container,) = pod["containers"]
    options = parse_launch(
        [word.replace("$(JOB_COMPLETION_INDEX)", "0") for word in container["command"] + container["args"]]
    )
    assert int(options.num_machines) == spec["completions"] == spec["parallelism"]
    gpus = spec["completions"] * container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(options.num_processes) == gpus
    assert options.main_process_ip == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert options.training_script_args[1:] == ["--resume_from_checkpoint", "true"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]


def test_the_loop_starts_a_run_again_until_it_is_over():
    """Code 75 twice, and then another one."""
    (loop,) = re.findall(r"```bash\n(while .*?)```", PAGE, re.DOTALL)
    program = "pvt-hf() { echo $*; starts=$((starts + 1)); return ${codes[$starts]}; }"
    for last in (0, 1):
        script = f"codes=(- 75 75 {last}); starts=0; {program}; {loop}"
        shown = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=20).stdout
        assert shown.splitlines() == ["train-classification arguments.yaml --resume_from_checkpoint true"] * 3


def test_what_a_gpu_needs_is_what_the_program_measures():
    program = load_script("measure_training")
    with program.FILE.open(newline="") as file:
        rows = {(row["recipe"], row["variant"]): row for row in csv.DictReader(file)}
    assert {variant for recipe, variant in rows if recipe == "imagenet"} == set(pvt_hf.VARIANTS)
    model = AutoModelForImageClassification.from_config(pvt_hf.build_config("pvt_v2_b0"))
    inputs = {"pixel_values": torch.randn(2, 3, 224, 224), "labels": torch.tensor([0, 1])}
    gflops, activations = program.measure_step(model, inputs)
    row = rows["imagenet", "pvt_v2_b0"]
    assert float(row["gflops"]) == pytest.approx(gflops, abs=0.1)
    assert float(row["activations"]) == pytest.approx(activations, rel=0.02)
    assert float(row["parameters"]) == pytest.approx(model.num_parameters() / 1e6, abs=0.1)
    assert gflops == pytest.approx(3 * 2 * 0.566, abs=0.01)  # multiply-adds of the forward pass, in 1e9
