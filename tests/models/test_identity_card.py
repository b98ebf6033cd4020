"""Identity cards: an ordinary PNG to everybody else, the identity to the bit to us, and words where it is gone."""

import io
from datetime import datetime, timezone

import numpy as np
import pytest
import torch
from PIL import Image
from pulid_sdxl.models.identities import load, pack_identity, save
from pulid_sdxl.models.identity_card import card_content, make_card
from pulid_sdxl.pulid.errors import IdentityFileError
from pulid_sdxl.pulid.identity import PREVIEW_SIZE, IdEmbedding

NOON = datetime(2025, 6, 1, 12, tzinfo=timezone.utc)


def identity(faces=2):
    generator = torch.Generator().manual_seed(faces)
    preview = torch.randint(0, 256, (faces, PREVIEW_SIZE, PREVIEW_SIZE, 3), generator=generator, dtype=torch.uint8)
    tokens = torch.randn(2, 1, 10, 2048, generator=generator)
    return IdEmbedding(tokens[0], tokens[1], "v1", "0123456789abcdef", preview if faces else None)


def card_in(folder, faces=2):
    return save(identity(faces), folder, "anna", NOON, "1.2.3", card=True)


@pytest.mark.parametrize("faces", [0, 1, 2, 8])
def test_a_card_is_a_picture_of_the_faces_and_gives_the_identity_back_to_the_bit(tmp_path, faces):
    path, made = card_in(tmp_path, faces), identity(faces)

    stored = load(path)

    assert path.name == "anna_00001_.png"
    assert torch.equal(stored.identity.cond, made.cond) and torch.equal(stored.identity.uncond, made.uncond)
    assert (stored.pack, stored.created) == ("1.2.3", NOON)
    with Image.open(path) as picture:
        picture.verify()
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        if faces:
            assert torch.equal(stored.identity.preview, made.preview)
            assert np.asarray(picture.crop((16, 16, 144, 144))).std() > 20  # noise, as the face is


def test_what_lies_inside_is_the_file_byte_for_byte():
    content = pack_identity(identity(), NOON, "1.2.3")
    assert card_content(make_card(content, None, "somebody")) == content


def test_cards_and_files_of_one_name_share_their_numbers(tmp_path):
    names = [save(identity(), tmp_path, "anna", NOON, "1", card).name for card in (False, True, False)]
    assert names == ["anna_00001_.safetensors", "anna_00002_.png", "anna_00003_.safetensors"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_card_that_an_editor_saved_anew_says_that_the_identity_is_gone(tmp_path, kind):
    path = card_in(tmp_path)
    file = io.BytesIO()
    with Image.open(path) as picture:
        picture.save(file, kind)
    path.write_bytes(file.getvalue())

    with pytest.raises(IdentityFileError, match=r"anna_00001_\.png carries no identity.*saved it anew.*encode"):
        load(path)


@pytest.mark.parametrize("where", ["length", "kind", "content", "checksum", "end"])
def test_a_damaged_card_is_refused_in_words(tmp_path, where):
    path = card_in(tmp_path)
    card = bytearray(path.read_bytes())
    start = card.index(b"puLD") - 4
    end = start + 12 + int.from_bytes(card[start : start + 4], "big")
    if where == "end":
        del card[end - 50 :]
    else:
        card[{"length": start + 3, "kind": start + 5, "content": start + 5000, "checksum": end - 1}[where]] ^= 4
    path.write_bytes(card)

    with pytest.raises(IdentityFileError, match="carries no identity"):
        load(path)


def test_what_a_card_carries_is_checked_like_a_file(tmp_path):
    content = bytearray(pack_identity(identity(), NOON, "1.2.3"))
    content[-1] ^= 1
    path = tmp_path / "forged.png"
    path.write_bytes(make_card(bytes(content), None, "forged"))
    with pytest.raises(IdentityFileError, match=r"forged\.png was altered after it was saved"):
        load(path)
    path.write_bytes(make_card(b"something else", None, "else"))
    with pytest.raises(IdentityFileError, match=r"forged\.png .*is not safetensors"):
        load(path)


def test_a_file_too_large_is_refused_before_what_it_carries_is_read(tmp_path):
    path = card_in(tmp_path)
    with pytest.raises(IdentityFileError, match="carries no identity"):
        load(path, largest=5000)
