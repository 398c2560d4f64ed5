"""The papers' training of a segmenter, and its evaluation pixel by pixel at the original sizes of the images."""

import copy
import csv
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from transformers.modeling_outputs import SemanticSegmenterOutput

from ..data.segmentation import MapCollator
from ..evaluation.metrics import mean_iou_metric
from ..evaluation.visualization import draw_overlays
from ..models.image_processing_segmentation import IGNORE_INDEX
from ..models.modeling_semantic_fpn import semantic_loss
from ..models.resize import resize_nearest
from ..models.sliding_window import sliding_window_logits
from ..recipes import SegmentationRecipe
from .optimization import polynomial_multiplier, segmentation_parameter_groups
from .trainer import DensePredictionTrainer


class SegmentationTrainer(DensePredictionTrainer):
    """Trains a segmenter with the papers' recipe for ADE20K, on one process or many.

    Metrics are `mIoU`, `mAcc` and `aAcc` in [0, 1] as mmsegmentation's, over the pixels of all validation images at
    their original sizes, each image once however many processes there are; and `loss`, the mean cross-entropy of the
    valid pixels at the size of the network's input. `IoU` and `Acc` of every class are in `eval_classes.csv` of
    `output_dir`.

    On several GPUs batch normalisation is over all processes, as in mmsegmentation (`torch.nn.SyncBatchNorm`, which
    there is for GPUs only). Pixels to ignore are marked so that the loss of an accumulated or distributed batch is the
    loss of the whole batch with both of Semantic FPN's normalisations.

    Args:
        model: With `logits` `(batch, num_labels, any height and width)`.
        recipe: Crops, decay, and the learning-rate schedule.
        recipe_schedule: Whether the schedule is the recipe's (the default), and not `args.lr_scheduler_type`.
        window: Evaluate in windows of this many pixels of the network's input, as
            [`~pvt_hf.models.sliding_window.sliding_window_logits`]; by default the whole image at once.
        stride: Pixels from one window to the next; it goes with `window`.
        train_dataset: [`~pvt_hf.data.segmentation.TrainingMaps`].
        eval_dataset: [`~pvt_hf.data.segmentation.EvaluationMaps`].
        processing_class: The image processor of both.
        *args: As of [`~pvt_hf.training.trainer.DensePredictionTrainer`].
        **kwargs: As of [`~pvt_hf.training.trainer.DensePredictionTrainer`], as are the errors.

    Raises:
        ValueError: If only one of `window` and `stride` is given.
    """

    task = "image-segmentation"
    metric_names = {"mIoU": "mIoU", "mAcc": "mean accuracy", "aAcc": "pixel accuracy"}
    pictures = ("curves.png", "predictions.png")

    def __init__(
        self,
        model: nn.Module,
        *args,
        recipe: SegmentationRecipe,
        processing_class: Any,
        recipe_schedule: bool = True,
        window: int | None = None,
        stride: int | None = None,
        **kwargs,
    ):
        if (window is None) != (stride is None):
            raise ValueError(f"`window` and `stride` go together, got {window} and {stride}.")
        # Trainer counts the labels other than -100, and a loss is divided by what is counted.
        by_valid_pixels = getattr(model.config, "loss_normalization", None) == "valid"
        ignored = -100 if by_valid_pixels else getattr(model.config, "semantic_loss_ignore_index", IGNORE_INDEX)
        super().__init__(
            model,
            *args,
            recipe=recipe,
            processing_class=processing_class,
            data_collator=MapCollator(processing_class, (recipe.crop_size, recipe.crop_size), ignored),
            parameter_groups=lambda model: segmentation_parameter_groups(
                model, self.args.learning_rate, self.args.weight_decay
            ),
            schedule=(lambda *steps: polynomial_multiplier(recipe.power, *steps)) if recipe_schedule else None,
            **kwargs,
        )
        if self.args.world_size > 1 and self.args.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)  # in place, with the same parameters
        self.window, self.stride = window, stride
        self.metric = mean_iou_metric(self.model.config.num_labels, IGNORE_INDEX)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """One image at a time, since sizes differ; each process reads its own share."""
        dataset, args = self.eval_dataset if eval_dataset is None else eval_dataset, self.args
        return DataLoader(
            dataset,
            sampler=DistributedSampler(dataset, args.world_size, args.process_index, shuffle=False),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        )

    def start_evaluation(self) -> None:
        self.metric.reset()
        self.matrix, self.seen = self.metric.matrix, 0
        self.sums = torch.zeros(3, dtype=torch.float64)  # of the loss, of valid pixels, of images

    @torch.no_grad()
    def prediction_step(self, model, inputs, *args, **kwargs) -> tuple[None, None, None]:
        """Counts the predictions for an image. The model does not get the labels, which have another size."""
        inputs = self._prepare_inputs(inputs)
        self.evaluate_batch(self._predict(model, inputs["pixel_values"]), inputs)
        return None, None, None

    def _predict(self, model: nn.Module, pixel_values: torch.Tensor) -> SemanticSegmenterOutput:
        with self.compute_loss_context_manager():
            if self.window is None:
                return model(pixel_values=pixel_values)
            logits = sliding_window_logits(model, pixel_values, self.window, self.stride)
            return SemanticSegmenterOutput(logits=logits)

    def _label_maps(self, outputs: SemanticSegmenterOutput, height: int, size: tuple[int, int]) -> list[torch.Tensor]:
        """Predictions at the original size, from logits for an input of that height."""
        # The processor is saved with the stride that the model has; windows that were put together have none.
        image_processor = self.processing_class if self.window is None else copy.copy(self.processing_class)
        image_processor.logits_stride = height // outputs.logits.shape[-2]
        return image_processor.post_process_semantic_segmentation(outputs, [size] * len(outputs.logits))

    def evaluate_batch(self, outputs: SemanticSegmenterOutput, inputs: dict[str, torch.Tensor]) -> None:
        position = self.seen * self.args.world_size + self.args.process_index
        self.seen += 1
        if position >= len(self.callback_handler.eval_dataloader.dataset):
            return
        labels, size = inputs["labels"], tuple(inputs["pixel_values"].shape[-2:])
        predictions = self._label_maps(outputs, size[0], tuple(labels.shape[-2:]))
        self.metric.add_batch(predictions=predictions, references=labels)
        labels = resize_nearest(labels, size)
        pixels = (labels != IGNORE_INDEX).sum()
        loss = semantic_loss(outputs.logits, labels, IGNORE_INDEX).double() * pixels
        self.sums += torch.stack([loss, pixels, torch.ones_like(loss)]).cpu()

    def evaluation_metrics(self) -> dict[str, float]:
        found = self.metric.compute()
        counts = self.matrix.counts.sum(dim=1).tolist()
        classes = (found["per_category_iou"].tolist(), found["per_category_accuracy"].tolist(), counts)
        self.classes = list(zip(*classes, strict=True))
        hub_names = {"mIoU": "mean_iou", "mAcc": "mean_accuracy", "aAcc": "overall_accuracy"}
        metrics = {name: found[hub_name] for name, hub_name in hub_names.items()}
        # As float32, which is what every device can add up; pixels are too many for it to be exact.
        loss, pixels, images = self.accelerator.reduce(self.sums.float().to(self.args.device)).tolist()
        return metrics | {"loss": loss / max(pixels, 1), "images": round(images)}

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        """As in `Trainer`; and writes a table of the classes, `{metric_key_prefix}_classes.csv`."""
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.is_world_process_zero():
            names = self.accelerator.unwrap_model(self.model).config.id2label
            with self.write_file(f"{metric_key_prefix}_classes.csv") as path, path.open("w", newline="") as file:
                rows = [(names[label], *values) for label, values in enumerate(self.classes)]
                csv.writer(file).writerows([("class", "IoU", "accuracy", "pixels"), *rows])
        return metrics

    @torch.no_grad()
    def draw_predictions(self, images: int = 6) -> None:
        """`predictions.png` in `output_dir`: validation images, spread over all of them, with truth and prediction.
        Called by every process."""
        model, dataset = self.accelerator.unwrap_model(self.model).eval(), self.eval_dataset
        indices = torch.linspace(0, len(dataset) - 1, min(images, len(dataset))).long().tolist()
        samples = []
        for index in indices:
            image, labels = dataset.data.read(index)
            pixel_values = dataset[index]["pixel_values"][None].to(self.args.device)
            outputs = self._predict(model, pixel_values)
            (prediction,) = self._label_maps(outputs, pixel_values.shape[-2], tuple(labels.shape))
            samples.append((image, labels, prediction.cpu()))
        if self.is_world_process_zero():
            with self.write_file("predictions.png") as path:
                draw_overlays(samples, model.config.id2label, path)
