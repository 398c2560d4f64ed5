"""DETR on a PVT: transformers' own [`~transformers.DetrForObjectDetection`] with the papers' structure and training.

Source: `detection/configs/detr_pvt_s_8x2_50ep_coco.py` of the released code, for mmdetection 2.13. The model stays a
class of transformers, so that plain transformers loads what is saved here.
"""

import copy
import dataclasses
import difflib
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, DetrConfig, DetrForObjectDetection, PreTrainedConfig
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_for_object_detection import HungarianMatcher, generalized_box_iou
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .distributed import mean_over_processes
from .targets import check_labels

# What differs from the defaults of `DetrConfig`, which are those of the DETR paper.
_CONFIG_FIELDS = {"num_labels": 80, "attention_dropout": 0.1, "activation_dropout": 0.1}


def build_detr_config(backbone_config: PreTrainedConfig | dict[str, Any], **overrides: Any) -> DetrConfig:
    """The configuration of the papers' DETR: 100 queries, 6 + 6 layers, stage 4 (stride 32) as the only feature map.

    Args:
        backbone_config: Of any backbone with stages, for example `build_config("pvt_small", drop_path_rate=0.1)`,
            which is the papers'. It is copied, and the last stage becomes its `out_features`.
        **overrides: Any field of [`~transformers.DetrConfig`], for example `num_queries=300` or `id2label`. There are
            80 classes, those of COCO, unless `num_labels` or `id2label` says otherwise.

    Raises:
        ValueError: If there is no such field (the message lists the nearest), if `backbone_config` has no stages, or
            for `auxiliary_loss=True`, with which transformers changes the decoder itself.
    """
    known = {field.name for field in dataclasses.fields(DetrConfig)} | {"num_labels"}
    for field in overrides:
        if field not in known:
            nearest = difflib.get_close_matches(field, known, n=3) or sorted(known)
            raise ValueError(f"DetrConfig has no field {field!r}. Nearest: {', '.join(nearest)}.")
    if isinstance(backbone_config, dict):
        backbone_config = AutoConfig.for_model(**backbone_config)
    if not getattr(backbone_config, "stage_names", None):
        raise ValueError(f"`backbone_config` must be that of a backbone with stages, got {type(backbone_config)}.")
    backbone_config = copy.deepcopy(backbone_config)
    backbone_config.out_features = [backbone_config.stage_names[-1]]
    fields = _CONFIG_FIELDS | {"num_channels": backbone_config.num_channels}
    if overrides.get("id2label") is not None:
        del fields["num_labels"]
    config = DetrConfig(backbone_config=backbone_config, **(fields | overrides))
    _check_config(config)
    return config


def build_detr(config: DetrConfig) -> DetrForObjectDetection:
    """A new model with mmdetection's initialisation, ready for training: see [`prepare_detr_training`].

    Xavier uniform for the transformer (query, key and value as the one matrix that they are there), zero for its
    biases, N(0, 1) for the queries, PyTorch's default for the input projection and the heads. The backbone is
    initialised by its own class; [`load_pretrained_backbone`] fills it.

    Raises:
        ValueError: If `config.auxiliary_loss` is set.
    """
    _check_config(config)
    model = DetrForObjectDetection(config)
    for transformer in (model.model.encoder, model.model.decoder):
        for name, module in transformer.named_modules():
            if isinstance(module, nn.Linear):
                is_fused = name.endswith(("q_proj", "k_proj", "v_proj"))
                # Xavier's bound sqrt(6 / (fan_in + fan_out)) of a (3 d, d) matrix, for each (d, d) third of it.
                nn.init.xavier_uniform_(module.weight, gain=0.5**0.5 if is_fused else 1.0)
                nn.init.zeros_(module.bias)
    heads = (model.class_labels_classifier, *model.bbox_predictor.layers)
    for module in (model.model.query_position_embeddings, model.model.input_projection, *heads):
        module.reset_parameters()
    return prepare_detr_training(model)


def prepare_detr_training(model: DetrForObjectDetection) -> DetrForObjectDetection:
    """Makes a model, in place, train as mmdetection's. Calling it again changes nothing.

    With `labels`, `loss` and `loss_dict` of the output are then those of [`detr_loss`], auxiliary losses included. The
    loss is computed inside the model's call, so that gradient accumulation in `Trainer`, mixed precision and
    `DistributedDataParallel` work as for any model. The dropout at the encoder's input, which mmdetection's model does
    not have, goes. Neither is saved: call it on the model that `from_pretrained` gives before training goes on.

    Raises:
        TypeError: If `model` is not a [`~transformers.DetrForObjectDetection`].
        ValueError: If `config.auxiliary_loss` is set.
    """
    if not isinstance(model, DetrForObjectDetection):
        raise TypeError(f"`model` must be a DetrForObjectDetection, got a {type(model).__name__}.")
    _check_config(model.config)
    if model.loss_function is not _return_no_loss:
        model.loss_function = _return_no_loss
        model.model.encoder.dropout = 0.0
        maybe_install_capturing_hooks(model.model.decoder)  # not at the first call: a compiler cannot trace that
        model.model.decoder.register_forward_pre_hook(_record_layers, with_kwargs=True)
        model.register_forward_hook(_add_loss, with_kwargs=True)
    return model


def detr_loss(
    model: DetrForObjectDetection, outputs: ModelOutput, labels: list[dict[str, torch.Tensor]]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """mmdetection's loss: the same three terms for every decoder layer, each layer matched on its own.

    Classification is cross-entropy with weight 0.1 for no object, divided by the sum of the weights of this process (at
    least 1). L1 and generalised IoU losses of the matched boxes are divided by the mean over processes of the number of
    matched boxes (at least 1). transformers' own loss divides by the number of processes once more.

    Args:
        model: The model that gave `outputs`; its heads read the intermediate layers.
        outputs: Of a forward pass with `output_hidden_states=True`.
        labels: For each image `class_labels`, integers `(objects,)`, and `boxes`, floats `(objects, 4)`, cxcywh
            relative to the image without its padding.

    Returns:
        The weighted sum, and its terms without weights: `loss_ce`, `loss_bbox` and `loss_giou` of the last layer, and
        with `_0` ... `_4` those of the layers before it.

    Raises:
        TypeError: For labels of another type.
        ValueError: For labels of another form, out of range or not finite, for outputs without hidden states, and for
            predictions that are not finite.
    """
    _check_config(model.config)
    check_labels(labels, len(outputs.logits), model.config.num_labels)
    states = outputs.decoder_hidden_states
    if states is None or any(state is None for state in states):
        raise ValueError(
            "`outputs` must have all `decoder_hidden_states`: call the model with output_hidden_states=True."
        )
    layers = {"": (outputs.logits, outputs.pred_boxes)}
    for index, state in enumerate(states[1:-1]):  # the first is the input, the last is the normed output
        state = model.model.decoder.layernorm(state)
        layers[f"_{index}"] = (model.class_labels_classifier(state), model.bbox_predictor(state).sigmoid())

    num_queries = outputs.logits.shape[1]
    matched = sum(min(len(label["class_labels"]), num_queries) for label in labels)
    num_boxes = mean_over_processes(torch.full((), float(matched), device=outputs.logits.device)).clamp(min=1)
    loss_dict = {
        f"{name}{ending}": value
        for ending, (logits, boxes) in layers.items()
        for name, value in _compute_layer_losses(logits, boxes, labels, num_boxes, model.config).items()
    }
    coefficients = (
        ("loss_ce", 1),
        ("loss_bbox", model.config.bbox_loss_coefficient),
        ("loss_giou", model.config.giou_loss_coefficient),
    )
    loss = sum(coefficient * loss_dict[name + ending] for ending in layers for name, coefficient in coefficients)
    return loss, loss_dict


def _record_layers(decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if torch.compiler.is_exporting():  # an exported program has no loss
        return args, kwargs
    return args, kwargs | {"output_hidden_states": True}


def _return_no_loss(*args: Any, **kwargs: Any) -> tuple[None, None, None]:
    """In place of transformers' loss, which `_add_loss` replaces."""
    return None, None, None


def _add_loss(model: DetrForObjectDetection, args: tuple, kwargs: dict, outputs: ModelOutput) -> ModelOutput:
    labels = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments.get("labels")
    if type(outputs) is dict and labels is None:
        return outputs  # transformers' exporters trace a forward that returns one, and want its tensors
    if not isinstance(outputs, ModelOutput):
        raise ValueError("A DETR prepared for training needs `return_dict=True`.")
    fields = dict(outputs)
    if labels is not None:
        fields["loss"], fields["loss_dict"] = detr_loss(model, outputs, labels)
    if not kwargs.get("output_hidden_states", model.config.output_hidden_states):
        fields.pop("decoder_hidden_states", None)  # evaluation would gather them
    return type(outputs)(**fields)


def _compute_layer_losses(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    labels: list[dict[str, torch.Tensor]],
    num_boxes: torch.Tensor,
    config: DetrConfig,
) -> dict[str, torch.Tensor]:
    """The three terms of one decoder layer: logits (batch, queries, classes + 1), boxes (batch, queries, 4), relative
    cxcywh."""
    logits, boxes = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (logits, boxes))
    if not (logits.isfinite().all() and boxes.isfinite().all()):
        raise ValueError("The predictions are not finite: the training has diverged, or `pixel_values` are not finite.")
    matcher = HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    classes = torch.full(logits.shape[:2], config.num_labels, device=logits.device)  # no object
    predicted, wanted = [boxes[:0, 0]], [boxes[:0, 0]]
    for index, label in enumerate(labels):
        if len(label["class_labels"]) == 0:
            continue
        target = {"class_labels": label["class_labels"].to(classes), "boxes": label["boxes"].to(boxes)}
        prediction = {"logits": logits[index : index + 1], "pred_boxes": boxes[index : index + 1]}
        ((queries, objects),) = matcher(prediction, [target])
        classes[index, queries] = target["class_labels"][objects]
        predicted.append(boxes[index, queries])
        wanted.append(target["boxes"][objects])
    predicted, wanted = torch.cat(predicted), torch.cat(wanted)  # (matched boxes, 4)

    weights = logits.new_ones(config.num_labels + 1)
    weights[-1] = config.eos_coefficient
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weights, reduction="sum")
    overlaps = generalized_box_iou(center_to_corners_format(predicted), center_to_corners_format(wanted)).diagonal()
    return {
        "loss_ce": cross_entropy / weights[classes].sum().clamp(min=1),
        "loss_bbox": (predicted - wanted).abs().sum() / num_boxes,
        "loss_giou": (1 - overlaps).sum() / num_boxes,
    }


def _check_config(config: DetrConfig) -> None:
    if config.auxiliary_loss:
        raise ValueError(
            "`auxiliary_loss` must be False: with True transformers norms the decoder's running state after every "
            "layer, which is another model. `prepare_detr_training` adds the auxiliary losses without it."
        )


__all__ = ["build_detr", "build_detr_config", "detr_loss", "prepare_detr_training"]
