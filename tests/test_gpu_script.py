"`.ci/gpu`, as far as a machine without a GPU can try it: how it counts and ends, and its cases at toy size on the CPU."
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
import torch
from elsewhere import elsewhere

from esam3.core import nearest
from esam3.training import loop as training


@pytest.fixture(scope="module")
def gpu(root: Path) -> ModuleType:
    "The script as a module."
    loader = SourceFileLoader("gpu_script", str(root / ".ci" / "gpu"))
    module = module_from_spec(spec_from_loader("gpu_script", loader))
    sys.modules["gpu_script"] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


@pytest.fixture
def report(gpu: ModuleType, tmp_path: Path) -> Callable[..., dict[str, dict]]:
    "Runs cases (of the table whose names begin with some words, or given ones) and returns the rows that were written."
    def run(*cases, limit: float = 3600.0, begun: float = 0.0) -> dict[str, dict]:
        gpu.BEGUN = time.perf_counter() - begun
        failed = gpu.Report(tmp_path / "out.json", limit).run([gpu.Section("all", 1.0, cases)])
        rows = json.loads((tmp_path / "out.json").read_text())["cases"]
        assert failed == sum(row["status"] == "failed" for row in rows.values())
        return rows
    return run


@pytest.fixture
def table(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "The cases by name, at toy size."
    monkeypatch.setenv("ESAM3_DATA", str(gpu.prepare()))
    few = "tracks: 2, frames: [4, 4], instances: 2, phrases: 2"
    sizes = gpu.Sizes("toy", "toy", "toy", ("tiny",) * 3, few, "es-ev-s", ("es-rv-s",), (1, 2), steps=2, workers=(1, 0),
                      objects=(1, 2), repeats=1, canvas=(128, 144), precisions=("bf16", "no"))
    def made(**more) -> dict:
        sections = gpu.Cases(replace(sizes, **more), tmp_path).sections()
        return {case.name: case for section in sections for case in section.cases}
    return made


def test_without_cuda_it_says_so_and_ends_well(root, tmp_path):
    "As a user starts it, from elsewhere; no file is written."
    run = subprocess.run([sys.executable, str(root / ".ci" / "gpu"), "out.json"], cwd=tmp_path, capture_output=True,
                         text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert (run.returncode, run.stdout) == (0, "no CUDA on this machine: nothing was run\n"), run.stderr
    assert not [*tmp_path.iterdir()]


def test_how_cases_end(gpu, report):
    "Each way once; the exit status counts failures alone, and what builds on a case that did not end well is left out."
    def fails(_): raise ValueError("no")
    def too_large(_): raise torch.OutOfMemoryError("CUDA out of memory: a batch of 4")
    def slow(_):
        try: time.sleep(30)
        except Exception: pass  # as libraries do; the end of the time is none
    calls = {"well": lambda _: {"answer": 1}, "fails": fails, "too large": too_large, "slow": slow}
    cases = [gpu.Case(name, call, seconds=0.3) for name, call in calls.items()]
    rows = report(*cases, gpu.Case("larger", fails, "too large"), gpu.Case("more", calls["well"], "well"))
    assert {name: row["status"] for name, row in rows.items()} == {
        "well": "ok", "fails": "failed", "too large": "out of memory", "slow": "cut for time", "larger": "skipped",
        "more": "ok"}
    assert rows["fails"]["error"] == "ValueError: no" and "raise ValueError" in rows["fails"]["where"]
    assert rows["well"]["answer"] == 1


def test_time_is_kept(gpu, report, tmp_path):
    "Nothing begins after the end; what a section leaves goes to the next."
    assert report(gpu.Case("late", lambda _: {}), limit=10.0, begun=11.0)["late"]["status"] == "skipped for time"
    gpu.BEGUN = time.perf_counter() - 5.0
    case = lambda name: gpu.Case(name, lambda _: {})
    sections = [gpu.Section("first", 0.3, [case("a")]), gpu.Section("second", 0.7, [case("b")])]
    gpu.Report(tmp_path / "out.json", 10.0).run(sections)
    rows = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [rows[k]["status"] for k in "ab"] == ["skipped for time", "ok"]


def test_words_choose(gpu, table):
    "By section or by name; what a chosen case builds on is taken as well done where it was not chosen."
    sections = lambda *words: {c.name for s in gpu.chosen(gpu.Cases(gpu.Sizes(), Path("nowhere")).sections(), words)
                               for c in s.cases}
    assert sections("8 workers") == {"full size, stage 1, 8 workers", "full size, stage 2, 8 workers"}
    assert sections("toy world") < sections("toy world", "compiled") < sections() and not sections("nothing")


def test_answers_of_before_stay(gpu, report, tmp_path):
    "Those that are, of the same machine and versions, where there is none this time."
    said = lambda n: gpu.Case("a", lambda _: {"n": n})
    assert report(said(1), gpu.Case("b", lambda _: {}, "c"))["b"]["status"] == "ok", "c was not chosen"
    late = report(said(2), limit=10.0, begun=11.0)
    assert late["a"]["n"] == 1 and late["b"]["status"] == "ok"
    assert report(said(3))["a"]["n"] == 3
    written = json.loads((tmp_path / "out.json").read_text())
    (tmp_path / "out.json").write_text(json.dumps(written | {"torch": "another"}))
    assert [*report(said(4))] == ["a"]


def test_first_calls_are_told_apart(gpu, report):
    def work(phases) -> None:
        for seconds in (0.2, 0.01, 0.02): phases.noted("work", time.sleep)(seconds)
    found = report(gpu.Case("work", work))["work"]["phases"]["work"]
    assert found["calls"] == 3 and found["first"] >= 0.2 > 0.1 > found["later"] >= 0.01 and found["all"] >= 0.23


def test_table_is_in_order_of_worth(gpu, table):
    "Stages on real geometry come before full size, and that before the toy world; a case after what it builds on."
    names, cases = [*table()], table()
    first = [names.index(name) for name in ("thin, stage 1, bf16", "full size, stage 1, micro-batch 1",
                                            "encode, SAM3, eager", "tiny, stage 1, bf16")]
    assert first == sorted(first)
    for name, case in cases.items(): assert not case.after or names.index(case.after) < names.index(name)
    real = {case.name for section in gpu.Cases(gpu.Sizes(), Path("nowhere")).sections() for case in section.cases}
    assert {"thin, stage 3, fp16", "full size, stage 3, micro-batch 4", "full size, stage 2, 8 workers",
            "full size, stage 1, checkpoint_encoder", "encode, es-tv-l, compiled", "tracker step, SAM3",
            "resume, stage 1, bf16", *(f"full size, stage {k}, host waits a step" for k in (1, 2, 3))} <= real


def test_waits_are_counted_where_they_happen(gpu):
    "Each one, though Python says a warning of a place but once; other warnings, and those outside, are none."
    warn = partial(warnings.warn, stacklevel=1)
    def read() -> Iterator[str]:  # for a line of the package
        for word in ("steps", "lr"):
            warn(f"{gpu.WAITS} (Triggered internally at …)")
            yield word
    with gpu.waits() as found:
        for _ in range(3): warn(gpu.WAITS)
        warn("deprecated")
        nearest("stepz", read(), "word")
    with pytest.warns(UserWarning, match="synchronizing"): warn(gpu.WAITS)
    assert found[:3] == ["elsewhere"] * 3
    assert [f.split(":")[0] + f.split()[-1] for f in found[3:]] == ["core.pynearest"] * 2, found


def ended(rows: dict[str, dict]) -> dict[str, str]:
    "How cases ended, with errors."
    return {name: row.get("error", row["status"]) for name, row in rows.items()}


def test_cases_on_the_cpu(report, table):
    "One of each kind; phases are timed anew in every case, and not where speed is measured."
    full = [f"full size, stage 1, {what}" for what in ("micro-batch 1", "micro-batch 2", "1 workers",
                                                       "host waits a step", "checkpoint_encoder")]
    names = ("first use", "thin, stage 1, bf16", *full, "encode, es-rv-s, channels-last", "tracker step, es-ev-s",
             "predictors")
    cases = table()
    rows = report(*map(cases.get, names))
    assert ended(rows) == dict.fromkeys(names, "ok")
    _, thin, one, two, waited, host, again, latency, follow, people = rows.values()
    assert thin["precision"] == "bf16" and len(thin["loss"]) == 2 and "miou_box" in thin["student"]
    assert {"load the teacher", "build the student", "backward", "step", "run scores"} <= {*thin["phases"]}
    for row, steps in ((thin, 2), (host, 3)):
        assert row["phases"]["step"]["calls"] == row["phases"]["Stage1 forward"]["calls"] == steps
        assert "Stage1" in row["first_steps"]
    for row in (one, two, waited, again): assert "step" not in row.get("phases", {}) and row["a second"] > 0
    assert 0 <= waited["share of waiting"] <= 1 and len(host["of each"]) == 3 and host["a step"] == 0, "here is no GPU"
    assert [*follow["ms"]] == ["1", "2"] and latency["ms"] > 0 and people["masks"] > 20 and people["least"] == 1
    assert not hasattr(training._step, "__wrapped__"), "nothing stays patched"


def test_full_size_steps_on_a_second_device(gpu, table, report):
    "Models, batches and groups meet on the accelerator."
    with elsewhere() as device, pytest.MonkeyPatch.context() as here:
        here.setattr(gpu, "pick_device", lambda: device)
        names = "full size, stage 3, micro-batch 1", "full size, stage 3, host waits a step"
        assert ended(report(*map(table(precisions=("no", "no"), micro=(1,)).get, names))) == dict.fromkeys(names, "ok")


@pytest.mark.skipif("ESAM3_FULL" not in os.environ, reason="the whole table takes minutes: bash .ci/full")
def test_the_whole_table(report, table):
    cases = {name: case for name, case in table().items() if "compiled" not in name}
    assert ended(report(*cases.values())) == dict.fromkeys(cases, "ok")
