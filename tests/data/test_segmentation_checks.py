"""Masks of 0 and 255, maps of colours, files of other formats, and what is said of a data set before the first step."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from pvt_hf.data.images import ImageError
from pvt_hf.data.label_maps import read_binary_mask, read_palette
from pvt_hf.data.segmentation import SegmentationData, read_segmentation_dataset, read_segmentation_folders
from pvt_hf.data.segmentation_checks import check_classes, survey_maps

NAMES = ["background", "polyp"]
MASK = np.zeros((40, 56), dtype=np.uint8)
MASK[8:24, 16:40] = 255  # 384 pixels, in blocks of 8 x 8
HINT = r"set `binary_masks` \(`--binary_masks`\)"


def write(folder, maps, ending="png", **options):
    """Images of the maps' sizes, in a folder beside theirs; the folders of both."""
    for index, pixels in enumerate(maps):
        label_map = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        for kind, picture, name in (("images", Image.new("RGB", label_map.size), "jpg"), ("masks", label_map, ending)):
            (folder / kind).mkdir(exist_ok=True)
            picture.save(folder / kind / f"{index}.{name}", **options if kind == "masks" else {})
    return folder / "images", folder / "masks"


def survey(folders, **settings):
    return survey_maps(read_segmentation_folders(*folders, **{"num_labels": 2} | settings), "the training set")[1]


@pytest.mark.parametrize(
    ("mode", "ending"),
    [
        *(("L", ending) for ending in ("png", "bmp", "tif", "jpg")),
        *(("RGB", ending) for ending in ("png", "jpg")),
        *((mode, "png") for mode in ("1", "P", "RGBA", "LA", "I;16")),
    ],
)
def test_masks_of_0_and_255_are_read_from_every_format(mode, ending, tmp_path):
    """Whatever the mode, and as JPEG with values beside 0 and 255."""
    given = Image.fromarray(MASK.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(MASK).convert(mode)
    folders = write(tmp_path, [given], ending, **({"quality": 60} if ending == "jpg" else {}))
    _, labels = read_segmentation_folders(*folders, num_labels=2, binary_masks=True).read(0)
    wrong = (labels.numpy() != (MASK > 0)).sum()
    assert labels.dtype == torch.int64 and wrong <= (20 if ending == "jpg" else 0)
    found = survey(folders, binary_masks=True)
    assert found.pixels == [MASK.size - labels.sum(), labels.sum()] and found.maps == [1, 1] and found.ignored == 0
    assert found.sizes == [(40, 56)]


def test_foreground_begins_at_half_of_the_range():
    """Of 8 bits at 128, and of 16 at 32768 where there are such values."""
    for dtype, values, expected in (
        (np.uint8, [0, 7, 127, 128, 248], [0, 0, 0, 1, 1]),
        (np.uint16, [0, 255, 32767, 32768, 65535], [0, 0, 0, 1, 1]),
        (np.uint16, [0, 127, 128, 255], [0, 0, 1, 1]),
    ):
        assert read_binary_mask(Image.fromarray(np.array([values], dtype=dtype)), "a mask").tolist() == [expected]
    with pytest.raises(ValueError, match="a mask has fractions"):
        read_binary_mask(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "a mask")


def test_masks_of_0_and_255_are_not_taken_for_labels(tmp_path):
    """255 would be ignored, and the first class be all that there is."""
    folders = write(tmp_path, [MASK, MASK])
    for reduce_labels in (False, True):
        with pytest.raises(ValueError, match=f"the training set have the values 0 and 255 only.*{HINT}"):
            survey(folders, reduce_labels=reduce_labels)
    Image.fromarray(np.where(MASK > 0, 250, 3).astype(np.uint8)).save(tmp_path / "masks" / "1.png")
    with pytest.raises(ImageError, match=rf"(?s)1 of 2 images .*1\.png of .*1\.jpg has the labels \[3, 250\].*{HINT}"):
        survey(folders)
    labels = np.where(MASK > 0, 1, 0).astype(np.uint8)
    labels[0] = 255
    found = survey(write(tmp_path, [labels, labels]))
    assert found.pixels == [2 * (MASK.size - 56 - 384), 2 * 384] and found.ignored == 2 * 56


def test_jpeg_maps_of_labels_are_refused_whatever_they_are_called(tmp_path):
    folders = write(tmp_path, [MASK], "jpg")
    with pytest.raises(ImageError, match=f"(?s)0.jpg is a JPEG, .* store maps as PNG, TIFF or BMP.*{HINT}"):
        survey(folders)
    (tmp_path / "masks" / "0.jpg").rename(tmp_path / "masks" / "0.png")
    with pytest.raises(ValueError, match=r"0.png of .* is a JPEG"):
        read_segmentation_folders(*folders, palette={(0, 0, 0): 0}).read(0)


def test_other_files_than_maps_are_listed(tmp_path):
    folders = write(tmp_path, [MASK, MASK])
    for path in (tmp_path / "masks").iterdir():
        path.rename(path.with_suffix(".npy"))
    with pytest.raises(ImageError, match=r"(?s)0 maps \(but 2 \.npy\).*Maps must be PNG, TIFF or BMP"):
        read_segmentation_folders(*folders)
    write(tmp_path, [MASK, MASK])
    (tmp_path / "masks" / "._0.png").write_bytes(b"what macOS leaves")
    assert len(read_segmentation_folders(*folders)) == 2
    Image.fromarray(MASK).save(tmp_path / "images" / "1.png")
    with pytest.raises(ImageError, match=r"(?s)1\.jpg and .*1\.png differ in their endings only"):
        read_segmentation_folders(*folders)


def test_classes_that_are_nowhere_are_told_with_all_counts(tmp_path, caplog):
    empty, ignored = np.zeros((40, 56), dtype=np.uint8), np.full((40, 56), 255, dtype=np.uint8)
    for part, maps in (("full", [MASK // 255, empty]), ("empty", [empty]), ("ignored", [ignored])):
        (tmp_path / part).mkdir()
        write(tmp_path / part, maps)
    full, background = (survey((tmp_path / part / "images", tmp_path / part / "masks")) for part in ("full", "empty"))
    counts = r"background 2,240 pixels in 1 maps; polyp 0 pixels in 0 maps; 0 pixels are ignored"
    with pytest.raises(ValueError, match=rf"training set has the classes \['polyp'\]: {counts}"):
        check_classes(background, full, NAMES)
    check_classes(full, full, NAMES, allow_missing=True)
    assert not caplog.records
    check_classes(background, full, NAMES, allow_missing=True)
    assert "No label map of the training set has the classes ['polyp']: background 2,240 pixels" in caplog.text
    with pytest.raises(ValueError, match=r"the classes \['background', 'polyp'\]"):
        check_classes(replace(full, pixels=[0, 0], maps=[0, 0]), full, NAMES, allow_missing=True)
    of_ones = survey((tmp_path / "full" / "images", tmp_path / "full" / "masks"), binary_masks=True)
    with pytest.raises(ValueError, match="masks of 0 and 1 are labels as they are, without `binary_masks`"):
        check_classes(of_ones, full, NAMES)
    check_classes(full, background, NAMES)
    assert "No label map of the validation set has the classes ['polyp']" in caplog.text
    nothing = replace(full, pixels=[0, 0], maps=[0, 0])
    with pytest.raises(ValueError, match=r"validation set has no pixel of any class: background 0 pixels in 0 maps"):
        check_classes(full, nothing, NAMES)
    assert survey((tmp_path / "ignored" / "images", tmp_path / "ignored" / "masks"), num_labels=1).ignored == 2240


def test_every_unusable_file_of_a_split_is_found_at_once(tmp_path, caplog):
    """Missing, corrupt and of another size; those that cannot be read may be skipped."""
    folders = write(tmp_path, [MASK // 255] * 6)
    data = read_segmentation_folders(*folders, num_labels=2)
    (tmp_path / "images" / "0.jpg").unlink()
    (tmp_path / "images" / "1.jpg").write_bytes(b"no image")
    (tmp_path / "masks" / "2.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"(?s)3 of 6 images of the validation set cannot be used:.*0\.jpg.*1\.jpg"):
        survey_maps(data, "the validation set")
    left, found = survey_maps(data, "the validation set", skip_corrupt=True)
    assert (
        len(left) == 3
        and found.maps == [3, 3]
        and len(found.left_out) == 3
        and "3 of 6 images" in caplog.text
        and "2.png" in caplog.text
    )
    Image.fromarray(MASK[:-1] // 255).save(tmp_path / "masks" / "4.png")
    with pytest.raises(
        ImageError, match=r"(?s)4\.png of .*4\.jpg has \(height, width\) \[39, 56\], the image \[40, 56\]"
    ):
        survey_maps(data, "the validation set", skip_corrupt=True)


def test_truncated_images_are_left_out_where_corrupt_ones_are(tmp_path):
    """Of both kinds of data, so that no evaluation ends at one; and rows without a map."""
    folders = write(tmp_path, [MASK // 255] * 3)
    file = tmp_path / "images" / "1.jpg"
    Image.effect_noise((56, 40), 90).save(file)
    file.write_bytes(file.read_bytes()[:-200])
    images, maps = (sorted(map(str, folder.iterdir())) for folder in folders)
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": images, "mask": [*maps[:2], None]}, features=features)
    for data, problems in (
        (read_segmentation_folders(*folders, num_labels=2), ["1.jpg cannot be read"]),
        (read_segmentation_dataset(rows, num_labels=2), ["1.jpg cannot be read", "2.jpg is missing"]),
    ):
        left, found = survey_maps(data, "the validation set", skip_corrupt=True)
        assert len(left) == 3 - len(problems) and len(found.left_out) == len(problems)
        assert all(problem in text for problem, text in zip(problems, found.left_out, strict=True))
    assert len(survey_maps(read_segmentation_folders(*folders, num_labels=2), "the validation set")[0]) == 3


def test_survey_of_a_data_set_of_the_hub_is_that_of_the_folders(tmp_path):
    folders = write(tmp_path, [MASK, np.zeros_like(MASK)])
    rows = {name: sorted(map(str, folder.iterdir())) for name, folder in zip(("image", "mask"), folders, strict=True)}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(dict.fromkeys(rows, datasets.Image())))
    for stored in (table, table.map(lambda row: row)):  # by path, and with the bytes
        data = read_segmentation_dataset(stored, num_labels=2, binary_masks=True)
        assert survey_maps(data, "the training set")[1] == survey(folders, binary_masks=True)


@pytest.mark.parametrize(
    "content",
    [
        [[0, 0, 0], [128, 64, 0], [1, 2, 3]],
        {"a": "#000000", "b": "128,64,0", "c": [1, 2, 3]},
        {"0,0,0": 0, "#804000": 1, "1, 2, 3": "c", "255,255,255": 255},
        "name,r,g,b\na,0,0,0\nb,128,64,0\nc,1,2,3\n",
        "\ufeffB, R, G, Name\r\n0, 0, 0, a\r\n0, 128, 64, 1\r\n\r\n3, 1, 2, c\r\n7, 7, 7, 255\r\n",
        "c,1,2,3\nb,128,64,0\na,0,0,0",
    ],
)
def test_palettes_in_every_form(content, tmp_path):
    """Colours are labels, and one that is not in the palette is an error before the first step."""
    file = tmp_path / ("colors.csv" if isinstance(content, str) else "colors.json")
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    palette = read_palette(file, ["a", "b", "c"])
    assert {(0, 0, 0): 0, (128, 64, 0): 1, (1, 2, 3): 2}.items() <= palette.items()
    assert len(palette) == (4 if "255" in file.read_text() else 3)
    labels = np.random.default_rng(0).integers(0, 3, (40, 56))
    colors = np.array([[0, 0, 0], [128, 64, 0], [1, 2, 3]], dtype=np.uint8)[labels]
    folders = write(tmp_path, [colors, Image.fromarray(colors).quantize(8)])
    for index in range(2):
        _, found = read_segmentation_folders(*folders, num_labels=3, palette=palette).read(index)
        np.testing.assert_array_equal(found.numpy(), labels)
    found = survey(folders, num_labels=3, palette=palette)
    assert found.pixels == (2 * np.bincount(labels.ravel())).tolist()
    colors[3, 4] = 9
    write(tmp_path, [colors])
    with pytest.raises(
        ImageError, match=r"0\.png of .* has 1 colours that are not in the palette, such as \[9, 9, 9\]"
    ):
        survey(folders, num_labels=3, palette=palette)
    with pytest.raises(ImageError, match=r"(?s)mode 'RGB'.*`palette` \(`--palette`\).*" + HINT):
        survey(folders, num_labels=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([[0, 0, 0], [0, 0, 0]], r"the colour \[0, 0, 0\] twice"),
        ([[0, 0]], r"\[0, 0\] where a colour should be"),
        ([[0, 0, 256]], r"\[0, 0, 256\] where a colour should be"),
        ({"sky": [0, 0, 0]}, "'sky' where a colour should be, .* or the name of a class"),
        ({"0,0,0": "sky"}, r"the class 'sky'; the classes are \['background', 'polyp'\]"),
        ({"0,0,0": 2}, "the class 2; the classes are"),
        ([], "is empty"),
        (3, "must be a list or an object, got int"),
        ("name,r,g\npolyp,0,0\n", r"must have the columns name, r, g, b, got the row \['name', 'r', 'g'\]"),
        ("class,red,green,blue\npolyp,0,0,0\n", "'red,green,blue' where a colour should be"),
        ("polyp,0,0,256", r"\[0, 0, 256\] where a colour should be"),
        ("sky,0,0,0", "the class 'sky'; the classes are"),
        ("name,r,g,b\n", "is empty"),
        ("", "is empty"),
        ('"polyp,0,0,0', "cannot be read"),
    ],
)
def test_palette_that_is_none_is_an_error(content, message, tmp_path):
    file = tmp_path / ("colors.csv" if isinstance(content, str) else "colors.json")
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=rf"The palette .*{file.name} .*{message}"):
        read_palette(file, NAMES)
    with pytest.raises(ValueError, match="cannot be read"):
        read_palette(tmp_path / "none.json", NAMES)


def test_names_of_digits_in_csv_are_names_before_they_are_labels(tmp_path):
    (tmp_path / "colors.csv").write_text("1,9,9,9\n0,8,8,8\n")
    assert read_palette(tmp_path / "colors.csv", ["1", "x"]) == {(9, 9, 9): 0, (8, 8, 8): 0}
    assert read_palette(tmp_path / "colors.csv", ["x", "y"]) == {(9, 9, 9): 1, (8, 8, 8): 0}


def test_settings_that_contradict_each_other_are_an_error():
    with pytest.raises(ValueError, match="`binary_masks` are of two classes, `num_labels` is 3"):
        SegmentationData([], num_labels=3, binary_masks=True)
    with pytest.raises(ValueError, match="Only one of `binary_masks`, `reduce_labels` and `palette`"):
        SegmentationData([], reduce_labels=True, binary_masks=True)


def test_part_of_the_training_set_is_the_validation_set(tmp_path):
    """By the seed, no image in both; of folders and of a data set of the Hub."""
    data = read_segmentation_folders(*write(tmp_path, [MASK] * 10), num_labels=2, binary_masks=True)
    train, validation = data.split(0.2, seed=1)
    names = [{part.name(index) for index in range(len(part))} for part in (train, validation, data)]
    assert len(validation) == 2 and not names[0] & names[1] and names[0] | names[1] == names[2]
    assert data.split(0.2, seed=1)[1] == validation and data.split(0.2, seed=2)[1] != validation
    assert validation.binary_masks and len(data.split(0.01, seed=1)[1]) == 1
    rows = datasets.Dataset.from_list([dict(row) for row in data.rows])
    assert [row["image"]["path"] for row in replace(data, rows=rows).split(0.2, seed=1)[1].rows] == [
        row["image"]["path"] for row in validation.rows
    ]
    for share in (0, 1, 0.99):
        with pytest.raises(ValueError, match="of 10 images leaves none of them"):
            data.split(share, seed=1)


def test_turned_image_goes_with_a_map_of_either_size(tmp_path):
    """As the readers do: turned as EXIF says, unless the map has the size of the stored pixels."""
    folders = write(tmp_path, [MASK // 255, MASK.T // 255])
    exif = Image.Exif()
    exif[0x0112] = 6
    for index in range(2):
        Image.new("RGB", (56, 40)).save(tmp_path / "images" / f"{index}.jpg", exif=exif)
    assert sorted(survey(folders).sizes) == [(40, 56), (56, 40)]
    assert all(read_segmentation_folders(*folders).read(index)[0].shape[1:] for index in range(2))
