"""What belongs to the repository and not to the pack: the files under .github, and what the registry is sent."""

import os
import re
import subprocess
import sys

import pytest
import yaml
from PIL import Image
from pulid_sdxl.tools import ROOT

YAML_FILES = [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml"]


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_is_yaml(path):
    assert read(path)


def test_the_form_asks_for_what_the_doctor_says():
    asked = next(part for part in read(".github/ISSUE_TEMPLATE/bug_report.yml")["body"] if part["id"] == "doctor")
    assert asked["validations"]["required"]
    assert "run.py doctor" in asked["attributes"]["label"]
    assert "no name and no key" in asked["attributes"]["description"]


def test_every_gate_is_that_of_ci_run():
    [job] = read(".github/workflows/ci.yml")["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"}
    commands = re.findall(r"run\.py (\w+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert commands == ["lint", "test"]
    [hook] = read(".pre-commit-config.yaml")["repos"][0]["hooks"]
    assert hook["entry"].endswith("run.py lint")


@pytest.mark.parametrize(("owner", "code"), [("OWNER", 1), ("ada", 0)])
def test_publishing_is_refused_while_the_address_names_nobody(tmp_path, owner, code):
    steps = read(".github/workflows/publish.yml")["jobs"]["publish"]["steps"]
    refusing, publishing = (next(i for i, step in enumerate(steps) if key in step) for key in ("run", "with"))
    assert refusing < publishing
    for name in ("pyproject.toml", "README.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("github.com/OWNER/", f"github.com/{owner}/")
        (tmp_path / name).write_text(text, encoding="utf-8")
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", steps[refusing]["run"]]  # as GitHub runs it
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code
    assert ("in the place of OWNER" in done.stdout) == bool(code)


def test_comfy_cli_finds_nothing_to_say_about_what_would_be_published(tmp_path):
    """`comfy node validate` ends well whatever it warns of, so that its words count."""
    validate = ["--skip-prompt", "--no-enable-telemetry", "node", "validate"]
    home = {**os.environ, "HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}  # it writes settings there
    done = subprocess.run(
        [sys.executable, "-m", "comfy_cli", *validate], cwd=ROOT, env=home, capture_output=True, text=True
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert done.returncode == 0 and said[-1].endswith("All validation checks passed successfully")
    assert said[:-1] == ["Validating node configuration...", "Running security checks..."]  # and no warning between


def test_the_pictures_of_the_registry_are_as_it_wants_them():
    with (
        Image.open(ROOT / ".github/pictures/icon.png") as icon,
        Image.open(ROOT / ".github/pictures/banner.jpg") as banner,
    ):
        assert max(icon.size) <= 400 and icon.width == icon.height
        assert banner.width / banner.height == pytest.approx(21 / 9)


def test_the_registry_is_sent_what_runs_and_nothing_else():
    ignored = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    named = {line.strip("/") for line in ignored}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sent = {path.split("/")[0] for path in listed.splitlines()} - named
    assert sent == {
        "CHANGELOG.md", "LICENSE", "README.md", "__init__.py", "hosted", "locales", "models", "nodes", "pulid",
        "pyproject.toml", "requirements.txt", "run.py", "subgraphs", "web", "workflows",
    }  # fmt: skip
