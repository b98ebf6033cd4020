"""The nodes that combine, save and load identities, in a real ComfyUI: in this process, then through its server."""

import io
import os
import urllib.error
import urllib.request
from datetime import datetime, timezone

import pytest

if not os.environ.get("COMFYUI"):
    pytest.skip("COMFYUI names no ComfyUI folder", allow_module_level=True)

from pulid_sdxl.tools import ROOT, comfy_host

comfy_host.enter(os.environ["COMFYUI"])

import numpy as np
import torch
from PIL import Image
from pulid_sdxl.models import identities
from pulid_sdxl.nodes import host
from pulid_sdxl.nodes.save_load import PulidLoadIdentity, PulidSaveIdentity
from pulid_sdxl.pulid.errors import IdentityFileError, InputError
from pulid_sdxl.pulid.identity import IdEmbedding
from pulid_sdxl.pulid.preview import thumbnails
from pulid_sdxl.tools.comfy_server import ADDRESS, ComfyServer, ServerError


@pytest.fixture(autouse=True)
def folders(own_folders, monkeypatch):
    """Output, temporary and model folders of this test's own, known to ComfyUI as at a start."""
    monkeypatch.setattr(host, "OWN_FOLDERS", {host.IDENTITIES: {".safetensors", ".png"}})
    host.register_folders()
    return own_folders


def identity(version="v1", tokens=10, preview=True):
    torch.manual_seed(tokens)
    faces = thumbnails(torch.rand(2, 3, 512, 512)) if preview else None
    return IdEmbedding(torch.randn(1, tokens, 2048), torch.randn(1, tokens, 2048), version, "0123456789abcdef", faces)


def save(prefix="anna", **options):
    return PulidSaveIdentity.execute(identity(**options), prefix)


def load(name="anna_00001_.safetensors", image=""):
    return PulidLoadIdentity.execute(name, image)


def choices():
    return PulidLoadIdentity.define_schema().inputs[0].options


def test_what_is_saved_is_listed_shown_and_loads_without_copying(folders):
    assert choices() == []

    out = save("family/anna")

    assert out.ui["text"] == ["Saved as family/anna_00001_.safetensors"]
    assert (folders / "output" / "pulid_identities" / "family" / "anna_00001_.safetensors").is_file()
    assert choices() == [os.path.join("family", "anna_00001_.safetensors")]
    loaded, made = load(choices()[0]), identity()
    for field in ("cond", "uncond", "preview"):
        assert torch.equal(getattr(loaded.args[0], field), getattr(made, field))
    for ui in (out.ui, loaded.ui):
        shown = [np.asarray(Image.open(folders / "temp" / picture["filename"])) for picture in ui["images"]]
        assert [picture.shape for picture in shown] == [(128, 128, 3)] * 2
        assert np.abs(shown[1] - made.preview[1].numpy().astype(int)).max() <= 1


def test_a_file_put_among_the_models_is_listed_too(folders):
    save()
    models = folders / "models" / "pulid_identities"
    models.mkdir(parents=True)
    (folders / "output" / "pulid_identities" / "anna_00001_.safetensors").rename(models / "bob.safetensors")
    (models / "notes.txt").touch()

    assert choices() == ["bob.safetensors"]
    assert load("bob.safetensors").args[0].tokens == 10


def test_an_identity_without_a_preview_says_the_rest():
    save(preview=False, version="v1.1", tokens=32)
    [(_, [text])] = load().ui.items()
    assert text.startswith("PuLID v1.1, 1 x 32 ID tokens, saved 20")


@pytest.mark.parametrize("prefix", ["%year%-anna", "%year%/anna", "%year%/%month%/anna"])
def test_variables_of_comfyui_are_filled_in(folders, prefix):
    name = prefix.replace("%year%", f"{datetime.now():%Y}").replace("%month%", f"{datetime.now():%m}")
    assert save(prefix).ui["text"] == [f"Saved as {name}_00001_.safetensors"]


@pytest.mark.parametrize("name", ["", "../anna", "/tmp/anna", "con", "a\0b"])
def test_a_name_that_leads_elsewhere_is_refused_in_words(folders, name):
    for use in (save, load):
        with pytest.raises(InputError, match="cannot name an identity file"):
            use(name)
    assert list((folders / "output").iterdir()) == []


def test_a_file_that_only_another_machine_has_is_named_with_what_to_do():
    assert PulidLoadIdentity.validate_inputs("bob.safetensors") is True
    words = "'bob.safetensors' in models/pulid_identities and output/pulid_identities.*Save it with PuLID Save Identity"
    with pytest.raises(IdentityFileError, match=words):
        load("bob.safetensors")


def test_a_card_is_listed_shown_and_loads_from_either_place(folders):
    out = PulidSaveIdentity.execute(identity(), "family/anna", "card")

    assert out.args == (out.args[0],) and torch.equal(out.args[0].cond, identity().cond)  # handed on
    place = {"subfolder": "pulid_identities/family", "type": "output"}
    assert out.ui["images"] == [{"filename": "anna_00001_.png", **place}]
    [listed] = choices()
    card = folders / "output" / "pulid_identities" / listed
    (folders / "input" / "uploaded.png").write_bytes(card.read_bytes())
    assert PulidLoadIdentity.define_schema().inputs[1].options == ["", "uploaded.png"]
    for chosen in ((listed,), ("", "uploaded.png"), ("not there", f"pulid_identities/{listed} [output]")):
        assert torch.equal(PulidLoadIdentity.execute(*chosen).args[0].cond, identity().cond)
        assert PulidLoadIdentity.fingerprint_inputs(*chosen)


def test_an_uploaded_picture_that_is_no_card_or_lies_elsewhere_is_refused_in_words(folders):
    Image.new("RGB", (8, 8)).save(folders / "input" / "holiday.png")
    with pytest.raises(IdentityFileError, match=r"holiday\.png carries no identity"):
        load("", "holiday.png")
    with pytest.raises(InputError, match="cannot name an identity file"):
        load("", "../holiday.png")


# ---- Through the server ----


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    """ComfyUI with this pack and no models at all."""
    base = tmp_path_factory.mktemp("base")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "pulid-sdxl").symlink_to(ROOT)
    with ComfyServer(comfyui, base, ("--cpu",)) as server:
        yield server


def saved_by_hand(server, name, **options):
    folder = server.base / "output" / "pulid_identities"
    return identities.save(identity(**options), folder, name, datetime.now(timezone.utc), "1").name


def average_and_save(first, second, prefix):
    both = {"identity_1": ["1", 0], "identity_2": ["2", 0], "mode": "average", "weight": 0.5}
    return {
        "1": {"class_type": "PuLID_LoadIdentity", "inputs": {"identity_file": first}},
        "2": {"class_type": "PuLID_LoadIdentity", "inputs": {"identity_file": second}},
        "3": {"class_type": "PuLID_CombineIdentities", "inputs": both},
        "4": {"class_type": "PuLID_SaveIdentity", "inputs": {"identity": ["3", 0], "filename_prefix": prefix}},
    }


def test_a_workflow_saves_what_another_lists_and_loads(server):
    first, second = (saved_by_hand(server, name, tokens=32, version="v1.1") for name in ("anna", "bea"))

    shown = server.run(average_and_save(first, second, "between"))

    assert shown["4"]["text"] == ["Saved as between_00001_.safetensors"]
    shapes = [Image.open(io.BytesIO(server.picture(entry))).size for entry in shown["1"]["images"]]
    assert shapes == [(128, 128)] * 2
    [kind, options] = server.object_info()["PuLID_LoadIdentity"]["input"]["required"]["identity_file"]
    listed = options["options"] if kind == "COMBO" else kind  # older hosts give the list in place of the kind
    assert {first, second, "between_00001_.safetensors"} <= set(listed)
    server.run(average_and_save("between_00001_.safetensors", first, "again"))


def test_a_card_goes_through_upload_and_a_pruned_graph_still_saves(server):
    saved_by_hand(server, "ida")
    loads = {"class_type": "PuLID_LoadIdentity", "inputs": {"identity_file": "ida_00001_.safetensors"}}
    as_card = {"identity": ["1", 0], "filename_prefix": "ida", "save_as": "card"}
    outputs = server.run({"1": loads, "2": {"class_type": "PuLID_SaveIdentity", "inputs": as_card}})
    [entry] = outputs["2"]["images"]

    (server.base / "input" / "sub").mkdir()
    (server.base / "input" / "sub" / "card.png").write_bytes(server.picture(entry))
    loads = {"class_type": "PuLID_LoadIdentity", "inputs": {"identity_file": "", "image": "sub/card.png"}}
    saves = {"class_type": "PuLID_SaveIdentity", "inputs": {"identity": ["1", 0], "filename_prefix": "again"}}
    mixed = {"identity_1": ["2", 0], "identity_2": ["1", 0], "mode": "average", "weight": 0.5}
    combined = {"class_type": "PuLID_CombineIdentities", "inputs": mixed}
    last = {"class_type": "PuLID_SaveIdentity", "inputs": {"identity": ["3", 0], "filename_prefix": "last"}}
    outputs = server.run({"1": loads, "2": saves, "3": combined, "4": last})
    assert outputs["4"]["text"] == ["Saved as last_00001_.safetensors"]


def test_only_a_changed_file_is_loaded_again(server):
    names = saved_by_hand(server, "carl", tokens=20), saved_by_hand(server, "dora", tokens=20)
    prompt = average_and_save(*names, "cached")
    for _ in range(2):
        assert server.run(prompt)["4"]["text"] == ["Saved as cached_00001_.safetensors"]
    path = server.base / "output" / "pulid_identities" / names[0]
    times = path.stat()
    path.unlink()
    path.write_bytes(identities.pack_identity(identity(tokens=20), datetime.now(timezone.utc), "2"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    ran = server.run(prompt)

    assert ran["1"]["text"][0].endswith("by version 2.")
    assert ran["4"]["text"] == ["Saved as cached_00002_.safetensors"]


@pytest.mark.parametrize(("second", "words"), [
    ("family\\zoe.safetensors", r"no identity 'family/zoe\.safetensors' in .*Save it with"),
    (None, r"identity_1 was made with PuLID v1 .* identity_2 with PuLID v1\.1"),
], ids=["a file of another machine", "what does not combine"])  # fmt: skip
def test_what_cannot_be_done_is_answered_in_words(server, second, words):
    first, other = saved_by_hand(server, "emil"), saved_by_hand(server, "gina", version="v1.1", tokens=32)
    with pytest.raises(ServerError, match=words):
        server.run(average_and_save(first, second or other, "x"))


def test_the_model_browser_of_comfyui_shows_the_faces(server):
    name = saved_by_hand(server, "hugo")

    pictures = []
    for folder in range(2):  # ComfyUI numbers the folders of one kind
        url = f"http://{ADDRESS}:{server.port}/experiment/models/preview/pulid_identities/{folder}/{name}"
        try:
            with urllib.request.urlopen(url) as answer:
                pictures.append(Image.open(io.BytesIO(answer.read())).convert("RGB"))
        except urllib.error.HTTPError as error:
            error.close()

    [picture] = pictures
    difference = np.asarray(picture).astype(int) - identity().preview[0].numpy()
    assert picture.size == (128, 128)
    assert np.abs(difference).mean() < 40  # it comes as lossy WebP, and noise is hard on that


def test_a_file_that_is_gone_has_no_state_and_another_in_its_place_another(folders):
    save()
    name = "anna_00001_.safetensors"
    before = PulidLoadIdentity.fingerprint_inputs(name)
    assert PulidLoadIdentity.fingerprint_inputs(name) == before

    path = folders / "output" / "pulid_identities" / name
    os.utime(path, (0, 0))
    assert PulidLoadIdentity.fingerprint_inputs(name) == before  # it goes by content
    path.unlink()
    assert PulidLoadIdentity.fingerprint_inputs(name) is None
    save(tokens=20)
    assert PulidLoadIdentity.fingerprint_inputs(name) not in (None, before)
