"""The report of a GPU, at toy size on a CPU: what is measured, what is kept, and what is said of it."""

import contextlib
import dataclasses
import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from examples import shell
from tests.benchmarks import contenders, gpu, gpu_tables
from tests.benchmarks.gpu import SCALES, Contender, Group, Part
from tests.benchmarks.gpu_tables import Result, Row
from tests.timm_import import import_timm

TOY = ["--device", "cpu", "--scale", "toy", "--backend", "eager"]
SOME = (
    Row("dense", "", 1.0, (0.3, 0.2), memory=2**31),
    Row("limit", "", 0.5, (0.1, 0.1)),
    Row("packed", "DToP", 0.51, (0.15, 0.2), None, 3, 40, 41, ("void at::flash_fwd<int>(float)",), 2**30),
    Row("static", "DToP", 0.51, reason="out of memory"),
)


@pytest.fixture(autouse=True)
def timm():
    import_timm()


@pytest.fixture
def toy():
    scale = SCALES["toy"]
    of, images = gpu.built(scale.parts[0], scale, torch.device("cpu"))
    return of, images, scale


@pytest.fixture
def quick(monkeypatch):
    """The groups that were measured, none of them in fact."""
    seen = []

    def measured(of, images, group, scale, *, backend):
        seen.append((of, group.name))
        return SOME

    monkeypatch.setattr(gpu, "built", lambda part, scale, device: (part.name, None))
    monkeypatch.setattr(gpu, "measured", measured)
    return seen


def of_all(scale):
    return [(part.name, group.name) for part in scale.parts for group in scale.groups]


def test_every_way_runs_and_has_its_row(tmp_path, capsys):
    gpu.main([*TOY, "--out", str(tmp_path), "--only", "eager"])
    assert "2 of 4 groups are left" in capsys.readouterr().out
    table = (tmp_path / "tables.md").read_text()
    for part in SCALES["toy"].parts:
        result = Result.from_dict(json.loads((tmp_path / f"{part.name}.json").read_text()))
        assert result.machine["device"] == "CPU"
        assert {"torch", "timm", "tokenexit", "dtype"} <= result.machine.keys()
        rows = {row.name: row for row in result.groups["eager 0.5"]}
        exits = {f"{layout}, {rule}" for layout in ("packed", "static") for rule in gpu.RULES}
        assert rows.keys() == {"dense", "limit", "truncated", "ToMe"} | exits
        for row in rows.values():
            assert row.reason is None
            assert len(row.seconds) == SCALES["toy"].rounds
        assert all(f"| {name} |" in table for name in rows)
    assert table.count("compiled 0.5") == 2


def test_all_but_packed_rows_are_compiled_as_one_program(toy, monkeypatch):
    of, images, scale = toy
    asked = []

    def uncompiled(call, **options):
        asked.append(options)
        return call

    monkeypatch.setattr(torch, "compile", uncompiled)
    rows = gpu.measured(of, images, Group("compiled", 0.5), scale, backend="eager")
    assert [row.name for row in rows[:3]] == ["dense", "dense, compiled", "limit"]
    assert all(row.reason is None and row.seconds for row in rows)
    whole, stages = {"fullgraph": True, "dynamic": False, "backend": "eager"}, {"dynamic": True, "backend": "eager"}
    assert asked == [stages if row.what == "packed" else whole for row in rows[1:]]


def test_the_drawn_share_runs_and_the_rule_is_asked(toy):
    of, images, _ = toy
    asked = []

    @dataclasses.dataclass(frozen=True)
    class Asked(contenders.Policy):
        """All leave, or none: it makes no difference."""

        leave: bool

        def leaves(self, evidence):
            asked.append(evidence.exit)
            return evidence.eligible & self.leave

    one = contenders.setting(0.5, patches=of.patches, batch=2, spread=0.3, device=images.device)
    with torch.no_grad():
        outputs = [
            of.model(images, schedule=one.schedule(of, rule=rule))
            for rule in (*gpu.RULES.values(), lambda _: Asked(True), lambda _: Asked(False))
        ]
    assert asked == [0, 1, 2] * 2
    for output in outputs:
        assert torch.equal(output.exit_depth, outputs[0].exit_depth)
        assert torch.equal(
            output.tokens_per_block[:, of.after[0] :].T[:3].sort().values[0], one.stay[0].sort().values + of.prefix
        )
        share = output.tokens_per_block.double().mean().item() / of.slots
        assert one.token_blocks(of) == pytest.approx(share)


def test_what_is_measured_is_not_measured_again(tmp_path, quick, capsys):
    gpu.main([*TOY, "--out", str(tmp_path)])
    assert quick == of_all(SCALES["toy"])
    assert "All is measured" in capsys.readouterr().out
    gpu.main([*TOY, "--out", str(tmp_path)])
    assert len(quick) == 4


def test_a_call_that_was_killed_goes_on_where_it_was(tmp_path, quick, monkeypatch):
    measured = gpu.measured

    def killed(of, *given, **options):
        if len(quick) == 3:
            raise KeyboardInterrupt
        return measured(of, *given, **options)

    monkeypatch.setattr(gpu, "measured", killed)
    with pytest.raises(KeyboardInterrupt):
        gpu.main([*TOY, "--out", str(tmp_path)])
    monkeypatch.setattr(gpu, "measured", measured)
    gpu.main([*TOY, "--out", str(tmp_path)])
    assert quick == of_all(SCALES["toy"])
    assert not list(tmp_path.glob("*.partial"))


def test_no_group_begins_when_the_time_is_spent(tmp_path, quick, monkeypatch, capsys):
    clock = iter([0.0, 0.0, 0.0, 59.0, 60.0])  # one to begin with, and one before each part and each group
    monkeypatch.setattr(gpu, "monotonic", lambda: next(clock))
    gpu.main([*TOY, "--out", str(tmp_path), "--minutes", "1"])
    assert quick == of_all(SCALES["toy"])[:2]
    assert "2 of 4 groups are left" in capsys.readouterr().out
    assert "Not measured: vit_tiny_patch16_224, 64px, batch1." in (tmp_path / "tables.md").read_text()


@pytest.mark.parametrize(
    ("name", "value"), [("device", "another"), ("torch", "1.0"), ("dtype", "bfloat16"), ("gpu", "H1")]
)
def test_results_of_another_machine_are_refused(name, value, tmp_path, quick):
    first, *_ = SCALES["toy"].parts
    gpu.main([*TOY, "--out", str(tmp_path), "--only", first.name])
    path = tmp_path / f"{first.name}.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "machine": {**data["machine"], name: value}}))
    with pytest.raises(shell.UsageError, match=rf"`--out` .* got .*{first.name}.json of {name} {value}"):
        gpu.main([*TOY, "--out", str(tmp_path)])
    gpu.main([*TOY, "--out", str(tmp_path), "--minutes", "0"])  # tables need no device
    assert f"{name} {value}" in (tmp_path / "tables.md").read_text()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"machine": {}}', '{"machine": {}, "groups": {"eager 0.5": [{"what": 1}]}}']
)
def test_files_of_something_else_are_refused(text, tmp_path):
    (tmp_path / f"{SCALES['toy'].parts[0].name}.json").write_text(text)
    with pytest.raises(shell.UsageError, match="files of this script"):
        gpu.main([*TOY, "--out", str(tmp_path)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(tmp_path):
    with pytest.raises(shell.UsageError, match="`--device` must be there"):
        gpu.main(["--out", str(tmp_path)])


def test_without_results_there_is_no_table(tmp_path, capsys):
    gpu.main([*TOY, "--out", str(tmp_path), "--minutes", "0"])
    assert gpu_tables.NOTHING.strip() in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("good", [0, 4], ids=["at first", "in the rounds"])
def test_what_does_not_fit_into_memory_says_so_and_the_others_are_timed(good, toy, monkeypatch):
    of, images, scale = toy
    calls = []

    def greedy(_):
        calls.append(0)
        if len(calls) > good:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    found = [Contender("dense", torch.sum, 1.0), Contender("greedy", greedy, 0.5), Contender("limit", torch.sum, 0.5)]
    monkeypatch.setattr(gpu, "contenders", lambda *_, **__: found)
    rows = gpu.measured(of, images, Group("eager", 0.5), scale, backend="eager")
    assert [row.reason for row in rows] == [None, "out of memory", None]
    assert [len(row.seconds) for row in rows] == [2, 0, 2]


def test_a_compilers_errors_are_read_and_a_device_in_disorder_is_not_measured_on(monkeypatch):
    def broken(error, cause=None):
        def call():
            raise error from cause

        return call

    def disorder():
        raise torch.AcceleratorError("illegal access")

    memory = torch.OutOfMemoryError("too much")
    assert gpu.tried(broken(RuntimeError("backend failed"), memory)).reason == "out of memory"
    assert gpu.tried(broken(RuntimeError("no such op\nhint: none"))).reason == "RuntimeError: no such op"
    with pytest.raises(TypeError):
        gpu.tried(broken(TypeError("a slip")))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", disorder)
    with pytest.raises(torch.AcceleratorError):
        gpu.tried(broken(RuntimeError("no such op")))


def test_waits_are_warnings_of_one_kind(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=2)
        warnings.warn("something else", stacklevel=2)

    assert gpu.waits(call) == 3
    assert modes == ["warn", 0]


def test_kernels_are_what_runs_on_the_device(monkeypatch):
    events = [
        ("void flash_fwd<1>(int)", "CUDA", False), ("gemm", "CUDA", False), ("gemm", "CUDA", False),
        ("Memcpy HtoD", "CUDA", False), ("Memset (Device)", "CUDA", False), ("## Call ##", "CUDA", True),
        ("cudaLaunchKernel", "CPU", False), ("cudaGraphLaunch", "CPU", False), ("cudaMemcpyAsync", "CPU", False),
    ]  # fmt: skip
    seen = [
        SimpleNamespace(name=name, device_type=SimpleNamespace(name=kind), is_user_annotation=note)
        for name, kind, note in events
    ]
    profiled = contextlib.nullcontext(SimpleNamespace(events=lambda: seen))
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: profiled)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setenv("TEARDOWN_CUPTI", "0")
    monkeypatch.setenv("DISABLE_CUPTI_LAZY_REINIT", "1")
    ran = contenders.launched(lambda: None)
    assert ran.kernels == ("void flash_fwd<1>(int)", "gemm", "gemm")
    assert ran.launches == 2
    assert ran.attention == ["void flash_fwd<1>(int)"]


def test_tables_say_what_was_found_and_what_is_missing():
    result = Result({"device": "X1", "torch": "9"}, {"compiled 0.5": SOME})
    text = gpu_tables.tables(
        {"a-512px": result}, {"a-512px": ["compiled 0.5", "compiled 0.3"], "b": ["compiled 0.5"]}, command="go"
    )
    assert text.startswith("device X1, torch 9.\n\n    go\n\n")
    assert "### a, 512px\n" in text
    assert "| 0.5 | eager | dense | 1.000 | 250 [225, 275] | 1.000 [1.000, 1.000] | | | | | 2.00 |" in text
    assert (
        "| 0.5 | compiled | packed, DToP | 0.510 | 175 [162.5, 187.5] | 1.500 [1.250, 1.750] | 0.583 [0.542, 0.625] |"
        " 3 | 40 | 41 | 1.00 |"
    ) in text
    assert "| 0.5 | compiled | static, DToP | 0.510 | out of memory |" in text
    assert "- `at::flash_fwd`: packed, DToP\n" in text
    assert text.endswith("Not measured: a, 512px (compiled 0.3); b.\n")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {12}


def test_dense_is_not_compared_with_a_limit_that_is_compiled():
    compiled, eager = (
        next(line for line in gpu_tables.tables({"a": Result({}, {name: SOME})}, {"a": [name]}, command="").splitlines()
             if "| dense |" in line)
        for name in ("compiled 0.5", "eager 0.5")
    )  # fmt: skip
    assert "| 1.000 [1.000, 1.000] | | | | | 2.00 |" in compiled
    assert "| 1.000 [1.000, 1.000] | 0.417 [0.375, 0.458] | | | | 2.00 |" in eager


def test_all_parts_of_the_report_are_there_once():
    parts = SCALES["full"].parts
    assert len({part.name for part in parts}) == len(parts) == 18
    assert parts[:3] == (
        Part("vit_base_patch16_224", 512, 8), Part("vit_large_patch16_224", 1024, 8), Part("vit_small_patch16_224", 512, 1)
    )  # fmt: skip
    assert len(SCALES["full"].groups) == 6
