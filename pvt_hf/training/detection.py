"""The papers' training of a detector, and its evaluation by COCO's twelve numbers for boxes and masks."""

import json
from typing import Any

from torch import nn
from transformers import DetrForObjectDetection

from ..data.detection import DetectionCollator, DetectionData
from ..data.samplers import AspectRatioSampler
from ..evaluation.metrics import coco_metrics, coco_results, gather_results
from ..evaluation.visualization import draw_detections
from ..models.detr import prepare_detr_training
from ..models.image_processing_detection import PvtDetectionImageProcessor
from ..recipes import DetectionRecipe
from .dense_prediction import DensePredictionTrainer
from .elastic import GROUP_SIZE
from .optimization import detection_parameter_groups, step_multiplier


class DetectionTrainer(DensePredictionTrainer):
    """Trains a detector of pvt_hf or DETR with one of the papers' recipes, on one process or many.

    An evaluation leaves its detections in `results`, by image id, and in `output_dir/predictions.json`.

    The losses of RetinaNet, Mask R-CNN and Cascade Mask R-CNN are, as mmdetection's, averages over what each process
    has (positive anchors, sampled regions): one process with batches of 4 images is not exactly two with 2. Those of
    ATSS, GFL, Sparse R-CNN and DETR count over all processes, and it is. Accumulated batches are averaged one by one.
    On several GPUs batch normalisation in a head (Cascade Mask R-CNN's) is over all processes.

    Args:
        model: Of the architecture that the recipe is for. transformers' DETR gets the original DETR's loss.
        recipe: Learning-rate schedule and groups of the optimiser.
        processing_class: Puts batches together, and makes detections from outputs.

        recipe_schedule: Whether the schedule is the recipe's (the default), and not `args.lr_scheduler_type`.
        max_detections: Most detections in an image, made and measured, at least 10 (default: as the configuration has
            it, or 100). Mask R-CNN's configuration keeps it.
        train_dataset: [`~pvt_hf.data.detection.TrainingDetections`], with masks where the model has a mask head.
        eval_dataset: [`~pvt_hf.data.detection.EvaluationDetections`].
        *args: As of [`~pvt_hf.training.trainer.VisionTrainer`].
        **kwargs: As of [`~pvt_hf.training.trainer.VisionTrainer`], as are the errors.
    """

    task = "object-detection"
    pictures = ("curves.png", "predictions.png")

    def __init__(
        self,
        model: nn.Module,
        *args,
        recipe: DetectionRecipe,
        processing_class: PvtDetectionImageProcessor,
        recipe_schedule: bool = True,
        max_detections: int | None = None,
        **kwargs,
    ):
        if max_detections is not None and max_detections < 10:
            raise ValueError(f"`max_detections` must be at least 10, got {max_detections}.")
        if max_detections is not None and hasattr(model.config, "max_detections"):
            model.config.max_detections = max_detections
        found = max_detections or getattr(model.config, "max_detections", None)
        self.max_detections: int = int(found or 100)
        is_detr = isinstance(model, DetrForObjectDetection)
        if is_detr:
            prepare_detr_training(model)
        self.masks = getattr(model.config, "use_masks", False)
        # mmdetection's: below it nothing is a detection
        self.threshold = 0.0 if is_detr else getattr(model, "evaluation_threshold", 0.05)
        self.metric_names = {"AP": "AP", "AP50": "AP50"}
        if self.masks:
            self.metric_names |= {"mask_AP": "mask AP", "mask_AP50": "mask AP50"}
        self.results: dict[int, list[dict[str, Any]]] = {}
        super().__init__(
            model,
            *args,
            recipe=recipe,
            processing_class=processing_class,
            data_collator=DetectionCollator(processing_class, self.masks),
            parameter_groups=lambda model: detection_parameter_groups(
                model, recipe, self.args.learning_rate, self.args.weight_decay
            ),
            schedule=(lambda *steps: step_multiplier(recipe, *steps)) if recipe_schedule else None,
            **kwargs,
        )
        if self.args.world_size > 1 and self.args.device.type == "cuda":
            for name, part in self.model.named_children():
                if name != "backbone":
                    nn.SyncBatchNorm.convert_sync_batchnorm(part)  # in place, with the same parameters
        self.model_accepts_loss_kwargs = False  # transformers' DETR takes any argument, which does not mean this one

    def describe_settings(self) -> dict[str, Any]:
        """As in [`~pvt_hf.training.trainer.VisionTrainer`], with what evaluations depend on."""
        return super().describe_settings() | {"max_detections": self.max_detections}

    def build_sampler(self) -> AspectRatioSampler:
        """Batches of one orientation."""
        args = self.args
        sizes = [record.size for record in self.train_dataset.data.records]
        seed = args.seed if args.data_seed is None else args.data_seed
        return AspectRatioSampler(
            sizes,
            self._train_batch_size,
            seed,
            args.process_index,
            args.world_size,
            self._images_per_step(),
            self._layout()[GROUP_SIZE],
        )

    def _layout(self) -> dict[str, Any]:
        """A resumed run has the groups of the first, though its batches are others: else the order would change."""
        former = self.former.get("layout", {})
        return super()._layout() | {GROUP_SIZE: former.get(GROUP_SIZE, self.args.per_device_train_batch_size)}

    @property
    def evaluated(self) -> DetectionData:
        """The images of the evaluation that runs, or that was the last one."""
        return self.callback_handler.eval_dataloader.dataset.data

    def start_evaluation(self) -> None:
        self.results = {}

    def evaluate_batch(self, outputs: Any, inputs: dict[str, Any]) -> None:
        labels = inputs["labels"]
        sizes = [label["orig_size"] for label in labels]
        detections = self.processing_class.post_process_object_detection(
            outputs, self.threshold, sizes, max_detections=self.max_detections
        )
        if self.masks:
            instances = self.processing_class.post_process_instance_segmentation(
                outputs, self.threshold, target_sizes=sizes, return_binary_maps=True
            )
            for image, instance in zip(detections, instances, strict=True):
                image["masks"] = instance["segmentation"]
        image_ids = [int(label["image_id"]) for label in labels]
        self.results |= coco_results(detections, image_ids, self.evaluated.category_ids)

    def evaluation_metrics(self) -> dict[str, float]:
        """COCO's twelve numbers, and with the prefix `mask_` those of the masks."""
        self.results = dict(gather_results(self.results))

        metrics = coco_metrics(self.results, self.evaluated.ground_truth(), max_detections=self.max_detections)
        if self.masks:
            truth = self.evaluated.ground_truth(masks=True)
            of_masks = coco_metrics(self.results, truth, masks=True, max_detections=self.max_detections)
            metrics |= {f"mask_{name}": value for name, value in of_masks.items()}

        if self.is_world_process_zero():
            found = [result for image in self.results.values() for result in image]
            with self.write_file("predictions.json") as file:
                file.write_text(json.dumps(found))
        return metrics | {"images": len(self.results)}

    def draw_predictions(self) -> None:
        """`predictions.png` in `output_dir`: images of the last evaluation, annotations beside detections."""
        if self.is_world_process_zero():
            picture = draw_detections(self.evaluated, self.results)
            with self.write_file("predictions.png") as file:
                picture.save(file)
