"""What transformers' example programs ask of a checkpoint: what they read from its image processor, how they call it,
what they hand to `Trainer` or to accelerate, and how they evaluate what comes out. On the bundled data."""

import json
from functools import partial

import albumentations as A
import numpy as np
import torch
from accelerate import Accelerator
from albumentations.pytorch import ToTensorV2
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.detection.mean_ap import MeanAveragePrecision
from torchvision import transforms
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForObjectDetection,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.image_transforms import center_to_corners_format
from transformers.utils import ModelOutput

from pvt_hf.data.digits import CLASSES, load_digits_dataset
from pvt_hf.evaluation.metrics import mean_iou_metric
from pvt_hf.models.annotations import read_objects

HUB = {"cache_dir": None, "revision": "main", "token": None, "trust_remote_code": False}


def read_size(image_processor):
    """Height and width, as the programs read them."""
    size = image_processor.size
    names = ("shortest_edge", "shortest_edge") if "shortest_edge" in size else ("height", "width")
    return tuple(size[name] for name in names)


class Classification:
    """run_image_classification: torchvision's transforms at the processor's size."""

    arguments = {"remove_unused_columns": False}

    def __init__(self, folder, images=64):
        data = load_digits_dataset().shuffle(seed=0)
        names = data.features["label"].names
        config = AutoConfig.from_pretrained(
            folder,
            num_labels=len(names),
            label2id={name: str(index) for index, name in enumerate(names)},
            id2label={str(index): name for index, name in enumerate(names)},
            finetuning_task="image-classification",
            **HUB,
        )
        self.model = AutoModelForImageClassification.from_pretrained(
            folder, config=config, ignore_mismatched_sizes=True, **HUB
        )
        self.image_processor = AutoImageProcessor.from_pretrained(folder, **HUB)
        size = read_size(self.image_processor)
        size = size if "height" in self.image_processor.size else size[0]
        tail = [
            transforms.ToTensor(),
            transforms.Normalize(mean=self.image_processor.image_mean, std=self.image_processor.image_std),
        ]
        augment = transforms.Compose([transforms.RandomResizedCrop(size, scale=(0.7, 1)), *tail])
        prepare = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), *tail])
        train, validation = data.select(range(images)), data.select(range(images, 2 * images))
        self.train = train.with_transform(partial(self.transform, augment))
        self.validation = validation.with_transform(partial(self.transform, prepare))
        self.right = []

    @staticmethod
    def transform(transform, examples):
        examples["pixel_values"] = [transform(image.convert("RGB")) for image in examples["image"]]
        return examples

    def collate(self, examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixel_values, "labels": torch.tensor([example["label"] for example in examples])}

    def compute_metrics(self, evaluation):
        return {"accuracy": float((np.argmax(evaluation.predictions, axis=1) == evaluation.label_ids).mean())}

    def add_batch(self, outputs, batch):
        self.right += (outputs.logits.argmax(dim=-1) == batch["labels"]).tolist()

    def compute(self):
        return {"accuracy": sum(self.right) / len(self.right)}


def load_scenes(folder):
    """The scenes as a data set of the Hub's form for detection."""
    records = json.loads((folder / "annotations.json").read_text())
    rows = []
    for image in records["images"]:
        found = [entry for entry in records["annotations"] if entry["image_id"] == image["id"]]
        objects = {"id": [entry["id"] for entry in found], "area": [float(entry["area"]) for entry in found]}
        objects |= {"bbox": [list(map(float, entry["bbox"])) for entry in found]}
        objects |= {"category": [entry["category_id"] - 1 for entry in found]}
        rows.append({"image_id": image["id"], "image": str(folder / "images" / image["file_name"]), "objects": objects})
    objects = {"id": List(Value("int64")), "area": List(Value("float32")), "bbox": List(List(Value("float32")))}
    objects["category"] = List(ClassLabel(names=list(CLASSES)))
    features = Features({"image_id": Value("int64"), "image": ImageFeature(), "objects": objects})
    return Dataset.from_list(rows, features=features)


def split_by_class(metrics, id2label):
    """torchmetrics' numbers of each class under its name, as the programs report them."""
    classes = metrics.pop("classes").reshape(-1).tolist()
    for name in ("map", "mar_100"):
        if f"{name}_per_class" not in metrics:  # nothing was found in any image
            continue
        values = metrics.pop(f"{name}_per_class").reshape(-1).tolist()
        metrics |= {f"{name}_{id2label[label]}": value for label, value in zip(classes, values, strict=True)}
    return {name: round(float(value), 4) for name, value in metrics.items()}


class Detection:
    """run_object_detection: albumentations, a square of a fixed size, and COCO's numbers by torchmetrics."""

    arguments = {"remove_unused_columns": False, "eval_do_concat_batches": False}

    def __init__(self, folder, scenes, side=128):
        train, validation = (load_scenes(scenes / split) for split in ("train", "validation"))
        self.id2label = dict(enumerate(train.features["objects"]["category"].feature.names))
        label2id = {name: label for label, name in self.id2label.items()}
        config = AutoConfig.from_pretrained(folder, label2id=label2id, id2label=self.id2label, **HUB)
        self.model = AutoModelForObjectDetection.from_pretrained(
            folder, config=config, ignore_mismatched_sizes=True, **HUB
        )
        self.image_processor = AutoImageProcessor.from_pretrained(
            folder,
            do_resize=True,
            size={"max_height": side, "max_width": side},
            do_pad=True,
            pad_size={"height": side, "width": side},
            use_fast=True,
            **HUB,
        )
        boxes = A.BboxParams(format="coco", label_fields=["category"], clip=True, min_area=25)
        augment = A.Compose(
            [
                A.Compose([A.SmallestMaxSize(side), A.RandomSizedBBoxSafeCrop(side, side)], p=0.2),
                A.Perspective(p=0.1),
                A.RandomBrightnessContrast(p=0.5),
            ],
            bbox_params=boxes,
            seed=0,
        )
        keep = A.Compose([A.NoOp()], bbox_params=A.BboxParams(format="coco", label_fields=["category"], clip=True))
        self.train = train.with_transform(partial(self.transform, self.image_processor, augment))
        self.validation = validation.with_transform(partial(self.transform, self.image_processor, keep))
        self.metric = MeanAveragePrecision(box_format="xyxy", class_metrics=True)

    @staticmethod
    def transform(image_processor, transform, examples):
        images, annotations = [], []
        for image_id, image, objects in zip(examples["image_id"], examples["image"], examples["objects"], strict=True):
            output = transform(
                image=np.array(image.convert("RGB")), bboxes=objects["bbox"], category=objects["category"]
            )
            images.append(output["image"])
            # Boxes that an augmentation removed leave more areas than boxes.
            entries = zip(output["category"], objects["area"], output["bboxes"], strict=False)
            annotations.append(
                {
                    "image_id": image_id,
                    "annotations": [
                        {"image_id": image_id, "category_id": label, "iscrowd": 0, "area": area, "bbox": list(box)}
                        for label, area, box in entries
                    ],
                }
            )
        result = image_processor(images=images, annotations=annotations, return_tensors="pt")
        result.pop("pixel_mask", None)  # since all images are padded to one square
        return result

    def collate(self, examples):
        pixel_values = torch.stack([example["pixel_values"] for example in examples])
        return {"pixel_values": pixel_values, "labels": [example["labels"] for example in examples]}

    def add(self, outputs, labels):
        sizes = torch.stack([torch.as_tensor(label["orig_size"]) for label in labels])
        predictions = self.image_processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        targets = []
        for label, (height, width) in zip(labels, sizes.tolist(), strict=True):
            boxes = center_to_corners_format(torch.as_tensor(label["boxes"]))
            boxes = boxes * torch.tensor([[width, height, width, height]])
            targets.append({"boxes": boxes, "labels": torch.as_tensor(label["class_labels"])})
        self.metric.update(predictions, targets)

    def compute_metrics(self, evaluation):
        """`Trainer` hands over a list of batches: tuples of arrays without the loss."""
        self.metric.reset()
        for batch, labels in zip(evaluation.predictions, evaluation.label_ids, strict=True):
            self.add(ModelOutput(logits=torch.tensor(batch[1]), pred_boxes=torch.tensor(batch[2])), labels)
        return self.compute()

    def add_batch(self, outputs, batch):
        self.add(outputs, batch["labels"])

    def compute(self):
        return split_by_class(self.metric.compute(), self.id2label)


class SemanticSegmentation:
    """run_semantic_segmentation: crops by albumentations at the processor's size, and the mean IoU."""

    arguments = {"remove_unused_columns": False}

    def __init__(self, folder, scenes):
        self.id2label = {0: "background"} | {index + 1: name for index, name in enumerate(CLASSES)}
        label2id = {name: str(label) for label, name in self.id2label.items()}
        config = AutoConfig.from_pretrained(folder, label2id=label2id, id2label=self.id2label, **HUB)
        self.model = AutoModelForSemanticSegmentation.from_pretrained(
            folder, config=config, ignore_mismatched_sizes=True, **HUB
        )
        self.image_processor = AutoImageProcessor.from_pretrained(folder, do_reduce_labels=False, **HUB)
        height, width = read_size(self.image_processor)
        mean, std = self.image_processor.image_mean, self.image_processor.image_std
        tail = [A.Normalize(mean=mean, std=std, max_pixel_value=255.0), ToTensorV2()]
        pad = A.PadIfNeeded(height, width, border_mode=0, fill=255, fill_mask=255)
        augment = A.Compose([pad, A.RandomCrop(height, width), *tail], seed=0)
        prepare = A.Compose([A.Resize(height, width), *tail])
        self.train = self.load(scenes / "train").with_transform(partial(self.transform, augment))
        self.validation = self.load(scenes / "validation").with_transform(partial(self.transform, prepare))
        self.metric = mean_iou_metric(num_labels=len(self.id2label))

    def load(self, folder):
        names = sorted(path.name for path in (folder / "images").iterdir())
        columns = {column: [str(folder / room / name) for name in names] for column, room in
                   (("image", "images"), ("label", "maps"))}  # fmt: skip
        return Dataset.from_dict(columns, features=Features({"image": ImageFeature(), "label": ImageFeature()}))

    @staticmethod
    def transform(transform, examples):
        pixel_values, labels = [], []
        for image, label in zip(examples["image"], examples["label"], strict=True):
            output = transform(image=np.array(image.convert("RGB")), mask=np.array(label))
            pixel_values.append(output["image"])
            labels.append(output["mask"])
        return {"pixel_values": torch.stack(pixel_values).float(), "labels": torch.stack(labels).long()}

    collate = staticmethod(default_data_collator)

    def segment(self, logits, size):
        return nn.functional.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(dim=1)

    def compute_metrics(self, evaluation):
        logits, labels = evaluation
        predictions = self.segment(torch.from_numpy(logits), labels.shape[-2:])
        self.metric.add_batch(predictions=predictions.numpy(), references=labels)
        return self.compute()

    def add_batch(self, outputs, batch):
        predictions = self.segment(outputs.logits, batch["labels"].shape[-2:])
        self.metric.add_batch(predictions=predictions, references=batch["labels"])

    def compute(self):
        metrics = self.metric.compute(
            num_labels=len(self.id2label), ignore_index=255, reduce_labels=self.image_processor.do_reduce_labels
        )
        for name, key in (("per_category_accuracy", "accuracy"), ("per_category_iou", "iou")):
            values = metrics.pop(name).tolist()
            metrics |= {f"{key}_{self.id2label[label]}": value for label, value in enumerate(values)}
        return {name: float(value) for name, value in metrics.items()}


class InstanceSegmentation:
    """run_instance_segmentation with Mask2Former: maps of classes and instances in an image, and torchmetrics."""

    arguments = {"remove_unused_columns": False, "eval_do_concat_batches": False, "batch_eval_metrics": True}

    def __init__(self, folder, scenes, side=64):
        self.id2label = dict(enumerate(CLASSES))
        self.model = AutoModelForUniversalSegmentation.from_pretrained(
            folder,
            label2id={name: label for label, name in self.id2label.items()},
            id2label=self.id2label,
            ignore_mismatched_sizes=True,
            token=None,
        )
        self.image_processor = AutoImageProcessor.from_pretrained(
            folder, do_resize=True, size={"height": side, "width": side}, do_reduce_labels=True, token=None
        )
        augment, keep = A.Compose([A.RandomBrightnessContrast(p=0.5)], seed=0), A.Compose([A.NoOp()])
        self.train = self.load(scenes / "train").with_transform(partial(self.transform, self.image_processor, augment))
        self.validation = self.load(scenes / "validation").with_transform(
            partial(self.transform, self.image_processor, keep)
        )
        self.metric = MeanAveragePrecision(iou_type="segm", class_metrics=True)

    def load(self, folder):
        """An annotation has the label map in its first channel (0 is background), numbers of objects in its second."""
        records, rows = json.loads((folder / "annotations.json").read_text()), []
        for image in records["images"]:
            found = [entry for entry in records["annotations"] if entry["image_id"] == image["id"]]
            size = image["height"], image["width"]
            masks = read_objects({"image_id": image["id"], "annotations": found}, size, True).masks
            maps = np.zeros((*size, 3), dtype=np.uint8)
            for number, (mask, entry) in enumerate(zip(masks.numpy(), found, strict=True), start=1):
                maps[mask] = entry["category_id"], number, 0
            rows.append((str(folder / "images" / image["file_name"]), Image.fromarray(maps)))
        images, annotations = zip(*rows, strict=True)
        features = Features({"image": ImageFeature(), "annotation": ImageFeature()})
        return Dataset.from_dict({"image": images, "annotation": annotations}, features=features)

    @staticmethod
    def transform(image_processor, transform, examples):
        batch = {"pixel_values": [], "mask_labels": [], "class_labels": []}
        for image, annotation in zip(examples["image"], examples["annotation"], strict=True):
            output = transform(image=np.array(image.convert("RGB")), mask=np.array(annotation)[..., :2])
            pairs = np.unique(output["mask"].reshape(-1, 2), axis=0)
            inputs = image_processor(
                images=[output["image"]],
                segmentation_maps=[output["mask"][..., 1]],
                instance_id_to_semantic_id={instance: label for label, instance in pairs},
                return_tensors="pt",
            )
            for name, values in batch.items():
                values.append(inputs[name][0])
        return batch

    def collate(self, examples):
        batch = {name: [example[name] for example in examples] for name in ("class_labels", "mask_labels")}
        return batch | {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}

    def add(self, outputs, masks, labels):
        sizes = [tuple(mask.shape[-2:]) for mask in masks]
        found = self.image_processor.post_process_instance_segmentation(
            outputs, threshold=0.0, target_sizes=sizes, return_binary_maps=True
        )
        predictions = []
        for image, size in zip(found, sizes, strict=True):
            segments = image["segments_info"]
            maps = image["segmentation"].bool() if segments else torch.zeros(0, *size, dtype=torch.bool)
            prediction = {"masks": maps, "labels": torch.tensor([segment["label_id"] for segment in segments]).long()}
            predictions.append(prediction | {"scores": torch.tensor([segment["score"] for segment in segments])})
        targets = [{"masks": mask.bool(), "labels": label} for mask, label in zip(masks, labels, strict=True)]
        self.metric.update(predictions, targets)

    def compute_metrics(self, evaluation, compute_result=False):
        predictions, (masks, labels) = evaluation.predictions, evaluation.label_ids
        outputs = ModelOutput(class_queries_logits=predictions[0], masks_queries_logits=predictions[1])
        self.add(outputs, masks, labels)
        return self.compute() if compute_result else None

    def add_batch(self, outputs, batch):
        self.add(outputs, batch["mask_labels"], batch["class_labels"])

    def compute(self):
        metrics = split_by_class(self.metric.compute(), self.id2label)
        self.metric.reset()
        return metrics


def run_with_trainer(program, output_dir, steps=2, batch_size=4, learning_rate=1e-3):
    """The losses of the steps, and the metrics afterwards."""
    set_seed(0)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        learning_rate=learning_rate,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **program.arguments,
    )
    trainer = Trainer(
        model=program.model,
        args=arguments,
        train_dataset=program.train,
        eval_dataset=program.validation,
        processing_class=program.image_processor,
        data_collator=program.collate,
        compute_metrics=program.compute_metrics,
    )
    trainer.train()
    trainer.save_model()
    metrics = trainer.evaluate(metric_key_prefix="test")
    trainer.create_model_card(tags=["vision"])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name.removeprefix("test_"): value for name, value in metrics.items()}


def run_without_trainer(program, output_dir, steps=2, batch_size=4, learning_rate=1e-3):
    """The losses of the steps, and the metrics afterwards."""
    set_seed(0)
    accelerator = Accelerator(cpu=True)
    loader = partial(DataLoader, collate_fn=program.collate, batch_size=batch_size)
    no_decay = ("bias", "LayerNorm.weight")
    decayed, others = [], []
    for name, parameter in program.model.named_parameters():
        (others if any(part in name for part in no_decay) else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    model, optimizer, train, validation = accelerator.prepare(
        program.model, optimizer, loader(program.train, shuffle=True), loader(program.validation)
    )
    losses = []
    while len(losses) < steps:
        model.train()
        for batch in train:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    model.eval()
    for batch in validation:
        with torch.no_grad():
            outputs = model(**batch)
        program.add_batch(accelerator.gather_for_metrics(outputs), accelerator.gather_for_metrics(batch))
    accelerator.save_state(str(output_dir / "state"))
    accelerator.load_state(str(output_dir / "state"))
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(output_dir, is_main_process=accelerator.is_main_process, save_function=accelerator.save)
    program.image_processor.save_pretrained(output_dir)
    return losses, program.compute()
