"""Every Auto class gives the classes of pvt_hf, whoever imports what first, and `import pvt_hf` costs what it replaces.

Registration is global and happens once per process: each case runs in a process of its own, forked from one that has
imported torch and transformers' base classes, but no model and no Auto class that builds one.
"""

import itertools
import pickle

import pytest

import pvt_hf
from tests.support.processes import run_python

pytestmark = pytest.mark.process

# The class that each Auto class has to give, by model type.
MODELS = {
    "pvt": {"AutoModel": "PvtModel", "AutoModelForImageClassification": "PvtForImageClassification"}
    | {"AutoBackbone": "PvtBackbone"},
    "pvt_v2": {"AutoModel": "PvtV2Model", "AutoModelForImageClassification": "PvtV2ForImageClassification"}
    | {"AutoBackbone": "PvtV2Backbone"},
    "pvt_hf_retinanet": {"AutoModelForObjectDetection": "RetinaNetForObjectDetection"},
    "pvt_hf_atss": {"AutoModelForObjectDetection": "ATSSForObjectDetection"},
    "pvt_hf_gfl": {"AutoModelForObjectDetection": "GFLForObjectDetection"},
    "pvt_hf_mask_rcnn": dict.fromkeys(
        ("AutoModelForInstanceSegmentation", "AutoModelForImageSegmentation", "AutoModelForObjectDetection"),
        "MaskRCNNForInstanceSegmentation",
    ),
    "pvt_hf_cascade_mask_rcnn": dict.fromkeys(
        ("AutoModelForInstanceSegmentation", "AutoModelForImageSegmentation", "AutoModelForObjectDetection"),
        "CascadeMaskRCNNForInstanceSegmentation",
    ),
    "pvt_hf_sparse_rcnn": {"AutoModelForObjectDetection": "SparseRCNNForObjectDetection"},
    "pvt_hf_semantic_fpn": {"AutoModelForSemanticSegmentation": "SemanticFPNForSemanticSegmentation"},
}
CHECK = f"""
def check():
    import pvt_hf, transformers
    for model_type, models in {MODELS!r}.items():
        config = transformers.AutoConfig.for_model(model_type)
        assert type(config).__module__.startswith("pvt_hf."), (model_type, type(config))
        for auto_class, name in models.items():
            model_class = getattr(transformers, auto_class)._model_mapping[type(config)]
            assert model_class is getattr(pvt_hf, name), (model_type, auto_class, model_class)
"""


def run_each(cases: list[str]) -> None:
    """Runs each piece of code in a process of its own (see above), and fails with those that fail or print."""
    failures = run_python(
        f"""
import os, sys, torch, torchvision, transformers.image_processing_backends, transformers.modeling_utils
{CHECK}
for case in {cases!r}:
    if (child := os.fork()) == 0:
        status = 1
        try:
            exec(case, globals())
            status = 0
        except BaseException as error:
            print(f"{{case}}: {{type(error).__name__}}: {{error}}", flush=True)
        os._exit(status)
    if os.waitpid(child, 0)[1]:
        print("failed:", case)
"""
    )
    assert not failures, failures


def test_every_auto_class_gives_our_class_in_a_fresh_process():
    cases: dict[str, str] = {}
    for model_type, models in MODELS.items():
        for auto_class, name in models.items():
            start = f"import pvt_hf\nfrom transformers import AutoConfig, {auto_class}"
            cases[auto_class] = f"""{cases.get(auto_class, start)}
with torch.device("meta"):
    model = {auto_class}.from_config(AutoConfig.for_model({model_type!r}))
assert type(model) is pvt_hf.{name}, type(model)
"""
    run_each([*cases.values()])


def test_any_import_order_gives_our_classes():
    names = ("configuration", "modeling", "image_processing")
    modules = {f"import transformers.models.auto.{name}_auto" for name in names}
    # Whichever of them come before ours; the others come after it.
    before = [set(some) for count in range(4) for some in itertools.combinations(sorted(modules), count)]
    orders = ["\n".join([*sorted(some), "import pvt_hf", *sorted(modules - some)]) for some in before]
    # Native classes that were used before.
    native = "from transformers import AutoConfig, PvtModel, PvtV2Backbone, PvtV2Model; AutoConfig.for_model('pvt')"
    orders += [f"{native}\nimport pvt_hf", f"import pvt_hf\n{native}"]
    run_each([f"{order}\ncheck()" for order in orders])


@pytest.mark.parametrize(
    "before, first, is_fresh",
    [
        ("", "import pvt_hf", True),
        # (Two threads that import transformers itself for the first time disturb each other without pvt_hf.)
        ("import transformers", "from transformers import AutoModel, PvtModel; import pvt_hf", False),
    ],
    ids=["ours first", "theirs first"],
)
def test_threads_that_import_and_build_at_once_get_our_classes(before, first, is_fresh):
    run_python(
        f"""
import threading
{before}
results, barrier = [], threading.Barrier(4)

def build(model_type, prefix):
    barrier.wait()
    {first}
    from transformers import AutoConfig, AutoModel
    model = AutoModel.from_config(AutoConfig.for_model(model_type, depths=[1, 1, 1, 1]))
    results.append((type(model).__module__, type(model).__name__ == prefix + "Model"))

threads = [threading.Thread(target=build, args=a) for a in [("pvt", "Pvt"), ("pvt_v2", "PvtV2")] * 2]
[thread.start() for thread in threads], [thread.join() for thread in threads]
assert len(results) == 4 and all(m.startswith("pvt_hf.models.") and right for m, right in results), results
""",
        is_fresh=is_fresh,
    )


def test_another_importer_than_pythons_gives_our_classes():
    """Frozen applications have a finder of their own in the place of `PathFinder`."""
    run_python(
        f"""
import importlib.machinery, sys

class Finder:
    find_spec = staticmethod(importlib.machinery.PathFinder.find_spec)
    find_distributions = staticmethod(importlib.machinery.PathFinder.find_distributions)

sys.meta_path[:] = [f for f in sys.meta_path if f is not importlib.machinery.PathFinder] + [Finder]
{CHECK}
import pvt_hf
check()
"""
    )


def test_a_configuration_from_anywhere_is_known():
    """Where transformers' class of the same name has been imported before: the fallback by name would find that."""
    sources = (
        "from pvt_hf.models.configuration_pvt_v2 import PvtV2Config; config = PvtV2Config()",
        "from pvt_hf.models.modeling_pvt_v2 import PvtV2Backbone; config = PvtV2Backbone.config_class()",
        f"import pickle; config = pickle.loads({pickle.dumps(pvt_hf.PvtV2Config())!r})",
        "from transformers import AutoImageProcessor; import pvt_hf; config = pvt_hf.build_config('pvt_v2_b0')",
    )
    run_each(
        [
            f"""
from transformers import AutoBackbone, AutoModel, PvtV2Backbone, PvtV2Model
{source}
import pvt_hf
assert type(AutoModel.from_config(config)) is pvt_hf.PvtV2Model
assert type(AutoBackbone.from_config(config)) is pvt_hf.PvtV2Backbone
"""
            for source in sources
        ]
    )


def test_native_classes_stay_what_they_are_and_import_quietly():
    """transformers reads the checkpoint name in our docstring when it documents its own classes."""
    names = "(transformers.PvtModel.__module__, transformers.PvtV2Backbone.__module__)"
    run_each([f"import pvt_hf, transformers; assert all(name.startswith('transformers.') for name in {names})"])


@pytest.mark.slow
def test_import_costs_what_transformers_costs():
    """In CPU time, at most a tenth more than what every program that trains a classifier imports anyway."""

    def cpu_seconds(code: str) -> float:
        return float(run_python(f"{code}\nimport time; print(time.process_time())", is_fresh=True).splitlines()[-1])

    base, ours = "from transformers import AutoModelForImageClassification, Trainer", "import pvt_hf"
    pairs = [(cpu_seconds(base), cpu_seconds(ours)) for _ in range(2)]
    assert min(ours for _, ours in pairs) / min(base for base, _ in pairs) <= 1.1


def test_a_registration_that_does_not_take_is_an_error():
    """A later transformers may change what `exist_ok` means: then `import pvt_hf` fails, and says so."""
    auto_classes = ("AutoConfig", "AutoImageProcessor", "AutoModel", "AutoModelForObjectDetection")
    run_each(
        [
            f"""
import transformers
transformers.{auto_class}.register = lambda *args, **kwargs: None
try:
    import pvt_hf
except RuntimeError as error:
    assert "does not take the classes of pvt_hf, it gives" in str(error) and "{auto_class}" in str(error), error
else:
    raise AssertionError("imported")
"""
            for auto_class in auto_classes
        ]
    )
