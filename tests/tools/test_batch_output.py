"""The folder of a run: whole pictures, one line for each job, and what an earlier run left is read as it should be."""

import io
import json

import pytest
from PIL import Image
from pulid_sdxl.tools.batch import BatchError
from pulid_sdxl.tools.batch.output import COLUMNS, ROWS, Output
from pulid_sdxl.tools.batch.plan import Job


def job(number):
    return Job(f"{number:020}", str(number), {}, {})


def png(color=(200, 30, 30)):
    file = io.BytesIO()
    Image.new("RGB", (300, 200), color).save(file, "PNG")
    return file.getvalue()


def done(*pictures):
    return {
        "pictures": [(f"ComfyUI_{n}_.png", each) for n, each in enumerate(pictures)],
        "seconds": 1.5,
        "worker": "1@a",
    }


def manifest(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_pictures_and_what_became_of_each_job_are_there(tmp_path):
    with Output(tmp_path) as output:
        output.keep(job(2), 7, done(png()))
        output.keep(job(3), {"8": 1, "9": 2}, done(png(), png()))
        output.keep(job(4), None, {"error": "no face", "worker": "2@b"})

    assert manifest(tmp_path) == [
        {"id": f"{2:020}", "row": "2", "seed": 7, "files": ["pictures/00002_00000000.png"], "seconds": 1.5,
         "worker": "1@a", "error": None},
        {"id": f"{3:020}", "row": "3", "seed": {"8": 1, "9": 2}, "seconds": 1.5, "worker": "1@a", "error": None,
         "files": ["pictures/00003_00000000_1.png", "pictures/00003_00000000_2.png"]},
        {"id": f"{4:020}", "row": "4", "seed": None, "files": [], "seconds": None, "worker": "2@b", "error": "no face"},
    ]  # fmt: skip
    assert (tmp_path / "pictures" / "00002_00000000.png").read_bytes() == png()
    assert len([*(tmp_path / "pictures").iterdir()]) == 3


def test_a_later_run_goes_on_and_tries_again_what_failed(tmp_path):
    with Output(tmp_path) as output:
        output.keep(job(2), 7, done(png()))
        output.keep(job(3), 7, {"error": "no face"})
    (tmp_path / "pictures" / ".half.png.part").write_bytes(b"half")
    with (tmp_path / "manifest.jsonl").open("ab") as file:
        file.write(b'{"id": "cut sho')

    with Output(tmp_path) as output:
        assert [output.is_done(job(n)) for n in (2, 3, 4)] == [True, False, False]
        output.keep(job(3), 7, done(png()))

    assert [entry["row"] for entry in manifest(tmp_path)] == ["2", "3"]
    assert sorted(path.name[:5] for path in (tmp_path / "pictures").iterdir()) == ["00002", "00003"]


def test_what_costs_money_is_never_sent_again(tmp_path):
    with Output(tmp_path, paid=True) as output:
        for number in (2, 3, 4):
            output.sending(job(number))
        output.keep(job(2), 7, done(png()))
        output.keep(job(3), 7, {"error": "refused"})  # and the run ends while 4 is under way

    with Output(tmp_path, paid=True) as output:
        assert [output.is_done(job(n)) for n in (2, 3, 4, 5)] == [True, True, True, False]
    assert [entry["error"] for entry in manifest(tmp_path)][:2] == [None, "refused"]
    assert "may have been paid for: it is not sent again" in manifest(tmp_path)[2]["error"]


def test_one_run_at_a_time_has_the_folder(tmp_path):
    with Output(tmp_path), pytest.raises(BatchError, match="Another run has"):
        Output(tmp_path).__enter__()


def test_a_manifest_with_a_damaged_line_is_refused(tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"id": "1", "er\n{"id": "2", "error": null}\n')
    with pytest.raises(BatchError, match=r"manifest\.jsonl is damaged"):
        Output(tmp_path).__enter__()
    assert (tmp_path / "manifest.jsonl").read_text().startswith('{"id": "1", "er\n')


def test_contact_sheets_show_every_picture_a_hundred_on_each(tmp_path):
    jobs = [job(number) for number in range(2, 2 + COLUMNS * ROWS + 3)]
    with Output(tmp_path) as output:
        for each in jobs[:-1]:
            output.keep(each, 1, done(png()))
        output.keep(jobs[-1], 1, {"error": "no face"})
        first, second = output.write_sheets(jobs)
        assert output.write_sheets(jobs[:1]) == [first]  # and no sheet of before stays

    assert (first.name, second.name, second.exists()) == ("contact_sheet_001.jpg", "contact_sheet_002.jpg", False)
    with Image.open(first) as sheet:
        assert sheet.size == (192, 212)
        red, green, blue = sheet.getpixel((96, 96))
        assert red > 150 and green < 80 and blue < 80
