"""The workflows are what they say: files, extras, jobs and versions of Python that exist; and what a release needs."""

import re
import runpy
import shutil
import tomllib

import pytest
import yaml

from tests.support.small_models import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
JOBS = [(f"{name}: {key}", job) for name, workflow in WORKFLOWS.items() for key, job in workflow["jobs"].items()]
PYTHONS = [text.split(" :: ")[-1] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
FILES = ("pyproject.toml", "CITATION.cff", "CHANGELOG.md", "pvt_hf/__init__.py")
find_problems = runpy.run_path(str(ROOT / ".ci" / "check_release.py"))["find_problems"]
MINIMUM = runpy.run_path(str(ROOT / ".ci" / "minimum_versions.py"))
list_requirements = runpy.run_path(str(ROOT / ".ci" / "measure_installation.py"))["list_requirements"]


def commands(job) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


@pytest.mark.parametrize("job", [job for _, job in JOBS], ids=[name for name, _ in JOBS])
def test_job_is_one_that_can_run(job):
    assert job["runs-on"] == "ubuntu-latest" and 0 < job["timeout-minutes"] <= 60
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step) and re.fullmatch(r"[\w-]+/[\w-]+@[\w/.]+", step.get("uses", "a/b@c"))
        if step.get("uses", "").startswith("actions/setup-python@"):
            assert step["with"]["python-version"] in (*PYTHONS, "${{ matrix.python }}")  # a string: 3.10 is no number
    text = commands(job)
    assert set(re.findall(r"\[(\w+)\]\"", text)) <= PROJECT["optional-dependencies"].keys()
    assert all((ROOT / file).is_file() for file in re.findall(r"(?<![\w/])(?:\.ci|tests)/[\w./]+", text))
    used = set(re.findall(r"matrix\.(\w+)", str(job["steps"])))
    assert all(used == choice.keys() for choice in list_choices(job))


def list_choices(job) -> list[dict[str, str]]:
    """What the matrix of a job chooses: its entries, or the names of its lists."""
    matrix = job.get("strategy", {}).get("matrix", {})
    return matrix.get("include", [matrix])


def test_every_lower_bound_is_resolved_and_tested():
    choices = list_choices(WORKFLOWS["ci"]["jobs"]["minimum-versions"])
    tested = {
        (name, bound) for choice in choices for name, bound in MINIMUM["find_minimum"](choice["extras"].split()).items()
    }
    extras = [f"pvt_hf[{extra}]" for extra in PROJECT["optional-dependencies"]]
    assert tested == set(MINIMUM["list_bounds"]([*PROJECT["dependencies"], *extras]))
    assert {"torch": "2.9", "timm": "1.0.21"}.items() <= MINIMUM["find_minimum"](["test"]).items()
    assert MINIMUM["find_minimum"](["examples"])["torch"] == "2.11"  # of two bounds the higher one
    assert any(choice["run"] == "pytest" for choice in choices)  # all tests but the slow ones


@pytest.mark.parametrize("name", WORKFLOWS)
def test_jobs_wait_for_jobs_that_exist(name):
    jobs = WORKFLOWS[name]["jobs"]
    assert {job["needs"] for job in jobs.values() if "needs" in job} <= jobs.keys()


@pytest.mark.parametrize(("workflow", "job"), [("ci", "test"), ("release", "test")])
def test_every_python_of_the_classifiers_is_tested(workflow, job):
    assert WORKFLOWS[workflow]["jobs"][job]["strategy"]["matrix"]["python"] == PYTHONS
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


def test_only_a_tested_tag_is_published_and_without_a_password():
    release = WORKFLOWS["release"]
    assert release[True] == {"push": {"tags": ["v*"]}} and release["permissions"] == {"contents": "read"}
    jobs = release["jobs"]
    assert [jobs[name].get("needs") for name in ("check", "build", "test", "publish", "docs")] == [
        None,
        "check",
        "build",
        "test",
        "publish",
    ]
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and jobs["publish"]["environment"]["name"] == "pypi"
    assert "secrets." not in str(release) and "password" not in str(jobs["publish"])
    assert "twine check --strict" in commands(jobs["build"]) and "mkdocs build --strict" in commands(jobs["docs"])
    assert 'check_release.py "$GITHUB_REF_NAME"' in commands(jobs["check"])


@pytest.fixture
def ready(tmp_path):
    """The files of a project that has a version, a part of the changelog and addresses."""
    version = re.search(r'__version__ = "(.+)"', (ROOT / "pvt_hf" / "__init__.py").read_text())[1]
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    urls = "".join(f'{name} = "https://code.org/x"\n' for name in ("Homepage", "Documentation", "Source", "Issues"))
    for name, old, new in (
        ("pyproject.toml", "[project.urls]\n", f'[project.urls]\n{urls}Changelog = "https://code.org/x"\n'),
        ("CHANGELOG.md", "## Unreleased\n", f"## {version} - 2026-12-01\n"),
        ("CITATION.cff", "type: software\n", "type: software\nrepository-code: https://code.org/x\n"),
    ):
        text = re.sub(r"^(?:Homepage|Documentation|Source|Issues|Changelog|repository-code)\b.*\n", "",
                      (tmp_path / name).read_text(), flags=re.MULTILINE)  # fmt: skip
        assert old in text
        (tmp_path / name).write_text(text.replace(old, new))
    (tmp_path / "README.md").write_text("# x\n![picture](https://docs.org/x.png)\n")
    (tmp_path / "mkdocs.yml").write_text("site_url: https://docs.org/x\nrepo_url: https://code.org/x\n")
    return tmp_path, f"v{version}"


def test_a_release_that_is_ready_has_no_problems(ready):
    assert find_problems(*ready) == []


@pytest.mark.parametrize(
    ("name", "line", "problem"),
    [
        ("CITATION.cff", r"^version: .*", "CITATION.cff has the version , not "),
        ("CITATION.cff", r"^repository-code: .*", "CITATION.cff has no address `repository-code`"),
        ("CHANGELOG.md", r" - 2026-12-01", "CHANGELOG.md has no part `## "),
        ("pyproject.toml", r"^Issues = .*", "pyproject.toml has no address 'Issues'"),
        ("README.md", r"https://docs.org/", "README.md has a picture or a link without an address"),
        ("mkdocs.yml", r"^site_url: .*", "mkdocs.yml has no address `site_url`"),
    ],
)
def test_what_is_missing_for_a_release_is_named(name, line, problem, ready):
    root, tag = ready
    text = (root / name).read_text()
    (root / name).write_text(re.sub(line, "", text, flags=re.MULTILINE))
    (found,) = find_problems(root, tag)
    assert found.startswith(problem)


def test_a_tag_is_of_the_version(ready):
    root, tag = ready
    assert find_problems(root, f"{tag}.1") == [f"the tag is {tag}.1, and pvt_hf/__init__.py says {tag[1:]}"]


def test_installed_is_what_the_package_needs_without_extras():
    needed = list_requirements("pvt-hf")
    assert {"pvt-hf", "torch", "transformers", "sympy"} <= needed and not {"timm", "datasets", "pytest"} & needed
