"""The study at a size that a CPU does in seconds: it stops anywhere, goes on, decides rates and sums up."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aero.model.decoder import Decoder

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def study() -> Iterator[Any]:
    """The program as a module; its neighbours are found while it is loaded."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import study as module

        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def tiny(study: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """The scale, a corpus and an empty folder."""
    out = tmp_path_factory.mktemp("study")
    scale = study.SCALES["tiny"]
    corpus = study.load_study_corpus(out / "corpus-tiny-0.npz", megabytes=0.3, vocab_size=300, cut=0)
    return scale, corpus, out


def test_the_plan_covers_the_study_and_no_name_is_twice(study: Any) -> None:
    runs = study.plan(study.SCALES["small"], [])
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    count = {phase: sum(run.phase == phase for run in runs) for phase in dict.fromkeys(run.phase for run in runs)}
    assert count == {
        "search": 28,
        "main": 25,
        "stability": 4,
        "context": 24,
        "cure": 7,
        "deep": 3,
        "long": 4,
        "other": 21,
    }
    assert all((run.rate is None) == (run.phase not in ("search", "cure")) for run in runs)
    longer = {run.row for run in runs if run.phase == "context"}
    assert longer == {"SM+LN+G", "static+bilinear", "static+bilinear+kernel", "static+bilinear+bounded"}
    stable = [run for run in runs if run.phase == "stability"]
    assert {(run.row, run.cut) for run in stable} == {("static+bilinear", 1), ("static+bilinear+kernel", 1)}
    for run in runs:
        assert run.config(study.SCALES["small"]).context == run.context
        tokens = {"search": 20, "cure": 20, "other": 20, "context": 42.5, "long": 250}.get(run.phase, 85)
        assert run.tokens == tokens * 1_000_000


def test_the_search_decides_every_rate(study: Any) -> None:
    scale = study.SCALES["small"]
    search = [run for run in study.plan(scale, []) if run.phase == "search"]
    documents = [
        {"run": asdict(run), "held_out_loss": None if run.rate == 1e-3 else abs(math.log(run.rate / 5e-4))}
        for run in search
    ]
    runs = [run for run in study.plan(scale, documents) if run.phase not in ("search", "cure")]
    assert {run.rate for run in runs if run.phase != "stability"} == {5e-4}
    assert sorted({run.rate for run in runs if run.phase == "stability"}) == pytest.approx([2.5e-4, 1e-3])
    missing = next(each for each in documents if each["run"]["row"] == "SM+LN+R")
    incomplete = [each for each in documents if each["run"]["row"] != "SM+LN+G" and each is not missing]
    rates = {run.row: run.rate for run in study.plan(scale, incomplete) if run.phase in ("main", "other")}
    assert rates["SM+LN+G"] is rates["SM+LN"] is rates["SM+LN+R"] is None
    assert rates["static+relu"] == 5e-4
    between = [each for each in documents if each["run"]["rate"] != 2e-3]
    assert {run.rate for run in study.plan(scale, between) if run.phase == "main"} == {5e-4}
    at_the_end = [each for each in documents if each["run"]["rate"] > 4e-4]
    assert {run.rate for run in study.plan(scale, at_the_end) if run.phase == "main"} == {None}


def test_a_run_that_is_cut_off_goes_on_as_if_nothing_had_happened(
    study: Any, tiny: tuple[Any, Any, Path], tmp_path: Path
) -> None:
    scale, corpus, _ = tiny
    base = next(run for run in study.plan(scale, []) if run.row == "static+bilinear+bounded")
    run = replace(base, rate=3e-3)
    documents = []
    for name in ("whole", "cut"):
        out = tmp_path / name
        out.mkdir()
        rounds = 0
        while not (out / f"{run.name}.json").exists():
            # A time that is over at once: every call takes one step.
            until = math.inf if name == "whole" else time.monotonic()
            try:
                study.train(run, scale, corpus, out, device="cpu", until=until, save=math.inf, parts=2)
            except study.OutOfTimeError:
                assert study.status(run, out) == "under way"
            rounds += 1
        documents.append(json.loads((out / f"{run.name}.json").read_text()))
        assert rounds == (1 if name == "whole" else documents[0]["steps"])
        assert not list(out.glob("*.state"))
    one, other = documents
    for name in ("curve", "held_out_loss", "head_entropy", "largest_gradient_norm", "largest_u", "largest_u_held_out"):
        assert one[name] == other[name], name
    assert one["operators"] == {"bounded heads": 4, "bilinear": 2}
    assert one["logit_bounds"] == [8.0]
    assert one["nan_step"] is None
    assert all(0 < u < 100 and norm in range(5) for _, u, norm in one["largest_u"])
    assert one["largest_u_held_out"] > 0
    assert one["stray_steps"] == other["stray_steps"] < one["steps"]
    assert one["perplexity"] == pytest.approx(math.exp(one["held_out_loss"]))


def test_single_steps_show_in_the_curve_of_u(study: Any) -> None:  # noqa: ARG001 - it makes the module found
    import study_train

    largest = [[2.0, 1.0]] * 40
    largest[20], largest[37], largest[39] = [9.0, 3.0], [5.0, 2.0], [math.nan, 0.0]
    curve = study_train.u_curve(largest, 10, None)
    assert curve == [[0, 2.0, 1.0], [10, 2.0, 1.0], [20, 9.0, 3.0], [39, None, 0.0]]
    assert [step for step, _, _ in study_train.u_curve(largest, 10, 39)] == [0, 10, *range(19, 40)]
    assert study_train.stray_steps(largest, 20) == 3
    assert study_train.stray_steps(largest, 21) == 2


@pytest.mark.parametrize("without", ["stray", "settle", "guard", "concentrated", "everything"])
def test_a_run_lacks_what_its_row_says(
    study: Any, tiny: tuple[Any, Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    from aero.model import norm

    for name in ("STRAY", "GUARD"):
        monkeypatch.setattr(norm, name, getattr(norm, name))
    # Small enough that every one of them tells in twenty steps.
    norm.STRAY, norm.GUARD = 1.1, 1.2
    scale, corpus, _ = tiny
    runs = [run for run in study.plan(scale, []) if run.phase == "cure" and run.without in ("", without)]
    documents = []
    for run in runs:
        study.train(run, scale, corpus, tmp_path, device="cpu", until=math.inf, save=math.inf, parts=1)
        documents.append(json.loads((tmp_path / f"{run.name}.json").read_text()))
    assert [document["run"]["row"] for document in documents] == [
        "static+bilinear",
        f"static+bilinear without {without}",
    ]
    gone = without in ("concentrated", "everything")
    assert documents[0]["held_out_loss"] != documents[1]["held_out_loss"]
    assert [document["concentrated"] for document in documents] == [1 / 32, 0.0 if gone else 1 / 32]
    assert (norm.STRAY > 1e20) == (without in ("stray", "everything"))
    assert (norm.GUARD > 1e20) == (without in ("guard", "everything"))


def test_a_run_that_does_not_wait_blends_early_and_is_otherwise_the_same(study: Any) -> None:
    from study_ablation import schedules_without

    scale = study.SCALES["small"]
    runs = study.plan(scale, [])
    early = [run for run in runs if run.without == "waiting"]
    assert [(run.phase, run.tokens, run.row) for run in early] == [
        ("long", 250_000_000, "static+bilinear+kernel without waiting"),
        ("main", 85_000_000, "static+bilinear+kernel without waiting"),
    ]
    usual = next(run for run in runs if (run.phase, run.row, run.seed) == ("long", "static+bilinear+kernel", 0))
    assert early[0].config(scale) == usual.config(scale)
    config = usual.config(scale)
    schedule, shipped = schedules_without(config, "waiting").static, schedules_without(config, "").static
    assert schedule is not None
    assert schedule == replace(shipped, start=0.15, end=0.5)


def test_a_run_that_diverges_says_at_which_step(study: Any, tiny: tuple[Any, Any, Path], tmp_path: Path) -> None:
    scale, corpus, _ = tiny
    run = replace(study.plan(scale, [])[0], rate=1e30)
    study.train(run, scale, corpus, tmp_path, device="cpu", until=math.inf, save=math.inf, parts=1)
    document = json.loads((tmp_path / f"{run.name}.json").read_text())
    assert document["nan_step"] in (1, 2, 3)
    assert document["held_out_loss"] is None
    assert study.status(run, tmp_path).startswith("NaN at step")


def test_runs_start_in_the_order_in_which_they_are_asked_for(study: Any) -> None:
    runs = study.plan(study.SCALES["tiny"], [])
    names = ["long-static+bilinear+kernel-L2-T16-s0-c0", "deep-SM+LN+G-L3-T16-s0-c0"]
    found = study.chosen(runs, ",".join([names[0], "deep", names[1]]))
    assert [run.name for run in found[:2]] == names
    assert [run.phase for run in found] == ["long", "deep", "deep", "deep"]
    assert study.chosen(runs, None) == runs


def test_the_program_lists_runs_side_by_side_and_sums_up(
    study: Any, tiny: tuple[Any, Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tiny[2]
    words = ["--out", str(out), "--scale", "tiny", "--device", "cpu"]
    names = [f"search-static+bilinear-L2-T16-s0-c0-lr{rate:g}" for rate in (5e-4, 1e-3)]
    assert study.main([*words, "--only", ",".join(names), "--parallel", "2"]) == 0
    assert capsys.readouterr().out.count("done") == 2
    assert study.main([*words, "--only", "search", "--list"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("done") == 2
    assert listed.count("missing") == 26  # seven rows at four rates, less two
    assert study.main([*words, "--only", names[0]]) == 0  # nothing left to do
    with pytest.raises(SystemExit, match="2"):
        study.main([*words, "--only", f"{names[0]},nothing"])
    assert "no run or phase is called 'nothing'" in capsys.readouterr().err
    assert study.main([*words, "--summary"]) == 0
    assert json.loads((out / "summary.json").read_text())["entries"] == []


def test_differences_from_the_baseline_are_paired_by_seed(study: Any) -> None:
    def result(row: str, seed: int, loss: float | None) -> dict[str, Any]:
        run = study.Run("main", row, 12, 128, 1000, seed, 0, 1e-3)
        entry = {"run": asdict(run), "held_out_loss": loss, "tokens": 1000, "operators": {}}
        perplexity = None if loss is None or loss > 700 else math.exp(loss)
        return entry | {"perplexity": perplexity, "buckets_of_reachable": [1.0, 0.0, 0.0, 0.0]}

    losses = {
        "SM+LN+G": (2.0, 2.2, 2.1),
        "static+bilinear": (1.9, 2.15, 1.98),
        "static+bilinear+power": (2.1, None, None),
        "static+bilinear+kernel": (1.9, 1.4e28, 2.0),  # the second is not a number on held-out text, but ended
    }
    results = [result(row, seed, loss) for row, values in losses.items() for seed, loss in enumerate(values)]
    entries = {entry["row"]: entry for entry in study.summary(results)}
    ours = entries["static+bilinear"]
    assert ours["difference"] == pytest.approx(-0.09)
    # By hand: standard deviation of (-0.1, -0.05, -0.12) is 0.036056; t = 4.303 with 2 degrees of freedom.
    assert ours["interval"] == pytest.approx(4.303 * 0.0360555 / math.sqrt(3), rel=1e-4)
    assert entries["static+bilinear+power"]["finished"] == 1
    assert entries["static+bilinear+power"]["interval"] is None
    kernel = entries["static+bilinear+kernel"]
    assert (kernel["runs"], kernel["finished"]) == (3, 2)
    assert kernel["difference"] == pytest.approx(-0.1)
    study.print_summary(list(entries.values()))


def test_the_other_rows_are_compared_with_the_baseline_at_its_best_rate_and_as_many_tokens(study: Any) -> None:
    def result(phase: str, row: str, rate: float, loss: float) -> dict[str, Any]:
        run = study.Run(phase, row, 12, 128, 1000, 0, 0, rate)
        entry = {"run": asdict(run), "held_out_loss": loss, "tokens": 1000, "operators": {}}
        return entry | {"perplexity": math.exp(loss), "buckets_of_reachable": [1.0, 0.0, 0.0, 0.0]}

    searched = zip((2.5e-4, 5e-4, 1e-3, 2e-3), (2.6, 2.4, 2.5, 2.7), strict=True)
    results = [result("search", "SM+LN+G", rate, loss) for rate, loss in searched]
    results += [result("other", "SM+G", 5e-4, 2.9), result("main", "SM+LN+G", 5e-4, 2.0)]
    entry = next(entry for entry in study.summary(results) if entry["phase"] == "other")
    assert entry["difference"] == pytest.approx(0.5)


@pytest.mark.usefixtures("study")
def test_whole_packages_are_held_out_and_cuts_differ() -> None:
    from study_corpus import held_out_packages, near_duplicates

    sizes = {f"package{index}": 10 + index for index in range(200)} | {"huge": 5000}
    first, second = held_out_packages(sizes, 0), held_out_packages(sizes, 1)
    assert first != second
    assert "huge" not in first | second
    for packages in (first, second):
        assert 0.02 <= sum(sizes[name] for name in packages) / sum(sizes.values()) < 0.05
    line = "a line of more than twenty characters"
    training = ["\n".join(f"{line} {index}" for index in range(10))]
    near = "\n".join(f"{line} {index}" for index in range(2, 10)) + f"\n{line} new\n{line} other"
    far = "\n".join(f"{line} {index}" for index in range(5, 15))
    assert near_duplicates(training, [near, far, "short"]) == 1


def test_corpora_keep_their_facts(tiny: tuple[Any, Any, Path]) -> None:
    corpus = tiny[1]
    assert corpus.facts.training_tokens == len(corpus.training)
    assert corpus.facts.held_out_packages >= 1
    training, held_out = corpus.windows(16)
    assert training.shape[1] == held_out.shape[1] == 17
    assert torch.equal(training.flatten(), corpus.training[: training.numel()])


def test_held_out_figures_do_not_depend_on_the_parts(
    study: Any, tiny: tuple[Any, Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import study_train

    scale, corpus, _ = tiny
    base = next(run for run in study.plan(scale, []) if run.row == "static+bilinear+kernel" and run.context == 16)
    config = base.config(scale)
    torch.manual_seed(0)
    model = Decoder(config)
    with torch.no_grad():
        for block in model.blocks():
            assert block.attention.q is not None
            block.attention.q.weight.mul_(20)
    rows = corpus.windows(16)[1][:300]
    monkeypatch.setattr(study_train, "PART_TOKENS", 16 * 37)
    found = study_train.evaluate(model, config, rows, "cpu")
    out = model.eval()(rows[:, :-1].long(), with_entropy=True, with_logits=True)
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1).double(), rows[:, 1:].long().flatten())
    assert found["held_out_loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    tops = [float(top.max()) for top in out.largest_logits or () if top is not None]
    assert found["largest_logit_held_out"] == pytest.approx(max(tops), rel=1e-6)
    # 128 sequences at least, in whole parts: 4 of 37.
    entropies = torch.stack([layer[:148].double().mean((0, 2)) for layer in out.entropies or ()])
    assert torch.tensor(found["head_entropy"]).double() == pytest.approx(entropies.detach(), abs=1e-4)
