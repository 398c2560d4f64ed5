"""Videos: their frames in order, by number and time, what is found in them, and what is wrong with broken ones."""

import json
import os
import struct
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from pvt_hf.commands.main import main
from pvt_hf.data.images import ImageError
from pvt_hf.prediction import videos
from pvt_hf.prediction.run import predict, predict_to_folder
from pvt_hf.prediction.videos import count_frames, read_frames, write_video
from tests.support.predictors import build_predictor
from tests.support.videos import draw_frame, find_number, spoil_packet, write_audio, write_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("videos") / "clip.mp4")


@pytest.fixture(scope="module")
def classifier():
    """Names of its classes have different lengths."""
    predictor = build_predictor("v2", top_k=2)
    predictor.model.config.id2label = {label: "name " * 2**label for label in range(5)}
    return predictor


def read_json(file):
    return json.loads(file.read_text())


def read_all(file):
    """The frames of a video that was written, and its rate."""
    with av.open(str(file)) as container:
        rate = container.streams.video[0].average_rate
        return [frame.to_image() for frame in container.decode(video=0)], rate


@pytest.mark.parametrize(
    ("ending", "codec"),
    [("mp4", "libx264"), ("ts", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"), ("mpg", "mpeg2video")],
)
def test_frames_come_in_the_order_in_which_they_are_shown(tmp_path, ending, codec):
    """Of H.264 they are stored in another one; times of a transport stream do not begin with 0."""
    file = str(write_clip(tmp_path / f"clip.{ending}", codec=codec))
    assert count_frames(file) == 8
    for interval in (1, 3):
        found = list(read_frames(file, interval))
        assert [frame.number for frame, _ in found] == list(range(0, 8, interval))
        assert [frame.time for frame, _ in found] == pytest.approx([number / 25 for number in range(0, 8, interval)])
        assert [find_number(image) for _, image in found] == list(range(0, 8, interval))
        assert {(frame.rate, image.mode, image.size) for frame, image in found} == {(25, "RGB", (64, 48))}


@pytest.mark.parametrize(
    ("matrix", "corner"),  # of the container, and the (row, column) where the upper left corner is seen
    [((0, 1, -1, 0), (0, -1)), ((-1, 0, 0, -1), (-1, -1)), ((0, -1, 1, 0), (-1, 0)), ((-1, 0, 0, 1), (0, -1)),
     ((1, 0, 0, -1), (-1, 0)), ((0, 1, 1, 0), (0, 0)), ((0, -1, -1, 0), (-1, -1))],
)  # fmt: skip
def test_frames_are_turned_as_the_container_says(clip, tmp_path, matrix, corner):
    a, b, c, d = (number * 2**16 for number in matrix)
    content = bytearray(clip.read_bytes())
    place = content.index(struct.pack(">4i", 2**16, 0, 0, 0), content.index(b"tkhd"))
    content[place : place + 20] = struct.pack(">5i", a, b, 0, c, d)
    (tmp_path / "turned.mp4").write_bytes(content)
    (_, image), *_ = read_frames(str(tmp_path / "turned.mp4"))
    assert image.size == ((48, 64) if matrix[0] == 0 else (64, 48))
    pixels = np.array(image, dtype=int)
    blue = {(row, column) for row in (0, -1) for column in (0, -1) if pixels[row, column, 2] > 200}
    assert blue == {corner}


def test_colours_are_those_of_the_picture(tmp_path):
    """By the rule that the file says: BT.709, where red by another rule would be (184, 9, 59)."""
    with write_video(tmp_path / "clip.mp4", Fraction(25)) as add:
        add(Image.new("RGB", (64, 48), (200, 30, 60)), 0)
    ((_, image),) = read_frames(str(tmp_path / "clip.mp4"))
    np.testing.assert_allclose(np.array(image)[24, 32], (200, 30, 60), atol=3)


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_pictures_of_other_sizes_get_the_size_of_the_first(tmp_path, monkeypatch, codec):
    monkeypatch.setattr(videos, "_CODECS", (codec,))
    with write_video(tmp_path / "clip.mp4", Fraction(30000, 1001)) as add:
        for number, size in enumerate(((63, 47), (30, 47), (126, 94))):
            add(Image.new("RGB", size, (0, 255, 0)), number)
    pictures, rate = read_all(tmp_path / "clip.mp4")
    assert [picture.size for picture in pictures] == [(64, 48)] * 3 and rate == Fraction(30000, 1001)
    green = [np.array(picture)[24, :, 1] > 200 for picture in pictures]
    assert green[0][:62].all() and green[2][:62].all()
    assert green[1][20:44].all() and not green[1][:14].any()  # it is in the middle


def break_videos(folder, clip):
    """Broken videos by their names."""
    content = clip.read_bytes()
    (folder / "whole.mp4").write_bytes(content)
    write_clip(folder / "early.mp4", movflags="faststart")
    write_clip(folder / "early.avi", codec="mpeg4")
    write_clip(folder / "early.mkv", count=80, rate=10)
    for name in ("early.mp4", "early.avi", "early.mkv"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) - 400])
    write_audio(folder / "sound.mp4")
    for name, other in {
        "empty.mp4": b"",
        "text.mp4": b"no video " * 100,
        "list.mp4": b"ffconcat version 1.0\nfile whole.mp4\n",
        "half.mp4": content[: len(content) // 2],
        "codec.mp4": content.replace(b"avc1", b"zzzz"),
    }.items():
        (folder / name).write_bytes(other)
    os.mkfifo(folder / "pipe.mp4")


def test_broken_videos_are_named_before_anything_is_decoded(clip, tmp_path, monkeypatch):
    break_videos(tmp_path, clip)
    monkeypatch.setattr(videos, "read_frames", None)
    for name, message in {
        "nowhere.mp4": "cannot be read: No such file",
        "pipe.mp4": "cannot be read: it is no regular file",
        "empty.mp4": "cannot be read: Invalid data found",
        "text.mp4": "cannot be read: Invalid",
        "list.mp4": "cannot be read: Invalid",  # which says what else is opened
        "half.mp4": "cannot be read: Invalid data found",
        "early.mp4": r"is truncated: it ends after 0\.\d\d s",
        "early.avi": r"is truncated: it ends after 0\.\d\d s",
        "early.mkv": r"is truncated: it ends after \d\.\d\d s",
        "sound.mp4": "has no video, only audio",
        "codec.mp4": "has a video of a codec that PyAV cannot decode",
    }.items():
        with pytest.raises(ImageError, match=f"^{tmp_path / name} {message}"):
            count_frames(str(tmp_path / name))


def test_each_frame_is_predicted_as_an_image(classifier, clip, tmp_path):
    """Between images, in batches that begin and end within the video."""
    for name in ("a.png", "z.png"):
        draw_frame(3).save(tmp_path / name)
    lines = []
    rows, problems = predict_to_folder(
        classifier,
        [tmp_path / "a.png", clip, tmp_path / "z.png"],
        tmp_path / "out",
        3,
        report=lines.append,
        frame_interval=2,
    )
    assert not problems and rows == read_json(tmp_path / "out" / "predictions.json")
    names = {row["file_name"].rpartition("/")[2] for row in rows}
    assert names == {"a.png", "clip.mp4", "z.png"} and "frame" not in rows[0] and "time" not in rows[-1]
    assert [(row["frame"], row["time"]) for row in rows[1:-1]] == [(0, 0.0), (2, 0.08), (4, 0.16), (6, 0.24)]
    stem = rows[1]["file_name"].removesuffix(".mp4")
    assert [row["picture"] for row in rows[1:-1]] == [f"pictures/{stem}/{n:06}.jpg" for n in (0, 2, 4, 6)]
    assert lines[2] == f"{stem}.mp4, frame 2 (0.08 s): {rows[2]['summary']}"
    frames = [image for _, image in read_frames(str(clip), 2)]
    for found in (classifier(frames), predict(classifier, clip, batch_size=3, frame_interval=2)):
        for row, prediction in zip(rows[1:-1], found, strict=True):
            assert [one["label"] for one in row["predictions"]] == [name for _, name, _ in prediction.list_best()]
            scores = [score for *_, score in prediction.list_best()]
            assert [one["score"] for one in row["predictions"]] == pytest.approx(scores, abs=1e-5)
    written, rate = read_all(tmp_path / "out" / f"pictures/{stem}.mp4")
    assert rate == Fraction(25, 2)
    assert [find_number(picture.crop((0, 0, 512, 384))) for picture in written] == [0, 2, 4, 6]
    (size,) = {Image.open(tmp_path / "out" / row["picture"]).size for row in rows[1:-1]}
    assert written[0].size == tuple(side + side % 2 for side in size)


def test_label_maps_of_frames(clip, tmp_path):
    predictor = build_predictor("semantic_fpn")
    rows, _ = predict_to_folder(predictor, clip, tmp_path, frame_interval=4, pictures=False)
    assert [row["label_map"] for row in rows] == [f"label_maps/clip/{number:06}.png" for number in (0, 4)]
    for row, (_, image) in zip(rows, read_frames(str(clip), 4), strict=True):
        np.testing.assert_array_equal(Image.open(tmp_path / row["label_map"]), predictor([image])[0].to_image())
    assert not (tmp_path / "pictures").exists()


def test_results_of_cocos_format_have_the_frame(clip, tmp_path):
    rows, _ = predict_to_folder(build_predictor("retinanet", threshold=0.05), clip, tmp_path, frame_interval=4)
    results = read_json(tmp_path / "coco_results.json")
    assert [result["image_id"] for result in results] == [1] * len(rows[0]["predictions"]) + [2] * len(
        rows[1]["predictions"]
    )
    assert {(result["file_name"], result["frame"], result["time"], result["image_id"]) for result in results} == {
        ("clip.mp4", 0, 0.0, 1),
        ("clip.mp4", 4, 0.16, 2),
    }
    assert len(read_all(tmp_path / "pictures" / "clip.mp4")[0]) == 2


def test_frame_that_cannot_be_decoded_is_an_error_or_skipped(classifier, clip, tmp_path):
    file = tmp_path / "spoiled.mp4"
    write_clip(file, g="1", bf="0")
    spoil_packet(file, 3)
    message = rf"{file}, frame 3 \(0\.12 s\) cannot be decoded: Invalid data found when processing input\."
    with pytest.raises(ImageError, match=message):
        predict_to_folder(classifier, file, tmp_path / "out", frame_interval=2)
    assert len(list((tmp_path / "out" / "pictures").rglob("*.jpg"))) == 2
    assert not list((tmp_path / "out").rglob("*.mp4")) and not (tmp_path / "out" / "predictions.json").exists()
    with pytest.raises(ImageError, match=message):
        predict(classifier, file)
    (tmp_path / "broken.mp4").touch()
    images = [file, tmp_path / "broken.mp4"]
    rows, problems = predict_to_folder(classifier, images, tmp_path / "out", 4, skip_corrupt=True)
    assert [row["frame"] for row in rows] == [0, 1, 2, 4, 5, 6, 7]
    assert [row["time"] for row in rows] == pytest.approx([row["frame"] / 25 for row in rows])
    assert [problem.split(" ")[0] for problem in problems] == [f"{tmp_path / 'broken.mp4'}", f"{file},"]
    with av.open(str(tmp_path / "out" / "pictures" / "spoiled.mp4")) as container:
        assert [frame.time for frame in container.decode(video=0)] == pytest.approx([row["time"] for row in rows])


def test_failed_frames_stand_where_they_would_be_shown(tmp_path):
    """Also where frames are stored in another order, as those of H.264 are."""
    file = write_clip(tmp_path / "spoiled.mp4", count=8, **{"x264-params": "bframes=2:b-adapt=0:slices=1"})
    spoil_packet(file, 2)
    found = list(read_frames(str(file)))
    assert [frame.number for frame, _ in found] == list(range(8))
    assert [frame.time for frame, _ in found] == pytest.approx([number / 25 for number in range(8)])
    assert [isinstance(image, ImageError) for _, image in found] == [number == 2 for number in range(8)]


def test_video_of_which_nothing_is_decoded_is_an_error(classifier, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "_decode", lambda container, stream: iter(()))
    for skip_corrupt in (False, True):
        with pytest.raises(ImageError, match="clip.mp4 has no frame that can be decoded"):
            predict_to_folder(classifier, clip, tmp_path, skip_corrupt=skip_corrupt)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["clip.mp4", "clip.avi"], r"clip\.mp4 and clip\.avi differ in their endings only"),
        (["clip.mp4", "clip/000003.jpg"], r"clip/000003\.jpg is called as the frames of clip\.mp4 are"),
        (["CLIP/1000003.png", "clip.mp4"], r"CLIP/1000003\.png is called as the frames of clip\.mp4 are"),
        (["clip.jpg.mp4", "clip.png"], r"clip\.jpg\.mp4 and clip\.png differ in their endings only"),
        (["pictures/clip.mp4"], r"clip\.mp4 would be replaced by a result"),
        (["clip.mp4", "pictures/clip/000003.jpg"], r"000003\.jpg would be replaced by a result"),
        (["clip.mp4", "label_maps/clip/000003.png"], r"000003\.png would be replaced by a result"),
    ],
)
def test_results_of_one_name_are_an_error(classifier, tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    # `pictures/clip.mp4` is one of `clip.mp4` where the folder that all have in common is that of the results.
    if names == ["pictures/clip.mp4"]:
        draw_frame(0).save(tmp_path / "a.png")
        names, message = ["pictures/clip.mp4"], r"clip\.mp4 would be replaced by a result"
    with pytest.raises(ImageError, match=message):
        predict_to_folder(classifier, [tmp_path / name for name in names], tmp_path)


def test_missing_package_is_one_line(classifier, clip, tmp_path, monkeypatch, capsys):
    classifier.model.save_pretrained(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["predict", str(tmp_path / "model"), str(clip), "--output_dir", str(tmp_path / "out")]) == 1
    line = 'pvt-hf predict: av is missing; install it with: pip install "pvt_hf[video]"\n'
    assert capsys.readouterr().err.endswith(line) and not (tmp_path / "out").exists()


def test_interval_is_at_least_1(classifier, clip, tmp_path):
    for function, arguments in ((predict, ()), (predict_to_folder, (tmp_path,))):
        with pytest.raises(ValueError, match="`frame_interval` must be at least 1, got 0"):
            function(classifier, clip, *arguments, frame_interval=0)
