"""The official training of a classifier: mixup, soft targets, repeated augmentation, the schedule by epochs."""

from typing import Any

import torch
import torch.nn.functional as F

from ..data.classification import collate
from ..evaluation.metrics import classification_metrics, classification_statistics
from ..recipes import ImageNetRecipe
from .optimization import cosine_multiplier, parameter_groups
from .trainer import VisionTrainer


def soft_target_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None):
    """Cross-entropy with class indices `(batch,)` or probabilities `(batch, num_labels)`, averaged over the images of
    the whole accumulated batch (`num_items_in_batch`) or of this one."""
    loss = F.cross_entropy(outputs["logits"], labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class ImageClassificationTrainer(VisionTrainer):
    """Trains a classifier with the official ImageNet recipe, on one process or many.

    Args:
        recipe: Mixing of whole batches, repeats, and the learning-rate schedule.
        recipe_schedule: Whether the learning rate is the recipe's, instead of `args.lr_scheduler_type`.
        layer_decay: Factor of the learning rate from a block to the one before it.
        train_dataset: [`~pvt_hf.data.classification.TrainingImages`] or [`~pvt_hf.data.classification.StreamedImages`].
        *args, **kwargs: As of [`~pvt_hf.training.trainer.VisionTrainer`], as are the errors.

    The loss, the optimiser's groups, the sampler and the metrics are set here.

    Raises:
        ValueError: If the batch size is odd, which timm's mixup cannot pair, or the recipe leaves no training.
    """

    task = "image-classification"
    metric_names = {"accuracy": "top-1", "top5_accuracy": "top-5"}

    def __init__(
        self,
        *args,
        recipe: ImageNetRecipe,
        recipe_schedule: bool = True,
        layer_decay: float = 1.0,
        **kwargs,
    ):
        super().__init__(
            *args,
            recipe=recipe,
            data_collator=collate,
            compute_loss_func=soft_target_loss,
            preprocess_logits_for_metrics=classification_statistics,
            compute_metrics=classification_metrics,
            parameter_groups=lambda model: parameter_groups(
                model, self.args.learning_rate, self.args.weight_decay, layer_decay
            ),
            schedule=(lambda *steps: cosine_multiplier(recipe, self.args.learning_rate, *steps))
            if recipe_schedule
            else None,
            repeats=recipe.repeats,
            **kwargs,
        )
        if self.args.per_device_train_batch_size % 2 and (recipe.mixup or recipe.cutmix):
            raise ValueError(
                "`per_device_train_batch_size` must be even for mixup, which mixes an image with its opposite in the "
                f"batch; got {self.args.per_device_train_batch_size}."
            )
        self.settings = {"layer-wise decay": layer_decay} | self.settings
        self.mixup = self._build_mixup()

    def _build_mixup(self):
        from timm.data import Mixup

        return Mixup(
            mixup_alpha=self.recipe.mixup,
            cutmix_alpha=self.recipe.cutmix,
            switch_prob=self.recipe.mixup_switch_prob,
            label_smoothing=self.recipe.label_smoothing,
            num_classes=self.model.config.num_labels,
        )

    def mix(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixed images and smoothed probabilities `(batch, num_labels)`; the last image of an odd batch stays alone."""
        from timm.data.mixup import mixup_target

        even = len(images) // 2 * 2 if self.mixup.mixup_alpha > 0 or self.mixup.cutmix_alpha > 0 else 0
        targets = mixup_target(labels, self.mixup.num_classes, smoothing=self.mixup.label_smoothing)
        if even:
            mixed, targets[:even] = self.mixup(images[:even].contiguous(), labels[:even])
            images = torch.cat((mixed, images[even:]))
        return images, targets

    def prepare_batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs["pixel_values"], inputs["labels"] = self.mix(inputs["pixel_values"], inputs["labels"])
        return inputs
