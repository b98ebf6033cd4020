"""Tables of jobs: CSV as RFC 4180 has it, in UTF-8, the first line naming columns. What is not is refused, by row."""

import csv
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import BatchError

LARGEST_TABLE = 32 << 20  # bytes
MOST_JOBS = 100_000
FAULTS_SHOWN = 20


@dataclass(frozen=True)
class Row:
    """One job's cells, by column.

    label   its number as a spreadsheet counts, the names of columns being row 1; of crossed tables, 3x7
    folder  of the table, to which the files that it names are relative; by column, since tables can be crossed
    """

    label: str
    cells: dict[str, str]
    folders: dict[str, Path]


def read_table(path: Path) -> list[Row]:
    """Raises BatchError for what is no such table, naming the row."""
    text = _text(path)
    if not text.strip():
        raise BatchError(f"{path.name} is empty. Its first line names columns, each further line is a job.")
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, faults, number = [], [], 0
    try:
        columns, number = [name.strip() for name in next(lines)], 1
        _check_columns(path, columns)
        for number, cells in enumerate(lines, 2):
            if not cells:
                continue  # an empty line, as at the end
            if len(cells) != len(columns):
                faults.append(f"row {number} has {len(cells)} cells, the first line names {len(columns)} columns")
            folders = dict.fromkeys(columns, path.resolve().parent)
            rows.append(Row(str(number), dict(zip(columns, cells, strict=False)), folders))
    except csv.Error as error:
        faults.append(f"row {number + 1} is not CSV: {error}. A cell with quotes or commas stands in double quotes")
    refuse(path.name, faults)
    if not rows:
        raise BatchError(f"{path.name} names columns and has no row below them.")
    return rows


def _text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > LARGEST_TABLE:
            raise BatchError(
                f"{path.name} has {size >> 20} MB, a table may have {LARGEST_TABLE >> 20}. Pictures belong beside it, "
                "named by their paths; cut a longer table in parts with an --out each."
            )
        content = path.read_bytes()
    except OSError as error:
        raise BatchError(f"The table {path} could not be read: {error.strerror}.") from error
    if content.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise BatchError(
            f"{path.name}, row 1, begins with a byte order mark, as Excel writes it. Save it as plain UTF-8: in "
            "LibreOffice 'Text CSV' with 'Unicode (UTF-8)', in an editor 'UTF-8' and not 'UTF-8 with BOM'."
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        row = content.count(b"\n", 0, error.start) + 1
        raise BatchError(f"{path.name}, row {row}, is not UTF-8. Save the table as 'CSV UTF-8'.") from error


def _check_columns(path: Path, columns: list[str]) -> None:
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        if any(mark in column for column in columns):
            raise BatchError(f"{path.name}, row 1, has {name} between its columns. Save it with commas.")
    twice = {column for column in columns if columns.count(column) > 1}
    if twice or "" in columns:
        fault = f"names {', '.join(map(repr, sorted(twice)))} twice" if twice else "has a column without a name"
        raise BatchError(f"{path.name}, row 1, {fault}. Each column names one input, as title.input or id.input.")


def cross(tables: Sequence[list[Row]]) -> list[Row]:
    """Every row of the first table with every row of the second, and so on."""
    count = 1
    for table in tables:
        count *= len(table)
    if count > MOST_JOBS:
        raise BatchError(f"These are {count} jobs, one run has {MOST_JOBS} at most. Cut the tables in parts.")
    for one, other in itertools.combinations(tables, 2):
        if both := one[0].cells.keys() & other[0].cells.keys():
            raise BatchError(f"Two of the crossed tables have a column {min(both)!r}. Keep it in one of them.")
    return [
        Row(
            "x".join(row.label for row in rows),
            {column: cell for row in rows for column, cell in row.cells.items()},
            {column: folder for row in rows for column, folder in row.folders.items()},
        )
        for rows in itertools.product(*tables)
    ]


def refuse(where: str, faults: list[str]) -> None:
    """Raises BatchError with the faults, if there are any: the first of them in full."""
    if faults:
        more = [f"and {len(faults) - FAULTS_SHOWN} more"] if len(faults) > FAULTS_SHOWN else []
        lines = "\n  ".join([*faults[:FAULTS_SHOWN], *more])
        raise BatchError(f"{where} cannot be run; nothing was started.\n  {lines}")
