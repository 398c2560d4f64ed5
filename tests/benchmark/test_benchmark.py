"""What `pvt-hf benchmark` measures, counts and writes, on small models; the numbers themselves are the machine's."""

import dataclasses
import math
import time

import pytest
import torch
from torch import nn

from pvt_hf.benchmark import networks
from pvt_hf.benchmark.counting import count_work
from pvt_hf.benchmark.images import PREPARE, draw_photo
from pvt_hf.benchmark.machine import measure_rates
from pvt_hf.benchmark.networks import build_network
from pvt_hf.benchmark.plots import draw_plots
from pvt_hf.benchmark.rows import OTHERS, PRESETS, Entrant, Row, choose_rows
from pvt_hf.benchmark.run import Bench
from pvt_hf.benchmark.table import PARTS_HEADER, list_parts, list_ratios, merge_results, read_results, write_results
from pvt_hf.benchmark.timing import Clock, measure, measure_peak
from pvt_hf.commands import benchmark
from tests.support.small_models import small_config

CPU = torch.device("cpu")
FROM_IMAGE_TO_RESULT = {"retinanet", "mask_rcnn", "semantic_fpn"}
VERSIONS = {"pvt_small": "v1", "pvt_v2_b2_li": "v2_linear"}


def build_small_config(name, **fields):
    return small_config(VERSIONS.get(name, "v2"), **fields)


@pytest.fixture
def bench(monkeypatch):
    """On small models, and with a compiler that starts none."""
    for name in networks.COMPILERS:
        monkeypatch.setitem(networks.COMPILERS, name, {"backend": "eager"})
    return Bench(Clock(CPU, least_seconds=0), rounds=2, build_config=build_small_config)


def shrink(row):
    return dataclasses.replace(row, batch=min(row.batch, 2), size=(64, 64))


def test_rows_have_their_names_alone_in_a_preset():
    for rows in PRESETS.values():
        names = [row.name for row in (*rows, *OTHERS)]
        assert len(set(names)) == len(names)
    assert [row.name for row in choose_rows("gpu", ["batch_8", "heads_training"])] == ["batch_8", "heads_training"]
    with pytest.raises(ValueError, match=r"--rows must be some of v1, .*; got v3$"):
        choose_rows("cpu", ["v1", "v3"])


# All rows, of which these take little time on small models.
CHEAP = {"v1_backbone_training", "batch_1", "semantic_fpn"}
ROWS = {f"{preset}-{row.name}": row for preset, rows in (PRESETS | {"others": OTHERS}).items() for row in rows}


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=key, marks=() if row.name in CHEAP else pytest.mark.slow) for key, row in ROWS.items()]
)
def test_rows_run(bench, row):
    row = row if row.step == "image processing" else shrink(row)
    results = bench.run(row)
    assert [result.entrant.split()[0] for result in results] == [entrant.library for entrant in row.entrants]
    assert all(0 < result.seconds_min <= result.seconds <= result.seconds_max for result in results)
    assert results[0].speed_min == results[0].speed == results[0].speed_max == 1
    for result in results if row.step != "image processing" else ():
        assert result.multiply_adds > 0 and result.moved_bytes > 0 and result.machine_flops > 0
        assert result.floor > 0 and result.utilization == result.flops / result.machine_flops
        assert result.flops == 2 * (3 if row.step == "training" else 1) * result.multiply_adds / result.seconds
    own = results[0]
    shares = own.image_processor, own.backbone, own.neck, own.head, own.post_processing
    if row.entrants[0].model in FROM_IMAGE_TO_RESULT:
        assert min(shares) > 0 and sum(shares) == pytest.approx(1, abs=0.1)
        assert len(list_parts(results)) == 1 and len(list_parts(results)[0]) == len(PARTS_HEADER)
    else:
        assert all(map(math.isnan, shares)) and not list_parts(results)


@pytest.mark.parametrize("version", ["v1", "v2", "v2_linear"])
def test_peers_are_the_same_network(version):
    """As many parameters and multiply-adds (but for the rows around PVT v2's chunks)."""
    config, pixels = small_config(version), torch.zeros(1, 3, 64, 64)
    own = build_network("pvt_hf", "classification", config).eval()
    for library in ("transformers", "timm"):
        if (library, version) == ("timm", "v1"):
            with pytest.raises(ValueError, match="timm has no PVT v1"):
                build_network(library, "classification", config)
            continue
        peer = build_network(library, "classification", config).eval()
        assert sum(map(torch.numel, peer.parameters())) == sum(map(torch.numel, own.parameters()))
        works = [count_work(lambda model=model: model(pixels)).multiply_adds for model in (own, peer)]
        assert works[0] == pytest.approx(works[1], rel=0.02)


def test_work_is_counted():
    """Of a product, a convolution and attention: each operand is read once, each result written once."""
    linear, convolution = nn.Linear(3, 5), nn.Conv2d(4, 4, 3, groups=4, bias=False)
    assert count_work(lambda: linear(torch.zeros(2, 3))) == (30, 4 * (6 + 15 + 5 + 10))
    operands = linear.bias.detach(), torch.zeros(2, 3), linear.weight.detach().t()
    assert count_work(lambda: torch.addmm(*operands, out=torch.zeros(2, 5))) == (30, 4 * (6 + 15 + 5 + 10))
    assert count_work(lambda: convolution(torch.zeros(1, 4, 5, 5))) == (4 * 9 * 9, 4 * (100 + 36 + 36))
    query, key = torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 10, 8)
    attention = count_work(lambda: nn.functional.scaled_dot_product_attention(query, key, key))
    assert attention == (2 * 2 * 6 * 10 * 8, 4 * (2 * 96 + 2 * 160))


def test_rounds_interleave_after_a_warm_up():
    calls, clock = [], Clock(CPU, least_seconds=0)
    times = measure([lambda: calls.append("a"), lambda: calls.append("b")], 3, clock, warmups=2)
    assert "".join(map(str, calls)) == "aabb" + "ab" * 3
    assert [len(kept.seconds) for kept in times] == [3, 3]
    parts = measure([lambda: {"half": 0.5}], 2, clock)[0].parts
    assert parts == {"half": [0.5, 0.5]}


def test_threads_of_a_runtime_rest_between_turns(tmp_path):
    """Those of onnxruntime would else wait in a loop for what comes next."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    side = [256, 256]
    maps = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, side) for name in ("pixel_values", "y")]
    product = onnx.helper.make_node("MatMul", ["pixel_values", "pixel_values"], ["y"])
    graph = onnx.helper.make_graph([product], "product", maps[:1], maps[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    step = networks.run_onnxruntime(tmp_path / "model.onnx", torch.ones(side), threads=4)
    for _ in range(10):
        step()
    before = time.process_time()
    time.sleep(0.1)
    assert time.process_time() - before < 0.02


def test_there_is_a_pause_before_each_turn(monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    measure([lambda: None] * 2, 3, Clock(CPU, least_seconds=0), warmups=1)
    assert len(pauses) == 6 and min(pauses) > 0.01


def test_peak_is_of_the_step_alone():
    held = torch.ones(2**23)  # 32 MiB that are there before

    def step():
        (torch.ones(2**24) + 1).sum()  # 64 MiB and 64 MiB

    step()
    peak = measure_peak(step, CPU)
    assert math.isnan(peak) or 100 * 2**20 < peak < 160 * 2**20
    assert len(held)


def test_rates_are_of_the_precision():
    clock = Clock(CPU, cpu_time=True)
    assert measure_rates("fp32", clock, 1) is measure_rates("fp32", clock, 1)
    assert measure_rates("fp32", clock, 1).flops > 1e9 and measure_rates("fp32", clock, 1).bytes > 1e8
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("name", "size"), [("classification", (300, 400)), ("detection", (480, 640))])
def test_peers_prepare_the_same_image(name, size):
    """All but a few grey levels: theirs are not OpenCV's and PIL's bits."""
    own, *others = (PREPARE[name](library)(draw_photo(*size)) for library in ("pvt_hf", "torchvision", "transformers"))
    for other in others:
        other = other.reshape(-1, *other.shape[-3:])
        height, width = min(own.shape[2], other.shape[2]), min(own.shape[3], other.shape[3])  # ours is padded
        difference = (own[..., :height, :width] - other[..., :height, :width]).abs() * 0.225 * 255
        assert difference.mean() < 4  # of pixels beside one another it is 13
    # (transformers rounds the longer side down.)
    assert (height, width) == {"classification": (224, 224), "detection": (800, 1066)}[name]


def make_result(row, entrant, seconds, **fields):
    values = {field.name: 1.0 if field.type is float else 1 for field in dataclasses.fields(benchmark.Result)}
    texts = {field.name: "x" for field in dataclasses.fields(benchmark.Result) if field.type is str}
    return benchmark.Result(**(values | texts | {"row": row, "entrant": entrant, "seconds": seconds} | fields))


def test_csv_keeps_what_was_measured(tmp_path):
    file = tmp_path / "new" / "benchmark.csv"
    results = [make_result("v1", "pvt_hf", 0.5), make_result("v1", "timm, and a comma", 0.25, peak_bytes=math.nan)]
    write_results(results, file)
    read = read_results(file)
    assert read[0] == results[0] and math.isnan(read[1].peak_bytes) and read[1].entrant == results[1].entrant
    anew = [make_result("v1", "pvt_hf", 2.0)]
    assert merge_results([*results, make_result("v2", "pvt_hf", 3.0)], anew)[0] == anew[0]
    assert [result.row for result in merge_results([*results, make_result("v2", "pvt_hf", 3.0)], anew)] == ["v1", "v2"]
    for text in ("", "row,work\n1,2\n", file.read_text().replace("0.5", "half", 1)):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"benchmark\.csv is no CSV of `pvt-hf benchmark`"):
            read_results(file)


def test_csv_of_before_has_no_parts_of_the_network(tmp_path):
    file = tmp_path / "benchmark.csv"
    write_results([make_result("retinanet", "pvt_hf", 0.5, post_processing=0.25)], file)
    header, values = (line.split(",") for line in file.read_text().splitlines())
    kept = [place for place, name in enumerate(header) if name not in ("backbone", "neck", "head")]
    assert len(kept) == len(header) - 3
    file.write_text("\n".join(",".join(line[place] for place in kept) for line in (header, values)))
    (result,) = read_results(file)
    assert math.isnan(result.neck) and result.post_processing == 0.25
    assert list_parts([result]) == [("x", "100.0 %", "", "", "", "25.0 %")]


def test_table_says_ratios_by_step_and_by_multiply_add():
    first = make_result("v1", "pvt_hf", 1.0, multiply_adds=2e9, peak_bytes=2.0**20)
    other = make_result("v1", "torchvision", 3.0, speed=3.0, multiply_adds=4e9, peak_bytes=2.0**21)
    ((work, beside, speed, each, memory, rates),) = list_ratios([first, other])
    assert (work, beside, speed) == ("x", "torchvision", "**3.00** (1.00 to 1.00)")
    assert (each, memory) == ("1.50", "0.50")
    assert rates == "1 images/s, 4 GFLOP/s, 1 MiB"
    assert list_ratios([first])[0][1] == ""


def test_plot_is_of_sizes_and_batches(tmp_path):
    file = tmp_path / "a.png"
    assert not draw_plots([make_result("v1", "pvt_hf", 1.0)], file) and not file.exists()
    results = [make_result(f"size_{side}", "pvt_hf", 1.0, height=side) for side in (224, 448)]
    assert draw_plots(results, file) and file.read_bytes().startswith(b"\x89PNG")


def run_command(monkeypatch, tmp_path, *arguments, rows=()):
    monkeypatch.setattr(benchmark, "choose_rows", lambda preset, names: list(rows))
    return benchmark.main(["--output_dir", str(tmp_path / "out"), "--rounds", "1", *arguments])


ROW = Row("size_64", "inference", (Entrant("pvt_hf"), Entrant("transformers")), batch=1, size=(64, 64))


@pytest.mark.process
def test_a_row_has_a_process_of_its_own_on_a_cpu(bench):
    """With the threads and the rates of this one."""
    threads = torch.get_num_threads()
    row = dataclasses.replace(ROW, threads=threads + 1)
    results = bench.run_alone(row)
    assert [result.threads for result in results] == [threads + 1] * 2 and torch.get_num_threads() == threads
    rates = measure_rates("fp32", bench.clock, threads + 1)
    assert {(result.machine_flops, result.machine_bytes) for result in results} == {rates}


def test_command_writes_row_by_row_and_names_what_failed(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "Bench", lambda clock, rounds: bench)
    monkeypatch.setattr(Bench, "run_alone", Bench.run)  # whose compiler, here, starts none
    wrong = dataclasses.replace(ROW, name="wrong", variant="pvt_small", entrants=(Entrant("timm"),))
    assert run_command(monkeypatch, tmp_path, rows=[wrong, ROW]) == 1
    printed = capsys.readouterr()
    assert "failed: wrong: ValueError: timm has no PVT v1" in printed.err
    assert printed.out.count("| transformers |") == 1 and "GFLOP/s, copies" in printed.out
    results = read_results(tmp_path / "out" / "benchmark.csv")
    assert [result.row for result in results] == ["size_64", "size_64"]
    assert (tmp_path / "out" / "benchmark.png").is_file()
    assert run_command(monkeypatch, tmp_path, "--minutes", "1e-9", rows=[ROW]) == 0
    assert "--rows size_64" in capsys.readouterr().out
    assert run_command(monkeypatch, tmp_path, "--profile", rows=[ROW]) == 0
    assert "aten::addmm" in capsys.readouterr().out


def test_gpu_table_is_of_shares():
    fields = {"multiply_adds": 1e12, "machine_flops": 1e13, "moved_bytes": 1e9, "machine_bytes": 1e10}
    result = make_result("gpu", "pvt_hf", 0.5, batch=128, step="training", peak_bytes=2.0**30, **fields)
    (cells,) = benchmark.list_rates([result])
    assert len(cells) == len(benchmark.RATES_HEADER)
    assert cells[2:] == ("256", "12", "120 %", "60 %", "1024 MiB")


def test_wrong_options_end_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "_measure", lambda *args: pytest.fail("there is work"))
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["--rows", "v3"], "--rows must be some of"),
        (["--rounds", "0"], "--rounds must be a number above 0"),
        (["--minutes", "nan"], "--minutes must be a number above 0"),
        (["--device", "gpu"], "--device must be cpu or cuda, got 'gpu'"),
        (["--output_dir", str(tmp_path / "file" / "out")], "--output_dir .*: Not a directory"),
        (["--plot", str(tmp_path / "none.csv")], "none.csv"),
    ):
        with pytest.raises(SystemExit, match=message):
            benchmark.main(arguments)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="torch sees no GPU here"):
            benchmark.main(["--preset", "gpu"])
