"""run.py: finding ComfyUI, what is installed and when, and what becomes of the arguments. Nothing is installed here."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pulid_sdxl import run
from pulid_sdxl.pulid.errors import InputError
from pulid_sdxl.tools import ROOT, TOOLS, arguments, demo, develop


class Recorder(develop.Environment):
    """An environment that is made without doing anything: it keeps what it would have installed and run."""

    def __init__(self, folder: Path, results=()):
        super().__init__(folder)
        vars(self).update(installs=[], frontends=[], calls=[], results=list(results))

    def create(self):
        self.python.parent.mkdir(parents=True, exist_ok=True)
        self.python.touch()

    def install(self, requirements):
        self.installs.append(requirements)

    def has_pip(self):
        return True

    def add_frontends(self, versions):
        self.frontends += versions

    def call(self, *arguments, **variables):
        """Answers with the next of `results`: an exit code and pytest's tests, failures, errors and skipped."""
        self.calls.append(([each for each in arguments if not each.startswith("--junitxml=")], variables))
        if arguments[:2] != ("-m", "pytest"):
            return self.results.pop(0)
        code, counts = self.results.pop(0) if self.results else (0, (2, 0, 0, 0))
        named = " ".join(map('{}="{}"'.format, ("tests", "failures", "errors", "skipped"), counts))
        Path(arguments[-1].partition("=")[2]).write_text(f"<testsuites><testsuite {named}/></testsuites>")
        return code


@pytest.fixture
def environment(tmp_path):
    return Recorder(tmp_path / "venv")


@pytest.fixture
def find_hosts(monkeypatch, tmp_path):
    """run.find_hosts in a home of its own."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)

    def find(given=None, here=tmp_path / "somewhere" / "pulid-sdxl"):
        return run.find_hosts(given, here, tmp_path / "cache")

    return find


def make_comfyui(folder: Path, version="0.3.64", requirements="aiohttp>=3\ntorch\ntorchaudio\n") -> Path:
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "comfy" / "supported_models.py").touch()
    (folder / "comfyui_version.py").write_text(f'# made by a build\n__version__ = "{version}"\n')
    (folder / "requirements.txt").write_text(requirements)
    return folder


class TestFindingComfyUI:
    def test_what_is_given_comes_first(self, find_hosts, tmp_path, monkeypatch):
        given, named = make_comfyui(tmp_path / "given"), make_comfyui(tmp_path / "named")
        monkeypatch.setenv("COMFYUI_PATH", str(named))
        assert find_hosts(str(given)) == [given]
        assert find_hosts() == [named]

    def test_several_are_separated_like_path(self, find_hosts, tmp_path):
        first, second = make_comfyui(tmp_path / "a"), make_comfyui(tmp_path / "b")
        assert find_hosts(os.pathsep.join(map(str, (first, second, first)))) == [first, second]

    def test_a_folder_that_is_none_is_refused_in_words(self, find_hosts, tmp_path):
        with pytest.raises(run.Failure, match=r"is not a ComfyUI folder"):
            find_hosts(str(tmp_path))

    def test_the_one_around_the_pack_comes_before_that_at_home_and_an_earlier_clone(self, find_hosts, tmp_path):
        assert find_hosts() == []
        cloned = make_comfyui(tmp_path / "cache" / "ComfyUI")
        assert find_hosts() == [cloned]
        at_home = make_comfyui(tmp_path / "home" / "comfy" / "ComfyUI")
        assert find_hosts() == [at_home]
        around = make_comfyui(tmp_path / "ComfyUI")
        assert find_hosts(here=around / "custom_nodes" / "pulid-sdxl") == [around]

    def test_folders_without_a_comfyui_around_the_pack_are_looked_into(self, find_hosts, tmp_path):
        make_comfyui(tmp_path / "home" / "comfy" / "ComfyUI")  # another one
        (tmp_path / "models" / "pulid").mkdir(parents=True)
        (tmp_path / "custom_nodes").mkdir()
        here = tmp_path / "custom_nodes" / "pulid-sdxl"
        here.symlink_to(ROOT)
        (tmp_path / "models" / "pulid" / "pulid_v1.1.safetensors").write_bytes(b"half")
        assert find_hosts(here=here) == []
        done = subprocess.run([sys.executable, here / "run.py", "models"], capture_output=True, text=True)
        assert f"{tmp_path}/models/pulid/pulid_v1.1.safetensors" in done.stdout

    def test_else_the_official_repository_is_cloned(self, tmp_path, monkeypatch):
        def clone(command, **_):
            assert command[0] == "git" and develop.HOST_TAG in command and develop.HOST_URL in command
            make_comfyui(Path(command[-1]))

        monkeypatch.setattr(subprocess, "run", clone)
        assert develop.clone_host(tmp_path / "cache") == [tmp_path / "cache" / "ComfyUI"]
        assert run.is_comfyui(tmp_path / "cache" / "ComfyUI")

    @pytest.mark.parametrize("problem", [
        subprocess.CalledProcessError(128, "git", stderr="fatal: Could not resolve host\n"),
        subprocess.CalledProcessError(128, "git", stderr=""),
        subprocess.TimeoutExpired("git", 300),
        FileNotFoundError("no git here"),
    ])  # fmt: skip
    def test_without_a_network_it_says_so_and_goes_on(self, tmp_path, monkeypatch, capsys, problem):
        def clone(command, **_):
            Path(command[-1]).mkdir()
            raise problem

        monkeypatch.setattr(subprocess, "run", clone)
        assert develop.clone_host(tmp_path / "cache") == []
        assert "could not clone it" in capsys.readouterr().out
        assert list((tmp_path / "cache").iterdir()) == []


class TestEnvironment:
    def test_own_requirements_are_those_of_pyproject(self):
        tomllib = pytest.importorskip("tomllib")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"]
        assert develop.own_requirements(["demo"]) == project["dependencies"] + extras["demo"]
        both = extras["demo"] + extras["standalone"]
        assert develop.own_requirements() == project["dependencies"] + both + extras["test"]

    def test_requirements_txt_is_the_list_of_dependencies(self):
        listed = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
        assert listed == develop.own_requirements()[: len(listed)]
        assert develop.own_requirements()[len(listed)].startswith("torch==")  # where the extras begin

    def test_comments_and_what_no_test_needs_are_left_out_of_the_hosts(self, tmp_path):
        text = "torch\ntorchaudio\ncomfyui-workflow-templates==1\n\n#more:\nkornia>=0.7 # why\npydantic~=2\n"
        host = make_comfyui(tmp_path / "host", requirements=f"comfyui-frontend-package==1.5.2\n{text}")
        assert develop.host_requirements(host) == ["torchaudio", "kornia>=0.7", "pydantic~=2"]
        assert develop.pinned_frontend(host) == "1.5.2"

    def test_each_front_end_gets_a_folder_of_its_own_once(self, tmp_path, monkeypatch):
        class Fetches(develop.Environment):
            def install(self, requirements):
                done.append(requirements[-1])
                Path(requirements[requirements.index("--target") + 1]).mkdir(parents=True)

        done = []
        monkeypatch.setattr(develop, "FRONTENDS", tmp_path)
        for _ in range(2):
            Fetches(tmp_path / "venv").add_frontends(["1.27.10", None, "1.58.1", "1.27.10"])
        assert done == ["comfyui-frontend-package==1.27.10", "comfyui-frontend-package==1.58.1"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1.27.10", "1.58.1"]

    def test_everything_is_installed_once_and_a_changed_list_again(self, environment, tmp_path):
        host, own = make_comfyui(tmp_path / "host"), develop.own_requirements()
        environment.prepare([host])
        assert environment.installs == [own, [*own, "aiohttp>=3", "torchaudio"]]
        environment.prepare([host])
        environment.prepare([])
        assert len(environment.installs) == 2
        (host / "requirements.txt").write_text("aiohttp>=4\n")
        environment.prepare([host])
        assert [call[-1] for call in environment.installs[2:]] == ["aiohttp>=4"]

    def test_the_newest_host_has_the_last_word_and_another_host_adds_its_own(self, environment, tmp_path):
        new = make_comfyui(tmp_path / "new", "0.18.1", "kornia==2")
        old = make_comfyui(tmp_path / "old", "0.3.64", "kornia==1")
        environment.prepare([new, old])
        assert [call[-1] for call in environment.installs[1:]] == ["kornia==1", "kornia==2"]
        environment.prepare([make_comfyui(tmp_path / "other", "0.8.0", "kornia==1.5")])
        assert [call[-1] for call in environment.installs[3:]] == ["kornia==1.5"]

    @pytest.mark.parametrize("harm", [
        lambda environment: environment.python.unlink(), lambda environment: environment.stamp.write_text("{")
    ])  # fmt: skip
    def test_what_went_or_cannot_be_read_is_made_again_in_full(self, environment, harm):
        environment.prepare([])
        harm(environment)
        environment.prepare([])
        assert json.loads(environment.stamp.read_text()) and len(environment.installs) == 2

    def test_what_a_killed_set_up_left_is_made_anew(self, environment, monkeypatch):
        environment.create()
        monkeypatch.setattr(environment, "has_pip", lambda: False)
        made = []
        monkeypatch.setattr(environment, "create", lambda: made.append("anew"))
        environment.prepare([])
        environment.prepare([])
        assert made == ["anew"] and len(environment.installs) == 1

    def test_a_failed_install_is_said_in_pips_words_and_tried_again(self, tmp_path):
        class Fails(Recorder):
            python = Path(sys.executable)

            def install(self, _):
                develop.Environment.install(self, ["--no-index", "no-such-package-pulid"])

        (tmp_path / "venv").mkdir()
        with pytest.raises(run.Failure, match=r"(?s)could not install.*no-such-package-pulid.*goes on from here"):
            Fails(tmp_path / "venv").prepare([])
        environment = Recorder(tmp_path / "venv")
        environment.prepare([])
        assert len(environment.installs) == 1


class TestTestCommand:
    TESTS = str(ROOT / "tests")

    def test_all_tests_once_and_those_on_a_host_once_per_host(self, environment, tmp_path, capsys):
        pins = ("1.2", "0.3.64"), ("1.9", "0.33.0"), ("1.3", "0.4.0")
        hosts = [make_comfyui(tmp_path / pin, version, f"{develop.FRONTEND}=={pin}") for pin, version in pins]
        assert develop.test(environment, hosts, ["-x"]) == 0
        assert environment.calls == [
            (["-m", "pytest", self.TESTS, f"--ignore={self.TESTS}/host", "-x"], {}),
            *((["-m", "pytest", f"{self.TESTS}/host", "-x"], {"COMFYUI": str(host)}) for host in hosts),
            (
                ["-m", "pytest", f"{self.TESTS}/host/test_browser.py", "-x"],
                {"COMFYUI": str(hosts[1]), "COMFYUI_FRONTEND": develop.NEWEST_FRONTEND},
            ),
        ]
        assert environment.frontends == ["1.2", "1.9", "1.3", develop.NEWEST_FRONTEND]
        rows = [line.split() for line in capsys.readouterr().out.splitlines()[-7:]]
        assert [row[:-1] for row in rows] == [
            ["host", "editor", "passed", "failed", "skipped"],
            ["no", "ComfyUI", "2", "0", "0"],
            ["ComfyUI", "0.3.64", "1.2", "2", "0", "0"],
            ["ComfyUI", "0.33.0", "1.9", "2", "0", "0"],
            ["ComfyUI", "0.4.0", "1.3", "2", "0", "0"],
            ["ComfyUI", "0.33.0", develop.NEWEST_FRONTEND, "2", "0", "0"],
            ["all", "10", "0", "0"],
        ]

    @pytest.mark.parametrize(("version", "pin"), [("0.3.64", "1.27.10"), ("0.46.0", develop.NEWEST_FRONTEND)])
    def test_the_newest_editor_is_left_out_where_nobody_has_it_or_it_is_the_pinned_one(
        self, environment, tmp_path, version, pin
    ):
        host = make_comfyui(tmp_path / "host", version, f"{develop.FRONTEND}=={pin}")
        assert develop.test(environment, [host], []) == 0
        assert len(environment.calls) == 2 and environment.frontends == [pin]

    def test_without_a_host_it_says_so_loudly_and_succeeds(self, environment, capsys):
        assert develop.test(environment, [], []) == 0
        assert len(environment.calls) == 1
        assert "NO COMFYUI" in capsys.readouterr().out

    def test_a_path_narrows_both_parts_down(self, environment, tmp_path):
        host = make_comfyui(tmp_path / "host")
        this, on_host = f"{__file__}::TestTestCommand", f"{self.TESTS}/host/conftest.py"
        assert develop.test(environment, [host], [this, "-k", "host", "--", "--setup-show"]) == 0
        assert develop.test(environment, [host], [on_host]) == 0
        assert [(arguments[2:], variables) for arguments, variables in environment.calls] == [
            ([this, "-k", "host", "--setup-show"], {}), ([on_host], {"COMFYUI": str(host)})
        ]  # fmt: skip

    @pytest.mark.parametrize(("results", "code", "counts"), [
        ([(0, (3, 0, 0, 0)), (1, (3, 1, 0, 1))], 1, ["4", "1", "1"]),
        ([(2, (0, 0, 0, 0)), (0, (1, 0, 0, 0))], 2, ["1", "0", "0"]),
        ([(0, (3, 0, 0, 0)), (5, (0, 0, 0, 0))], 0, ["3", "0", "0"]),
        ([(5, (0, 0, 0, 0)), (5, (0, 0, 0, 0))], 5, ["0", "0", "0"]),
    ])  # fmt: skip
    def test_any_failure_is_the_whole_runs(self, tmp_path, capsys, results, code, counts):
        assert develop.test(Recorder(tmp_path, results), [make_comfyui(tmp_path / "host")], []) == code
        assert capsys.readouterr().out.splitlines()[-1].split()[:-1] == ["all", *counts]

    def test_results_are_counted_as_pytest_has_them(self, monkeypatch, tmp_path):
        monkeypatch.setattr(develop.Environment, "python", sys.executable)
        tests = tmp_path / "test_all_kinds.py"
        tests.write_text(
            "import pytest\n"
            "def test_a(): pass\n"
            "def test_b(): assert 0\n"
            "def test_c(): pytest.skip('no')\n"
            "@pytest.fixture\ndef broken(): 1 / 0\n"
            "def test_d(broken): pass\n"
        )
        arguments = [str(tests), "-q", f"--rootdir={tmp_path}", "-p", "no:cacheprovider"]
        run = develop.pytest(develop.Environment(tmp_path), "a host", "", arguments)
        assert (run.code, run.counts) == (1, {"passed": 1, "failed": 2, "skipped": 1})


class TestLint:
    @pytest.mark.parametrize(("results", "code"), [([0, 0, 0], 0), ([1, 0, 0], 1), ([0, 0, 2], 1)])
    def test_every_check_runs_and_one_finding_is_enough(self, tmp_path, results, code):
        environment = Recorder(tmp_path, results)
        assert develop.lint(environment, [], []) == code
        assert [arguments[1:3] for arguments, _ in environment.calls] == [
            ["ruff", "check"], ["ruff", "format"], ["mypy", f"--config-file={ROOT / 'pyproject.toml'}"]
        ]  # fmt: skip

    def test_mypy_finds_the_pack_under_its_name_whatever_its_folder_is_called(self, tmp_path):
        for _ in range(2):
            develop.link_for_mypy(tmp_path)
        assert (tmp_path / "mypy" / "pulid_sdxl").resolve() == ROOT


class TestDemo:
    def test_a_damaged_photograph_is_refused_before_anything_is_made_of_it(self, tmp_path):
        photo = tmp_path / "me.png"
        photo.write_bytes(b"\x89PNG\r\n\x1a\n" + b"damaged" * 9)
        with pytest.raises(InputError, match=r"me.png cannot be read.*Use a whole PNG"):
            demo.prepare_photo(tmp_path / "input", photo)
        assert list((tmp_path / "input").iterdir()) == []

    @pytest.mark.parametrize(("comfyui", "words"), [
        (None, ["docs.comfy.org/installation", "models --comfyui FOLDER"]),
        (Path("/ComfyUI"), ["models --comfyui /ComfyUI", "main.py --base-directory"]),
    ])  # fmt: skip
    def test_where_it_had_stand_ins_it_says_how_to_get_the_real_thing(self, comfyui, words):
        assert all(word in demo.next_steps(comfyui) for word in words)


class TestCommandLine:
    def test_a_command_gets_the_host_and_all_other_arguments(self, tmp_path, monkeypatch):
        host = make_comfyui(tmp_path / "host")
        monkeypatch.setattr(develop, "run", lambda *arguments: arguments)
        assert run.main(["demo", "--seed", "4", "--comfyui", str(host)]) == ("demo", [host], ["--seed", "4"])

    @pytest.mark.parametrize(("name", "named", "argument"), [
        ("demo", ["--comfyui", "{}"], "--seed=4"), ("conformance", ["--comfyui={}"], ".")
    ])  # fmt: skip
    def test_a_tool_is_told_the_host(self, tmp_path, name, named, argument):
        environment, host = Recorder(tmp_path / "venv", [3, 3]), make_comfyui(tmp_path / "host")
        assert develop.run(name, [host], [argument], environment) == 3
        assert environment.calls == [([str(TOOLS), name, *(each.format(host) for each in named), argument], {})]

    @pytest.mark.parametrize(("name", "argument", "words"), [
        ("demo", "--help", "--photo"), ("demo", "--sed=4", "--sed"), ("demo", f"--photo={__file__}", "is no picture"),
        ("demo", "--size=large", "896x1152"), ("demo", "--size=0x64", "896x1152"), ("demo", "--steps=0", "from 1 on"),
        ("conformance", "nowhere", "is not a folder"), ("lint", "-x", "-x"),
        ("test", "-h", "pytest"), ("test", "--kk=x", "--kk"), ("test", "tests/nowhere", "is not there"),
        ("bench", "--help", "--quick"), ("bench", "--only=steps", "need --device"), ("bench", "--quik", "--quik"),
        ("bench", "--json=no/folder/x.json", "is not a folder"), ("bench", "--device=tpu", "cuda"),
    ])  # fmt: skip
    def test_arguments_are_checked_before_anything_is_set_up(self, tmp_path, capsys, name, argument, words):
        environment = Recorder(tmp_path / "venv")
        with pytest.raises(SystemExit):
            develop.run(name, [], [argument], environment)
        assert words in "".join(capsys.readouterr()) and environment.installs == []

    def test_pytests_options_stand_among_paths_and_behind_a_rule_those_that_are_not_known(self):
        known = arguments.test(["-xvk", "a or b", "tests/pulid", "--durations=3", f"{__file__}::TestLint", "--", "--x"])
        assert (known.k, known.durations, known.paths) == ("a or b", 3, ["tests/pulid", f"{__file__}::TestLint"])

    @pytest.mark.parametrize("name", sorted(run.COMMANDS))
    def test_help_is_given_and_nothing_else_needed(self, monkeypatch, capsys, name):
        monkeypatch.setenv("COMFYUI_PATH", "/nowhere")
        with pytest.raises(SystemExit) as ended:
            run.main([name, "--help"])
        assert ended.value.code == 0 and f"run.py {name}" in capsys.readouterr().out

    @pytest.mark.parametrize(("with_host", "extras"), [(True, ["demo"]), (False, ["demo", "standalone"])])
    def test_the_demo_installs_what_it_needs_and_no_more(self, tmp_path, monkeypatch, with_host, extras):
        monkeypatch.setattr(develop, "clone_host", lambda: [])
        environment = Recorder(tmp_path / "venv", [0])
        hosts = [make_comfyui(tmp_path / "host", requirements="")] if with_host else []
        develop.run("demo", hosts, [], environment)
        assert environment.installs[0] == develop.own_requirements(extras)

    def test_lines_of_run_py_and_of_what_it_starts_come_in_order_when_redirected(self, tmp_path):
        code = (
            "import sys; from pathlib import Path; from pulid_sdxl.tools.develop import Environment\n"
            "Environment.python = sys.executable\n"
            "Environment(Path()).call('-c', 'import sys; print(1); print(2, file=sys.stderr); print(3)')\n"
        )
        command = [sys.executable, str(TOOLS), "-c", code]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.stdout.split() == ["1", "2", "3"]

    def test_a_folder_that_cannot_be_written_to_is_named_with_what_to_do(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(run.Failure, match=r"cannot be written to.*Copy the folder"):
            develop.run("demo", [], [], Recorder(tmp_path / "venv"))

    def test_an_older_python_is_told_so_in_one_sentence(self):
        code = (ROOT / "run.py").read_text(encoding="utf-8")
        ast.parse(code, feature_version=(3, 7))  # it gets that far
        old = "import sys; sys.version_info = (3, 8, 0); exec(compile(sys.stdin.read(), 'run.py', 'exec'))"
        done = subprocess.run([sys.executable, "-c", old], input=code, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr == "PuLID for SDXL needs Python 3.10 or newer, this is 3.8. Start run.py with a newer one.\n"

    @pytest.mark.parametrize(("name", "clones"), [("conformance", 0), ("lint", 0), ("demo", 1), ("test", 1)])
    def test_a_host_is_cloned_only_where_it_is_needed(self, tmp_path, monkeypatch, name, clones):
        cloned = []
        monkeypatch.setattr(develop, "clone_host", lambda: cloned.append("a clone") or [])
        rest = [str(tmp_path)] if name == "conformance" else []
        develop.run(name, [], rest, Recorder(tmp_path, [] if name == "test" else [0, 0, 0]))
        assert len(cloned) == clones

    @pytest.mark.parametrize(("line", "words"), [
        ("demo --comfyui nowhere", "is not a ComfyUI folder"), ("--comfyui nowhere demo", "is not a ComfyUI folder"),
        ("models --models . --extra-model-paths no.yaml", "no.yaml cannot be read"),
        ("hosted list --user-directory nowhere", "nowhere is not a folder"),
        ("hosted forget 7 --user-directory docs", "Not known here: 7. Nothing was forgotten"),
        ("batch --workflow no.json --table no.csv --out . --server http://127.0.0.1:9", "no.json could not be read"),
    ])  # fmt: skip
    def test_what_goes_wrong_is_said_in_words(self, capsys, monkeypatch, line, words):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # before packages are missed
        assert run.main(line.split()) == 2
        assert words in capsys.readouterr().err

    def test_a_command_is_required(self, capsys):
        with pytest.raises(SystemExit):
            run.main([])
        assert "python run.py doctor" in capsys.readouterr().err

    def test_its_help_lists_the_commands(self):
        done = subprocess.run([sys.executable, str(ROOT / "run.py"), "--help"], capture_output=True, text=True)
        assert done.returncode == 0
        assert {"demo", "test", "lint", "conformance", "models", "doctor"} <= set(done.stdout.split())
