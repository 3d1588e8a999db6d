"""What the names of a source stand for: lists, globs, folders, compressed files, saved data sets
and streams of the hub."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.config.data_options import DataOptions, SourceNames
from trainer.data.cache import cache_key
from trainer.data.extent import Extent
from trainer.data.sources import hub_ids, read_rows
from trainer.data.tokenise import prepare
from trainer.errors import UserError
from trainer.tasks.causal_lm import CausalLM, CausalLMOptions

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(9)]


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def places(source: SourceNames, split: str = "train", **keys: Any) -> list[tuple[str, dict]]:
    rows: Any = read_rows(source, split, DataOptions(train=source, **keys), None)
    return list(rows)


def rows_of(source: SourceNames, split: str = "train", **keys: Any) -> list[dict]:
    return [row for _, row in places(source, split, **keys)]


def refusal(source: SourceNames, split: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        places(source, split)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# --- compressed files


def as_csv(rows: list[dict]) -> bytes:
    return "".join(
        ["prompt,completion\n", *(f"{','.join(row.values())}\n" for row in rows)]
    ).encode()


def as_parquet(rows: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


FILES = {
    ".jsonl": lines(ROWS),
    ".json": json.dumps(ROWS).encode(),
    ".csv": as_csv(ROWS),
    ".tsv": as_csv(ROWS).replace(b",", b"\t"),
    ".parquet": as_parquet(ROWS),
}


@pytest.mark.parametrize("suffix", FILES)
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    plain = places(str(write(tmp_path / f"plain{suffix}", FILES[suffix])))
    assert [row for _, row in plain] == ROWS
    for ending, compress in ((".gz", gzip.compress), (".ZST", zstd)):
        path = write(tmp_path / f"packed{suffix}{ending}", compress(FILES[suffix]))
        found = places(str(path))
        assert [row for _, row in found] == ROWS
        assert [p.rpartition(":")[2] for p, _ in found] == [p.rpartition(":")[2] for p, _ in plain]


def test_several_gzip_members_and_zstd_frames_are_one_file(tmp_path: Path) -> None:
    for ending, compress in ((".gz", gzip.compress), (".zst", zstd)):
        parts = compress(lines(ROWS[:4])) + compress(lines(ROWS[4:]))
        assert rows_of(str(write(tmp_path / f"a.jsonl{ending}", parts))) == ROWS


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_truncated_and_foreign_compressed_files(tmp_path: Path, suffix: str, ending: str) -> None:
    whole = (gzip.compress if ending == ".gz" else zstd)(FILES[suffix])
    for content in (whole[:-5], whole[: len(whole) // 2], b"no such format"):
        path = write(tmp_path / f"a{suffix}{ending}", content)
        assert refusal(str(path)).startswith(f"{path}: ")


def test_paragraphs_are_named_by_their_line(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf\nfirst line\nits second\n\n \t\n\r\nthe next\r\n\n\n"
    path = write(tmp_path / "a.txt.gz", gzip.compress(text))
    expected = [
        (f"{path}:2", {"text": "first line\nits second"}),
        (f"{path}:7", {"text": "the next"}),
    ]
    assert places(str(path)) == expected


# --- lists, globs, folders


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Three files, written out of order, beside files that are no data."""
    folder = tmp_path / "shards"
    for name in ("README.md", "_SUCCESS", ".part-0.jsonl.crc", ".hidden.jsonl"):
        write(folder / name, b"words")
    return [write(folder / f"part-{i}.jsonl", lines(ROWS[3 * i :][:3])) for i in (2, 0, 1)][::-1]


def test_lists_globs_and_folders(shards: list[Path]) -> None:
    folder = shards[0].parent
    ordered = sorted(map(str, shards))
    for source in (
        ordered,
        [str(folder)],
        str(folder),
        f"{folder}/part-*.jsonl",
        f"{folder}/*.jsonl",
    ):
        found = places(source)
        assert [row for _, row in found] == ROWS, source
        assert [place for place, _ in found] == [f"{p}:{n}" for p in ordered for n in (1, 2, 3)]
    assert rows_of(ordered[::-1]) == [*ROWS[6:], *ROWS[3:6], *ROWS[:3]], "a list keeps its order"
    assert rows_of([ordered[0], ordered[0]]) == ROWS[:3] * 2, "a file may be given twice"
    assert rows_of(f"{folder.parent}/**/part-1.jsonl") == ROWS[3:6]
    mixed = [ordered[0], str(write(folder.parent / "more.csv", as_csv(ROWS[3:])))]
    assert rows_of(mixed) == ROWS


def test_a_folder_whose_files_are_named_after_splits(tmp_path: Path) -> None:
    """As the hub keeps them: a run neither learns its test set nor is scored on what it learned."""
    folder = tmp_path / "data"
    names = ("train-00000-of-00002", "train-00001-of-00002", "test", "validation_matched")
    for index, name in enumerate(names):
        write(folder / f"{name}.jsonl", lines(ROWS[2 * index :][:2]))

    def of(split: str) -> list:
        rows = read_rows(str(folder), split, DataOptions(train="x"), None)
        return [row for _, row in rows]

    assert (of("train"), of("test"), of("validation")) == (ROWS[:4], ROWS[4:6], ROWS[6:8])
    with pytest.raises(UserError, match="data: files of the splits test, train, validation for th"):
        of("dev")
    write(folder / "more.jsonl", lines(ROWS))
    with pytest.raises(UserError, match="train, validation and the files more"):
        of("train")
    for name in names[2:]:
        (folder / f"{name}.jsonl").unlink()
    assert of("test") == [*ROWS, *ROWS[:4]], "a folder of one split alone is read whole"


def test_records_are_counted_over_all_files(shards: list[Path]) -> None:
    rows = read_rows(f"{shards[0].parent}/*.jsonl", "train", DataOptions(train="x"), 5)
    assert [row for _, row in rows] == ROWS[:5]


def test_bad_records_are_named_by_file_and_line(shards: list[Path], tokenizer) -> None:
    write(sorted(shards)[1], lines(ROWS[3:5]) + b"{\n")
    source, task = str(shards[0].parent), CausalLM(CausalLMOptions(), tokenizer)
    options = DataOptions(train=source, cache=f"{source}/.cache")
    with pytest.raises(UserError, match=r"part-1.jsonl:3: broken JSON"):
        prepare(source, "train", None, options, task)


def test_names_that_stand_for_nothing(tmp_path: Path, shards: list[Path]) -> None:
    folder = shards[0].parent
    assert refusal(f"{tmp_path}/*.csv") == (
        f"{tmp_path}/*.csv: no file matches; accepted: a glob of data files"
    )
    assert "not a data file; accepted: .json, .jsonl" in refusal(f"{folder}/*.md")
    (tmp_path / "none").mkdir()
    write(tmp_path / "none/notes.md", b"words")
    assert refusal(str(tmp_path / "none")).startswith(
        f"{tmp_path}/none: no data file in this folder"
    )
    assert refusal(["a", str(shards[0])]).startswith("a: no such file; accepted: a file (.json")
    write(folder / "part-3.jsonl.gz", gzip.compress(lines(ROWS)))
    assert refusal(str(folder)).startswith(f"{folder}: files of several kinds (.jsonl, .jsonl.gz)")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file; accepted: at least one record"),
        (b"\n \n", "no records; accepted: at least one"),
    ],
)
def test_an_empty_file_of_a_list_is_named(shards: list[Path], content: bytes, reason: str) -> None:
    path = write(sorted(shards)[1], content)
    for source in (str(path.parent), [str(shards[0]), str(path)]):
        assert refusal(source) == f"{path}: {reason}"


def test_the_cache_knows_the_content_of_all_files(shards: list[Path], tokenizer) -> None:
    task = CausalLM(CausalLMOptions(), tokenizer)

    def key(source: SourceNames) -> str:
        return cache_key(source, "train", None, DataOptions(train=source), task)

    folder, ordered = str(shards[0].parent), sorted(map(str, shards))
    assert key(folder) == key(f"{folder}/*.jsonl") == key(ordered)
    assert key(ordered) != key(ordered[::-1]) and key(ordered[:1]) != key(ordered[:2])
    before = key(folder)
    write(shards[2], lines(ROWS[:3]) + b"\n")
    assert key(folder) != before


# --- saved data sets, and the hub


def test_saved_data_sets(tmp_path: Path, tokenizer) -> None:
    nested = [{"prompt": "p", "completion": "c", "calls": [{"a": 1, "b": None}]}, *ROWS]
    train = datasets.Dataset.from_list(nested)
    both = datasets.DatasetDict({"train": train, "held": datasets.Dataset.from_list(ROWS)})
    train.save_to_disk(tmp_path / "one", num_shards=2)
    both.save_to_disk(tmp_path / "both")
    first = {"prompt": "p", "completion": "c", "calls": [{"a": 1}]}
    for source in ("one", "both"):
        found = rows_of(str(tmp_path / source))
        assert found[0] == first and [row["prompt"] for row in found[1:]] == [
            r["prompt"] for r in ROWS
        ]
    assert places(str(tmp_path / "both"), "held")[1] == (f"{tmp_path}/both/held:2", ROWS[1])
    assert refusal(str(tmp_path / "both"), "test") == (
        f"{tmp_path}/both: no split 'test'; accepted: train, held"
    )
    (tmp_path / "one/data-00001-of-00002.arrow").write_bytes(b"words")
    assert refusal(str(tmp_path / "one")).startswith(f"{tmp_path}/one: no data set of save_to_disk")


def test_hub_data_sets_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, given = [], []

    def stream() -> Iterator[dict]:
        for number in range(10**6):
            given.append(number)
            yield {"prompt": f"p{number}", "completion": "c", "meta": {"a": None, "b": number}}

    def load(name: str, subset: str | None, **keys: Any) -> datasets.IterableDataset:
        asked.append((name, subset, keys))
        return datasets.IterableDataset.from_generator(stream)

    monkeypatch.setattr(datasets, "load_dataset", load)
    options = DataOptions(train="a/b", subset="s", revision="r")
    rows: Any = read_rows(["a/b", "a/c"], "train", options, 3)
    assert list(rows)[2] == ("a/b:3", {"prompt": "p2", "completion": "c", "meta": {"b": 2}})
    assert len(given) < 10, "no more is read than is asked for"
    assert asked == [("a/b", "s", {"split": "train", "revision": "r", "streaming": True})]


def test_a_real_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` itself streams files, which stand for the hub's."""
    files = [str(write(tmp_path / f"{i}.jsonl", lines(ROWS[3 * i :][:3]))) for i in range(3)]
    real = datasets.load_dataset

    def load(name: str, subset: str | None, **keys: Any) -> datasets.IterableDataset:
        assert (name, subset) == ("a/b", None)
        return real("json", data_files={"train": files}, **keys)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert rows_of("a/b") == ROWS
    assert refusal("a/b", "other").startswith(
        "a/b: neither a local file nor a data set that the hub"
    )


def test_a_stream_that_breaks_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream() -> Iterator[dict]:
        yield ROWS[0]
        raise ConnectionError("reset\nby peer")

    rows = datasets.IterableDataset.from_generator(stream)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert refusal("a/b") == ("a/b: neither a local file nor a data set that the hub gives (reset)")


def test_hub_ids(shards: list[Path]) -> None:
    assert hub_ids([str(shards[0]), "a/b", f"{shards[0].parent}/*", "c/d.jsonl"]) == ["a/b"]


# --- how much was read


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", FILES)
def test_the_part_that_was_read_grows_to_the_whole(
    tmp_path: Path, suffix: str, ending: str
) -> None:
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstd}[ending]
    files = [
        str(write(tmp_path / f"{i}{suffix}{ending}", compress(FILES[suffix]))) for i in range(3)
    ]
    extent = Extent()
    shares = [
        extent.share for _ in read_rows(files, "train", DataOptions(train=files), None, extent)
    ]
    assert shares == sorted(shares) and shares[9] == pytest.approx(shares[0] + 1 / 3, abs=0.01)
    assert shares[-1] > 0.9 and extent.total == sum(Path(file).stat().st_size for file in files)
