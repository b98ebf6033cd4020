"""What the doctor finds on machines that are wrong in the ways people report, and the commands that show it."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from pulid_sdxl import run as commands
from pulid_sdxl.models import catalogue, doctor, extra_model_paths, inventory, locate, onnx_providers
from pulid_sdxl.models.doctor import Finding
from pulid_sdxl.pulid import packages
from pulid_sdxl.pulid.errors import InputError, MissingPackage
from pulid_sdxl.pulid.packages import import_package, pip_command
from pulid_sdxl.tools import ROOT, develop
from pulid_sdxl.tools.fakes.fake_hub import answer, serving
from pulid_sdxl.tools.fakes.folders import folders_below


def write(path, content=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def sized(path, size):
    write(path)
    os.truncate(path, size)  # a hole: no disk is used
    return path


# ---- Packages ----


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Puts a package of any name and content in front of all others."""
    monkeypatch.syspath_prepend(tmp_path / "packages")

    tops = set()

    def loaded():
        return [key for key in sys.modules if key.partition(".")[0] in tops]

    def put(name, source):
        write(tmp_path / "packages" / name / "__init__.py", source)
        tops.add(name.partition("/")[0])
        for key in loaded():
            monkeypatch.delitem(sys.modules, key)

    yield put
    for key in loaded():
        del sys.modules[key]


HOLLOW = ["cv2", "onnxruntime", "insightface.model_zoo", "facexlib.detection.retinaface", "facexlib.parsing.bisenet"]


@pytest.mark.parametrize("module", [*HOLLOW, "torchvision"])
def test_a_hollow_package_is_named_with_how_it_got_so_and_the_command(package, module):
    top, *below = module.split(".")
    for number in range(len(below) + 1):
        package("/".join([top, *below[:number]]), "")
    name = {"cv2": "opencv-python"}.get(top, top)

    with pytest.raises(MissingPackage) as caught:
        import_package(module)

    for words in (repr(top), "hollow", "mixed" if top in ("cv2", "onnxruntime") else "removed in part", name):
        assert words in str(caught.value)
    if top not in ("facexlib",) or "detection" in module:  # what the doctor tries
        [finding] = doctor.try_package(top)
        assert "hollow" in finding.text
        assert "pip" in finding.remedy


@pytest.mark.parametrize("source", [
    "raise OSError('libcudart.so.12: cannot open shared object file')",
    "raise ImportError('DLL load failed while importing x')", "def broken(",
])  # fmt: skip
def test_a_broken_package_is_named_with_its_own_words_and_the_command(package, source):
    package("insightface", source)

    with pytest.raises(MissingPackage) as caught:
        import_package("insightface.model_zoo")
    [finding] = doctor.try_package("insightface")

    command = f'"{sys.executable}" -m pip install --upgrade --force-reinstall --no-deps insightface'
    assert command in str(caught.value)
    assert "is installed, but cannot be imported" in str(caught.value)
    assert finding.text.endswith("cannot be imported") and command in finding.remedy


@pytest.mark.parametrize("module", HOLLOW[2:])
def test_a_package_without_the_part_that_is_needed_is_hollow(package, module):
    package(module.partition(".")[0], "")
    with pytest.raises(MissingPackage, match=rf"is installed, but hollow: {module.rpartition('.')[0]}"):
        import_package(module)


@pytest.mark.parametrize("top", ["cv2", "onnxruntime"])
def test_a_folder_that_was_left_behind_is_no_package(package, monkeypatch, tmp_path, top):
    package(top, "")
    (tmp_path / "packages" / top / "__init__.py").unlink()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages")])
    with pytest.raises(MissingPackage, match=rf"(?s)'{top}' is installed, but hollow: {top}\..*uninstall -y.*install"):
        import_package(top)


@pytest.mark.parametrize(("other", "module"), [("cv2", "insightface.model_zoo"), ("torchvision", "facexlib.parsing")])
def test_a_fault_of_what_a_package_is_built_on_is_told_as_that(package, other, module):
    package(other, "")
    with pytest.raises(MissingPackage, match=f"^The Python package '{other}' is installed, but hollow"):
        import_package(module)


@pytest.mark.parametrize("source", ["raise ImportError('DLL load failed')", ""], ids=["broken", "hollow"])
@pytest.mark.parametrize(("builds", "commands"), [
    (["onnxruntime-gpu"], "onnxruntime-gpu"),
    (["onnxruntime", "onnxruntime-gpu"], "uninstall -y onnxruntime onnxruntime-gpu .*install onnxruntime-gpu\n"),
    (["opencv-python", "opencv-contrib-python"], "uninstall -y opencv-python .*install opencv-contrib-python\n"),
])  # fmt: skip
def test_the_build_that_was_chosen_is_the_one_to_install_and_never_a_second(
    package, monkeypatch, builds, commands, source
):
    top = "cv2" if "opencv" in builds[0] else "onnxruntime"
    package(top, source)
    monkeypatch.setattr(packages, "installed", lambda of: builds)
    with pytest.raises(MissingPackage, match=f"(?s){commands}") as caught:
        import_package(top)
    assert "install onnxruntime\n" not in str(caught.value)
    assert ("spoil each other" in str(caught.value)) == (len(builds) > 1 and bool(source))


def test_a_package_of_which_pip_has_the_record_alone_is_removed_first(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(MissingPackage, match=r"(?s)though pip believes.*uninstall -y scikit-image\n.*--upgrade scikit"):
        import_package("skimage")


def test_torchvision_stays_the_one_of_this_torch(package, monkeypatch):
    package("torchvision", "raise OSError('undefined symbol')")
    monkeypatch.setattr(packages, "version", lambda name: "0.21.0+cu124")
    with pytest.raises(MissingPackage, match=r"torchvision==0\.21\.0 --index-url \S+/whl/cu124\n"):
        import_package("torchvision")


def test_a_package_whose_own_needs_are_missing_names_those(package):
    package("facexlib", "import filterpy_of_another_world")
    assert "pip install --upgrade filterpy_of_another_world" in doctor.try_package("facexlib")[0].remedy


def test_a_portable_python_is_told_to_stay_alone(monkeypatch):
    monkeypatch.setattr(sys, "executable", "C:\\ComfyUI\\python_embeded\\python.exe")
    monkeypatch.setattr(sys, "flags", type("Flags", (), {"no_user_site": 1}))

    assert pip_command("install", "x") == '"C:\\ComfyUI\\python_embeded\\python.exe" -s -m pip install x'


class Distribution:
    def __init__(self, name):
        self.metadata, self.version = {"Name": name}, "1.0"


@pytest.mark.parametrize(("names", "keep"), [
    (["onnxruntime", "onnxruntime_directml"], "onnxruntime-directml"),
    (["onnxruntime", "onnxruntime-gpu", "onnxruntime-rocm"], "onnxruntime-gpu"), (["onnxruntime-gpu"], None),
])  # fmt: skip
def test_two_builds_of_onnxruntime_are_one_too_many(monkeypatch, names, keep):
    names = [*names, "onnx", "onnxruntime-extensions", "numpy"]
    monkeypatch.setattr(doctor, "distributions", lambda: [Distribution(name) for name in names])

    remedies = [finding.remedy for finding in doctor.builds()]

    assert len(remedies) == bool(keep)
    for remedy in remedies:
        assert "uninstall -y onnxruntime" in remedy and "extensions" not in remedy
        assert remedy.endswith(f"pip install {keep}")


def test_a_provider_that_is_offered_and_does_not_load_is_told_with_its_reason(monkeypatch):
    monkeypatch.setattr(doctor, "available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnx_providers, "why_not", lambda provider: "OSError: libcublasLt.so.12: cannot open")
    session = type("Session", (), {"get_providers": lambda self: ["CPUExecutionProvider"]})
    monkeypatch.setattr(import_package("onnxruntime"), "InferenceSession", lambda *_, **__: session())
    first = []
    monkeypatch.setattr(doctor, "import_package", first.append)

    cuda, cpu = doctor.onnx_providers()

    assert first == ["torch"]  # whose libraries a provider finds in ComfyUI
    assert cuda.text == "CUDAExecutionProvider does not load: OSError: libcublasLt.so.12: cannot open"
    assert cuda.remedy and not cpu.remedy


@pytest.mark.skipif(sys.platform != "linux", reason="names of libraries as on Linux")
def test_the_systems_words_on_a_provider_hold_no_folder(monkeypatch, tmp_path):
    assert "is not part of this onnxruntime" in onnx_providers.why_not("CUDAExecutionProvider")
    for library in (onnx_providers.SHARED, "onnxruntime_providers_cuda"):
        write(tmp_path / "home" / "capi" / f"lib{library}.so", b"no library")
    monkeypatch.setattr(import_package("onnxruntime"), "__file__", str(tmp_path / "home" / "__init__.py"))

    reason = onnx_providers.why_not("CUDAExecutionProvider")

    assert "libonnxruntime_providers_shared.so" in reason and str(tmp_path) not in reason


# ---- ComfyUI and other packs ----


@pytest.mark.parametrize(("version", "old"), [("0.3.63", True), ("0.3.64", False), ("0.18.1", False), ("1.0", False)])
def test_a_comfyui_that_is_too_old_is_told(tmp_path, version, old):
    write(tmp_path / "comfyui_version.py", f'__version__ = "{version}"')

    [finding] = doctor.comfyui_version(tmp_path)

    assert version in finding.text
    assert bool(finding.remedy) is old


def test_other_packs_are_found_by_the_nodes_they_name_and_never_run(tmp_path):
    source = "raise SystemExit\nNODES = {\"ApplyPulid\": 1, 'PulidModelLoader': 2}"
    write(tmp_path / "PuLID_ComfyUI" / "pulid.py", source)
    write(tmp_path / "a copy" / "deep" / "nodes.py", 'node_id="PuLID_Loader"')
    write(tmp_path / "other" / "nodes.py", '"KSampler"; Pulid = "ApplyPulidNot"')
    write(tmp_path / "old.disabled" / "nodes.py", '"ApplyPulid"')
    (tmp_path / "this one").symlink_to(ROOT)

    other, copy = doctor.neighbours(tmp_path)

    assert other.text.startswith("PuLID_ComfyUI has ApplyPulid, PulidModelLoader; older workflows run on its nodes")
    assert "keep one of the two" in copy.remedy


# ---- Files ----


def test_whole_altered_and_missing_files_are_told_apart(tmp_path):
    sized(tmp_path / "pulid" / catalogue.V1_1.name, catalogue.V1_1.size)
    sized(tmp_path / "clip_vision" / catalogue.EVA_CLIP.name, 28449231)

    findings = doctor.files(folders_below(tmp_path))

    whole, cut, missing = findings
    assert whole.text.startswith("size right") and not whole.remedy
    assert "28449231 bytes instead of 856461210" in cut.text and "Delete it" in cut.remedy
    assert "EVA02_CLIP_L_336_psz14_s6B.pt" in missing.text and "glintr100.onnx" in missing.text
    assert "pulid" not in missing.text.partition(":")[2].partition(",")[0]


def test_one_of_several_choices_is_enough_and_the_zip_stands_for_both_its_files(tmp_path):
    sized(tmp_path / "pulid" / catalogue.V1.name, catalogue.V1.size)
    assert len(inventory.lacking(inventory.inventory(folders_below(tmp_path)))) == 5

    sized(tmp_path / "insightface" / "models" / "antelopev2.zip", catalogue.ANTELOPEV2_ZIP.size)
    lacking = inventory.lacking(inventory.inventory(folders_below(tmp_path)))
    assert not {catalogue.V1_1, catalogue.SCRFD, catalogue.GLINTR100} & set(lacking)


def test_hashes_are_compared_where_asked_for(tmp_path):
    sized(tmp_path / "pulid" / catalogue.V1_1.name, catalogue.V1_1.size)  # nothing but zeros
    heard = []

    entries = inventory.inventory(folders_below(tmp_path), lambda file, done: heard.append(done))

    [entry] = [entry for entry in entries if entry.path]
    assert entry.fault.startswith("sha256 ") and not entry.whole
    assert heard[-1] == catalogue.V1_1.size
    assert "ALTERED" in inventory.table(entries) and entry.fault in inventory.table(entries)
    assert "ALTERED" not in inventory.table(inventory.inventory(folders_below(tmp_path)))


# ---- The text ----


SECRET = "hf_0123456789"


def test_a_report_can_be_pasted_in_public(tmp_path, monkeypatch):
    home = tmp_path / "alice"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.setattr(sys, "executable", str(home / "venv" / "bin" / "python"))
    environment = {"HTTPS_PROXY": f"http://alice:{SECRET}@proxy.example:3128", "HF_TOKEN": SECRET, "FAL_KEY": SECRET}
    folders = folders_below(home / "ComfyUI" / "models", locate.other_programs({}, home))
    write(home / "ComfyUI" / "comfyui_version.py", '__version__ = "0.3.64"')
    sized(home / "ComfyUI" / "models" / "pulid" / "pulid_v1.1.safetensors", 5)

    findings = doctor.examine(folders, home / "ComfyUI", None, lambda name: [Finding(name, f"{home}/x")], environment)
    text = doctor.text_of(findings)

    assert str(home) not in text and "alice" not in text and SECRET not in text
    assert "HTTPS_PROXY is proxy.example" in text
    assert "pulid_v1.1.safetensors" in text and "0.3.64, ~" in text
    assert '"$HOME/venv/bin/python"' in text or "%USERPROFILE%" in text
    assert text.index("To do") > text.index("ComfyUI")
    assert doctor.text_of([Finding("a", "b")]).endswith("Nothing to do.")


# ---- extra_model_paths.yaml ----

YAML = """
# a comment
comfyui:
    base_path: {base}
    is_default: true
    pulid: models/pulid
    clip: |
        models/clip
        other/clip
    loras: models/loras
other:
    insightface: relative/insightface
empty:
"""


def test_paths_of_a_yaml_are_those_of_comfyui(tmp_path):
    yaml = write(tmp_path / "config" / "extra_model_paths.yaml", YAML.format(base=tmp_path / "big"))

    found = extra_model_paths.model_paths(tmp_path / "models", [yaml])

    assert found["pulid"] == [tmp_path / "big/models/pulid", tmp_path / "models/pulid"]
    assert found["insightface"] == [tmp_path / "models/insightface", tmp_path / "config/relative/insightface"]
    assert found["text_encoders"] == [
        tmp_path / "big/other/clip", tmp_path / "big/models/clip",
        tmp_path / "models/text_encoders", tmp_path / "models/clip",
    ]  # fmt: skip
    assert "loras" not in found


@pytest.mark.parametrize("content", [b"a: [1", b"- a\n- b", b"\xff\xfe\x00", b"just text"])
def test_a_yaml_that_is_none_is_told(tmp_path, content):
    with pytest.raises(InputError, match=r"paths\.yaml"):
        extra_model_paths.model_paths(tmp_path, [write(tmp_path / "paths.yaml", content)])


def test_a_python_without_yaml_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(MissingPackage, match="yaml"):
        extra_model_paths.model_paths(tmp_path, [write(tmp_path / "paths.yaml", "a:")])


# ---- run.py models, run.py doctor ----


@pytest.fixture
def run(monkeypatch):
    """run.py on a machine without a ComfyUI; what developers use is not reached."""
    monkeypatch.setattr(commands, "find_hosts", lambda given: [])
    monkeypatch.setattr(develop, "run", lambda *_: pytest.fail("a developers' command"))
    return commands


SMALL = b"small weights"
PUBLISHED = {"size": len(SMALL), "sha256": hashlib.sha256(SMALL).hexdigest()}


@pytest.fixture
def published(run, monkeypatch):
    """The catalogue's needs as six small files on a hub of this machine; and `run.py models` with them."""
    needs = tuple(replace(need, files=(replace(need.files[0], **PUBLISHED),)) for need in catalogue.NEEDS)
    with serving(SMALL) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.models = lambda folder, *more: run.models([], ["--models", str(folder), *more], needs)
        yield server


def test_models_lists_every_file_and_fails_while_some_are_missing(run, tmp_path, capsys):
    assert run.main(["models", "--models", str(tmp_path)]) == 1

    shown = capsys.readouterr().out
    for file in catalogue.CATALOGUE:
        assert file.name in shown and file.url in shown and file.licence in shown
    assert shown.count("no hash is published") == 2
    assert "PuLID_Loader: pulid_file" in shown and "The loader lacks pulid_v1.1.safetensors" in shown


@pytest.mark.parametrize(("typed", "fetched"), [("--accept-licence", 6), ("y", 6), ("n", 4), (None, 4)])
def test_models_fetches_what_is_missing_and_antelopev2_for_who_accepts_its_licence(
    tmp_path, capsys, monkeypatch, published, typed, fetched
):
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: typed is not None})())
    monkeypatch.setattr("builtins.input", lambda question: typed)
    accepted = [typed] if typed == "--accept-licence" else []

    code = published.models(tmp_path, "--download", *accepted)

    assert len(published.fetched) == fetched
    assert code == (0 if fetched == 6 else 1)
    shown = capsys.readouterr().out
    assert "Licence: non-commercial research only" in shown
    assert ("this licence has to be accepted" in shown) is (fetched == 4)
    if fetched == 6:
        assert (tmp_path / "insightface/models/antelopev2/glintr100.onnx").read_bytes() == SMALL
        assert published.models(tmp_path) == 0
        assert capsys.readouterr().out.count("hash right") == 6
        assert published.models(tmp_path, "--download") == 0
        assert len(published.fetched) == 6


def test_models_fetches_what_is_named_and_replaces_what_is_altered(tmp_path, capsys, published):
    altered = write(tmp_path / "facexlib" / "parsing_bisenet.pth", b"small weighty")
    published.plan += [answer(403)] * 2

    assert published.models(tmp_path, "--download", "pulid_v1.1.safetensors") == 1
    assert "127.0.0.1 refuses to give it (HTTP 403)" in capsys.readouterr().out
    assert published.models(tmp_path, "--download", "parsing_bisenet.pth") == 1  # others lack

    assert altered.read_bytes() == SMALL
    assert published.fetched == ["camenduru/PuLID/facexlib/parsing_bisenet.pth"]


def test_an_altered_file_of_the_right_size_is_named_by_models_and_doctor_and_after_a_download(
    run, tmp_path, capsys, monkeypatch, published
):
    write(tmp_path / "facexlib" / "parsing_bisenet.pth", b"small weightz")
    assert published.models(tmp_path, "--download", "pulid_v1.1.safetensors") == 1
    assert "ALTERED" in capsys.readouterr().out

    monkeypatch.setattr(run, "ask", lambda package: [])
    sized(tmp_path / catalogue.SCRFD.place, catalogue.SCRFD.size)
    for command in ("models", "doctor"):
        run.main([command, "--models", str(tmp_path)])
        assert f"instead of {catalogue.SCRFD.sha256}" in capsys.readouterr().out


@pytest.mark.parametrize(("remedy", "code", "last"), [("", 0, "Nothing to do."), ("Mend it.", 1, "Mend it.")])
def test_doctor_fails_while_something_is_to_be_done(run, monkeypatch, tmp_path, capsys, remedy, code, last):
    monkeypatch.setattr(run, "ask", lambda package: [Finding(package, "1.0", remedy if package == "facexlib" else "")])
    monkeypatch.setattr(doctor, "files", lambda folders, progress: [Finding("file", "hash right")])
    assert run.main(["doctor", "--models", str(tmp_path)]) == code
    assert capsys.readouterr().out.strip().endswith(last)


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "Name its folder with --comfyui, or its models with --models"),
    (["--models", ".", "--download", "https://evil.example/x"], "No file 'https://evil.example/x' is known"),
])  # fmt: skip
def test_models_says_what_it_does_not_know(run, capsys, arguments, words):
    assert run.main(["models", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_models_looks_where_the_yaml_points(run, tmp_path, capsys):
    sized(tmp_path / "disk" / "p" / catalogue.V1.name, catalogue.V1.size)
    yaml = write(tmp_path / "y.yaml", f"a:\n  base_path: {tmp_path / 'disk'}\n  pulid: p\n")

    run.main(["models", "--models", str(tmp_path), "--extra-model-paths", str(yaml)])

    assert str(tmp_path / "disk" / "p" / catalogue.V1.name) in capsys.readouterr().out


def test_doctor_asks_each_package_in_a_process_of_its_own(run, package, monkeypatch, tmp_path):
    package("insightface", "import os; os.abort()")
    package("cv2", "print('a greeting'); __version__, resize = '1', print")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))

    [crashed], fine = run.ask("insightface"), run.ask("cv2")

    assert "ends Python (exit code" in crashed.text and "--force-reinstall" in crashed.remedy
    assert fine[0].topic == "cv2" and not fine[0].remedy


def test_doctor_and_models_run_where_nothing_is_installed_yet(tmp_path):
    """No site-packages, a home of its own."""
    (tmp_path / "pulid").mkdir()
    environment = {**os.environ, "HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "COMFYUI_PATH": ""}

    def said(*arguments):
        command = [sys.executable, "-I", "-S", str(ROOT / "run.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 1, done.stderr
        return done.stdout

    models = ["models", "--models", str(tmp_path)]
    assert "The loader lacks pulid_v1.1.safetensors" in said(*models)
    assert "pip install --upgrade huggingface_hub" in said(*models, "--download", "pulid_v1.1.safetensors")
    assert not list((tmp_path / "pulid").iterdir())
    report = said("doctor")
    assert "no torch here, so this is not ComfyUI's Python" in report
    assert "ComfyUI   none found" in report
