"""Files as they lie about: any encoding, packed or not, lines of any ends, CSV; what is damaged is one sentence."""

import bz2
import csv
import gzip
import json
import lzma

import pyarrow
import pytest

from patarm_jax.config.sections import DataSection
from patarm_jax.data import reasons as p
from patarm_jax.data.preferences import read_preferences
from patarm_jax.types import UserError

ROWS = [
    {"prompt": "Färbt der Himmel? 😀", "chosen": "Ja,\nblau.", "rejected": 'Nein, "grün".', "id": "a"},
    {"prompt": "Second", "chosen": "Yes", "rejected": "No; never\tnow", "id": "b"},
]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
KEPT = [("Färbt der Himmel? 😀", "Ja,\nblau.", 'Nein, "grün".', "a"), ("Second", "Yes", "No; never\tnow", "b")]


def read(path):
    kept, report = read_preferences(DataSection(str(path), domain="chat"))
    return [(one.prompt[0]["content"], one.chosen, one.rejected, one.id) for one in kept], report


def refusal(path):
    with pytest.raises(UserError) as error:
        read(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def separated(rows=ROWS, **style):
    """Rows as a CSV file's text."""
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n", **style)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def zstd(data):
    return pyarrow.Codec("zstd").compress(data, asbytes=True)


def zstd_stream(path, *datas):
    """A file of one frame per piece of data, as `zstd` writes them."""
    parts = []
    for data in datas:
        with pyarrow.CompressedOutputStream(str(path), "zstd") as out:
            out.write(data)
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))
    return path


# ---- Encodings and ends of lines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.tsv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_every_encoding_that_says_what_it_is(tmp_path, name, encoding, ends):
    texts = {
        "x.jsonl": LINES, "x.json": json.dumps(ROWS, indent=1, ensure_ascii=False),
        "x.csv": separated(), "x.tsv": separated(delimiter="\t"),
    }  # fmt: skip
    lines = texts[name].split("\n")
    text = ends.join(lines) if name.startswith("x.json") else texts[name].replace("\n", ends)
    (tmp_path / name).write_bytes(text.encode(encoding))
    kept = [tuple(cell.replace("\r\n", "\n") for cell in row) for row in read(tmp_path / name)[0]]
    assert kept == KEPT


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_the_other_encodings_are_told_by_name_when_they_break(tmp_path, encoding):
    (tmp_path / "x.jsonl").write_bytes(LINES.encode(encoding)[:-1])
    assert "x.jsonl begins as UTF-16" in refusal(tmp_path / "x.jsonl")
    assert "Save the file as UTF-8" in refusal(tmp_path / "x.jsonl")


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv"])
def test_what_is_not_utf_8_names_the_line(tmp_path, name):
    text = LINES if name == "x.jsonl" else separated()
    lines = text.replace("😀", "").splitlines(keepends=True)
    (tmp_path / name).write_bytes("".join(lines).encode("cp1252"))
    number = 1 if name == "x.jsonl" else 2
    assert f"{name}:{number} is not UTF-8" in refusal(tmp_path / name)


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n \n", b"\n\0\0\0\0", b"\0\0\0", b"\n\0\0\n"])
def test_the_last_line_may_end_in_any_way(tmp_path, end):
    """Zero bytes are what a crash leaves of a file that was being written."""
    (tmp_path / "x.jsonl").write_bytes(LINES.encode().rstrip() + end)
    assert read(tmp_path / "x.jsonl")[0] == KEPT
    (tmp_path / "x.json").write_bytes(json.dumps(ROWS).encode() + end)
    assert read(tmp_path / "x.json")[0] == KEPT
    (tmp_path / "x.csv").write_bytes(separated().encode().rstrip() + end)
    assert read(tmp_path / "x.csv")[0] == KEPT


def test_zero_bytes_before_the_end_are_damage(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(LINES.encode() + b"\0\0\0\n" + LINES.encode())
    assert "x.jsonl:3 holds zero bytes alone" in refusal(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_bytes(b"\0" * 100)
    assert "x.jsonl is empty" in refusal(tmp_path / "x.jsonl")


def test_a_file_that_is_cut_off_says_so(tmp_path):
    (tmp_path / "x.jsonl").write_text(LINES[:-10])
    assert "x.jsonl:2 is not JSON" in (said := refusal(tmp_path / "x.jsonl"))
    assert "The file ends here without a line end and may be cut off" in said


def test_halves_of_characters_cost_their_row(tmp_path):
    """Spelled as JSON spells them, or as bytes, as some programs write them."""
    spelled = '{"prompt": "a", "chosen": "b\\ud83d", "rejected": "c"}\n'
    written = '{"prompt": "a", "chosen": "b\ud83d", "rejected": "c"}\n'.encode("utf-8", "surrogatepass")
    (tmp_path / "x.jsonl").write_bytes(spelled.encode() + written + LINES.encode())
    kept, report = read(tmp_path / "x.jsonl")
    assert kept == KEPT and report.dropped == {p.NOT_UNICODE: 2}
    assert report.first == {p.NOT_UNICODE: f"{tmp_path / 'x.jsonl'}:1"}


# ---- Packed files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.tsv"])
def test_packed_files_are_read_as_what_is_in_them(tmp_path, name):
    texts = [LINES, json.dumps(ROWS), separated(), separated(delimiter="\t")]
    data = dict(zip(("x.jsonl", "x.json", "x.csv", "x.tsv"), texts, strict=True))[name].encode()
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
    zstd_stream(tmp_path / f"{name}.zst", data)
    (tmp_path / f"{name}.bz2").write_bytes(bz2.compress(data))
    (tmp_path / f"{name}.xz").write_bytes(lzma.compress(data))
    for ending in (".gz", ".zst", ".bz2", ".xz"):
        assert read(tmp_path / (name + ending))[0] == KEPT
    assert len(read(tmp_path)[0]) == 8  # all, from their folder


def test_packed_files_of_several_pieces(tmp_path):
    first, second = LINES.encode().splitlines(keepends=True)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(first) + gzip.compress(second))
    assert read(tmp_path / "x.jsonl.gz")[0] == KEPT
    for name, pack in (("x.jsonl.bz2", bz2.compress), ("x.jsonl.xz", lzma.compress)):
        (tmp_path / name).write_bytes(pack(first) + pack(second))
        assert read(tmp_path / name)[0] == KEPT
    assert read(zstd_stream(tmp_path / "x.jsonl.zst", first, second))[0] == KEPT


def test_a_name_that_says_packed_wrongly_does_no_harm(tmp_path):
    """Some downloads unpack a file and keep its name, or the other way round."""
    (tmp_path / "x.jsonl.gz").write_text(LINES)
    (tmp_path / "x.jsonl").write_bytes(gzip.compress(LINES.encode()))
    assert read(tmp_path / "x.jsonl.gz")[0] == read(tmp_path / "x.jsonl")[0] == KEPT


@pytest.mark.parametrize("cut", [12, -9, -3])
@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.jsonl.bz2", "x.jsonl.xz"])
def test_a_packed_file_that_is_cut_off_or_damaged(tmp_path, name, cut):
    pack = {"bz2": bz2.compress, "xz": lzma.compress}.get(name.rpartition(".")[2], gzip.compress)
    data = pack(LINES.encode())
    if name.endswith("zst"):
        data = zstd_stream(tmp_path / name, LINES.encode()).read_bytes()
    (tmp_path / name).write_bytes(data[:cut])
    assert f"cannot read {tmp_path / name}" in (said := refusal(tmp_path / name))
    assert "The file is damaged or cut off: fetch it again." in said
    (tmp_path / name).write_bytes(data[:10] + b"\xff\xff\xff\xff" + data[14:])
    assert "The file is damaged or cut off" in refusal(tmp_path / name)


# ---- CSV and TSV ----------------------------------------------------------------------------------------------------


def test_the_ids_of_a_csv_are_lines_of_the_file(tmp_path):
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ROWS]
    (tmp_path / "x.csv").write_text(separated(rows))
    assert [row[3] for row in read(tmp_path / "x.csv")[0]] == ["x.csv:2", "x.csv:4"]  # a cell holds a line break


def test_spreadsheets_write_semicolons_and_empty_rows(tmp_path):
    (tmp_path / "x.csv").write_text(separated(delimiter=";") + ";;;\n\n")
    assert read(tmp_path / "x.csv")[0] == KEPT


@pytest.mark.parametrize("name", ["x.ndjson", "x.jsonlines", "x.NDJSON", "x.ndjson.gz", "x.jsonlines.xz"])
def test_other_names_of_json_lines(tmp_path, name):
    data = LINES.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert read(tmp_path / name)[0] == KEPT == read(tmp_path)[0]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("line", ["sep={}", '"sep={}"', "SEP={}"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_first_line_of_excel_says_the_separator(tmp_path, mark, line, end):
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ROWS]
    (tmp_path / "x.csv").write_text(line.format(mark) + end + separated(rows, delimiter=mark), newline="")
    assert [row[3] for row in read(tmp_path / "x.csv")[0]] == ["x.csv:3", "x.csv:5"]
    (tmp_path / "x.csv").write_text(f"sep=;{end}prompt;chosen;rejected{end}Q;a", newline="")
    assert "x.csv:3 has 2 cells" in refusal(tmp_path / "x.csv")


def test_empty_columns_without_a_name_are_not_read(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected,,\nQ,a,b,,\nR,c,d,,\n")
    assert [row[:3] for row in read(tmp_path / "x.csv")[0]] == [("Q", "a", "b"), ("R", "c", "d")]
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected,\nQ,a,b\n")
    assert "x.csv:2 has 3 cells" in refusal(tmp_path / "x.csv")


def test_a_comma_in_a_quoted_name_is_not_the_separator(tmp_path):
    (tmp_path / "x.csv").write_text('"note, if any";prompt;chosen;rejected\n;Q;a;b\n')
    assert read(tmp_path / "x.csv")[0][0][:3] == ("Q", "a", "b")


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.tsv"])
def test_line_ends_of_old_macs_are_told(tmp_path, name):
    rows = [ROWS[1]] * 2
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if name != "x.jsonl":
        text = separated(rows, delimiter="\t" if name == "x.tsv" else ",")
    (tmp_path / name).write_text(text.replace("\n", "\r"), newline="")
    assert f"{name}:1 holds a carriage return" in (said := refusal(tmp_path / name))
    assert "Save the file with line ends of Unix" in said


@pytest.mark.parametrize("word", ["", "NaN", "nan", "None", "NULL", "null", "NA", "<NA>", " "])
def test_words_for_nothing_are_missing_values_in_csv_alone(tmp_path, word):
    lines = [f"Q,a,b,{word},{word},{word}", f"Q,{word},b,i,s,chat", f"Q,a,{word},i,s,chat", f"{word},a,b,i,s,chat"]
    (tmp_path / "x.csv").write_text("\n".join(["prompt,chosen,rejected,id,source,domain", *lines]))
    kept, report = read_preferences(DataSection(str(tmp_path / "x.csv"), domain="chat"))
    assert [(one.id, one.source, one.domain) for one in kept] == [("x.csv:2", "", "chat")]
    assert report.dropped == {p.EMPTY_RESPONSE: 2, p.EMPTY_PROMPT: 1} and not report.notes
    if word.strip():
        (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "Q", "chosen": word, "rejected": "b", "id": word}))
        assert read(tmp_path / "x.jsonl")[0] == [("Q", word, "b", word)]


def test_messages_in_a_csv(tmp_path):
    """As pandas writes lists: the way Python prints them."""
    user, answers = {"role": "user", "content": "It's?"}, [{"role": "assistant", "content": text} for text in "ab"]
    rows = [{"prompt": [user], "chosen": [answers[0]], "rejected": [answers[1]], "id": "a"}]
    (tmp_path / "x.csv").write_text(separated(rows))
    assert read(tmp_path / "x.csv")[0] == [("It's?", "a", "b", "a")]


def test_a_cell_may_be_longer_than_pythons_limit(tmp_path):
    long = "word " * 100_000
    (tmp_path / "x.csv").write_text(separated([ROWS[1] | {"chosen": long}]))
    assert read(tmp_path / "x.csv")[0][0][1] == long


def test_empty_cells_are_missing_values(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected,id,domain\nQ,a,b,,\nQ,,b,,\n,a,b,,\n")
    kept, report = read(tmp_path / "x.csv")
    assert kept == [("Q", "a", "b", "x.csv:2")]
    assert report.dropped == {p.EMPTY_RESPONSE: 1, p.EMPTY_PROMPT: 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,chosen,rejected\nQ,a,b,c\n", ["x.csv:2 has 4 cells", "names 3 columns", "double quotes"]),
        ("prompt,chosen,rejected\nQ,a\n", ["x.csv:2 has 2 cells"]),
        ('prompt,chosen,rejected\nQ,a,b\nQ,"a\nb,c\n', ["row that begins in", "x.csv:3", "close each quote"]),
        ('prompt,chosen,rejected\nQ,"a"b,c\n', ["x.csv:2", "inside a quoted cell twice"]),
        ("prompt,chosen,chosen\nQ,a,b\n", ["x.csv:1 names the column 'chosen' twice"]),
        ("prompt,chosen\nQ,a\n", ["x.csv:2 has no column rejected; it has prompt, chosen"]),
        ("", ["x.csv is empty"]),
        ("prompt,chosen,rejected\n", ["x.csv is empty"]),
    ],
)
def test_a_broken_csv_names_the_line(tmp_path, text, words):
    (tmp_path / "x.csv").write_text(text)
    message = refusal(tmp_path / "x.csv")
    assert all(word in message for word in words), message
