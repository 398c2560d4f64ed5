"""The image classifier, and the backbone that is left of any checkpoint without its heads."""

from transformers import AutoBackbone, AutoModelForImageClassification

from .. import reference, rename
from ..checkpoint import load_file
from ..image_processor import read_image_processor
from ..infer_config import infer_config
from .base import Architecture, reference_options


class Classifier(Architecture):
    name = "image classifier"
    auto_class = AutoModelForImageClassification
    pipeline_tag = "image-classification"

    def read_config(self, official, known, class_names=()):
        return infer_config(official, known)

    def from_official(self, official):
        return rename.from_official(official)

    def to_official(self, tensors):
        return rename.to_official(rename.add_base_prefix(tensors))

    def read_saved(self, saved_dir, known):
        official = self.to_official(load_file(saved_dir / "model.safetensors"))
        config = self.read_config(official, known)
        rename.check_complete(self.from_official(official), self.build_empty(config).state_dict())
        return official

    def outputs(self, model, image):
        return [model(image).logits]

    def reference(self, weights, image, config):
        return [reference.logits(weights, image, **reference_options(config))]

    def image_processor(self, checkpoint, config):
        return read_image_processor(checkpoint, config)


class Backbone(Classifier):
    name = "backbone"
    auto_class = AutoBackbone
    pipeline_tag = "image-feature-extraction"
    tags = ("backbone",)
    is_backbone = True

    def select(self, official):
        start = "backbone."  # in a detector or a segmenter
        parts = {key.removeprefix(start): tensor for key, tensor in official.items() if key.startswith(start)}
        # What the official backbones for dense prediction do not have.
        classifier_only = ("head.", "norm.", "cls_token")
        return {key: tensor for key, tensor in (parts or official).items() if not key.startswith(classifier_only)}

    def read_config(self, official, known, class_names=()):
        config = super().read_config(official, known)
        config.out_features = config.stage_names
        return config

    def from_official(self, official):
        return rename.remove_base_prefix(super().from_official(official))

    def outputs(self, model, image):
        return list(model(image).feature_maps)

    def reference(self, weights, image, config):
        return reference.feature_maps(weights, image, **reference_options(config))
