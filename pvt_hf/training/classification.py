"""The papers' training of a classifier: Mixup, soft targets, repeated augmentation, the schedule by epochs."""

from typing import Any

import torch
import torch.nn.functional as F

from ..data.classification import collate
from ..evaluation.metrics import classification_metrics, classification_statistics
from ..evaluation.visualization import draw_classes
from ..recipes import ImageNetRecipe
from .optimization import SettingError, cosine_multiplier, parameter_groups
from .trainer import VisionTrainer


def soft_target_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy, averaged over the images.

    Args:
        outputs: With `logits` `(batch, num_labels)`.
        labels: Class indices `(batch,)`, or probabilities `(batch, num_labels)`.
        num_items_in_batch: Images of the whole accumulated batch; by default those of this one.
    """
    loss = F.cross_entropy(outputs["logits"], labels, reduction="sum")
    return loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class ImageClassificationTrainer(VisionTrainer):
    """Trains a classifier with the papers' ImageNet recipe, on one process or many.

    The loss, the groups of the optimiser, the sampler and the metrics are set here.

    Args:
        recipe: Mixing of whole batches, repeats, and the learning-rate schedule.
        recipe_schedule: Whether the schedule is the recipe's (the default), and not `args.lr_scheduler_type`.
        layer_decay: Learning-rate multiplier from a block to the one before it (default: 1).
        train_dataset: [`~pvt_hf.data.classification.TrainingImages`] or [`~pvt_hf.data.classification.StreamedImages`].
        *args: As of [`~pvt_hf.training.trainer.VisionTrainer`].
        **kwargs: As of [`~pvt_hf.training.trainer.VisionTrainer`], as are the errors.

    Raises:
        ValueError: If the batch size is odd, which timm's Mixup cannot pair, or the recipe leaves no training.
    """

    task = "image-classification"
    metric_names = {"accuracy": "top-1", "top5_accuracy": "top-5"}
    pictures = ("curves.png", "predictions.png")

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
            raise SettingError(
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
        """Mixup or CutMix, as the recipe has it, and label smoothing.

        Args:
            images: `(batch, channels, height, width)`; the last one of an odd batch stays alone.
            labels: Class indices `(batch,)`.

        Returns:
            Mixed images, and probabilities `(batch, num_labels)`.
        """
        from timm.data.mixup import mixup_target

        even = len(images) // 2 * 2 if self.mixup.mixup_alpha > 0 or self.mixup.cutmix_alpha > 0 else 0
        targets = mixup_target(labels, self.mixup.num_classes, smoothing=self.mixup.label_smoothing)
        if even:
            mixed, targets[:even] = self.mixup(images[:even].contiguous(), labels[:even])
            images = torch.cat((mixed, images[even:]))
        return images, targets

    @torch.no_grad()
    def draw_predictions(self, images: int = 24) -> None:
        """`predictions.png` in `output_dir`: validation images, spread over all of them, with the classes that were
        found. Called by every process."""
        model, dataset = self.accelerator.unwrap_model(self.model).eval(), self.eval_dataset
        indices = torch.linspace(0, len(dataset) - 1, min(images, len(dataset))).long().tolist()
        pixels = torch.stack([dataset[index]["pixel_values"] for index in indices])  # (images, channels, height, width)
        scores, labels = model(pixels.to(self.args.device)).logits.float().softmax(-1).max(-1)
        if self.is_world_process_zero():
            names, found = model.config.id2label, zip(labels.tolist(), scores.tolist(), strict=True)
            truths = (dataset.read(index)[:2] for index in indices)
            picture = draw_classes(
                [
                    (image, names[truth], names[label], score)
                    for (image, truth), (label, score) in zip(truths, found, strict=True)
                ]
            )
            with self.write_file("predictions.png") as file:
                picture.save(file)

    def prepare_batch(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs["pixel_values"], inputs["labels"] = self.mix(inputs["pixel_values"], inputs["labels"])
        return inputs
