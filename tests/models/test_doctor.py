"""What the doctor finds on machines that are wrong in the ways people report, and the commands that show it."""

import hashlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pulid_sdxl.models import catalogue, doctor, extra_model_paths, inventory, locate, onnx_providers
from pulid_sdxl.models.doctor import Finding
from pulid_sdxl.models.locate import ModelFolders
from pulid_sdxl.pulid.errors import InputError, MissingPackage
from pulid_sdxl.pulid.packages import import_package, pip_command
from pulid_sdxl.tools.fakes.fake_hub import answer, serving

ROOT = Path(__file__).parents[2]


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

    def put(name, source):
        write(tmp_path / "packages" / name / "__init__.py", source)
        for loaded in [key for key in sys.modules if key.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, loaded)

    return put


@pytest.mark.parametrize(
    "source",
    [
        "raise OSError('libcudart.so.12: cannot open shared object file')",
        "raise AttributeError('_ARRAY_API not found')",
        "raise ImportError('DLL load failed while importing x')",
        "raise RuntimeError('module compiled against ABI version 0x1000009')",
        "def broken(",
    ],
)
def test_a_broken_package_is_named_with_its_own_words_and_the_command(package, source):
    package("insightface", source)

    with pytest.raises(MissingPackage) as caught:
        import_package("insightface.model_zoo")
    [finding] = doctor.try_package("insightface")

    command = f'"{sys.executable}" -m pip install --upgrade --force-reinstall --no-deps insightface'
    assert command in str(caught.value)
    assert "is installed, but cannot be imported" in str(caught.value)
    assert finding.text.endswith("cannot be imported") and command in finding.remedy


def test_a_package_whose_own_needs_are_missing_names_those(package):
    package("facexlib", "import filterpy_of_another_world")

    [finding] = doctor.try_package("facexlib")

    assert "pip install --upgrade filterpy_of_another_world" in finding.remedy


def test_a_portable_python_is_told_to_stay_alone(monkeypatch):
    monkeypatch.setattr(sys, "executable", "C:\\ComfyUI\\python_embeded\\python.exe")
    flags = type("Flags", (), {"no_user_site": 1})
    monkeypatch.setattr(sys, "flags", flags)

    assert pip_command("install", "x") == '"C:\\ComfyUI\\python_embeded\\python.exe" -s -m pip install x'


class Distribution:
    def __init__(self, name, version="1.0"):
        self.metadata, self.version = {"Name": name}, version


@pytest.mark.parametrize(
    "others", [["onnxruntime-gpu"], ["onnxruntime_directml"], ["onnxruntime-gpu", "onnxruntime-rocm"]]
)
def test_two_builds_of_onnxruntime_are_one_too_many(monkeypatch, others):
    names = ["onnxruntime", *others, "onnx", "onnxruntime-extensions", "numpy"]
    monkeypatch.setattr(doctor, "distributions", lambda: [Distribution(name) for name in names])

    [finding] = doctor.builds()

    gpu = sorted(name.replace("_", "-") for name in others)[0]
    assert "uninstall -y onnxruntime" in finding.remedy and "extensions" not in finding.remedy
    assert finding.remedy.endswith(f"pip install {gpu}")


def test_one_build_of_onnxruntime_is_fine(monkeypatch):
    monkeypatch.setattr(doctor, "distributions", lambda: [Distribution("onnxruntime-gpu"), Distribution("onnx")])
    assert doctor.builds() == []


def test_a_provider_that_is_offered_and_does_not_load_is_told_with_its_reason(monkeypatch):
    monkeypatch.setattr(doctor, "available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(onnx_providers, "why_not", lambda provider: "OSError: libcublasLt.so.12: cannot open")
    session = type("Session", (), {"get_providers": lambda self: ["CPUExecutionProvider"]})
    monkeypatch.setattr(import_package("onnxruntime"), "InferenceSession", lambda *_, **__: session())

    cuda, cpu = doctor.onnx_providers()

    assert cuda.text == "CUDAExecutionProvider does not load: OSError: libcublasLt.so.12: cannot open"
    assert cuda.remedy and not cpu.remedy


def test_a_provider_that_this_build_lacks_gives_the_reason():
    assert "is not part of this onnxruntime" in onnx_providers.why_not("CUDAExecutionProvider")


@pytest.mark.skipif(sys.platform != "linux", reason="names of libraries as on Linux")
def test_the_systems_words_on_a_provider_hold_no_folder(monkeypatch, tmp_path):
    for library in (onnx_providers.SHARED, "onnxruntime_providers_cuda"):
        write(tmp_path / "home" / "capi" / f"lib{library}.so", b"no library")
    monkeypatch.setattr(import_package("onnxruntime"), "__file__", str(tmp_path / "home" / "__init__.py"))

    reason = onnx_providers.why_not("CUDAExecutionProvider")

    assert "libonnxruntime_providers_shared.so" in reason and str(tmp_path) not in reason


def test_rocm_goes_by_its_present_name_first():
    assert list(onnx_providers.PROVIDERS)[1:3] == ["MIGraphX", "ROCM"]
    assert list(onnx_providers.PROVIDERS)[-1] == "CPU"


# ---- ComfyUI and other packs ----


@pytest.mark.parametrize(("version", "old"), [("0.3.63", True), ("0.3.64", False), ("0.18.1", False), ("1.0", False)])
def test_a_comfyui_that_is_too_old_is_told(tmp_path, version, old):
    write(tmp_path / "comfyui_version.py", f'__version__ = "{version}"')

    [finding] = doctor.comfyui_version(tmp_path)

    assert version in finding.text
    assert bool(finding.remedy) is old


def test_other_packs_are_found_by_the_nodes_they_name_and_never_run(tmp_path):
    write(
        tmp_path / "PuLID_ComfyUI" / "pulid.py", "raise SystemExit\nNODES = {\"ApplyPulid\": 1, 'PulidModelLoader': 2}"
    )
    write(tmp_path / "a copy" / "deep" / "nodes.py", 'node_id="PuLID_Loader"')
    write(tmp_path / "other" / "nodes.py", '"KSampler"; Pulid = "ApplyPulidNot"')
    write(tmp_path / "old.disabled" / "nodes.py", '"ApplyPulid"')
    (tmp_path / "this one").symlink_to(ROOT)

    other, copy = doctor.neighbours(tmp_path)

    assert other == Finding(
        "other pack", "PuLID_ComfyUI has ApplyPulid, PulidModelLoader; older workflows run on its nodes, not on ours"
    )
    assert "keep one of the two" in copy.remedy


# ---- Files ----


def test_whole_altered_and_missing_files_are_told_apart(tmp_path):
    sized(tmp_path / "pulid" / catalogue.V1_1.name, catalogue.V1_1.size)
    sized(tmp_path / "clip_vision" / catalogue.EVA_CLIP.name, 28449231)

    findings = doctor.files(ModelFolders.below(tmp_path))

    whole, cut, missing = findings
    assert whole.text.startswith("size right") and not whole.remedy
    assert "28449231 bytes instead of 856461210" in cut.text and "Delete it" in cut.remedy
    assert "EVA02_CLIP_L_336_psz14_s6B.pt" in missing.text and "glintr100.onnx" in missing.text
    assert "pulid" not in missing.text.partition(":")[2].partition(",")[0]


def test_one_of_several_choices_is_enough(tmp_path):
    sized(tmp_path / "pulid" / catalogue.V1.name, catalogue.V1.size)

    lacking = inventory.lacking(inventory.inventory(ModelFolders.below(tmp_path)))

    assert catalogue.V1_1 not in lacking and len(lacking) == 5


def test_the_zip_stands_for_both_its_files(tmp_path):
    sized(tmp_path / "insightface" / "models" / "antelopev2.zip", catalogue.ANTELOPEV2_ZIP.size)

    lacking = inventory.lacking(inventory.inventory(ModelFolders.below(tmp_path)))

    assert not {catalogue.SCRFD, catalogue.GLINTR100} & set(lacking)


def test_hashes_are_compared_where_asked_for(tmp_path):
    sized(tmp_path / "pulid" / catalogue.V1_1.name, catalogue.V1_1.size)  # nothing but zeros
    heard = []

    entries = inventory.inventory(ModelFolders.below(tmp_path), lambda file, done: heard.append(done))

    [entry] = [entry for entry in entries if entry.path]
    assert entry.fault.startswith("sha256 ") and not entry.whole
    assert heard[-1] == catalogue.V1_1.size
    assert "ALTERED" in inventory.table(entries) and entry.fault in inventory.table(entries)


# ---- The text ----


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "alice"))
    return tmp_path / "alice"


SECRET = "hf_0123456789"


def test_a_report_can_be_pasted_in_public(home, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(home / "venv" / "bin" / "python"))
    environment = {"HTTPS_PROXY": f"http://alice:{SECRET}@proxy.example:3128", "HF_TOKEN": SECRET, "FAL_KEY": SECRET}
    folders = ModelFolders.below(home / "ComfyUI" / "models", locate.other_programs({}, home))
    write(home / "ComfyUI" / "comfyui_version.py", '__version__ = "0.3.64"')
    sized(home / "ComfyUI" / "models" / "pulid" / "pulid_v1.1.safetensors", 5)

    text = doctor.report(folders, home / "ComfyUI", None, lambda name: [Finding(name, f"{home}/x")], environment)

    assert str(home) not in text and "alice" not in text and SECRET not in text
    assert "HTTPS_PROXY is proxy.example" in text
    assert "pulid_v1.1.safetensors" in text and "0.3.64, ~" in text
    assert '"$HOME/venv/bin/python"' in text or "%USERPROFILE%" in text
    assert text.index("To do") > text.index("ComfyUI")


def test_a_report_of_a_sound_installation_says_so():
    text = doctor.text_of([Finding("a", "b")])
    assert text.endswith("Nothing to do.")


def test_findings_survive_the_way_from_another_process():
    findings = [Finding("a", "b\n√", "c")]
    assert doctor.from_json(doctor.to_json(findings)) == findings


def test_a_loader_that_fails_is_advised_shortly(tmp_path):
    advice = doctor.advice(ModelFolders.below(tmp_path))

    assert len(advice.splitlines()) <= 5
    assert f"torch {doctor.version_of('torch')}" in advice
    assert advice.splitlines()[-1].endswith('run.py" doctor')


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


@pytest.mark.parametrize(
    "content",
    [b"a: [1", b"- a\n- b", b"\xff\xfe\x00", b"a: *unknown", b"\x00", b"just text", b"a: &b [*b" + b"]" * 100],
)
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
    spec = importlib.util.spec_from_file_location("pulid_run", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "find_hosts", lambda given, clone: [])
    monkeypatch.setattr(module, "ensure_environment", lambda hosts: pytest.fail("set up an environment"))
    return module


SMALL = b"small weights"


def small(file):
    return replace(file, size=len(SMALL), sha256=hashlib.sha256(SMALL).hexdigest())


@pytest.fixture
def published(run, monkeypatch):
    """The catalogue's needs as six small files on a hub of this machine; and `run.py models` with them."""
    needs = tuple(replace(need, files=(small(need.files[0]),)) for need in catalogue.NEEDS)
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


def test_models_fetches_what_is_missing(tmp_path, capsys, published):
    assert published.models(tmp_path, "--download", "--accept-licence") == 0

    assert len(published.fetched) == 6
    assert (tmp_path / "insightface/models/antelopev2/glintr100.onnx").read_bytes() == SMALL
    shown = capsys.readouterr().out
    assert "Licence: non-commercial research only" in shown
    assert published.models(tmp_path) == 0
    assert capsys.readouterr().out.count("hash right") == 6
    assert published.models(tmp_path, "--download") == 0
    assert len(published.fetched) == 6


@pytest.mark.parametrize(("typed", "fetched"), [("y", 6), ("n", 4), (None, 4)])
def test_antelopev2_is_fetched_only_by_who_accepts_its_licence(
    run, tmp_path, capsys, monkeypatch, published, typed, fetched
):
    monkeypatch.setattr(run.sys, "stdin", type("Terminal", (), {"isatty": lambda self: typed is not None})())
    monkeypatch.setattr("builtins.input", lambda question: typed)

    code = published.models(tmp_path, "--download")

    assert len(published.fetched) == fetched
    assert code == (0 if fetched == 6 else 1)
    assert ("this licence has to be accepted" in capsys.readouterr().out) is (fetched == 4)


def test_models_fetches_what_is_named_and_replaces_what_is_altered(tmp_path, published):
    altered = write(tmp_path / "facexlib" / "parsing_bisenet.pth", b"small weighty")

    assert published.models(tmp_path, "--download", "parsing_bisenet.pth") == 1  # others lack

    assert altered.read_bytes() == SMALL
    assert published.fetched == ["camenduru/PuLID/facexlib/parsing_bisenet.pth"]


def test_models_tells_why_a_download_failed(tmp_path, capsys, published):
    published.plan += [answer(403)] * 2

    assert published.models(tmp_path, "--download", "pulid_v1.1.safetensors") == 1

    assert "127.0.0.1 refuses to give it (HTTP 403)" in capsys.readouterr().out


def test_models_lists_without_huggingface_hub_and_says_what_to_install_for_a_download(tmp_path):
    """As on a machine where nothing is installed yet."""
    (tmp_path / "pulid").mkdir()
    command = [sys.executable, "-I", "-S", str(ROOT / "run.py"), "models", "--models", str(tmp_path)]
    listed = subprocess.run(command, capture_output=True, text=True)
    asked = subprocess.run([*command, "--download", "pulid_v1.1.safetensors"], capture_output=True, text=True)

    assert "The loader lacks pulid_v1.1.safetensors" in listed.stdout, listed.stderr
    assert asked.returncode == 1 and "pip install --upgrade huggingface_hub" in asked.stdout, asked.stderr
    assert not list((tmp_path / "pulid").iterdir())


def test_models_knows_no_other_name(run, tmp_path, capsys):
    assert run.main(["models", "--models", str(tmp_path), "--download", "https://evil.example/x"]) == 2
    assert "No file 'https://evil.example/x' is known" in capsys.readouterr().err


def test_models_looks_where_the_yaml_points(run, tmp_path, capsys):
    sized(tmp_path / "disk" / "p" / catalogue.V1.name, catalogue.V1.size)
    yaml = write(tmp_path / "y.yaml", f"a:\n  base_path: {tmp_path / 'disk'}\n  pulid: p\n")

    run.main(["models", "--models", str(tmp_path), "--extra-model-paths", str(yaml)])

    assert str(tmp_path / "disk" / "p" / catalogue.V1.name) in capsys.readouterr().out


def test_without_a_comfyui_models_asks_for_a_folder(run, capsys):
    assert run.main(["models"]) == 2
    assert "Name its folder with --comfyui, or its models with --models" in capsys.readouterr().err


def test_doctor_asks_each_package_in_a_process_of_its_own(run, package, monkeypatch, tmp_path):
    package("insightface", "import os; os.abort()")
    package("cv2", "print('a greeting'); __version__ = '1'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    run.mount_pack()

    [crashed], fine = run.ask("insightface"), run.ask("cv2")

    assert "ends Python (exit code" in crashed.text and "--force-reinstall" in crashed.remedy
    assert fine[0].topic == "cv2" and not fine[0].remedy


def test_doctor_runs_without_comfyui_and_without_packages(tmp_path):
    """As on a machine where nothing is installed yet: no site-packages, a home of its own."""
    environment = {**os.environ, "HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "COMFYUI_PATH": ""}
    command = [sys.executable, "-I", "-S", str(ROOT / "run.py"), "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)

    assert done.returncode == 0, done.stderr
    assert "no torch here, so this is not ComfyUI's Python" in done.stdout
    assert "ComfyUI   none found" in done.stdout
