"""From a graph and a table to jobs: what is refused, by row and in words; what a job is; what is encoded once."""

import json
import subprocess
import sys

import pytest
from pulid_sdxl.tools import TOOLS
from pulid_sdxl.tools.batch import BatchError, command
from pulid_sdxl.tools.batch.plan import plan, seed_of
from pulid_sdxl.tools.batch.table import LARGEST_TABLE, cross, read_table


def node(class_type, title=None, **inputs):
    return {"class_type": class_type, "inputs": inputs, **({"_meta": {"title": title}} if title else {})}


def graph():
    """A photograph becomes an identity, which a picture is made with; the face is previewed."""
    return {
        "1": node("LoadImage", "Person", image="someone.png"),
        "2": node("PuLID_Loader", pulid_file="v1.1"),
        "3": node("PuLID_Encode", pulid=["2", 0], image=["1", 0], face="largest"),
        "4": node("PreviewImage", images=["3", 1]),
        "5": node("CLIPTextEncode", "Prompt", text="portrait"),
        "6": node("CLIPTextEncode", text="blurry"),
        "7": node("PuLID_Apply", pulid=["2", 0], identity=["3", 0], weight=0.8, on=True),
        "8": node("KSampler", model=["7", 0], positive=["5", 0], negative=["6", 0], seed=5, cfg=7),
        "9": node("SaveImage", images=["8", 0], filename_prefix="x"),
    }


@pytest.fixture
def rows_of(tmp_path):
    """Rows of a table with this content, beside photographs anna.png and bob.png; bea.png is anna's too."""
    for name, content in (("anna", b"anna"), ("bob", b"bob"), ("bea", b"anna")):
        (tmp_path / f"{name}.png").write_bytes(content)

    def read(text, name="jobs.csv"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_table(tmp_path / name)

    return read


def test_a_row_sets_the_inputs_that_its_columns_name(rows_of):
    made = plan(graph(), rows_of('Prompt.text,8.seed,8.cfg,7.on\n"a ""red"" hat,\nand more",7,3.5,no\n'), {})
    [job] = made.jobs
    ran = made.graph_of(job)
    assert (ran["5"]["inputs"]["text"], ran["6"]["inputs"]["text"]) == ('a "red" hat,\nand more', "blurry")
    assert (ran["8"]["inputs"]["seed"], ran["8"]["inputs"]["cfg"], ran["7"]["inputs"]["on"]) == (7, 3.5, False)
    assert (job.row, seed_of(made, job)) == ("2", 7)


def test_crossed_tables_give_every_pair_and_say_which(rows_of):
    people, prompts = rows_of("Person.image\nanna.png\nbob.png\n"), rows_of("Prompt.text\na\nb\nc\n", "prompts.csv")
    made = plan(graph(), cross([people, prompts]), {})
    assert [job.row for job in made.jobs] == ["2x2", "2x3", "2x4", "3x2", "3x3", "3x4"]
    with pytest.raises(BatchError, match=r"Two of the crossed tables have a column 'Prompt\.text'"):
        cross([prompts, prompts])
    with pytest.raises(BatchError, match="125000 jobs, one run has 100000 at most"):
        cross([[row] * 50 for row in (people[0], prompts[0], rows_of("8.seed\n1\n")[0])])


@pytest.mark.parametrize(("text", "words"), [
    ("\ufeffPrompt.text\na\n", "row 1, begins with a byte order mark"),
    ("Prompt.text\na\n".encode("utf-16"), "row 1, begins with a byte order mark"),
    (b"Prompt.text\nok\ncaf\xe9\n", "row 3, is not UTF-8"),
    ("Prompt.text;8.seed\na;1\n", "row 1, has semicolons between its columns"),
    ("Prompt.text\t8.seed\na\t1\n", "row 1, has tabs"),
    (b"Prompt.text\n" + b"a\n" * (50 << 20), "has 100 MB, a table may have 32"),
    ("", "is empty"),
    ("Prompt.text\n", "no row below"),
    ("Prompt.text,Prompt.text\na,b\n", "row 1, names 'Prompt.text' twice"),
    ("Prompt.text,\na,b\n", "row 1, has a column without a name"),
    ("Prompt.text,8.seed\na,1\nb\n", "row 3 has 1 cells, the first line names 2 columns"),
    ('Prompt.text\nok\n"a" b\n', "row 3 is not CSV"),
    ("Promt.text\na\n", r"'Promt.text', row 1: the graph has no node 'Promt'.*Prompt \(5\)"),
    ("Prompt\na\n", "'Prompt', row 1: the graph has no node"),
    ("Prompt.words\na\n", "'Prompt' has no input 'words'. It has: text"),
    ("8.model\na\n", "is connected to 'PuLID_Apply'"),
    ("8.seed\n1\n2.5\n", "row 3, 8.seed: expected a whole number, found '2.5'"),
    ("8.cfg\n1\nnan\n", "row 3, 8.cfg: expected a number, found 'nan'"),
    ("7.on\nmaybe\n", "row 2, 7.on: expected true or false, found 'maybe'"),
    ("Person.image\nanna.png\ncarl.png\n", "row 3, Person.image: there is no file 'carl.png'"),
    (f"Person.image\nanna.png\n{'long' * 999}\n", "row 3, Person.image: there is no file 'longlong"),
    (f"Person.image\nanna.png\n{'long' * 999}\n", "row 3, Person.image: there is no file 'longlong"),
    ("Person.image\nanna.png\n\"\"\n", "row 3, Person.image: there is no file ''"),
])  # fmt: skip
def test_what_is_wrong_is_refused_by_its_row(rows_of, text, words):
    with pytest.raises(BatchError, match=words):
        plan(graph(), rows_of(text), {})
    assert LARGEST_TABLE == 32 << 20


def test_a_title_that_stands_twice_is_refused_and_an_id_serves(rows_of):
    twice = graph()
    twice["6"]["_meta"] = {"title": "Prompt"}
    with pytest.raises(BatchError, match=r"2 nodes are called 'Prompt'. Name one by id: 5.text or 6.text"):
        plan(twice, rows_of("Prompt.text\na\n"), {})
    assert len(plan(twice, rows_of("6.text\na\n"), {}).jobs) == 1


def test_all_faults_are_named_at_once_and_a_night_of_them_is_cut_short(rows_of):
    with pytest.raises(BatchError, match=r"(?s)row 2, 8.seed.*row 3, Person.image") as caught:
        plan(graph(), rows_of("8.seed,Person.image\nx,anna.png\n1,carl.png\n"), {})
    assert "nothing was started" in str(caught.value)
    with pytest.raises(BatchError, match="and 80 more"):
        plan(graph(), rows_of("8.seed\n" + "x\n" * 100), {})


def test_a_job_is_its_graph_and_what_its_files_hold(rows_of):
    def ids(text, changed=None):
        return [job.id for job in plan(changed or graph(), rows_of(text), {}).jobs]

    anna, bob = ids("Person.image,8.seed\nanna.png,1\nbob.png,1\n")
    assert ids("8.seed,Person.image\n1,bea.png\n") == [anna] != [bob]  # the same photograph under another name
    other = graph()
    other["5"]["_meta"] = {"title": "Words"}
    other["5"]["inputs"] = dict(reversed(other["5"]["inputs"].items()))
    assert ids("8.seed,Person.image\n1,bea.png\n", other) == [anna]  # titles and order are for people
    other["6"]["inputs"]["text"] = "ugly"
    assert ids("8.seed,Person.image\n1,bea.png\n", other) != [anna]


def test_rows_that_ask_for_the_same_are_one_job(rows_of):
    made = plan(graph(), rows_of("8.seed\n1\n2\n1\n"), {})
    assert ([job.row for job in made.jobs], made.twins) == (["2", "3"], [("4", "2")])


def test_each_person_is_encoded_once_and_the_jobs_load_a_card(rows_of):
    text = "Person.image,8.seed\nanna.png,1\nbob.png,1\nanna.png,2\nbea.png,3\n"
    made = plan(graph(), rows_of(text), {})

    assert len(made.encodings) == 2
    [anna, bob, again, bea] = [job.people["3"] for job in made.jobs]
    assert anna == again == bea != bob
    encoding = made.encoding_graph(anna)
    kinds = {key: each["class_type"] for key, each in encoding.items()}
    loads = {"1": "LoadImage", "2": "PuLID_Loader", "3": "PuLID_Encode", "card": "PuLID_SaveIdentity"}
    assert kinds == loads and encoding["card"]["inputs"]["identity"] == ["3", 0]
    assert {place: made.paths[name].name for place, name in made.encoding_files(anna).items()} == {
        ("1", "image"): "anna.png"
    }

    ran = made.graph_of(made.jobs[0])
    assert {key: each["class_type"] for key, each in ran.items()} == {
        "2": "PuLID_Loader", "3": "PuLID_LoadIdentity", "5": "CLIPTextEncode", "6": "CLIPTextEncode",
        "7": "PuLID_Apply", "8": "KSampler", "9": "SaveImage",
    }  # fmt: skip
    assert made.files_of(made.jobs[0]) == {("3", "image"): f"{anna}.png"}


def test_a_column_of_the_encoder_or_before_it_makes_another_person(rows_of):
    made = plan(graph(), rows_of("3.face,8.seed\nlargest,1\ncenter,1\nlargest,2\n"), {})
    assert len(made.encodings) == 2
    assert made.encoding_graph(made.jobs[1].people["3"])["3"]["inputs"]["face"] == "center"


@pytest.mark.parametrize("reader", ["SaveImage", "PuLID_Encode"])
def test_an_encoder_of_which_more_than_the_identity_is_used_stays(rows_of, reader):
    more = graph() | {"10": node(reader, images=["3", 1])}
    made = plan(more, rows_of("8.seed\n1\n"), {})
    assert made.jobs[0].people == {} and made.graph_of(made.jobs[0])["3"]["class_type"] == "PuLID_Encode"


def test_files_that_the_graph_names_itself_travel_when_they_are_here(rows_of, tmp_path):
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "someone.png").write_bytes(b"someone")
    made = plan(graph(), rows_of("8.seed\n1\n"), {"image": [tmp_path / "nowhere", tmp_path / "input"]})
    [encoding] = made.encodings
    [name] = made.encoding_files(encoding).values()
    assert made.paths[name] == (tmp_path / "input" / "someone.png").resolve()
    elsewhere = plan(graph(), rows_of("8.seed\n1\n"), {"image": [tmp_path / "nowhere"]})
    [encoding] = elsewhere.encodings
    assert elsewhere.encoding_files(encoding) == {}
    assert elsewhere.encoding_graph(encoding)["1"]["inputs"]["image"] == "someone.png"


@pytest.mark.parametrize("refused", [
    (["--table", "jobs.csv"], {}, "--out"),
    (["--table", "jobs.csv", "--out", "out", "--nonsense"], {}, "--nonsense"),
])  # fmt: skip
def test_wrong_options_end_with_usage(refused, capsys):
    arguments, _, words = refused
    with pytest.raises(SystemExit) as caught:
        command.options(["--workflow", "g.json", *arguments])
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_a_graph_that_costs_money_is_refused_before_anything_is_started(rows_of, tmp_path):
    pytest.importorskip("ray", reason="RAY IS NOT INSTALLED: run.py batch is not tested")
    rows_of("8.prompt\nx\n")
    (tmp_path / "graph.json").write_text(json.dumps({"8": node("PuLID_HostedSubmit", "Send it", prompt="a")}))
    given = [
        "--workflow",
        str(tmp_path / "graph.json"),
        "--table",
        str(tmp_path / "jobs.csv"),
        "--out",
        str(tmp_path / "o"),
    ]
    with pytest.raises(BatchError, match=r"cost money: PuLID_HostedSubmit\. With --allow-hosted each row is sent once"):
        command.run([tmp_path], given)
    assert not (tmp_path / "o").exists()


TEN_THOUSAND = """
import json, sys
from pathlib import Path
from pulid_sdxl.tools.batch.plan import plan
from pulid_sdxl.tools.batch.table import read_table

graph = json.loads(Path(sys.argv[1]).read_text())
made = plan(graph, read_table(Path(sys.argv[2])), {})
graphs = {len(made.graph_of(job)) for job in made.jobs}
peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])  # ru_maxrss has the parent's in it
print(json.dumps([len(made.jobs), len(made.encodings), peak / 1024, sorted(graphs)]))
"""


def test_ten_thousand_rows_are_planned_in_little_memory(rows_of, tmp_path):
    rows_of(
        "Person.image,Prompt.text,8.seed\n"
        + "".join(f"{'anna' if n % 2 else 'bob'}.png,{'x' * 200},{n}\n" for n in range(10_000))
    )
    (tmp_path / "graph.json").write_text(json.dumps(graph()))
    done = subprocess.run(
        [sys.executable, str(TOOLS), "-c", TEN_THOUSAND, str(tmp_path / "graph.json"), str(tmp_path / "jobs.csv")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    jobs, encodings, megabytes, sizes = json.loads(done.stdout)
    assert (jobs, encodings, sizes) == (10_000, 2, [7])
    assert megabytes < 500
