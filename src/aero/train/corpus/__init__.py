"""A corpus of real text: found, cleaned, deduplicated, split by package and by file, and accounted for."""

from aero.train.corpus.build import BuildOptions, build_corpus
from aero.train.corpus.document import Document, Filters
from aero.train.corpus.sources import FolderSource, HuggingFaceSource, InstalledSource, Source
from aero.train.corpus.split import SPLITS, Split
from aero.train.corpus.store import Manifest, SplitSummary, load_manifest, read_split, split_digest, verify

__all__ = [
    "SPLITS",
    "BuildOptions",
    "Document",
    "Filters",
    "FolderSource",
    "HuggingFaceSource",
    "InstalledSource",
    "Manifest",
    "Source",
    "Split",
    "SplitSummary",
    "build_corpus",
    "load_manifest",
    "read_split",
    "split_digest",
    "verify",
]
