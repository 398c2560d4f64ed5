"""The papers' training of a segmenter, and its evaluation pixel by pixel at the original sizes of the images."""

import csv
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils import logging

from ..data.class_names import list_class_names
from ..data.segmentation import MapCollator
from ..evaluation.label_map_predictor import LabelMapPredictor
from ..evaluation.metrics import mean_iou_metric, overlap_scores
from ..evaluation.visualization import draw_overlays
from ..models.image_processing_segmentation import IGNORE_INDEX
from ..models.modeling_semantic_fpn import semantic_loss
from ..models.resize import resize_nearest
from ..recipes import SegmentationRecipe
from .dense_prediction import DensePredictionTrainer
from .optimization import polynomial_multiplier, segmentation_parameter_groups
from .preemption import start_worker
from .segmentation_losses import IGNORED, SegmentationLoss

logger = logging.get_logger(__name__)

# A table of more classes is in the file only.
_MAX_PRINTED = 30


class SegmentationTrainer(DensePredictionTrainer):
    """Trains a segmenter with the papers' recipe for ADE20K, on one process or many.

    Metrics are `mIoU`, `mAcc` and `aAcc` in [0, 1] as mmsegmentation's, over the pixels of all validation images at
    their original sizes, each image once however many processes there are; and `loss`, the mean cross-entropy of the
    valid pixels at the size of the network's input. IoU, Dice and accuracy of every class are in `eval_classes.csv` of
    `output_dir`. Of two classes the second is the foreground: its Dice and IoU over the pixels of all images are
    `dice_set` and `iou_set`, the means over the images `dice_images` and `iou_images`, where an image in which neither
    truth nor prediction has foreground counts as 1. What there is no ground truth for is not among the metrics, and an
    empty cell of the table.

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
        tta_scales: Evaluate at these scales too, as a
            [`~pvt_hf.evaluation.label_map_predictor.LabelMapPredictor`] does (default: none).
        tta_flip: Evaluate mirrored images too (default: `False`).
        loss: Instead of the model's own.
        train_dataset: [`~pvt_hf.data.segmentation.TrainingMaps`].
        eval_dataset: [`~pvt_hf.data.segmentation.EvaluationMaps`].
        processing_class: The image processor of both.
        *args: As of [`~pvt_hf.training.dense_prediction.DensePredictionTrainer`].
        **kwargs: As of [`~pvt_hf.training.dense_prediction.DensePredictionTrainer`], as are the errors.

    Raises:
        ValueError: If only one of `window` and `stride` is given, or a scale is not positive.
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
        tta_scales: Sequence[float] = (),
        tta_flip: bool = False,
        loss: SegmentationLoss | None = None,
        **kwargs,
    ):
        self.predictor = LabelMapPredictor(processing_class, window, stride, tta_scales, tta_flip)
        # Trainer counts the labels other than -100, and a loss is divided by what is counted.
        by_valid_pixels = loss is not None or getattr(model.config, "loss_normalization", None) == "valid"
        ignored = IGNORED if by_valid_pixels else getattr(model.config, "semantic_loss_ignore_index", IGNORE_INDEX)
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
            compute_loss_func=loss,
            **kwargs,
        )
        if self.args.world_size > 1 and self.args.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)  # in place, with the same parameters
        self.metric = mean_iou_metric(self.model.config.num_labels, IGNORE_INDEX)
        processing_class.logits_stride = self._find_stride()  # with which it is saved
        if self.model.config.num_labels == 2:
            name = self.model.config.id2label[1]
            self.metric_names = self.metric_names | {
                f"{key}_{over}": f"{score} of {name} {words}"
                for key, score in (("dice", "Dice"), ("iou", "IoU"))
                for over, words in (("images", "(mean over images)"), ("set", "(over the set)"))
            }

    def describe_settings(self) -> dict[str, Any]:
        """As in [`~pvt_hf.training.trainer.VisionTrainer`], with what evaluations depend on."""
        chosen = {name: getattr(self.predictor, name) for name in ("window", "stride", "scales", "flip")}
        return super().describe_settings() | chosen

    @torch.no_grad()
    def _find_stride(self, size: int = 64) -> int:
        """How many times larger the model's input is than its logits."""
        training = self.model.training
        logits = self.model.eval()(pixel_values=torch.zeros(1, 3, size, size, device=self.model.device)).logits
        self.model.train(training)
        return size // logits.shape[-2]

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """One image at a time, since sizes differ; each process reads its own share."""
        dataset, args = self.eval_dataset if eval_dataset is None else eval_dataset, self.args
        return DataLoader(
            dataset,
            sampler=DistributedSampler(dataset, args.world_size, args.process_index, shuffle=False),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            worker_init_fn=start_worker,
        )

    def start_evaluation(self) -> None:
        self.metric.reset()
        self.matrix, self.seen = self.metric.matrix, 0
        self.sums = torch.zeros(5, dtype=torch.float64)  # of the loss, of valid pixels, of images, of Dice, of IoU

    @torch.no_grad()
    def prediction_step(self, model, inputs, *args, **kwargs) -> tuple[None, None, None]:
        """Counts the predictions for an image. The model does not get the labels, which have another size."""
        inputs = self._prepare_inputs(inputs)
        prediction, logits = self._predict(model, inputs)
        self.evaluate_batch(SemanticSegmenterOutput(logits=logits), inputs | {"prediction": prediction})
        return None, None, None

    def _predict(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The label map of an image, and its logits."""
        views = [inputs["pixel_values"], *inputs.get("scaled", [])]
        with self.compute_loss_context_manager():
            return self.predictor(model, views, tuple(inputs["labels"].shape[-2:]))

    def evaluate_batch(self, outputs: SemanticSegmenterOutput, inputs: dict[str, torch.Tensor]) -> None:
        position = self.seen * self.args.world_size + self.args.process_index
        self.seen += 1
        if position >= len(self.callback_handler.eval_dataloader.dataset):
            return
        labels, size = inputs["labels"], tuple(inputs["pixel_values"].shape[-2:])
        before = self.matrix.counts.clone()
        self.metric.add_batch(predictions=[inputs["prediction"]], references=labels)
        # Of the last class, which is the foreground where there are two; nowhere is right where it is nowhere.
        scores = [values[-1].nan_to_num(1.0) for values in overlap_scores(self.matrix.counts - before)]
        labels = resize_nearest(labels, size)
        pixels = (labels != IGNORE_INDEX).sum()
        loss = semantic_loss(outputs.logits, labels, IGNORE_INDEX).double() * pixels
        self.sums += torch.stack([loss.cpu(), pixels.cpu(), torch.ones(()), *scores])

    def evaluation_metrics(self) -> dict[str, float]:
        found = self.metric.compute()
        dice, iou = overlap_scores(self.matrix.counts)
        counts = self.matrix.counts.sum(dim=1).tolist()
        classes = (iou.tolist(), dice.tolist(), found["per_category_accuracy"].tolist(), counts)
        self.classes = list(zip(*classes, strict=True))
        hub_names = {"mIoU": "mean_iou", "mAcc": "mean_accuracy", "aAcc": "overall_accuracy"}
        metrics = {name: found[hub_name] for name, hub_name in hub_names.items()}
        # As float32, which is what every device can add up; pixels are too many for it to be exact.
        loss, pixels, images, *scores = self.accelerator.reduce(self.sums.float().to(self.args.device)).tolist()
        if len(self.classes) == 2:
            metrics |= {"dice_set": float(dice[1]), "iou_set": float(iou[1])}
            metrics |= dict(zip(("dice_images", "iou_images"), (score / images for score in scores), strict=True))
        return metrics | ({"loss": loss / pixels} if pixels else {}) | {"images": round(images)}

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        """As in `Trainer`; and writes a table of the classes, `{metric_key_prefix}_classes.csv`."""
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.is_world_process_zero():
            with self.write_file(f"{metric_key_prefix}_classes.csv") as path, path.open("w", newline="") as file:
                # A cell is empty where there is nothing to measure, and the value NaN.
                cells = ((value if value >= 0 else "" for value in values) for values in self.classes)
                rows = [(name, *values) for name, values in zip(self._names(), cells, strict=True)]
                csv.writer(file).writerows([("class", "IoU", "Dice", "accuracy", "pixels"), *rows])
            if warning := self._describe_missing():
                logger.warning(warning)
        return metrics

    def _names(self) -> list[str]:
        return list_class_names(self.accelerator.unwrap_model(self.model).config)

    def _describe_missing(self) -> str:
        """The classes that no pixel had in the last evaluation, in words."""
        missing = [name for name, (*_, pixels) in zip(self._names(), self.classes, strict=True) if not pixels]
        return f"mIoU says nothing about {missing}: no pixel of the validation set has them." if missing else ""

    def finish(self) -> str:
        """As in [`~pvt_hf.training.trainer.VisionTrainer`], with the classes one by one."""
        return "\n".join(filter(None, [super().finish(), self.describe_classes(), self._describe_missing()]))

    def describe_classes(self) -> str:
        """What the last evaluation found of each class, a line each; nothing where they are many."""
        lines = []
        for name, (*values, pixels) in zip(self._names(), self.classes, strict=True):
            scores = zip(("IoU", "Dice", "accuracy"), values, strict=True)
            shown = [f"{score} {value:.4f}" for score, value in scores if value >= 0]
            lines.append(f"  {name}: {', '.join([*shown, f'{pixels:,} pixels' if pixels else 'no ground truth'])}")
        return "\n".join(lines) if len(lines) <= _MAX_PRINTED else ""

    @torch.no_grad()
    def draw_predictions(self, images: int = 6) -> None:
        """`predictions.png` in `output_dir`: validation images, spread over all of them, with truth, prediction and
        errors. Called by every process."""
        model, dataset = self.accelerator.unwrap_model(self.model).eval(), self.eval_dataset
        indices = torch.linspace(0, len(dataset) - 1, min(images, len(dataset))).long().tolist()
        samples = []
        for index in indices:
            image, labels = dataset.data.read(index)
            views = [view.to(self.args.device) for view in self.predictor.prepare(image, dataset.data.name(index))]
            prediction, _ = self._predict(model, {"pixel_values": views[0], "scaled": views[1:], "labels": labels})
            samples.append((image, labels, prediction.cpu()))
        if self.is_world_process_zero():
            with self.write_file("predictions.png") as path:
                draw_overlays(samples, model.config.id2label, path)
