"""Converts PVT checkpoints to verified Hugging Face folders, publishes them, and converts them back.

    python conversion/convert.py pvt_v2_b2 converted/pvt_v2_b2             # downloads the official release
    python conversion/convert.py checkpoint.pth converted/mine             # official, timm's or transformers' format
    python conversion/convert.py timm/pvt_v2_b2.in1k converted/b2          # a repository of the Hub
    python conversion/convert.py semantic_fpn.pth converted/segmenter      # a whole detector or segmenter
    python conversion/convert.py retinanet.pth converted/c --backbone-only # or its backbone
    python conversion/convert.py --all converted                           # all the released variants
    python conversion/convert.py --to official converted/b2 b2.pth         # and back

What the checkpoint is, is read from its tensors. Before anything is written, the converted model is compared in float64
with an independent evaluation of the source's weights.
"""

import argparse
import functools
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from pvt_hf.variants import backbone_config, differences, find_variant

from ..models.configuration_pvt import PvtConfig
from ..models.image_processing_pvt import PvtImageProcessor
from ..variants import VARIANTS
from . import rename, systems
from .checkpoint import Checkpoint, load_file, read_checkpoint, read_json
from .infer_config import imagenet_labels, read_config
from .kinds import BACKBONE, CLASSIFIER, Kind, System, kind_of_checkpoint, kind_of_folder
from .model_card import Conversion, render
from .output_folder import appearing_whole, check_output_dir
from .publish import publish, saved_with_code
from .rename import ConversionError, StateDict
from .verify import largest_difference, reference_outputs, timm_outputs

OFFICIAL_EPS = PvtConfig().patch_layer_norm_eps


def convert(
    name: str,
    output_dir: Path,
    *,
    variant: str | None = None,
    backbone_only: bool = False,
    overwrite: bool = False,
    with_code: bool = False,
    card_name: str | None = None,
) -> Conversion:
    """Converts one checkpoint.

    Args:
        name: A file, the name of a variant or a repo id: see [`read_checkpoint`].
        output_dir: Folder to write. It appears only when it is whole and verified.
        variant: The variant that it must be.
        backbone_only: Write the backbone with its four feature maps and leave the heads.
        overwrite: Replace the folder of a former conversion.
        with_code: Write the code of the package too.
        card_name: What the model card calls the checkpoint, `output_dir` by default.

    Raises:
        ConversionError: If the checkpoint is not what it should be, or the result differs from it.
    """
    check_output_dir(output_dir, overwrite)
    checkpoint = read_checkpoint(name)
    if checkpoint.path.resolve().is_relative_to(output_dir.resolve()):
        raise ConversionError(f"`OUTPUT_DIR` {output_dir} holds the checkpoint itself; choose another.")
    source_format = rename.detect_format(checkpoint.weights)
    kind = kind_of_checkpoint(checkpoint.weights, source_format, backbone_only)
    if with_code and isinstance(kind, System):
        raise ConversionError(
            f"`--with-code` cannot be used for a {kind.name}: its code finds the backbone's by the Auto classes of an "
            "installed pvt_hf."
        )
    official = _official_weights(checkpoint.weights, source_format, backbone_only)
    config = kind.read_config(official, checkpoint)
    backbone = backbone_config(config)
    if source_format == "mmdetection 3":
        backbone.patch_layer_norm_eps = 1e-6  # its own PVT has the same epsilon in all norms
    variant = variant or (name if name in VARIANTS else None)
    if variant and (wrong := differences(backbone, VARIANTS[variant])):
        raise ConversionError(f"The checkpoint is not a {variant}: {'; '.join(wrong)}.")
    model = build_model(kind.from_official(official, config), config, kind)
    processor, processor_origin = kind.image_processor(checkpoint, config)
    facts = {
        "source": checkpoint.source,
        "sha256": checkpoint.sha256,
        "source_format": source_format,
        "config": config,
        "kind": kind.name,
        "pipeline_tag": kind.pipeline_tag,
        "auto_class": kind.auto_class.__name__,
        "variant": find_variant(backbone),
        "model_class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "tensors": len(model.state_dict()),
        "parameters": model.num_parameters(),
        "has_image_processor": processor is not None,
        "has_code": with_code,
    }
    with appearing_whole(output_dir, overwrite) as folder:
        with ExitStack() as stack:
            if with_code:
                code = {
                    kind.auto_class.__name__: type(model),
                    "AutoConfig": type(config),
                    "AutoImageProcessor": PvtImageProcessor,
                }
                stack.enter_context(saved_with_code(**code))
            model.save_pretrained(folder)
            if processor is not None:
                processor.save_pretrained(folder)
        model_class = type(model)
        del model
        if source_format == "timm":
            del official
            expected = timm_outputs(checkpoint.weights, config, backbone_only)
        else:
            expected = reference_outputs(official, config, kind)
            del official
        checkpoint.weights.clear()
        difference = largest_difference(model_class.from_pretrained(folder), expected, kind)
        conversion = Conversion(difference=difference, **facts)
        card = render(conversion, card_name or str(output_dir))
        card.save(folder / "README.md")
    _describe(conversion, checkpoint, processor_origin, output_dir)
    return conversion


def build_model(tensors: StateDict, config: PreTrainedConfig, kind: Kind) -> PreTrainedModel:
    """The model with these tensors, its floating-point numbers in the widest of their dtypes.

    Raises:
        ConversionError: Unless each tensor has its place and each place its tensor.
    """
    with torch.device("meta"):
        model = kind.auto_class.from_config(config).eval()
    wanted = model.state_dict()
    rename.check_filled(tensors, wanted)
    floating = {key: tensor for key, tensor in tensors.items() if wanted[key].is_floating_point()}
    if whole := [key for key, tensor in floating.items() if not tensor.is_floating_point()]:
        raise ConversionError(f"These tensors are no floating-point numbers: {rename.quote(whole)}.")
    dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in floating.values()})
    storages, filled = set(), {}
    for key, tensor in tensors.items():
        tensor = tensor.to(dtype if key in floating else wanted[key].dtype)
        storage = tensor.untyped_storage()
        # `save_pretrained` refuses tensors that share memory, as the parts of a fused one do.
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        storages.add(tensor.untyped_storage().data_ptr())
        filled[key] = tensor
    model.load_state_dict(filled, assign=True)
    model.config.dtype = dtype
    return model


def export(saved_dir: Path, file: Path, to: str, overwrite: bool = False) -> None:
    """Writes the tensors of a folder saved by `save_pretrained` with the names of another format.

    Args:
        saved_dir: Folder with `config.json` and `model.safetensors`.
        file: To write: with the ending `.safetensors` that format, else a plain state dict of `torch.save`.
        to: `"official"` or `"timm"` (v2 only).

    Raises:
        ConversionError: If the folder does not hold a whole PVT, or `file` exists and `overwrite` is not set.
    """
    if file.resolve().is_relative_to(saved_dir.resolve()):
        raise ConversionError(f"`FILE` {file} would lie in `SAVED_DIR` {saved_dir}; choose another place.")
    if file.is_dir() or (file.exists() and not overwrite):
        raise ConversionError(
            f"`FILE` {file} exists" + (": it is a directory." if file.is_dir() else "; use --overwrite.")
        )
    if missing := [name for name in ("config.json", "model.safetensors") if not (saved_dir / name).is_file()]:
        raise ConversionError(f"`SAVED_DIR` must be a folder of `save_pretrained`, but {saved_dir} has no {missing}.")
    official = _exported(saved_dir)
    known = read_json(saved_dir / "config.json")
    eps = (known.get("backbone_config") or known).get("patch_layer_norm_eps", OFFICIAL_EPS)
    if eps != OFFICIAL_EPS:
        print(f"Note: the weights were trained with patch_layer_norm_eps {eps:.0e}, which no such file can say.")
    if to == "timm":
        official = rename.official_to_timm(official)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as temporary:
        partial = Path(temporary) / file.name
        if file.suffix == ".safetensors":
            safetensors.torch.save_file(official, partial, metadata={"format": "pt"})
        else:
            torch.save(official, partial)
        partial.replace(file)
    print(f"{saved_dir}: {len(official)} tensors written to {file} with the names of {to}.")


def _exported(saved_dir: Path) -> StateDict:
    """The tensors of a saved folder with the official names. Raises a `ConversionError` unless they are all there."""
    known = read_json(saved_dir / "config.json")
    if kind := kind_of_folder(known):
        return _exported_system(saved_dir, kind)
    weights = load_file(saved_dir / "model.safetensors")
    kind = BACKBONE if all(key.startswith("encoder.") for key in weights) else CLASSIFIER
    official = rename.to_official(rename.with_base_prefix(weights))
    config = read_config(official, known)
    if kind is BACKBONE:
        config.out_features = config.stage_names
    build_model(kind.from_official(official, config), config, kind)
    return official


def _exported_system(saved_dir: Path, kind: System) -> StateDict:
    config = AutoConfig.from_pretrained(saved_dir)
    if (model_type := config.backbone_config.model_type) not in ("pvt", "pvt_v2"):
        raise ConversionError(
            f"This {kind.name} has a backbone of type {model_type!r}: there are official names on a PVT only."
        )
    # Files have other names than modules where transformers keeps those of its former versions, as for DETR.
    model, loading_info = kind.auto_class.from_pretrained(
        saved_dir, output_loading_info=True, ignore_mismatched_sizes=True
    )
    wrong = {key: sorted(map(str, names)) for key, names in loading_info.items() if names}
    if wrong:
        raise ConversionError(f"`SAVED_DIR` {saved_dir} does not hold a whole {kind.name}: {wrong}.")
    return kind.to_official(model.state_dict(), config)


def _official_weights(weights: StateDict, source_format: str, backbone_only: bool) -> StateDict:
    if source_format == "mmdetection 3":
        weights = rename.mmdetection_3_to_official(weights)
    if source_format.startswith("mm"):
        if not backbone_only:
            return systems.with_current_names(weights)
        weights = {key.removeprefix("backbone."): weights[key] for key in weights if key.startswith("backbone.")}
    convert_names = {"timm": rename.timm_to_official, "transformers": rename.to_official}
    official = convert_names.get(source_format, dict)(weights)
    if backbone_only:  # what the official backbones for dense prediction do not have
        official = {key: official[key] for key in official if not key.startswith(("head.", "norm.", "cls_token"))}
    return official


def _describe(conversion: Conversion, checkpoint: Checkpoint, processor_origin: str, output_dir: Path) -> None:
    config = backbone_config(conversion.config)
    name = conversion.variant.name if conversion.variant else "a variant of your own"
    system = f" + {conversion.kind}" if conversion.is_system else ""
    print(f"{conversion.source}: {name}{system}, {conversion.source_format} format, {conversion.dtype}")
    if checkpoint.set_aside:
        print(f"  left in the file: {', '.join(checkpoint.set_aside)}")
    if conversion.variant is None and "num_attention_heads" not in checkpoint.config:
        heads = ", ".join(map(str, config.num_attention_heads))
        print(f"  attention heads: {heads}, the official numbers; the checkpoint does not tell")
    labels = list(conversion.config.id2label.values())
    if config.patch_layer_norm_eps != OFFICIAL_EPS:
        print(f"  epsilon of the norms in patch embedding and spatial reduction: {config.patch_layer_norm_eps:.0e}")
    if not conversion.is_backbone and labels == imagenet_labels():
        print("  labels: those of ImageNet-1k, as there are 1000 without other names")
    if conversion.is_system:
        origin = "the checkpoint's own" if checkpoint.class_names else "by their number, as the checkpoint has no names"
        print(f"  labels: {', '.join(labels[:3])}, ... ({len(labels)}; {origin})")
    print(f"  image processor: {processor_origin}")
    print(f"  {conversion.tensors} tensors, {conversion.parameters / 1e6:.1f} M parameters, all of them used")
    print(f"  largest difference to the source, in float64: {conversion.difference:.1e}")
    print(f"  written to {output_dir}")


def convert_all(output_root: Path, repo_owner: str | None = None, private: bool = False, **options) -> bool:
    """Converts every released variant to `output_root/<variant>`, prints a table, and tells whether all went well."""
    lines = ["| variant | tensors | parameters (M) | largest difference | result |", "|--|--|--|--|--|"]
    failures = 0
    for name in VARIANTS:
        folder = output_root / name
        try:
            repo = f"{repo_owner}/{name}" if repo_owner else None
            done = convert(name, folder, card_name=repo, **options)
            result = publish(folder, repo, private) if repo else folder
            lines.append(
                f"| {name} | {done.tensors} | {done.parameters / 1e6:.1f} | {done.difference:.1e} | {result} |"
            )
        except _EXPECTED as error:
            failures += 1
            lines.append(f"| {name} | | | | {error} |")
    print("\n".join(lines))
    return not failures


# What a user's files, disks and networks can do. Anything else is a mistake of this program, and shows its traceback.
_EXPECTED = (ConversionError, OSError, SafetensorError)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "source", nargs="?", metavar="CHECKPOINT", help="file, variant or repo id (--to: a saved folder)"
    )
    parser.add_argument("output", nargs="?", metavar="OUTPUT_DIR", type=Path, help="folder to write (--to: a file)")
    parser.add_argument("--all", type=Path, metavar="OUTPUT_ROOT", help="convert every released variant")
    parser.add_argument("--to", choices=("official", "timm"), help="convert a saved folder back")
    parser.add_argument("--variant", choices=VARIANTS, help="insist on a variant")
    parser.add_argument("--backbone-only", action="store_true", help="write a backbone, leave the heads")
    parser.add_argument("--overwrite", action="store_true", help="replace a former conversion")
    parser.add_argument("--with-code", action="store_true", help="write the code too, for trust_remote_code=True")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload it; with --all, an owner of repositories")
    parser.add_argument("--private", action="store_true", help="into a private repository")
    options = parser.parse_args(arguments)
    if options.all and (options.source or options.to or options.variant):
        parser.error("--all takes no CHECKPOINT, --to or --variant")
    if not options.all and options.output is None:
        parser.error("CHECKPOINT and OUTPUT_DIR are required, or --all OUTPUT_ROOT")
    if options.to and (options.push_to_hub or options.with_code or options.variant or options.backbone_only):
        parser.error("--to takes SAVED_DIR, FILE and --overwrite only")
    if options.private and not options.push_to_hub:
        parser.error("--private needs --push-to-hub")
    if options.push_to_hub:
        repo = f"{options.push_to_hub}/name" if options.all else options.push_to_hub
        try:
            validate_repo_id(repo)
        except ValueError as error:
            parser.error(f"--push-to-hub: {error}")
        if "/" not in repo:  # the card names the repository
            parser.error(f"--push-to-hub must be owner/name, got {repo}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs the program. Returns its exit code: 0, or 1 for an error, which is printed."""
    options = parse_arguments(arguments)
    logging.disable_progress_bar()  # of transformers: its bars for two small files hide the figures
    chosen = {key: getattr(options, key) for key in ("backbone_only", "overwrite", "with_code")}
    try:
        if options.all:
            return 0 if convert_all(options.all, options.push_to_hub, options.private, **chosen) else 1
        if options.to:
            export(Path(options.source), options.output, options.to, options.overwrite)
            return 0
        convert(options.source, options.output, variant=options.variant, card_name=options.push_to_hub, **chosen)
        if options.push_to_hub:
            print(f"  published: {publish(options.output, options.push_to_hub, options.private)}")
    except _EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
