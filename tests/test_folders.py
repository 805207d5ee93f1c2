"""Of a folder, the files of one split are read, by the Hub's names; training and held-out data are never mixed up."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from patarm_jax.config.sections import DataSection
from patarm_jax.data.folders import SPLIT_WORDS, split_named
from patarm_jax.data.preferences import read_preferences
from patarm_jax.types import UserError

CASES = Path(__file__).parents[2] / "shared" / "cases"


def row(name):
    return {"prompt": f"Which is {name}?", "chosen": f"This is {name}.", "rejected": "None.", "source": name}


def make(folder, *names):
    """Files, each of one row that says where it lies."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(row(name)) + "\n"
        if name.endswith(".parquet"):
            datasets.Dataset.from_list([row(name)]).to_parquet(path)
        else:
            path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return folder


def read(folder, split="train"):
    """The sources that are read, and the report."""
    kept, report = read_preferences(DataSection(str(folder), split=split, domain="chat"))
    return [one.source for one in kept], str(report)


def refusal(folder, split="train", setting="data"):
    with pytest.raises(UserError) as error:
        read_preferences(DataSection(str(folder), split=split, domain="chat"), setting)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("training", "heldout", "split"),
    [
        ("train.jsonl", "eval.jsonl", "test"),
        ("train.jsonl", "test.jsonl", "test"),
        ("training-set.jsonl.gz", "my_evaluation.jsonl.gz", "test"),
        ("pairs.train.jsonl", "pairs.testing.jsonl", "test"),
        ("TRAIN.jsonl", "Dev.jsonl", "validation"),
        ("train 1.jsonl", "valid2.jsonl", "validation"),
        ("code-train_v2.jsonl", "code-val_v2.jsonl", "validation"),
        ("train/x.jsonl", "test/x.jsonl", "test"),
        ("chat/train/x.jsonl", "chat/eval-set/x.jsonl", "test"),
        ("a/train.jsonl", "b/test.jsonl", "test"),
        ("train/part-00000-of-00002.parquet", "test/part-00000-of-00001.parquet", "test"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "test"),
        ("data/train_prefs-00000-of-00001.parquet", "data/train_sft-00000-of-00001.parquet", "train_sft"),
        ("train_test/train.jsonl", "train_test/test.jsonl", "test"),
    ],
)
def test_of_a_folder_of_splits_one_is_read(tmp_path, training, heldout, split):
    """Each of the two goes without the other's file, whatever it is asked by; and it is said what is not read."""
    make(tmp_path, training, heldout)
    first = "train_prefs" if split == "train_sft" else "train"
    assert read(tmp_path, first) == ([training], f"kept 1 of 1; dropped none; not read: {heldout}")
    assert read(tmp_path, split) == ([heldout], f"kept 1 of 1; dropped none; not read: {training}")


@pytest.mark.parametrize(("word", "split"), SPLIT_WORDS.items())
def test_every_word_of_the_hub_names_its_split(word, split):
    for name in (f"{word}.jsonl", f"my-{word}.v2.jsonl", f"{word}_0/x.jsonl", f"a/{word.upper()} set/x.csv.gz"):
        assert split_named(name) == split
    for name in (f"{word}ing2.jsonl", f"un{word}.jsonl", f"{word}s/x.jsonl"):
        assert split_named(name) in ({None} if f"{word}ing" not in SPLIT_WORDS else {None, split})


def test_names_are_read_as_the_hub_reads_them(tmp_path):
    """Against what `datasets` itself makes of such folders."""
    for number, names in enumerate(
        (
            ("train.jsonl", "eval.jsonl"),
            ("my_train_file.jsonl", "x-dev.jsonl", "testing1.jsonl"),
            ("train/a.jsonl", "validation/a.jsonl"),
            ("data/train-00000-of-00001.jsonl", "data/gpt-00000-of-00001.jsonl"),
        )
    ):
        folder = make(tmp_path / str(number), *names)
        theirs = datasets.load_dataset(str(folder), streaming=True)
        for split, rows in theirs.items():
            assert read(folder, split)[0] == [each["source"] for each in rows]


def test_an_asked_split_may_go_by_another_word(tmp_path):
    make(tmp_path, "train.jsonl", "eval.jsonl", "dev.jsonl")
    for asked in ("test", "eval", "evaluation", "testing"):
        assert read(tmp_path, asked)[0] == ["eval.jsonl"]
    for asked in ("validation", "val", "dev"):
        assert read(tmp_path, asked)[0] == ["dev.jsonl"]


def test_shards_of_two_words_for_a_split_are_two_splits(tmp_path):
    make(tmp_path, "data/eval-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl")
    assert read(tmp_path, "eval")[0] == ["data/eval-00000-of-00001.jsonl"]
    assert read(tmp_path, "test")[0] == ["data/test-00000-of-00001.jsonl"]


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    make(tmp_path, "train.jsonl", "valid.jsonl")
    words = refusal(tmp_path, "test", "heldout")
    assert "holds the splits train (train.jsonl), validation (valid.jsonl), and heldout.split is test" in words
    assert "Set heldout.split to one that is there" in words
    assert read(tmp_path, "validation")[0] == ["valid.jsonl"]  # what it says works
    (tmp_path / "train.jsonl").unlink()
    assert "holds the split validation (valid.jsonl), and data.split is train" in refusal(tmp_path)


def test_without_a_split_asked_for_the_only_one_is_read(tmp_path):
    """As `eval pairs` asks."""
    assert read(make(tmp_path / "one", "test.jsonl"), "")[0] == ["test.jsonl"]
    assert "data.split is empty" in refusal(make(tmp_path / "two", "test.jsonl", "train.jsonl"), "")


@pytest.mark.parametrize(
    ("names", "naming", "none"),
    [
        (("train.jsonl", "extra.jsonl"), "train.jsonl names a split", "extra.jsonl names none"),
        (("train.jsonl", "test.jsonl", "more.jsonl"), "test.jsonl, train.jsonl name a split", "more.jsonl names none"),
        (("chat/a.jsonl", "train_math/b.jsonl"), "train_math/b.jsonl names a split", "chat/a.jsonl names none"),
        (("code.jsonl", "math-train.jsonl"), "math-train.jsonl names a split", "code.jsonl names none"),
    ],
)
def test_a_folder_where_some_files_name_a_split_and_others_none_is_refused(tmp_path, names, naming, none):
    make(tmp_path, *names)
    message = refusal(tmp_path)
    assert naming in message and none in message and "Give one file or folder as data.path, or rename" in message
    for name in names:  # the remedies work
        assert read(tmp_path / name)[0] == [name]
    for number, name in enumerate(names):
        (tmp_path / name).rename(tmp_path / f"train_{number}.jsonl")
    assert len(read(tmp_path)[0]) == len(names)


@pytest.mark.parametrize("name", ["train_test_split.jsonl", "train/test.jsonl", "test/train-00000-of-00001.jsonl"])
def test_a_name_that_says_two_splits_is_refused(tmp_path, name):
    make(tmp_path, name)
    assert f"the name of {name} says the splits test and train" in refusal(tmp_path)
    assert read(tmp_path / name)[0] == [name]


@pytest.mark.parametrize(
    "names",
    [
        ("a.jsonl", "b.jsonl"),
        ("chat/a.jsonl", "code/b.jsonl"),
        ("part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"),
        ("brainstorming.jsonl", "latest.jsonl"),  # words only where they stand apart
    ],
)
def test_of_a_folder_without_splits_all_is_read(tmp_path, names):
    make(tmp_path, *names)
    assert read(tmp_path) == (sorted(names), "kept 2 of 2; dropped none")


def test_a_folder_without_data(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    assert f"the folder {tmp_path} holds no .jsonl, .json, .csv" in refusal(tmp_path)


# ---- What datasets writes -------------------------------------------------------------------------------------------


def saved(name, count=3):
    return datasets.Dataset.from_list([row(f"{name}{number}") for number in range(count)])


def test_a_saved_data_set_is_read_as_it_is(tmp_path):
    saved("a").save_to_disk(tmp_path / "saved", num_shards=2)
    kept, report = read_preferences(DataSection(str(tmp_path / "saved"), domain="chat"))
    assert [(one.source, one.id) for one in kept] == [(f"a{n}", f"saved:{n + 1}") for n in range(3)]
    assert str(report) == "kept 3 of 3; dropped none"
    (shard, *_) = sorted((tmp_path / "saved").glob("*.arrow"))
    assert read(shard)[0] == ["a0", "a1"]  # one file of it


def test_of_a_saved_dict_one_split_is_read(tmp_path):
    splits = {"train": saved("t"), "test": saved("h", 2), "train_sft": saved("s", 1)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == (["t0", "t1", "t2"], "kept 3 of 3; dropped none; not read: test, train_sft")
    assert read(tmp_path / "saved", "eval")[0] == ["h0", "h1"]
    assert read(tmp_path / "saved", "train_sft")[0] == ["s0"]
    assert read(tmp_path, "test")[0] == ["h0", "h1"]  # in a folder of its own
    assert "holds the splits test (test), train (train), train_sft" in refusal(tmp_path / "saved", "dev")


def test_saved_data_sets_beside_each_other_are_told_by_their_folders(tmp_path):
    saved("t", 1).save_to_disk(tmp_path / "train")
    saved("h", 1).save_to_disk(tmp_path / "eval")
    assert (read(tmp_path)[0], read(tmp_path, "test")[0]) == (["t0"], ["h0"])


def test_a_damaged_saved_data_set_is_one_sentence(tmp_path):
    saved("a").save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert "cannot read" in refusal(tmp_path / "saved")
    arrow.unlink()
    assert "Write it again with save_to_disk" in refusal(tmp_path / "saved")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["gone"]}')
    assert "does not name the folders beside it" in refusal(tmp_path)


def test_a_clone_of_a_hub_data_set_is_read_without_its_metadata(tmp_path):
    make(tmp_path, "data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet")
    for name in ("dataset_infos.json", "dataset_info.json", "config.json", ".gitattributes", "README.md"):
        (tmp_path / name).write_text('{"default": {}}')
    names, report = read(tmp_path)
    assert names == ["data/train-00000-of-00001.parquet"]
    assert report.endswith("; not read: data/test-00000-of-00001.parquet, config.json, dataset_info.json and 1 more")


LISTS = [
    "configs: [{config_name: default, data_files: [{split: train, path: a.jsonl}, {split: test, path: 'more/*'}]}]",
    "configs: [{config_name: x, data_files: {train: [a.jsonl], test: more/b.jsonl}}]",
    "configs: [{data_files: '**a.jsonl'}, {data_dir: more, data_files: [{split: test, path: b.jsonl}]}]",
]


@pytest.mark.parametrize("listed", LISTS)
def test_the_files_that_a_clone_lists_are_of_the_splits_it_says(tmp_path, listed):
    make(tmp_path, "a.jsonl", "more/b.jsonl", "notes_test.json")
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{listed}\n---\n# Pairs\n")
    assert read(tmp_path) == (["a.jsonl"], "kept 1 of 1; dropped none; not read: more/b.jsonl, notes_test.json")
    assert read(tmp_path, "test")[0] == ["more/b.jsonl"]
    assert "holds the splits test (more/b.jsonl), train (a.jsonl)" in refusal(tmp_path, "dev")


@pytest.mark.parametrize(
    "text", ["# Pairs", "---\n: [\n---", "---\nconfigs: 3\n---", "---\nconfigs: [1, {data_files: 2}]\n---"]
)
def test_a_readme_that_lists_nothing_is_a_page_for_people(tmp_path, text):
    make(tmp_path, "a.jsonl", "b.jsonl")
    (tmp_path / "README.md").write_text(text)
    assert read(tmp_path)[0] == ["a.jsonl", "b.jsonl"]


def test_a_pointer_of_git_lfs_is_no_data(tmp_path):
    for name in ("train-00000-of-00001.parquet", "x.jsonl"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        assert "holds a pointer of Git LFS, not the data. Run `git lfs pull`" in refusal(tmp_path / name)


def test_the_cases_of_the_field():
    if not CASES.is_dir():
        pytest.skip(f"small inputs of the field are not at {CASES}")
    counts = {"train_eval": 64, "folder": 20, "folder_dict": 20, "clone": 20}
    for name, count in counts.items():
        (folder,) = CASES.glob(f"*/{name}")
        assert len(read(folder)[0]) == count
    training, heldout = (
        read_preferences(DataSection(str(CASES / "eval_split" / "train_eval"), split=split))[0]
        for split in ("train", "test")
    )
    assert {one.id for one in training}.isdisjoint({one.id for one in heldout}) and len(heldout) == 32
