"""What a run leaves for people: a card that tells the truth, whatever names data, run and classes have."""

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from transformers import TrainerState, TrainingArguments

from pvt_hf.recipes import DetectionRecipe, ImageNetRecipe, SegmentationRecipe
from pvt_hf.training.report import RunFacts, is_on_hub, publish_name, run_settings, training_card
from tests.support.small_models import small_config

EVIL = "<script>alert(1)</script> | **b** `c` $x$ [l](http://e.vil)\n---\nlicense: mit\n# h \x1b[31m\u202e&amp; _d_"
SHOWN = r"<script>alert(1)</script> | **b** `c` $x$ [l](http://e.vil)\n---\nlicense: mit\n# h \x1b[31m\u202e&amp; _d_"
LOG = [{"epoch": 1.0, "eval_images": 7, "eval_accuracy": 0.5, "eval_loss": 1.0}]


def build_card(metric: str = "top-1", **facts) -> ModelCard:
    facts = {"name": "run", "task": "image-classification"} | facts
    card = training_card(RunFacts(**facts), small_config("v2"), LOG, {"accuracy": metric})
    again = ModelCard(str(card))  # which the Hub's library reads and validates
    assert again.data.to_dict() == card.data.to_dict()
    return again


def test_names_are_shown_as_they_are():
    """No HTML, markdown, YAML or control character of a name has an effect, in text, tables and metadata."""
    card = build_card(EVIL, name=EVIL, dataset=EVIL, initial_weights=EVIL, settings={EVIL: EVIL}, dataset_title=EVIL)
    assert "license" not in card.data.to_dict() and card.data.eval_results[0].dataset_name == SHOWN
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.text)
    kinds = {token.type for token in tokens} | {child.type for token in tokens for child in token.children or []}
    assert not kinds & {"html_block", "html_inline", "link_open", "em_open"}
    lines = ["".join(child.content for child in token.children) for token in tokens if token.type == "inline"]
    assert lines[0] == SHOWN and lines.count(SHOWN) == 4  # the title; a column of metrics, a setting and its value
    assert f"on {SHOWN} from" in lines[1] and f"50.00 % {SHOWN}." in lines[1]
    assert [token.content for token in tokens if token.tag == "h1" and token.content] == []
    assert sum(token.type == "heading_open" for token in tokens) == 5
    assert card.content.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    "name",
    ["x" * 300, "nul\0byte", "/home/me/data", "../data", "train/*.tar", "\udcff", " "],
    ids=lambda name: name[:5],
)
def test_every_name_of_data_makes_a_card_without_a_path(name, tmp_path):
    card = build_card(dataset=name, initial_weights=name)
    assert not {"datasets", "base_model"} & card.data.to_dict().keys() and "/home/me" not in card.content
    card.save(tmp_path / "README.md")
    assert ModelCard.load(tmp_path / "README.md").data.eval_results[0].dataset_type == "imagefolder"


def test_paths_are_named_by_their_last_part(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "polyps").mkdir(parents=True)
    card = build_card(dataset="me/polyps", initial_weights=str(tmp_path), settings={"palette": str(tmp_path / "me")})
    assert "on `polyps` from\n`" + tmp_path.name + "`." in card.content and "| palette | me |" in card.content
    assert str(tmp_path) not in card.content and "me/polyps" not in card.content
    assert not is_on_hub("me/polyps") and is_on_hub("me/elsewhere") and publish_name(".") == tmp_path.name


def test_what_is_known_is_in_the_metadata():
    card = build_card(dataset="ILSVRC/imagenet-1k", initial_weights="OpenGVLab/pvt_v2_b0", license="apache-2.0")
    known = {"datasets": ["ILSVRC/imagenet-1k"], "base_model": "OpenGVLab/pvt_v2_b0", "license": "apache-2.0"}
    assert known.items() <= card.data.to_dict().items() and "## Licence\n\napache-2.0" in card.content
    assert card.data.eval_results[0].dataset_type == "ILSVRC/imagenet-1k"
    card = build_card()
    assert not known.keys() & card.data.to_dict().keys() and "No licence was chosen" in card.content
    assert "on `scikit-learn digits` from" in card.content
    assert "on `my own` from" in build_card(dataset_title="my own").content
    with pytest.raises(ValueError, match="`license` must be the Hub's identifier of a licence.*got 'Apache 2'"):
        build_card(license="Apache 2")


def test_metrics_without_ground_truth_are_not_numbers():
    """They are not in the log, and the card says why."""
    log = [{"epoch": epoch, "eval_images": 7, "eval_loss": 1.0} for epoch in (1.0, 2.0)]
    log[0]["eval_AP"] = 0.25
    facts = RunFacts("run", "object-detection")
    card = training_card(facts, small_config("v2"), log, {"AP": "AP"})
    assert "reaches no AP, of which there is no ground truth." in card.content.replace("\n", " ")
    assert "eval_results" not in card.data.to_dict() and "| 1 | 1.0000 | 0.2500 |" in card.content
    assert "nan" not in card.content
    log.append(log[1])
    assert "| 2 | 1.0000 |  |" in training_card(facts, small_config("v2"), log, {"AP": "AP"}).content


def settings_of(recipe, recipe_schedule=True, **arguments):
    args = TrainingArguments(output_dir="x", learning_rate=1e-3, use_cpu=True, **{"weight_decay": 0.05} | arguments)
    config, state = small_config("v2", drop_path_rate=0.3), TrainerState(epoch=0.5, global_step=60)
    return run_settings(recipe, args, config, state, recipe_schedule)


def test_settings_are_what_was_done_beside_the_recipe():
    settings = settings_of(SegmentationRecipe(), weight_decay=1e-4)
    assert (settings["steps"], settings["epochs"], settings["steps of the recipe"]) == (60, 0.5, 40_000)
    assert (
        settings["learning_rate"] == 1e-3 and settings["power"] == 0.9 and "weight_decay of the recipe" not in settings
    )
    assert settings["learning_rate of the recipe, for 32 images per step"] == 2e-4
    assert settings["drop_path_rate"] == 0.3 and settings["drop_path_rate of the recipe"] == 0.1
    detection = settings_of(DetectionRecipe("retinanet"))
    assert detection["epochs of the recipe"] == 12 and detection["decay_epochs"] == (0.33, 0.46)
    other = settings_of(ImageNetRecipe(), recipe_schedule=False, lr_scheduler_type="linear")
    assert other["learning-rate schedule"] == "linear" and not {"warmup_epochs", "min_learning_rate"} & other.keys()
