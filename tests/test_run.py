"""run.py: finding ComfyUI, what is installed and when, and what becomes of the arguments. Nothing is installed here."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from pulid_sdxl import run as running
from pulid_sdxl.tools import develop as developing

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def develop(monkeypatch, tmp_path):
    """tools/develop.py, with .venv and .cache elsewhere."""
    monkeypatch.setattr(developing, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(developing, "VENV", tmp_path / "venv")
    monkeypatch.setattr(developing, "STAMP", tmp_path / "venv" / "stamp.json")
    monkeypatch.setattr(developing, "PYTHON", tmp_path / "venv" / "python")
    return developing


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run.py as a module, in a home of its own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(running, "HERE", tmp_path / "somewhere" / "pulid-sdxl")
    monkeypatch.setattr(running, "CACHE", tmp_path / "cache")
    return running


@pytest.fixture
def installs(develop, monkeypatch):
    """What would have been installed, call by call, into a .venv that is made without doing anything."""
    calls = []

    def create_venv():
        develop.VENV.mkdir(exist_ok=True)
        develop.PYTHON.touch()

    monkeypatch.setattr(develop, "create_venv", create_venv)
    monkeypatch.setattr(develop, "pip_install", calls.append)
    return calls


def make_comfyui(folder: Path, version="0.3.64", requirements="aiohttp>=3\ntorch\ntorchaudio\n") -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfy" / "supported_models.py").touch()
    (folder / "comfyui_version.py").write_text(f'# made by a build\n__version__ = "{version}"\n')
    (folder / "requirements.txt").write_text(requirements)
    return folder


class TestFindingComfyUI:
    def test_what_is_given_comes_first(self, run, tmp_path, monkeypatch):
        given, named = make_comfyui(tmp_path / "given"), make_comfyui(tmp_path / "named")
        monkeypatch.setenv("COMFYUI_PATH", str(named))
        assert run.find_hosts(str(given)) == [given]
        assert run.find_hosts(None) == [named]

    def test_several_are_separated_like_path(self, run, tmp_path):
        first, second = make_comfyui(tmp_path / "a"), make_comfyui(tmp_path / "b")
        assert run.find_hosts(run.os.pathsep.join(map(str, (first, second, first)))) == [first, second]

    def test_a_folder_that_is_none_is_refused_in_words(self, run, tmp_path):
        with pytest.raises(run.Failure, match=r"is not a ComfyUI folder"):
            run.find_hosts(str(tmp_path))

    def test_the_one_around_the_pack_is_found(self, run, tmp_path, monkeypatch):
        around = make_comfyui(tmp_path / "ComfyUI")
        monkeypatch.setattr(run, "HERE", around / "custom_nodes" / "pulid-sdxl")
        make_comfyui(tmp_path / "home" / "comfy" / "ComfyUI")
        assert run.find_hosts(None) == [around]

    def test_then_the_one_at_home_then_an_earlier_clone(self, run, tmp_path):
        cloned = make_comfyui(tmp_path / "cache" / "ComfyUI")
        assert run.find_hosts(None) == [cloned]
        at_home = make_comfyui(tmp_path / "home" / "comfy" / "ComfyUI")
        assert run.find_hosts(None) == [at_home]

    def test_else_the_official_repository_is_cloned(self, run, develop, tmp_path, monkeypatch):
        def clone(command, **_):
            assert command[0] == "git" and develop.HOST_TAG in command and develop.HOST_URL in command
            make_comfyui(Path(command[-1]))

        monkeypatch.setattr(develop.subprocess, "run", clone)
        assert develop.clone_host() == [tmp_path / "cache" / "ComfyUI"]
        assert run.is_comfyui(tmp_path / "cache" / "ComfyUI")

    @pytest.mark.parametrize(
        "problem",
        [
            subprocess.CalledProcessError(128, "git", stderr="fatal: Could not resolve host\n"),
            subprocess.CalledProcessError(128, "git", stderr=""),
            subprocess.TimeoutExpired("git", 300),
            FileNotFoundError("no git here"),
        ],
    )
    def test_without_a_network_it_says_so_and_goes_on(self, develop, tmp_path, monkeypatch, capsys, problem):
        def clone(command, **_):
            Path(command[-1]).mkdir()
            raise problem

        monkeypatch.setattr(develop.subprocess, "run", clone)
        assert develop.clone_host() == []
        assert "could not clone it" in capsys.readouterr().out
        assert list((tmp_path / "cache").iterdir()) == []


class TestEnvironment:
    def test_own_requirements_are_those_of_pyproject(self, develop):
        tomllib = pytest.importorskip("tomllib")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert develop.own_requirements() == project["dependencies"] + project["optional-dependencies"]["test"]

    def test_requirements_txt_is_the_list_of_dependencies(self, develop):
        listed = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
        assert listed == develop.own_requirements()[: len(listed)]
        assert develop.own_requirements()[len(listed)].startswith("torch==")  # where the test extra begins

    def test_comments_and_what_no_test_needs_are_left_out_of_the_hosts(self, tmp_path, develop):
        text = (
            "torch\ntorchaudio\ntorchsde\ncomfyui-workflow-templates==1\n\n#more:\nkornia>=0.7 # why\npydantic~=2.0\n"
        )
        host = make_comfyui(tmp_path / "host", requirements=text)
        assert develop.host_requirements(host) == ["torchsde", "kornia>=0.7", "pydantic~=2.0"]

    def test_everything_is_installed_once(self, installs, tmp_path, develop):
        host = make_comfyui(tmp_path / "host")
        develop.ensure_environment([host])
        assert installs == [develop.own_requirements(), [*develop.own_requirements(), "aiohttp>=3"]]
        develop.ensure_environment([host])
        develop.ensure_environment([])
        assert len(installs) == 2

    def test_the_newest_host_has_the_last_word_and_another_host_adds_its_own(self, installs, tmp_path, develop):
        new = make_comfyui(tmp_path / "new", "0.18.1", "frontend==2")
        old = make_comfyui(tmp_path / "old", "0.3.64", "frontend==1")
        develop.ensure_environment([new, old])
        assert [call[-1] for call in installs[1:]] == ["frontend==1", "frontend==2"]
        other = make_comfyui(tmp_path / "other", "0.8.0", "frontend==1.5")
        develop.ensure_environment([other])
        assert [call[-1] for call in installs[3:]] == ["frontend==1.5"]

    def test_a_changed_list_is_installed_again(self, installs, tmp_path, develop):
        host = make_comfyui(tmp_path / "host")
        develop.ensure_environment([host])
        (host / "requirements.txt").write_text("aiohttp>=4\n")
        develop.ensure_environment([host])
        assert [call[-1] for call in installs[2:]] == ["aiohttp>=4"]

    def test_a_venv_that_went_is_made_again_in_full(self, installs, tmp_path, develop):
        develop.ensure_environment([])
        develop.PYTHON.unlink()
        develop.ensure_environment([])
        assert len(installs) == 2

    def test_a_broken_stamp_is_no_stamp(self, installs, develop):
        develop.ensure_environment([])
        develop.STAMP.write_text("{")
        develop.ensure_environment([])
        assert json.loads(develop.STAMP.read_text()) and len(installs) == 2

    def test_a_failed_install_is_tried_again(self, run, installs, monkeypatch, develop):
        def fail(_):
            raise run.Failure("no network")

        monkeypatch.setattr(develop, "pip_install", fail)
        with pytest.raises(run.Failure):
            develop.ensure_environment([])
        monkeypatch.setattr(develop, "pip_install", installs.append)
        develop.ensure_environment([])
        assert len(installs) == 1

    def test_pips_last_words_reach_the_user(self, run, monkeypatch, develop):
        monkeypatch.setattr(develop, "PYTHON", sys.executable)
        with pytest.raises(run.Failure, match="Could not install"):
            develop.pip_install(["--no-index", "no-such-package-pulid"])


class TestTestCommand:
    @pytest.fixture
    def calls(self, monkeypatch, develop):
        calls = []

        def pytest_run(title, arguments, **variables):
            calls.append((arguments, variables))
            return develop.pytest_answers.pop(0) if hasattr(develop, "pytest_answers") else (0, Counter(passed=2))

        monkeypatch.setattr(develop, "pytest", pytest_run)
        return calls

    def test_all_tests_once_and_those_on_a_host_once_per_host(self, calls, tmp_path, capsys, develop):
        hosts = [make_comfyui(tmp_path / name) for name in ("a", "b")]
        assert develop.test(hosts, ["-x"]) == 0
        tests = str(ROOT / "tests")
        assert calls == [
            ([tests, f"--ignore={tests}/host", "-x"], {}),
            ([f"{tests}/host", "-x"], {"COMFYUI": str(hosts[0])}),
            ([f"{tests}/host", "-x"], {"COMFYUI": str(hosts[1])}),
        ]
        assert capsys.readouterr().out.endswith("\n6 passed, 0 failed, 0 skipped\n")

    def test_without_a_host_it_says_so_loudly_and_succeeds(self, calls, capsys, develop):
        assert develop.test([], []) == 0
        assert len(calls) == 1
        assert "NO COMFYUI" in capsys.readouterr().out

    def test_a_path_narrows_both_parts_down(self, calls, tmp_path, develop):
        host = make_comfyui(tmp_path / "host")
        this = f"{__file__}::TestTestCommand"
        assert develop.test([host], [this, "-k", "host"]) == 0
        on_host = str(ROOT / "tests" / "host" / "conftest.py")
        assert develop.test([host], [on_host]) == 0
        assert calls == [([this, "-k", "host"], {}), ([on_host], {"COMFYUI": str(host)})]

    @pytest.mark.parametrize(
        ("answers", "code", "line"),
        [
            ([(0, Counter(passed=3)), (1, Counter(passed=1, failed=1))], 1, "4 passed, 1 failed, 0 skipped"),
            ([(2, Counter()), (0, Counter(passed=1))], 2, "1 passed, 0 failed, 0 skipped"),
            ([(0, Counter(passed=3)), (5, Counter())], 0, "3 passed, 0 failed, 0 skipped"),
            ([(5, Counter()), (5, Counter())], 5, "0 passed, 0 failed, 0 skipped"),
        ],
    )
    def test_any_failure_is_the_whole_runs(self, calls, tmp_path, capsys, answers, code, line, develop):
        develop.pytest_answers = answers
        assert develop.test([make_comfyui(tmp_path / "host")], []) == code
        assert line in capsys.readouterr().out

    def test_results_are_counted_as_pytest_has_them(self, monkeypatch, tmp_path, develop):
        monkeypatch.setattr(develop, "PYTHON", sys.executable)
        tests = tmp_path / "test_all_kinds.py"
        tests.write_text(
            "import pytest\n"
            "def test_a(): pass\n"
            "def test_b(): assert 0\n"
            "def test_c(): pytest.skip('no')\n"
            "@pytest.fixture\ndef broken(): 1 / 0\n"
            "def test_d(broken): pass\n"
        )
        code, counts = develop.pytest("a title", [str(tests), "-q", f"--rootdir={tmp_path}", "-p", "no:cacheprovider"])
        assert (code, counts) == (1, Counter(passed=1, failed=2, skipped=1))


class TestCommandLine:
    @pytest.fixture
    def seen(self, installs, monkeypatch, tmp_path):
        seen = []
        make_comfyui(tmp_path / "home" / "comfy" / "ComfyUI")
        monkeypatch.setattr(subprocess, "call", lambda command, **_: seen.append(command[1:]) or 3)
        return seen

    def test_demo_gets_the_host_and_all_other_arguments(self, run, seen, tmp_path):
        assert run.main(["demo", "--seed", "4"]) == 3
        host = str(tmp_path / "home" / "comfy" / "ComfyUI")
        assert seen == [[str(ROOT / "tools"), "demo", "--comfyui", host, "--seed", "4"]]

    def test_conformance_takes_the_hosts_that_are_there(self, run, seen, tmp_path):
        assert run.main(["conformance", "somewhere"]) == 3
        host = tmp_path / "home" / "comfy" / "ComfyUI"
        assert seen == [[str(ROOT / "tools"), "conformance", f"--comfyui={host}", "somewhere"]]

    def test_conformance_needs_no_host_and_clones_none(self, run, seen, tmp_path, monkeypatch, develop):
        (tmp_path / "home" / "comfy" / "ComfyUI" / "main.py").unlink()
        monkeypatch.setattr(develop, "clone_host", lambda: pytest.fail("cloned a ComfyUI"))
        assert run.main(["conformance", "somewhere"]) == 3
        assert seen == [[str(ROOT / "tools"), "conformance", "somewhere"]]

    def test_what_goes_wrong_is_said_in_words(self, run, seen, capsys):
        assert run.main(["demo", "--comfyui", "nowhere"]) == 2
        assert "is not a ComfyUI folder" in capsys.readouterr().err

    def test_a_command_is_required(self, run, capsys):
        with pytest.raises(SystemExit):
            run.main([])
        assert "COMMAND" in capsys.readouterr().err


def test_starts_in_no_time():
    """The part of run.py that every command waits for, on any Python from 3.10."""
    done = subprocess.run([sys.executable, str(ROOT / "run.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for command in ("demo", "test", "conformance"):
        assert command in done.stdout
