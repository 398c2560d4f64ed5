"""Complete detectors and the segmenter through `pvt-hf convert`: official checkpoints in, and back bit for bit."""

import json
import re
import sys
import types
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from huggingface_hub import ModelCard, metadata_load
from transformers import AutoConfig, AutoImageProcessor

import pvt_hf
from pvt_hf.commands.convert import print_conversion
from pvt_hf.conversion import convert, formats
from pvt_hf.conversion.architectures import registry
from pvt_hf.conversion.class_names import ADE20K, COCO
from pvt_hf.variants import VARIANTS
from tests.support import head_shapes
from tests.support.checkpoints import TINY, equal, run, save, without
from tests.support.small_models import STAGES

pytestmark = pytest.mark.usefixtures("small_probes")

SEMANTIC_FPN, RETINANET, ATSS, GFL, SPARSE_RCNN, *R_CNNS, DETR = registry.DENSE_PREDICTORS
CASCADE_MASK_RCNN, CASCADE_RCNN, MASK_RCNN, FASTER_RCNN = R_CNNS
HEADS = {
    SEMANTIC_FPN: head_shapes.semantic_fpn,
    RETINANET: head_shapes.retinanet,
    ATSS: head_shapes.atss,
    GFL: head_shapes.gfl,
    SPARSE_RCNN: head_shapes.sparse_rcnn,
    CASCADE_MASK_RCNN: head_shapes.cascade_mask_rcnn,
    CASCADE_RCNN: head_shapes.cascade_rcnn,
    MASK_RCNN: head_shapes.mask_rcnn,
    FASTER_RCNN: head_shapes.faster_rcnn,
    DETR: head_shapes.detr,
}
SMALL = {
    SEMANTIC_FPN: {"channels": 16, "num_labels": 150},
    RETINANET: {"channels": 16, "num_labels": 80},
    SPARSE_RCNN: {"channels": 16, "num_labels": 80, "hidden": 24, "proposals": 7, "heads": 2, "dynamic": 4},
    CASCADE_MASK_RCNN: {"channels": 16, "num_labels": 80, "hidden": 24},
    CASCADE_RCNN: {"channels": 16, "num_labels": 80, "hidden": 24},
    ATSS: {"channels": 64, "num_labels": 80},
    GFL: {"channels": 64, "num_labels": 80},
    MASK_RCNN: {"channels": 16, "num_labels": 80, "hidden": 24},
    FASTER_RCNN: {"channels": 16, "num_labels": 80, "hidden": 24},
    DETR: {"channels": 32, "num_labels": 80, "hidden": 48},
}
EVERY_ARCHITECTURE = pytest.mark.parametrize("architecture", SMALL, ids=lambda architecture: architecture.name)
# They have the parts of others, and what differs depends on no version.
ONE_VERSION = {ATSS: "v2_linear", GFL: "v2", SPARSE_RCNN: "v2_linear", CASCADE_MASK_RCNN: "v2", CASCADE_RCNN: "v1"}


def each_version(*versions: str):
    pairs = [(a, version) for a in SMALL for version in versions if ONE_VERSION.get(a, version) == version]
    return pytest.mark.parametrize(("architecture", "version"), pairs, ids=lambda value: getattr(value, "name", value))


def small_weights(architecture, version: str, **options) -> dict[str, torch.Tensor]:
    options = SMALL[architecture] | options
    return head_shapes.checkpoint_weights(HEADS[architecture], TINY[version], std=0.1, **options)


@pytest.mark.parametrize(
    ("name", "architecture", "variant"),
    [
        ("det_retinanet_pvt_t", RETINANET, "pvt_tiny"),
        ("det_retinanet_pvt_v2_b0", RETINANET, "pvt_v2_b0"),
        ("det_atss_pvt_v2_b2_li", ATSS, "pvt_v2_b2_li"),
        ("det_gfl_pvt_v2_b2_li", GFL, "pvt_v2_b2_li"),
        ("det_mask_rcnn_pvt_t", MASK_RCNN, "pvt_tiny"),
        ("det_mask_rcnn_pvt_v2_b0", MASK_RCNN, "pvt_v2_b0"),
        ("det_sparse_rcnn_pvt_v2_b2_li", SPARSE_RCNN, "pvt_v2_b2_li"),
        ("det_cascade_mask_rcnn_pvt_v2_b2_li", CASCADE_MASK_RCNN, "pvt_v2_b2_li"),
        ("det_detr_pvt_s", DETR, "pvt_small"),
        ("seg_semfpn_pvt_t", SEMANTIC_FPN, "pvt_tiny"),
    ],
)
def test_official_files_have_these_names_and_shapes(name, architecture, variant):
    assert head_shapes.checkpoint_shapes(HEADS[architecture], VARIANTS[variant]) == head_shapes.listed_shapes(name)


# Of the released checkpoints of detectors, tensors and parameters in millions: as mmdetection builds them.
RELEASED = {
    (RETINANET, "pvt_tiny"): (192, 22.965),
    (RETINANET, "pvt_v2_b0"): (212, 12.947),
    (MASK_RCNN, "pvt_tiny"): (198, 32.882),
    (MASK_RCNN, "pvt_v2_b0"): (218, 23.446),
    (ATSS, "pvt_v2_b2_li"): (395, 30.156),
    (ATSS, "pvt_v2_b2"): (383, 32.965),
    (ATSS, "pvt_v2_b0"): (227, 11.402),
    (GFL, "pvt_v2_b2_li"): (394, 30.301),
    (GFL, "pvt_v2_b2"): (382, 33.111),
    (GFL, "pvt_v2_b0"): (226, 11.548),
    (CASCADE_MASK_RCNN, "pvt_v2_b2_li"): (492, 80.043),
    (CASCADE_MASK_RCNN, "pvt_v2_b2"): (480, 82.852),
    (CASCADE_MASK_RCNN, "pvt_v2_b0"): (324, 61.281),
    (SPARSE_RCNN, "pvt_v2_b2_li"): (602, 104.154),
    (SPARSE_RCNN, "pvt_v2_b2"): (590, 106.964),
    (SPARSE_RCNN, "pvt_v2_b0"): (434, 85.393),
}


@pytest.mark.parametrize(("architecture", "variant"), RELEASED, ids=lambda value: getattr(value, "name", value))
def test_models_have_the_tensors_of_released_checkpoints(architecture, variant):
    """Names and shapes, there and back: the listed ones of the head on those of the variant's backbone."""
    official = head_shapes.checkpoint_shapes(HEADS[architecture], VARIANTS[variant])
    model = architecture.build_empty(architecture.build_config(pvt_hf.build_config(variant)))
    renamed = architecture.from_official({key: torch.empty(shape, device="meta") for key, shape in official.items()})
    assert {k: v.shape for k, v in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in architecture.to_official(renamed).items()} == official
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (len(official), round(parameters / 1e6, 3)) == RELEASED[architecture, variant]


@each_version(*TINY)
def test_every_architecture_becomes_a_verified_folder_and_back(architecture, version, tmp_path, capsys):
    """Verified, complete, with names and image processor, loadable by its Auto class, and back bit for bit."""
    source = small_weights(architecture, version)
    checkpoint = {"state_dict": source, "meta": {"epoch": 12, "config": "model = dict()"}, "optimizer": {"state": {}}}
    checkpoint["amp"] = {"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 1234}}  # of a run with apex
    done = convert.convert(str(save(checkpoint, tmp_path / "a.pth")), tmp_path / "out")
    assert done.architecture is architecture and done.difference < 1e-8 and done.variant is None
    assert done.source_format.name == ("mmsegmentation" if architecture is SEMANTIC_FPN else "mmdetection")
    assert any(note.startswith("left in the file") and "amp" in note for note in done.notes)
    print_conversion(done, tmp_path / "out")
    assert f"a variant of your own + {architecture.name}" in capsys.readouterr().out

    model = architecture.auto_class.from_pretrained(tmp_path / "out")
    assert equal(model.state_dict(), architecture.from_official(source))
    assert tuple(model.config.id2label.values()) == (ADE20K if architecture is SEMANTIC_FPN else COCO)
    assert len(model.config.label2id) == model.config.num_labels
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.num_labels == model.config.num_labels
    edges = (512, 2048) if architecture is SEMANTIC_FPN else (800, 1333)
    assert (processor.size.shortest_edge, processor.size.longest_edge) == edges

    assert run("--to", "official", tmp_path / "out", tmp_path / "back.pth") == 0
    assert equal(torch.load(tmp_path / "back.pth"), source)
    assert run("--to", "timm", tmp_path / "out", tmp_path / "timm.pth") == 1
    assert "timm has no" in capsys.readouterr().err and not (tmp_path / "timm.pth").exists()


@pytest.mark.process
@pytest.mark.parametrize(
    ("architecture", "variant", "parameters"),
    [
        (SEMANTIC_FPN, "pvt_tiny", 16.981),
        (RETINANET, "pvt_v2_b0", 12.947),
        (MASK_RCNN, "pvt_v2_b0", 23.446),
        (DETR, "pvt_small", 41.645),
        pytest.param(SPARSE_RCNN, "pvt_v2_b0", 85.393, marks=pytest.mark.slow),
    ],
)
def test_official_checkpoints_have_the_published_parameters(architecture, variant, parameters, tmp_path):
    """The papers' own: the variant is found, insisted on, and the parameters are as many as published."""
    weights = head_shapes.checkpoint_weights(HEADS[architecture], VARIANTS[variant])
    path = save({"state_dict": weights}, tmp_path / "a.pth")
    done = convert.convert(str(path), tmp_path / "out", variant=variant)
    assert done.variant.name == variant and round(done.parameters / 1e6, 3) == parameters
    assert run(path, tmp_path / "again", "--variant", "pvt_v2_b5") == 1


@EVERY_ARCHITECTURE
def test_wrong_numbers_are_not_written(architecture, tmp_path, capsys, monkeypatch):
    """The comparison sees the heads: a model that computes something else is no conversion."""
    path = save(small_weights(architecture, "v2"), tmp_path / "a.pth")
    outputs = type(architecture).outputs
    monkeypatch.setattr(type(architecture), "outputs", lambda *args: [x + 1e-7 for x in outputs(*args)])
    assert run(path, tmp_path / "out") == 1
    assert "differs from its source by 1.0e-07" in capsys.readouterr().err and not (tmp_path / "out").exists()


@EVERY_ARCHITECTURE
def test_class_names_of_the_checkpoint_count_more(architecture, tmp_path):
    """`meta.CLASSES` of version 2, and `dataset_meta` of version 3, in turn, count more than the number of classes."""
    names = tuple(f"thing {index} " for index in range(SMALL[architecture]["num_labels"]))
    source = small_weights(architecture, "v2")
    metas = ({"CLASSES": names}, {"dataset_meta": {"classes": names, "palette": [(1, 2, 3)]}})
    meta = metas[[*SMALL].index(architecture) % 2]
    config = convert.convert(str(save({"state_dict": source, "meta": meta}, tmp_path / "a.pth")), tmp_path / "a").config
    assert config.id2label[0] == "thing 0" and config.label2id["thing 79"] == 79
    path = save({"state_dict": source, "meta": {"CLASSES": ("cat", "dog")}}, tmp_path / "wrong.pth")
    assert run(path, tmp_path / "wrong") == 1


@EVERY_ARCHITECTURE
def test_any_number_of_classes_and_channels_is_converted(architecture, tmp_path):
    weights = small_weights(architecture, "v1", num_labels=3, channels=64 if architecture in (ATSS, GFL, DETR) else 24)
    done = convert.convert(str(save(weights, tmp_path / "a.pth")), tmp_path / "out")
    assert done.config.num_labels == 3 and done.config.id2label[2] == "LABEL_2"
    assert any("LABEL_0, LABEL_1, LABEL_2" in note for note in done.notes)
    assert not getattr(AutoImageProcessor.from_pretrained(tmp_path / "out"), "do_reduce_labels", False)


def test_gfl_of_other_distances_is_refused(tmp_path, capsys):
    source = small_weights(GFL, "v2") | {"bbox_head.integral.project": torch.arange(17.0) / 2}
    assert run(save(source, tmp_path / "a.pth"), tmp_path / "out") == 1
    assert "'bbox_head.integral.project' must be 0, 1, ... 16" in capsys.readouterr().err


def test_half_precision_keeps_counters_as_integers(tmp_path):
    """BatchNorm counts its batches in integers."""
    source = {k: v.half() if v.is_floating_point() else v for k, v in small_weights(SEMANTIC_FPN, "v2").items()}
    convert.convert(str(save(source, tmp_path / "a.pth")), tmp_path / "out")
    model = SEMANTIC_FPN.auto_class.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16 and model.head.scale_heads[0][0].norm.num_batches_tracked == 40_000
    assert equal(model.state_dict(), SEMANTIC_FPN.from_official(source))


def test_detr_of_former_versions_becomes_the_current_one(tmp_path):
    source, former = small_weights(DETR, "v1"), {}
    for key, tensor in source.items():
        key = key.replace(".attentions.0.", ".self_attn.").replace(".attentions.1.", ".multihead_attn.")
        former[key.replace(".ffns.0.", ".ffn.").replace(".post_norm.", ".norm.")] = tensor
    assert former.keys() != source.keys()
    done = convert.convert(str(save(former, tmp_path / "a.pth")), tmp_path / "out")
    assert done.config.encoder_ffn_dim == 48 and run("--to", "official", tmp_path / "out", tmp_path / "b.pth") == 0
    assert equal(torch.load(tmp_path / "b.pth"), source)


@EVERY_ARCHITECTURE
@pytest.mark.parametrize("missing", ["neck or transformer", "backbone.block2.0.attn.q.bias"])
def test_incomplete_checkpoint_is_refused(architecture, missing, tmp_path, capsys):
    weights = small_weights(architecture, "v2")
    if missing not in weights:
        missing = "bbox_head.query_embedding.weight" if architecture is DETR else "neck.fpn_convs.0.conv.weight"
    assert run(save(without(weights, missing), tmp_path / "a.pth"), tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert re.search(rf"lacks '{missing}'.*--backbone-only|lacks 1: '.*query.bias'", error), error
    assert not (tmp_path / "out").exists()


def test_folder_that_lost_a_tensor_is_not_exported(tmp_path, capsys):
    convert.convert(str(save(small_weights(DETR, "v2"), tmp_path / "a.pth")), tmp_path / "out")
    weights = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    weights = without(weights, "model.decoder.layernorm.bias")
    safetensors.torch.save_file(weights, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert run("--to", "official", tmp_path / "out", tmp_path / "b.pth") == 1
    error = capsys.readouterr().err
    assert "not hold a complete DETR: {'missing_keys': ['model.decoder.layernorm.bias']}" in error


def test_code_cannot_be_saved_with_a_class_of_transformers(tmp_path, capsys):
    path = save(small_weights(DETR, "v2"), tmp_path / "a.pth")
    assert run(path, tmp_path / "out", "--with-code") == 1
    assert "`--with-code` cannot be used for a DETR: its class is transformers' own" in capsys.readouterr().err


def test_other_backbones_have_no_official_names(tmp_path, capsys):
    config = pvt_hf.SemanticFPNConfig(backbone_config={"model_type": "resnet", "out_features": STAGES})
    (tmp_path / "out").mkdir()
    config.save_pretrained(tmp_path / "out")
    save({"x": torch.zeros(1)}, tmp_path / "out" / "model.safetensors")
    assert run("--to", "official", tmp_path / "out", tmp_path / "b.pth") == 1
    assert "backbone of type 'resnet'" in capsys.readouterr().err


@pytest.mark.process
@each_version("v1", "v2")
def test_model_card_runs_and_names_the_architecture(architecture, version, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(small_weights(architecture, version), tmp_path / "a.pth")
    with_code = not architecture.is_native
    done = convert.convert("a.pth", tmp_path / "out", card_name="out", with_code=with_code)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    metadata = card.data.to_dict()
    assert metadata == metadata_load(tmp_path / "out" / "README.md")
    assert metadata["pipeline_tag"] == architecture.pipeline_tag
    assert ("`trust_remote_code=True`" in card.content) == with_code == (tmp_path / "out" / "layers.py").exists()
    assert f"# PVT {version} + {architecture.name}\n" in card.content
    assert metadata["conversion"]["max_abs_difference_float64"] == done.difference
    assert "license" not in metadata and "paper's" not in card.content
    assert not re.search(r"\{\{ | \}\}|\n\n\n", card.content)
    (block,) = re.findall(r"```python\n(.*?)```", card.content, flags=re.DOTALL)
    namespace = {}
    exec(block, namespace)
    outputs = namespace["outputs"]
    if "scores" in outputs:  # the logits of a detection have -inf for all classes but its own
        outputs["logits"] = outputs["logits"][outputs["logits"] != -torch.inf]
    assert all(value.isfinite().all() for value in outputs.values())


def test_new_architecture_needs_a_line_in_the_list_only(tmp_path, monkeypatch, capsys):
    """Recognised, converted, described in the card, and exported by what its class says."""

    class NewNet(type(RETINANET)):
        name, tags, signature = "NewNet", ("new-net",), "bbox_head.new_cls."
        rules = tuple((official.replace("retina_cls", "new_cls"), ours) for official, ours in RETINANET.rules)
        fixed_fields = {"focal_gamma": 3.0}

        def read_fields(self, shape, official):
            return super().read_fields(lambda key: shape(key.replace("retina_cls", "new_cls")), official)

        def head_reference(self, weights, image, feature_maps):
            weights = {key.replace("new_cls", "retina_cls"): weights[key] for key in weights}
            return super().head_reference(weights, image, feature_maps)

    source = {key.replace("retina_cls", "new_cls"): x for key, x in small_weights(RETINANET, "v2").items()}
    path = save(source, tmp_path / "a.pth")
    assert run(path, tmp_path / "out") == 1
    assert "of an architecture with 'bbox_head', 'neck', which pvt_hf does not have" in capsys.readouterr().err
    monkeypatch.setattr(registry, "DENSE_PREDICTORS", (NewNet(), *registry.DENSE_PREDICTORS))
    assert run(path, tmp_path / "out") == 0
    assert "+ NewNet, mmdetection format" in capsys.readouterr().out
    assert {"new-net", "pvt_v2"} <= set(ModelCard.load(tmp_path / "out" / "README.md").data.tags)
    assert run("--to", "official", tmp_path / "out", tmp_path / "b.pth") == 0
    assert equal(torch.load(tmp_path / "b.pth"), source)


def mmdetection_3(official: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A detector on the official PVT with the names and shapes of mmdetection 3's own PVT, from reading that."""
    renamed, is_v1 = {}, "backbone.pos_embed1" in official
    for key, tensor in official.items():
        if not key.startswith("backbone."):
            renamed[key] = tensor
            continue
        key = key.removeprefix("backbone.")
        if match := re.fullmatch(r"pos_embed(\d)", key):
            stage = int(match[1]) - 1
            renamed[f"backbone.layers.{stage}.1.0.pos_embed"] = tensor[:, 1:] if stage == 3 else tensor
        elif match := re.fullmatch(r"patch_embed(\d)\.(proj|norm)\.(.*)", key):
            name = "projection" if match[2] == "proj" else "norm"
            renamed[f"backbone.layers.{int(match[1]) - 1}.0.{name}.{match[3]}"] = tensor
        elif match := re.fullmatch(r"norm(\d)\.(.*)", key):
            renamed[f"backbone.layers.{int(match[1]) - 1}.2.{match[2]}"] = tensor
        else:
            match = re.fullmatch(r"block(\d)\.(\d+)\.(.*)\.(weight|bias)", key)
            start = f"backbone.layers.{int(match[1]) - 1}.1.{int(match[2]) + is_v1}"
            name, end = match[3], match[4]
            if name == "attn.kv":
                continue
            if name == "attn.q":
                keys_values = official[f"backbone.{key.replace('.q.', '.kv.')}"]
                renamed[f"{start}.attn.attn.in_proj_{end}"] = torch.cat((tensor, keys_values))
                continue
            if name in ("mlp.fc1", "mlp.fc2") and end == "weight":
                tensor = tensor[:, :, None, None]
            places = {"mlp.fc1": "ffn.layers.0", "mlp.dwconv.dwconv": "ffn.layers.1", "attn.proj": "attn.attn.out_proj"}
            places["mlp.fc2"] = "ffn.layers.3" if is_v1 else "ffn.layers.4"
            renamed[f"{start}.{places.get(name, name)}.{end}"] = tensor
    return renamed


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_mmdetection_3_is_converted_with_its_epsilon(version, tmp_path, capsys):
    """RetinaNet on mmdetection 3's own PVT, complete and as a backbone."""
    official = small_weights(RETINANET, version)
    if version == "v1":
        official["backbone.pos_embed4"][:, 0] = 0  # not in that format, and not used
    path = save({"state_dict": mmdetection_3(official), "meta": {}}, tmp_path / "a.pth")
    assert equal(formats.mmdetection_3_to_official(mmdetection_3(official)), official)
    done = convert.convert(str(path), tmp_path / "out")
    assert done.source_format.name == "mmdetection 3" and done.architecture is RETINANET and done.difference < 1e-8
    assert "epsilon of the norms in patch embedding and spatial reduction: 1e-06" in done.notes
    assert run("--to", "official", tmp_path / "out", tmp_path / "back.pth") == 0
    assert "trained with patch_layer_norm_eps 1e-06" in capsys.readouterr().out
    assert equal(torch.load(tmp_path / "back.pth"), official)
    done = convert.convert(str(path), tmp_path / "backbone", backbone_only=True)
    assert done.architecture is registry.BACKBONE
    assert json.loads((tmp_path / "backbone" / "config.json").read_text())["out_features"]
    config = AutoConfig.from_pretrained(tmp_path / "out").backbone_config
    assert config.out_features == ["stage2", "stage3", "stage4"] and config.patch_layer_norm_eps == 1e-6
    model = RETINANET.auto_class.from_pretrained(tmp_path / "out")
    epsilons = [module.eps for module in model.backbone.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert set(epsilons) == {1e-6} and len(epsilons) > 15


class HistoryBuffer:
    """What mmengine pickles in every checkpoint, under its name: arrays, and methods by way of `getattr`."""

    def __init__(self):
        self._log_history, self._statistics_methods = np.array([1.5]), {"mean": self.mean}

    def mean(self):
        raise AssertionError


@pytest.mark.parametrize("numpy", ["numpy._core", "numpy.core"])
def test_logs_of_mmengine_are_set_aside(numpy, tmp_path, monkeypatch, capsys):
    """They are set aside without running anything of mmengine, which need not be installed."""
    module = types.ModuleType("mmengine.logging.history_buffer")
    HistoryBuffer.__module__, module.HistoryBuffer = module.__name__, HistoryBuffer
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    hub = {"log_scalars": {"train/loss": HistoryBuffer()}}
    source = small_weights(RETINANET, "v2")
    save({"state_dict": mmdetection_3(source), "message_hub": hub}, tmp_path / "a.pth")
    monkeypatch.undo()
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename == "a/data.pkl":
                assert b"getattr" in content and b"HistoryBuffer" in content and b"cnumpy._core.multiarray" in content
                content = content.replace(b"cnumpy._core.multiarray", f"c{numpy}.multiarray".encode())
            new.writestr("b" + entry.filename.removeprefix("a"), content)
    assert run(tmp_path / "b.pth", tmp_path / "out") == 0
    assert "left in the file: message_hub" in capsys.readouterr().out
