"""Folders as YOLO, Pascal VOC and Roboflow lay them out hold what is drawn here, exactly."""

import json
import os

import pytest
from PIL import Image

from pvt_hf.data.class_names import ClassNameError
from pvt_hf.data.detection_folders import find_layout, read_detection_folder
from pvt_hf.data.images import ImageError
from pvt_hf.models.annotations import AnnotationError

# Of images of 200 x 100 pixels.
NAMES = ["cat", "dog", "emu"]
SPLITS = {
    "train": {"a": [(2, [20, 10, 40, 30]), (0, [100, 50, 100, 50])], "b": []},
    "valid": {"c": [(2, [0, 0, 50, 25])]},
}


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (200, 100)).save(path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_roboflow_coco(folder):
    for split, images in SPLITS.items():
        content = {
            "images": [],
            "annotations": [],
            "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES)],
        }
        for number, (stem, objects) in enumerate(images.items()):
            draw(folder / split / f"{stem}.jpg")
            content["images"].append({"id": number, "file_name": f"{stem}.jpg", "height": 100, "width": 200})
            for label, box in objects:
                annotation = {"id": len(content["annotations"]), "image_id": number, "category_id": label, "bbox": box}
                content["annotations"].append(annotation)
        write(folder / split / "_annotations.coco.json", json.dumps(content))


def yolo_lines(objects):
    return "".join(
        f"{label} {(x + w / 2) / 200} {(y + h / 2) / 100} {w / 200} {h / 100}\n" for label, (x, y, w, h) in objects
    )


def write_yolo(folder, places, data_yaml):
    """`places` are the folders of a split's images and labels."""
    for split, images in SPLITS.items():
        for stem, objects in images.items():
            draw(folder / places[0].format(split) / f"{stem}.png")
            write(folder / places[1].format(split) / f"{stem}.txt", yolo_lines(objects))
    write(folder / ("data.yaml" if ":" in data_yaml else "classes.txt"), data_yaml)


def voc_xml(stem, objects, size="<size><width>200</width><height>100</height><depth>3</depth></size>"):
    return f"<annotation><filename>{stem}.jpg</filename>{size}" + "".join(
        f"<object><name>{NAMES[label]}</name><difficult>{int(label == 0)}</difficult><bndbox><xmin>{x + 1}</xmin>"
        f"<ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
        for label, (x, y, w, h) in objects
    ) + "</annotation>"  # fmt: skip


def write_roboflow_voc(folder):
    for split, images in SPLITS.items():
        for stem, objects in images.items():
            draw(folder / split / f"{stem}.jpg")
            write(folder / split / f"{stem}.xml", voc_xml(stem, objects))


def write_voc_devkit(folder):
    for split, images in SPLITS.items():
        write(folder / "ImageSets" / "Main" / f"{split.removesuffix('id')}.txt", "\n".join(images) + "\n")
        for stem, objects in images.items():
            draw(folder / "JPEGImages" / f"{stem}.jpg")
            write(folder / "Annotations" / f"{stem}.xml", voc_xml(stem, objects, size=""))


ROBOFLOW_YAML = "train: ../train/images\nval: ../valid/images\nnc: 3\nnames: ['cat', 'dog', 'emu']\n"
ULTRALYTICS_YAML = "path: .\ntrain: images/train\nval: [images/valid]\nnames:\n  0: cat\n  1: dog\n  2: emu\n"
LAYOUTS = {
    "coco": write_roboflow_coco,
    "yolo of Roboflow": lambda folder: write_yolo(folder, ("{}/images", "{}/labels"), ROBOFLOW_YAML),
    "yolo of Ultralytics": lambda folder: write_yolo(folder, ("images/{}", "labels/{}"), ULTRALYTICS_YAML),
    "yolo without yaml": lambda folder: write_yolo(folder, ("images/{}", "labels/{}"), "cat\ndog\nemu\n"),
    "voc of Roboflow": write_roboflow_voc,
    "voc devkit": write_voc_devkit,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_objects(layout, tmp_path):
    LAYOUTS[layout](tmp_path)
    is_voc = layout.startswith("voc")
    assert find_layout(tmp_path) == layout.split()[0]
    names = NAMES if not is_voc else ["cat", "emu"]  # those that occur
    train = read_detection_folder(tmp_path, "train")
    validation = read_detection_folder(tmp_path, "validation", train.label_names)
    assert train.label_names == validation.label_names == names
    for data, split in ((train, "train"), (validation, "valid")):
        assert [record.name.split("/")[-1].split(".")[0] for record in data.records] == list(SPLITS[split])
        for record, objects in zip(data.records, SPLITS[split].values(), strict=True):
            assert record.size == (100, 200)
            assert [names[entry["category_id"]] for entry in record.annotations] == [
                NAMES[label] for label, _ in objects
            ]
            for entry, (label, box) in zip(record.annotations, objects, strict=True):
                assert entry["bbox"] == pytest.approx(box, abs=1e-12)
                assert not is_voc or entry["iscrowd"] == entry["ignore"] == (label == 0)
        assert data.check_images(split) is data and data.image(0).shape == (3, 100, 200)


def test_yolo_may_be_named_by_its_yaml(tmp_path):
    LAYOUTS["yolo of Ultralytics"](tmp_path)
    (tmp_path / "data.yaml").rename(tmp_path / "mine.yml")
    assert find_layout(tmp_path / "mine.yml") == "yolo" and find_layout(tmp_path / "missing.yml") is None
    data = read_detection_folder(tmp_path / "mine.yml", "train")
    assert data.label_names == NAMES and len(data) == 2 and len(data.records[0].annotations) == 2


def test_names_of_voc_files_may_have_blanks(tmp_path):
    LAYOUTS["voc devkit"](tmp_path)
    for folder in ("Annotations", "JPEGImages"):
        for file in (tmp_path / folder).glob("a.*"):
            file.rename(file.with_stem("an image"))
    write(tmp_path / "ImageSets" / "Main" / "train.txt", "an image \nb\n")
    assert [record.name for record in read_detection_folder(tmp_path, "train").records] == ["an image.jpg", "b.jpg"]


def test_polygons_of_yolo_are_masks(tmp_path):
    LAYOUTS["yolo of Roboflow"](tmp_path)
    write(tmp_path / "train" / "labels" / "a.txt", "1 0.1 0.2 0.3 0.2 0.3 0.6\n\n2 0.5 0.5 0.1 0.1\n")
    polygon, box = read_detection_folder(tmp_path, "train").records[0].annotations
    assert polygon["bbox"] == pytest.approx([20, 20, 40, 40]) and polygon["category_id"] == 1
    assert polygon["segmentation"] == [pytest.approx([20, 20, 60, 20, 60, 60])] and "segmentation" not in box


def replace_text(name, old, new):
    def change(folder):
        file = folder / name
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return change


def replace_by_pipe(file):
    file.unlink()
    os.mkfifo(file)


TXT, XML = "train/labels/a.txt", "train/a.xml"
BAD = {
    "word": ("yolo of Roboflow", replace_text(TXT, "2 ", "emu "), "a.txt, line 1 must have numbers only, got 'emu"),
    "class": ("yolo of Roboflow", replace_text(TXT, "0 0.75", "3 0.75"), "a.txt, line 2 has the class 3, the classes"),
    "confidence": ("yolo of Roboflow", replace_text(TXT, "\n", " 0.9\n"), "line 1 has 6 numbers, it must have 5"),
    "pixels": ("yolo of Roboflow", lambda f: write(f / TXT, "0 40 25 40 30"), "They look like `coco`"),
    "nan": ("yolo of Roboflow", replace_text(TXT, "0.3\n", "nan\n"), "line 1 has numbers that are not finite: .*nan"),
    "names": ("yolo of Roboflow", replace_text("data.yaml", "'dog'", "'cat'"), "data.yaml has class names twice"),
    "pose": ("yolo of Roboflow", lambda f: write(f / "data.yaml", ROBOFLOW_YAML + "kpt_shape: [3, 2]"), "is of poses"),
    "yaml": ("yolo of Roboflow", lambda f: write(f / "data.yaml", "names: ["), "data.yaml cannot be read"),
    "no split": ("yolo of Roboflow", replace_text("data.yaml", "../train/", "nowhere/"), "has none of .*nowhere/im"),
    "outside": ("yolo of Roboflow", replace_text("data.yaml", "../train/images", ".."), "is outside of .*--allow_"),
    "no labels": ("yolo of Roboflow", lambda f: (f / "train/labels").rename(f / "gone"), "None of 2 images has labels"),
    "no names": ("yolo of Roboflow", replace_text("data.yaml", "names", "classes"), "neither data.yaml with `names` n"),
    "count": ("yolo of Roboflow", replace_text("data.yaml", "nc: 3", "nc: 2"), "says `nc` 2, but there are 3 names"),
    "corrupt": ("yolo of Roboflow", lambda f: write(f / "train/images/a.png", "x"), "(?s)1 of 2 images.*a.png cannot"),
    "xml": ("voc of Roboflow", replace_text(XML, "</annotation>", ""), "a.xml cannot be read"),
    "corner": ("voc of Roboflow", replace_text(XML, "<ymin>11<", "<ymin>top<"), "a.xml: <object> has <bndbox/ymin> 't"),
    "no corner": ("voc of Roboflow", replace_text(XML, "<ymin>11</ymin>", ""), "a.xml: <object> has no <bndbox/ymin>"),
    "no name": ("voc of Roboflow", replace_text(XML, "<name>emu</name>", ""), "a.xml: <object> has no <name>"),
    "size": ("voc of Roboflow", replace_text(XML, "<height>100", "<height>-3"), "must be positive integers"),
    "no set": ("voc devkit", lambda f: (f / "ImageSets/Main/train.txt").unlink(), "ImageSets/Main/train.txt"),
    "no xml": ("voc devkit", lambda f: (f / "Annotations/a.xml").unlink(), "1 of 2 xml files are missing: .*a.xml"),
    "waits": ("yolo of Roboflow", lambda f: replace_by_pipe(f / TXT), "a.txt is no regular file"),
    "yaml waits": ("yolo of Roboflow", lambda f: replace_by_pipe(f / "data.yaml"), "data.yaml is no regular file"),
    "xml waits": ("voc of Roboflow", lambda f: replace_by_pipe(f / XML), "a.xml is no regular file"),
    "json waits": ("coco", lambda f: replace_by_pipe(f / "train/_annotations.coco.json"), "json is no regular file"),
    "image waits": ("yolo of Roboflow", lambda f: replace_by_pipe(f / "train/images/a.png"), "it is no regular file"),
    "references": ("yolo of Roboflow", replace_text("data.yaml", "train: ", "a: &a [x]\ntrain: [*a] # "), "references"),
    "long name": ("yolo of Roboflow", replace_text("data.yaml", "../train", "x" * 5000), "has none of"),
    "out of set": ("voc devkit", replace_text("ImageSets/Main/train.txt", "a", "../a"), "files outside of .*'../a'"),
    "nothing": ("coco", lambda f: (f / "train/_annotations.coco.json").unlink(), "has none of .*_annotations.coco"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_used_is_an_error_that_says_where(case, tmp_path):
    layout, change, message = BAD[case]
    LAYOUTS[layout](tmp_path)
    change(tmp_path)
    with pytest.raises((AnnotationError, ClassNameError, ImageError), match=message):
        read_detection_folder(tmp_path, "train")


def test_other_classes_and_folders_are_an_error(tmp_path):
    write_roboflow_voc(tmp_path / "voc")
    with pytest.raises(AnnotationError, match=r"a\.xml: an object is a 'emu', the classes are \['cat', 'dog'\]"):
        read_detection_folder(tmp_path / "voc", "train", ["cat", "dog"])
    draw(tmp_path / "others" / "cat" / "a.png")
    assert find_layout(tmp_path / "others") is None and find_layout(tmp_path / "missing") is None
    with pytest.raises(AnnotationError, match="has none of the known layouts"):
        read_detection_folder(tmp_path / "others", "train")


def test_corrupt_images_are_left_out(tmp_path):
    LAYOUTS["yolo of Roboflow"](tmp_path)
    (tmp_path / "train" / "images" / "a.png").write_text("x")
    data = read_detection_folder(tmp_path, "train", skip_corrupt=True)
    assert [record.name for record in data.records] == ["train/images/b.png"] and "a.png" in data.left_out[0]
