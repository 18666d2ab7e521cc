"""The corpus: what enters, what is held out, what the manifest says, and the sentences for bad input."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aero.errors import AeroError
from aero.train.corpus import (
    SPLITS,
    BuildOptions,
    Document,
    Filters,
    FolderSource,
    HuggingFaceSource,
    InstalledSource,
    build_corpus,
    load_manifest,
    read_split,
    verify,
)
from aero.train.corpus.document import decode, normalise
from aero.train.corpus.licences import NOT_STATED, licence_of
from aero.train.corpus.split import Sample, assign, drop_near_duplicates

OPTIONS = BuildOptions(holdout_packages=0.2, holdout_files=0.15)


@dataclass(frozen=True)
class ListSource:
    """Documents from a list, in its order."""

    items: list[Document]

    def describe(self) -> dict[str, Any]:
        return {"kind": "list"}

    def documents(self) -> Iterator[Document | None]:
        return iter(self.items)


def documents_of(folder: Path) -> dict[str, list[Document]]:
    return {split: list(read_split(folder, split)) for split in SPLITS}


def without_date(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    values.pop("date")
    values.pop("source")
    return values


def test_the_same_source_gives_the_same_corpus_in_any_order(code: Path, corpus: Path, tmp_path: Path) -> None:
    found = [document for document in FolderSource(code).documents() if document is not None]
    for turn in range(3):
        random.Random(turn).shuffle(found)
        build_corpus(ListSource(found), tmp_path / str(turn), OPTIONS)
        assert without_date(tmp_path / str(turn)) == without_date(corpus)
        assert documents_of(tmp_path / str(turn)) == documents_of(corpus)


def test_another_seed_holds_out_other_text(code: Path, corpus: Path, tmp_path: Path) -> None:
    options = BuildOptions(holdout_packages=0.2, holdout_files=0.15, seed=1)
    build_corpus(FolderSource(code), tmp_path / "other", options)
    assert documents_of(tmp_path / "other")["holdout_packages"] != documents_of(corpus)["holdout_packages"]


def test_no_text_is_in_two_splits_and_none_is_lost(code: Path, corpus: Path) -> None:
    splits = documents_of(corpus)
    texts = [document.text for members in splits.values() for document in members]
    assert len(texts) == len(set(texts)) == len(list(code.rglob("*.py")))


def test_held_out_packages_are_whole(code: Path, corpus: Path) -> None:
    splits = documents_of(corpus)
    out = {document.package for document in splits["holdout_packages"]}
    seen = {document.package for split in ("train", "holdout_files") for document in splits[split]}
    assert out
    assert not out & seen
    everything = {path.parent.name for path in code.rglob("*.py")}
    assert out | seen == everything
    share = sum(len(document.data) for document in splits["holdout_packages"])
    total = sum(len(document.data) for members in splits.values() for document in members)
    assert 0.08 < share / total <= 0.2


def test_the_manifest_agrees_with_an_independent_count(corpus: Path) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text())
    names = []
    for split in SPLITS:
        rows = pyarrow.parquet.read_table(corpus / f"{split}.parquet").to_pylist()
        lines = []
        for row in rows:
            text = row["text"].encode()
            lines.append(f"{hashlib.sha256(text).hexdigest()}  {row['package']}/{row['path']}\n".encode())
        digest = hashlib.sha256(b"".join(sorted(lines))).hexdigest()
        assert manifest["splits"][split] == {
            "documents": len(rows),
            "packages": len({row["package"] for row in rows}),
            "bytes": sum(len(row["text"].encode()) for row in rows),
            "sha256": digest,
        }
        listed = {name: entry[split] for name, entry in manifest["packages"].items() if split in entry}
        assert sum(entry["documents"] for entry in listed.values()) == len(rows)
        names.append(f"{digest}  {split}\n")
    assert manifest["sha256"] == hashlib.sha256("".join(names).encode()).hexdigest()
    assert set(manifest) >= {"source", "options", "versions", "date", "left_out", "packages"}
    assert str(corpus.parent) not in json.dumps(manifest)
    assert verify(corpus) == load_manifest(corpus)


def test_duplicates_are_dropped_before_the_split(code: Path, tmp_path: Path) -> None:
    copy = tmp_path / "code"
    shutil.copytree(code, copy)
    for package in ("package00", "package05"):
        shutil.copytree(copy / package, copy / f"vendored-{package}")
    # The same text with other line ends and blanks is the same text.
    original = copy / "package01" / "module0.py"
    (copy / "package11" / "copy.py").write_bytes(original.read_bytes().replace(b"\n", b"  \r\n"))
    manifest = build_corpus(FolderSource(copy), tmp_path / "out", OPTIONS)
    assert manifest.left_out["duplicate"] == 13
    texts = [document.text for members in documents_of(tmp_path / "out").values() for document in members]
    assert len(texts) == len(set(texts))


def test_near_duplicates_of_training_text_are_not_held_out() -> None:
    body = "\n".join(f"a line that is long enough to tell texts apart, number {index}" for index in range(20))
    train = Document("a", "a.py", body + "\nfirst copy with a line of its own\n")
    near = Document("b", "b.py", body + "\nsecond copy with another line of its own\n")
    other = Document("b", "c.py", body.replace("number", "figure") + "\n")
    splits = {"train": [train], "holdout_packages": [near, other], "holdout_files": []}
    assert drop_near_duplicates(splits) == 1  # type: ignore[arg-type]
    assert splits["holdout_packages"] == [other]


def test_the_size_cap_holds_and_samples_from_the_hash_alone(code: Path, corpus: Path, tmp_path: Path) -> None:
    total = sum(summary.bytes for summary in load_manifest(corpus).splits.values())
    cap = total // 2
    found = [document for document in FolderSource(code).documents() if document is not None]
    chosen = []
    for turn in range(2):
        random.Random(turn).shuffle(found)
        options = BuildOptions(holdout_packages=0.2, holdout_files=0.15, max_bytes=cap)
        manifest = build_corpus(ListSource(found), tmp_path / str(turn), options)
        taken = sum(summary.bytes for summary in manifest.splits.values())
        assert 0.8 * cap < taken <= cap
        assert manifest.left_out["over the cap"] == len(found) - sum(s.documents for s in manifest.splits.values())
        chosen.append(documents_of(tmp_path / str(turn)))
    assert chosen[0] == chosen[1]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=40), st.integers(1, 400), st.randoms())
def test_a_sample_does_not_depend_on_order(numbers: list[int], cap: int, random: random.Random) -> None:
    offered = [Document(f"p{number % 3}", f"{place}", "x" * (number + 1)) for place, number in enumerate(numbers)]
    results = []
    for _ in range(2):
        sample = Sample(cap, seed=3)
        for document in offered:
            sample.offer(document)
        results.append(sample.documents())
        assert sample.bytes == sum(len(document.data) for document in results[-1]) <= cap
        assert sample.distinct == len(set(numbers))
        random.shuffle(offered)
    assert results[0] == results[1]


def test_what_is_too_odd_to_learn_from_stays_out() -> None:
    filters = Filters()

    def reason(text: str) -> str | None:
        return filters.reason(Document("p", "x.py", normalise(text)))

    plain = "value = compute(first, second)\n" * 20
    assert reason(plain) is None
    assert reason("x = 1\n") == "too short"
    assert reason(plain * 2000) == "too long"
    assert reason(plain + "x" * 1500) == "long lines"
    assert reason("data = " + ", ".join(["12345"] * 100) + "\n") == "long lines"
    assert reason("# Generated by a compiler. DO NOT EDIT!\n" + plain) == "generated"
    assert reason("+-*/ =>< (){}[];:., \n" * 20) == "few letters"
    assert decode(b"abc\0def") is None
    assert decode(b"\xff\xfe\xfa") is None
    assert decode(b"\xef\xbb\xbfabc") == "abc"


def test_binary_files_are_counted_and_left_out(code: Path, tmp_path: Path) -> None:
    copy = tmp_path / "code"
    shutil.copytree(code, copy)
    (copy / "package00" / "data.bin").write_bytes(bytes(range(256)) * 4)
    (copy / "package00" / ".hidden").write_text("x = 1\n" * 100)
    manifest = build_corpus(FolderSource(copy), tmp_path / "out", OPTIONS)
    assert manifest.left_out["not text"] == 1
    assert sum(summary.documents for summary in manifest.splits.values()) == 72


def test_the_installed_source_groups_by_package() -> None:
    found: dict[str, str] = {}
    for document in InstalledSource().documents():
        if document is not None:
            found.setdefault(document.package, document.path)
        if "stdlib.asyncio" in found:
            break
    assert all(name.startswith("stdlib.") for name in found)
    assert found["stdlib.asyncio"].startswith("asyncio/")
    assert found["stdlib.argparse"] == "argparse.py"


@pytest.fixture
def rows(code: Path) -> list[dict[str, Any]]:
    """The code as rows in codeparrot's layout."""
    return [
        {
            "repo_name": f"owner/{path.parent.name}",
            "path": f"src/{path.name}",
            "copies": "1",
            "size": str(path.stat().st_size),
            "content": path.read_text(encoding="utf-8"),
            "license": "mit",
        }
        for path in sorted(code.rglob("*.py"))
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_in_codeparrot_layout(
    rows: list[dict[str, Any]], corpus: Path, tmp_path: Path, streaming: bool
) -> None:
    source = HuggingFaceSource(str(write_lines(tmp_path / "code.jsonl", rows)), streaming=streaming)
    manifest = build_corpus(source, tmp_path / "out", OPTIONS)
    assert manifest.source["name"] == "code.jsonl"
    assert {name.partition("/")[0] for name in manifest.packages} == {"owner"}
    texts = {document.text for members in documents_of(tmp_path / "out").values() for document in members}
    assert texts == {document.text for members in documents_of(corpus).values() for document in members}


def test_a_dataset_saved_to_disk_its_limit_and_rows_without_names(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    import datasets

    bare = datasets.Dataset.from_list([{"text": row["content"]} for row in rows])
    bare.save_to_disk(tmp_path / "saved")
    source = HuggingFaceSource(str(tmp_path / "saved"), text_field="text", limit=20)
    manifest = build_corpus(source, tmp_path / "out", OPTIONS)
    assert sum(summary.documents for summary in manifest.splits.values()) == 20
    assert len(manifest.packages) == 20


def test_bad_sources_are_one_sentence(
    code: Path, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    empty = tmp_path / "empty"
    empty.mkdir()
    lines = str(write_lines(tmp_path / "rows.jsonl", rows))
    cases: list[tuple[Any, BuildOptions, str]] = [
        (FolderSource(tmp_path / "missing"), OPTIONS, "There is no folder"),
        (FolderSource(empty), OPTIONS, "no file was found"),
        (FolderSource(code), BuildOptions(max_bytes=10), "size cap"),
        (FolderSource(code.parent), OPTIONS, "single package"),
        (HuggingFaceSource("nobody/no-such-dataset"), OPTIONS, "cannot be read"),
        (HuggingFaceSource(str(tmp_path / "missing.jsonl")), OPTIONS, "cannot be read"),
        (HuggingFaceSource(lines, text_field="body"), OPTIONS, "no column 'body'"),
    ]
    for source, options, expected in cases:
        if source == FolderSource(code.parent):
            (tmp_path / "one").mkdir()
            shutil.copytree(code, tmp_path / "one" / "only")
            source = FolderSource(tmp_path / "one")
        with pytest.raises(AeroError, match=expected) as caught:
            build_corpus(source, tmp_path / "out", options)
        assert re.fullmatch(r"[^\n]+\.", str(caught.value))
        assert not (tmp_path / "out").exists()


def test_bad_shares_are_refused() -> None:
    for change in ({"holdout_packages": 0.9}, {"holdout_files": -0.1}, {"max_bytes": 0}):
        with pytest.raises(AeroError):
            BuildOptions(**change)  # type: ignore[arg-type]


def test_a_share_of_zero_leaves_the_split_empty() -> None:
    documents = [Document("p", f"{index}", f"text {index}") for index in range(5)]
    splits = assign(documents, packages_share=0, files_share=0, seed=0)
    assert [len(splits[split]) for split in SPLITS] == [5, 0, 0]


def test_foreign_folders_are_never_replaced(code: Path, corpus: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "work"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(AeroError, match="holds other files"):
            build_corpus(FolderSource(code), foreign, OPTIONS, force=force)
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    own = tmp_path / "own"
    shutil.copytree(corpus, own)
    with pytest.raises(AeroError, match="--force"):
        build_corpus(FolderSource(code), own, OPTIONS)
    build_corpus(FolderSource(code), own, OPTIONS, force=True)
    verify(own)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "work"]


def test_a_damaged_corpus_is_noticed(corpus: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(corpus, broken)
    shutil.copy(broken / "holdout_files.parquet", broken / "train.parquet")
    with pytest.raises(AeroError, match="not what its manifest says"):
        verify(broken)
    (broken / "train.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(AeroError, match="cannot be read"):
        verify(broken)
    (broken / "train.parquet").unlink()
    with pytest.raises(AeroError, match=r"lacks train\.parquet"):
        verify(broken)
    (broken / "manifest.json").write_text("{}")
    with pytest.raises(AeroError, match="damaged"):
        load_manifest(broken)
    with pytest.raises(AeroError, match="not a corpus"):
        load_manifest(tmp_path)


def test_an_installed_corpus_says_the_licence_of_every_package() -> None:
    licences = InstalledSource().describe()["licences"]
    assert licences["numpy"] == "BSD License"
    assert "Apache" in licences["transformers"]
    facts = Message()
    facts["License"] = "a whole text\nof many lines"
    facts["Classifier"] = "License :: OSI Approved :: MIT License"
    assert licence_of(facts) == "MIT License"
    facts["License-Expression"] = "MIT OR Apache-2.0"
    assert licence_of(facts) == "MIT OR Apache-2.0"
    assert licence_of(Message()) == NOT_STATED
