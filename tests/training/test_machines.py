"""Jobs of two machines that share no folder, by the command lines of the docs; and what their processes agree on."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from pvt_hf.commands import train_classification, train_detection, train_segmentation
from pvt_hf.training import distributed, machines
from pvt_hf.training.machines import (
    agree_on_checkpoint,
    check_same_run,
    explain_lost_process,
    find_missing_processes,
    is_lost_process,
    read_agreed_run,
    shares_folder,
)
from pvt_hf.training.optimization import SettingError
from pvt_hf.training.run_checkpoints import CheckpointError, incompleteness
from tests.support.classification_run import build
from tests.support.machines import Machine, can_isolate, find_free_port, two_machines
from tests.support.run_checkpoints import RUN
from tests.support.run_checkpoints import write_checkpoint as write_run_checkpoint
from tests.support.small_models import ROOT

PROGRAMS = {
    "classification": ("--per_device_train_batch_size", "8"),
    "detection": ("--num_scenes", "8", "--per_device_train_batch_size", "2"),
    "segmentation": ("--num_scenes", "16", "--per_device_train_batch_size", "4", "--eval_steps", "4"),
}
STEPS = ("--smoke", "--use_cpu", "true", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2")
STEPS += ("--output_dir", "run", "--disable_tqdm", "true")


def torchrun(machine: Machine) -> list[str]:
    where = ["--node-rank", str(machine.number), "--master-addr", machine.main, "--master-port", str(machine.port)]
    return ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", *where]


def torchrun_with_rendezvous(machine: Machine) -> list[str]:
    where = ["--rdzv-id", "job", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{machine.main}:{machine.port}"]
    # Names of machines, by which each knows whether it is meant, are not to be looked up here.
    where += ["--local-addr", machine.address, "--rdzv-conf", f"is_host={int(machine.number == 0)}"]
    return ["torchrun", "--nnodes", "2", "--nproc-per-node", "1", *where]


def accelerate(machine: Machine) -> list[str]:
    where = ["--machine_rank", str(machine.number), "--main_process_ip", machine.main]
    where += ["--main_process_port", str(machine.port)]
    return ["accelerate", "launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2", *where]


def wait(processes, seconds: float = 600) -> list[int]:
    end = time.monotonic() + seconds
    return [process.wait(max(1, end - time.monotonic())) for process in processes]


def train(folder: Path, launch, program: str, *options: str) -> list[Machine]:
    """A job of two machines, to its end."""
    command = ["-m", f"pvt_hf.commands.train_{program}", *STEPS, *PROGRAMS[program], *options]
    with two_machines(folder) as both:
        codes = wait([machine.start(*launch(machine), *command) for machine in both])
        assert codes == [0, 0], [machine.output.read_text()[-3000:] for machine in both]
    return both


def train_on_one(folder: Path, program: str) -> dict[str, torch.Tensor]:
    """The weights after a job of two processes on one machine."""
    command = ["-m", f"pvt_hf.commands.train_{program}", *STEPS, *PROGRAMS[program]]
    with two_machines(folder) as (machine, _):
        (code,) = wait([machine.start("torchrun", "--standalone", "--nproc-per-node", "2", *command)])
        assert code == 0, machine.output.read_text()[-3000:]
    return load_file(folder / "0" / "run" / "model.safetensors")


def assert_equal(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_two_machines_train_as_one_with_two_processes(program, tmp_path):
    """By both launchers. Only the main process of the job writes, prints what was read, and says what was reached."""
    expected = train_on_one(tmp_path / "one", program)
    torch_launcher = torchrun_with_rendezvous if program == "detection" else torchrun
    for name, launch in (("torchrun", torch_launcher), ("accelerate", accelerate)):
        main, other = train(tmp_path / name, launch, program)
        assert_equal(main.folder / "run", expected)
        checkpoint = main.folder / "run" / "checkpoint-4"
        assert incompleteness(checkpoint) is None and (checkpoint / "rng_state_1.pth").exists()
        assert {"README.md", "curves.png", "predictions.png", "eval_results.json"} <= set(
            os.listdir(main.folder / "run")
        )
        assert not (other.folder / "run").exists()
        printed = [machine.output.read_text() for machine in (main, other)]
        assert "everything is in run" in printed[0] and "everything is in" not in printed[1]
        assert "the training set" in printed[0].replace("training images", "the training set")
        assert "the training set:" not in printed[1] and "training images:" not in printed[1]
        assert "The machines do not share run" in printed[0]


@pytest.mark.slow
def test_each_machine_resumes_from_its_own_disk(tmp_path):
    """With a checkpoint on each, or copied to each; else all end with the same words."""
    expected = train_on_one(tmp_path / "one", "classification")
    main, other = train(tmp_path / "each", torchrun, "classification", "--save_on_each_node", "true")
    runs = [machine.folder / "run" for machine in (main, other)]
    for run in runs:
        assert_equal(run, expected)
        assert incompleteness(run / "checkpoint-4") is None
    assert (runs[0] / "README.md").exists() and not (runs[1] / "README.md").exists()

    shutil.rmtree(runs[1] / "checkpoint-4")  # as if it had been killed while it wrote
    resume = ("--resume_from_checkpoint", "true")
    train(tmp_path / "each", torchrun, "classification", "--save_on_each_node", "true", *resume)
    assert "Training resumes from run/checkpoint-2" in main.output.read_text()
    assert_equal(runs[0], expected)

    shutil.rmtree(runs[1])
    with two_machines(tmp_path / "each") as both:
        command = ["-m", "pvt_hf.commands.train_classification", *STEPS, *PROGRAMS["classification"], *resume]
        assert wait([machine.start(*torchrun(machine), *command) for machine in both]) == [1, 1]
    for machine in both:
        assert "is not a complete checkpoint for process 1 (on" in machine.output.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not can_isolate(), reason="network namespaces need rights that this user does not have")
@pytest.mark.parametrize("is_killed", [True, False], ids=["killed", "unreachable"])
def test_a_lost_machine_ends_the_other_with_a_message(is_killed, tmp_path):
    """At once if it says so itself, by closing connections, else after `--ddp_timeout` seconds."""
    options = [*STEPS, "--max_steps", "1000", "--ddp_timeout", "20", *PROGRAMS["classification"]]
    with two_machines(tmp_path) as (main, other):
        command = ["-m", "pvt_hf.commands.train_classification", *options]
        processes = [machine.start(*torchrun(machine), *command) for machine in (main, other)]
        while incompleteness(main.folder / "run" / "checkpoint-4"):
            assert processes[0].poll() is None, main.output.read_text()[-3000:]
            time.sleep(0.2)
        if is_killed:
            for number in other.list_processes():
                os.kill(number, signal.SIGKILL)
        else:
            other.cut_cable()
        started = time.monotonic()
        survivors = processes[: 1 if is_killed else 2]
        assert wait(survivors, 120) == [1] * len(survivors)
        assert time.monotonic() - started < 90
        for machine in (main, other)[: len(survivors)]:
            printed = machine.output.read_text()
            assert "The job has lost a process:" in printed and "--ddp_timeout says" in printed
            assert "in _inner_training_loop" not in printed  # no traceback of the program
        assert incompleteness(main.folder / "run" / "checkpoint-4") is None


STAND_INS = {
    "srun": """for i in 0 1; do
    SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 "$@" & started+=($!)
done
echo "${started[@]}" > started
code=0
for process in "${started[@]}"; do wait "$process"; last=$?; if [ $last -gt $code ]; then code=$last; fi; done
exit $code""",
    "scontrol": 'case $1 in show) echo 127.0.0.1;; requeue) echo "$2" > requeued;; esac',
}


@pytest.mark.slow
def test_the_script_for_slurm_requeues_a_run_that_a_signal_ends(tmp_path):
    """As it stands in the docs, but for what is trained; `srun` and `scontrol` are stand-ins."""
    page = (ROOT / "docs" / "guides" / "training-at-scale.md").read_text()
    script = re.search(r"```bash\n(#!/bin/bash\n.*?)```", page, re.DOTALL)[1]
    arguments = shlex.join(["train_classification", *STEPS, *PROGRAMS["classification"], "--max_steps", "60"])
    script = script.replace("train_detection arguments.yaml", arguments).replace("29500", str(find_free_port()))
    for name, content in STAND_INS.items():
        file = tmp_path / name
        file.write_text(f"#!/bin/bash\n{content}\n")
        file.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": "7"}

    def start() -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=os.environ | variables, **pipes)

    first = start()
    while incompleteness(tmp_path / "run" / "checkpoint-4"):
        assert first.poll() is None, first.communicate()[0][-3000:]
        time.sleep(0.2)
    for number in (tmp_path / "started").read_text().split():
        os.kill(int(number), signal.SIGUSR1)
    printed, _ = first.communicate(timeout=300)
    assert first.returncode == 75 and (tmp_path / "requeued").read_text() == "7\n", printed[-3000:]
    second = start()
    printed, _ = second.communicate(timeout=600)
    assert second.returncode == 0 and "Training resumes from run/checkpoint-" in printed, printed[-3000:]
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.fixture
def job(monkeypatch):
    """What the other process of a job of two says, in turn."""
    answers = []
    monkeypatch.setattr(machines, "gather", lambda value: [value, answers.pop(0)(value)])
    return answers


def test_processes_of_different_runs_are_told_apart(job):
    facts = {"seed": 0, "images of an epoch": 64}
    job += [lambda own: own, lambda own: ({}, "b"), lambda own: (facts | {"images of an epoch": 63}, "b")]
    assert check_same_run(facts) == check_same_run(facts) == facts
    with pytest.raises(SettingError, match=r"Process 1 \(on b\) is of another run .* epoch is 63, not 64"):
        check_same_run(facts)


def write_checkpoint(folder: Path, monkeypatch) -> None:
    folder.mkdir(parents=True)
    (folder / "complete").touch()
    found = lambda path: None if (Path(path) / "complete").exists() else "there is no such folder"  # noqa: E731
    monkeypatch.setattr(machines, "recall_incompleteness", found)
    monkeypatch.setattr("pvt_hf.training.run_checkpoints.recall_incompleteness", found)


def test_all_processes_resume_from_the_newest_checkpoint_that_each_has(job, tmp_path, monkeypatch):
    for step in (2, 4):
        write_checkpoint(tmp_path / f"checkpoint-{step}", monkeypatch)
    job += [lambda own: ("b", own[1].replace("checkpoint-4", "checkpoint-2")), lambda own: own]
    assert agree_on_checkpoint(tmp_path, True) == str(tmp_path / "checkpoint-2")
    job += [lambda own: ("b", None), lambda own: ("b", "there is no such folder")]
    with pytest.raises(CheckpointError, match=r"checkpoint-4 is not a complete checkpoint for process 1 \(on b\)"):
        agree_on_checkpoint(tmp_path, True)
    job += [lambda own: ("b", "there is no such folder")]
    with pytest.raises(CheckpointError, match="copy the checkpoint to each"):
        agree_on_checkpoint(tmp_path, str(tmp_path / "checkpoint-2"))
    job += [lambda own: ("b", None)]
    assert agree_on_checkpoint(tmp_path / "none", True) is None


def test_one_process_of_each_machine_looks_at_the_checkpoint_for_all(tmp_path, monkeypatch):
    """The other has its verdict, and what the run was, without a look at the disk."""
    found = ("a", str(tmp_path / "checkpoint-2")), ("a", None), ("a", (RUN, None)), ("a", ({}, "is damaged"))
    answers = iter(found)
    monkeypatch.setattr(machines, "is_first_of_machine", lambda: False)
    monkeypatch.setattr(machines, "gather", lambda value: [next(answers), value])
    for name in ("last_complete_checkpoint", "recall_incompleteness", "read_run", "check_states"):
        monkeypatch.setattr(machines, name, lambda *args: pytest.fail("looks at the disk"))
    checkpoint = agree_on_checkpoint(tmp_path, True)
    assert checkpoint == agree_on_checkpoint(tmp_path, checkpoint) == str(tmp_path / "checkpoint-2")
    assert read_agreed_run(checkpoint, states=True) == RUN
    with pytest.raises(CheckpointError, match="^is damaged$"):
        read_agreed_run(checkpoint)


def test_all_machines_end_if_one_cannot_read_the_checkpoint(job, tmp_path):
    write_run_checkpoint(tmp_path, RUN)
    job += [lambda own: own, lambda own: ("b", ({}, "optimizer.pt is damaged"))]
    assert read_agreed_run(tmp_path) == RUN
    with pytest.raises(CheckpointError, match=r"Process 1 \(on b\): optimizer\.pt is damaged"):
        read_agreed_run(tmp_path)


def test_only_the_first_process_of_a_machine_looks_at_the_data(tmp_path, monkeypatch):
    """For the fingerprint: it stats each file, and every shard of a stream."""
    trainer = build(tmp_path)
    monkeypatch.setattr("pvt_hf.training.changes.fingerprint", lambda data: pytest.fail("looks at the data"))
    monkeypatch.setattr("pvt_hf.training.changes.is_first_of_machine", lambda: False)
    assert trainer.describe_run() == {}


def test_a_folder_is_shared_if_all_see_what_the_main_process_makes(job, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    job += [lambda own: None, lambda own: own]
    assert shares_folder(tmp_path)
    job += [lambda own: None, lambda own: not own]
    assert not shares_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_do_not_fit_the_settings_are_errors(tmp_path, monkeypatch):
    trainer = build(tmp_path)
    monkeypatch.setattr(type(trainer.args), "world_size", property(lambda self: 2))
    monkeypatch.setattr(distributed, "gather", lambda value: [value, value])
    monkeypatch.setattr(distributed, "shares_folder", lambda folder: folder == "shared")
    trainer._check_folder()
    trainer.args.load_best_model_at_end = True
    with pytest.raises(SettingError, match="`load_best_model_at_end`: not every machine sees the checkpoints"):
        trainer._check_folder()
    trainer.args.save_on_each_node = True
    trainer._check_folder()
    trainer.args.output_dir = "shared"
    with pytest.raises(SettingError, match="`save_on_each_node`: all machines see the same shared"):
        trainer._check_folder()
    # The first process of the second machine, of which `save_pretrained` would write no weights.
    trainer.args.output_dir = str(tmp_path)
    monkeypatch.setattr("transformers.distributed.mixin._is_torch_distributed_initialized", lambda: True)
    monkeypatch.setattr("transformers.distributed.mixin._get_torch_distributed_rank", lambda: 1)
    trainer.save_model()
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "config.json").exists()


def test_groups_on_cpus_have_the_time_out_too(monkeypatch):
    """`TrainingArguments` forgets it with `use_cpu`."""
    started = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **options: started.append(options))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    machines.start_cpu_group(None, 20)  # of one process
    monkeypatch.setenv("WORLD_SIZE", "2")
    machines.start_cpu_group("mpi", 20)
    assert started == []
    machines.start_cpu_group(None, 20)
    assert started == [{"timeout": timedelta(seconds=20)}]


@pytest.mark.parametrize(
    ("program", "where", "options"),
    [
        (train_classification, "pvt_hf.data.classification.load_images", []),
        (train_detection, "pvt_hf.commands.shared.load_images", []),
        (train_segmentation, "pvt_hf.commands.train_segmentation.load_split", ["--binary_masks"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_one_process_of_each_machine_downloads_first(program, where, options, tmp_path, monkeypatch):
    events = []

    @contextmanager
    def main_process_first(self, local=True, desc="work"):
        events.append(("waits", local))
        yield

    def load(*args, **kwargs):
        events.append("loads")
        raise ValueError("seen")

    monkeypatch.setattr(TrainingArguments, "main_process_first", main_process_first)
    monkeypatch.setattr(where, load)
    with pytest.raises(SystemExit, match="seen"):
        program.main(["--use_cpu", "true", "--dataset_name", "a/b", "--output_dir", str(tmp_path), *options])
    assert events == [("waits", True), "loads"]


def test_a_launcher_that_started_one_process_of_several_is_told():
    of_accelerate = {"ACCELERATE_MIXED_PRECISION": "no"}
    assert find_missing_processes({}) is None and find_missing_processes(of_accelerate) is None
    assert "start them with torchrun" in find_missing_processes(of_accelerate | {"MASTER_PORT": "29500"})
    assert "srun started 8 processes" in find_missing_processes({"SLURM_STEP_NUM_TASKS": "8"})
    assert find_missing_processes({"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_errors_of_lost_processes_are_known_by_what_torch_raises():
    closed = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:24708: Connection reset by "
        "peer. This is typically caused by a remote worker crashing. Check the logs ..."
    )
    assert is_lost_process(closed) and is_lost_process(torch.distributed.DistNetworkError("Connection refused"))
    assert not is_lost_process(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert "Connection reset by peer. It ended, and said why" in explain_lost_process(closed)


@pytest.mark.parametrize("program", [train_classification, train_detection, train_segmentation])
def test_deepspeed_is_refused_where_it_cannot_be(program, tmp_path, monkeypatch):
    """Where it is missing, and for a resume: before anything is read, by argument and by accelerate's variable."""
    arguments = ["--smoke", "--use_cpu", "true", "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr("pvt_hf.training.arguments.find_spec", lambda name: None)
    resumed = "^--resume_from_checkpoint {}: runs of DeepSpeed are not resumed, because DeepSpeed unpickles its states"
    for options in (["--deepspeed", "zero.json"], []):
        with pytest.raises(SystemExit, match="^DeepSpeed is asked for, and is missing; .* pip install deepspeed$"):
            program.main([*arguments, *options])
        for value in ("true", "run/checkpoint-1"):
            with pytest.raises(SystemExit, match=resumed.format(value)):
                program.main([*arguments, *options, "--resume_from_checkpoint", value])
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert list(tmp_path.iterdir()) == []


def test_trainer_of_deepspeed_does_not_resume(tmp_path, monkeypatch):
    """Nor does it begin anew, because no checkpoint of such a run is complete."""
    trainer = build(tmp_path)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(trainer, "_inner_training_loop", None)
    with pytest.raises(CheckpointError, match="Runs of DeepSpeed are not resumed"):
        trainer.train(True)
