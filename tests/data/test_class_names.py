"""Class names as people write them, and classes in another order."""

import json
import os

import pytest

from pvt_hf.data.class_names import ClassNameError, match_class_names, read_class_names

NAMES = ["cat", "dog", "emu"]
FORMS = {
    "list.json": json.dumps(NAMES),
    "from_0.json": json.dumps({"0": "cat", "1": "dog", "2": "emu"}),
    "from_1.json": json.dumps({"3": "emu", "1": "cat", "2": "dog"}),
    "names.json": json.dumps({"emu": 2, "cat": 0, "dog": "1"}),
    "config.json": json.dumps({"model_type": "pvt", "id2label": {"0": "cat", "1": "dog", "2": "emu"}}),
    "data.yaml": "nc: 3\nnames: [cat, dog, emu]\n",
    "keys.yml": "names:\n  0: cat\n  1: dog\n  2: emu\n",
    "classes.txt": "\ufeffcat\r\ndog \r\nemu\r\n\r\n",
    "bare": "cat\ndog\nemu",
    "class_dict.csv": '\ufeffr, g, b, Name\n64,128,64,cat\n192,0,128,"dog"\n\n0,128,192, emu\n',
    "column.csv": "cat\ndog\nemu\n",
}
WRONG = {
    "gap.json": (json.dumps({"0": "cat", "2": "dog"}), "from 0 or from 1 without gaps, got 2 numbers from 0 to 2"),
    "late.json": (json.dumps({"7": "cat"}), "1 numbers from 7 to 7"),
    "number.json": ("3", "must have a list of class names.*got int"),
    "mixed.json": (json.dumps({"0": "cat", "dog": "emu"}), "a different integer for each class"),
    "labels.json": (json.dumps({"cat": 0, "dog": [1]}), "a different integer for each class"),
    "twice.json": (json.dumps(["cat", "cat"]), r"class names twice: \['cat'\]"),
    "null.json": (json.dumps(["cat", None]), "must be a string in UTF-8 that is not empty, got None"),
    "half.json": ('["\\ud800"]', r"must be a string in UTF-8 that is not empty, got '\\ud800'"),
    "hole.txt": ("cat\n\ndog", "must be a string in UTF-8 that is not empty, got ''"),
    "broken.json": ("[", "cannot be read"),
    "deep.json": ("[" * 100000, "cannot be read"),
    "broken.yaml": ("names: [", "cannot be read"),
    "references.yaml": ("a: &a [cat]\nnames: [*a]", r"it has references \(`\*name`\)"),
    "deep.yaml": ("[" * 100000, "nested too deeply"),
    "date.yaml": ("names: !!timestamp cat", "cannot be read"),
    "truth.yaml": ("names: !!bool cat", "cannot be read"),
    "escape.json": (json.dumps(["\x1b[2J"] * 2), r"class names twice: \['\\x1b\[2J'\]"),
    "empty.txt": ("", "has no class names"),
    "columns.csv": ("cat,1\ndog,2\n", r"none of its columns \['cat', '1'\] is called name"),
    "short.csv": ("r,name\n1,cat\n2\n", "must be a string in UTF-8 that is not empty, got ''"),
    "quote.csv": ('name\n"cat', "cannot be read"),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_read(name, tmp_path):
    (tmp_path / name).write_bytes(FORMS[name].encode())
    assert read_class_names(tmp_path / name) == NAMES


@pytest.mark.parametrize("name", WRONG)
def test_other_content_is_an_error_with_the_files_name(name, tmp_path):
    content, message = WRONG[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(ClassNameError, match=rf"(?s){name}.*{message}"):
        read_class_names(tmp_path / name)
    with pytest.raises(ClassNameError, match="missing cannot be read"):
        read_class_names(tmp_path / "missing")
    os.mkfifo(tmp_path / "\x1b[2J")  # which would be waited for
    with pytest.raises(ClassNameError, match=r"\\x1b\[2J is no regular file"):
        read_class_names(tmp_path / "\x1b[2J")


def test_long_lists_are_cut():
    names = [f"class {index}" for index in range(200)]
    with pytest.raises(ClassNameError, match=r"'class 99', ... 200 in all\].*only the second \['cat'\]"):
        match_class_names(names, ["cat"], ("A", "B"))


def test_classes_in_another_order_are_matched_by_name():
    owners = "The model", "the data"
    assert match_class_names(NAMES, NAMES, owners) == [0, 1, 2]
    assert match_class_names(NAMES, ["emu", "Cat", "dog"], owners) == [2, 0, 1]
    assert match_class_names(["a-b", "a b"], ["a b", "a-b"], owners) == [1, 0]
    assert match_class_names(["traffic light", "x"], ["X", "traffic_light"], owners) == [1, 0]
    assert match_class_names(["crane", "crane", "x"], ["crane", "Crane", "x"], owners) == [0, 1, 2]
    assert match_class_names(NAMES, ["emu"], owners, subset=True) == [2]
    for found in (["emu"], ["cat", "dog", "cow"], [*NAMES, "cow"], ["cat", "CAT", "dog"]):
        with pytest.raises(ClassNameError, match=r"The model has the classes \['cat', 'dog', 'emu'\], the data \['"):
            match_class_names(NAMES, found, owners)
    with pytest.raises(ClassNameError, match=r"only the first has \['dog', 'emu'\], only the second \['cow'\]"):
        match_class_names(NAMES, ["cow", "cat"], owners, subset=True)
    for found, is_told in ((["emu"], True), (["emu", "cow"], False)):
        with pytest.raises(ClassNameError) as error:
            match_class_names(NAMES, found, owners, advice="Allow it.")
        assert str(error.value).endswith(" Allow it.") == is_told
