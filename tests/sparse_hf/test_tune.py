"""`sparse-hf tune kernels` without a GPU: which candidates count, which one wins, the table's file, and its use."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from sparse_hf.cli import main
from sparse_hf.cli.app import build_app
from sparse_hf.tune.candidates import candidates, shipped
from sparse_hf.tune.kernels import (
    Tuned,
    choose,
    described,
    row_error,
    tune_kernels,
    tune_key,
    write_kernel_table,
)
from sparse_hf.tune.plan import KernelOptions, num_steps, plan_kernels, tuning_device
from sparse_hf.tune.workloads import Workload, make_workloads
from sparse_hf_kernels import tuned
from sparse_hf_kernels.tuned import ARCHES, FIELDS, HEAD_DIMS, Config, Key, checked_entry, read_table

CPU = torch.device("cpu")
KEY = Key("triton", "forward", 80, 128, torch.bfloat16)
KEYS = [
    Key(backend, kind, arch, head_dim, torch.bfloat16)
    for backend, kind in FIELDS
    for arch in ((90,) if backend == "gluon" else ARCHES)
    for head_dim in HEAD_DIMS
    if (backend, kind, head_dim) != ("gluon", "backward", 256)
]


@pytest.fixture(autouse=True)
def no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No table of the machine's, and none left behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    with tuned.in_force(None):
        yield


def make(rows: int, columns: int, warps: int, stages: int) -> Config:
    return (("rows", rows), ("columns", columns), ("num_warps", warps), ("num_stages", stages))


BASE, FAST, SLOW = make(128, 64, 8, 3), make(64, 64, 4, 2), make(32, 64, 4, 2)
WRONG, NAN, LARGE, BROKEN = (make(16, 64, 4, stages) for stages in (1, 2, 3, 4))


class OutOfResources(Exception):
    """Goes by the name of Triton's."""


@dataclass
class FakeGpu:
    """Computes as the configuration in force says, and times by configuration."""

    times: dict[str, float] = field(default_factory=dict)
    lost: bool = False
    runs: list[Config] = field(default_factory=list)

    def run(self) -> tuple[Tensor, ...]:
        (config,) = tuned.active_table().configs.values()
        self.runs.append(config)
        if config == LARGE:
            raise OutOfResources("out of resource: shared memory, Required: 300000, Hardware limit: 232448")
        if config == BROKEN:
            self.lost = True
            raise RuntimeError("PassManager::run failed")
        truth = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        if config == WRONG:
            truth[1, 63] *= 1.5
        if config == NAN:
            truth[0, 0, 0] = float("nan")
        return (truth.bfloat16(), truth[:1].bfloat16())

    def workload(self, name: str) -> Workload:
        return Workload(name=name, run=self.run)

    def record(self, label: str, call: Callable[[], object]) -> float:
        call()
        return self.times.get(label, 4.0)

    def read(self, handles: Sequence[float]) -> list[float]:
        return list(handles)


def tune(gpu: FakeGpu, configs: Sequence[Config], **options: Any) -> Tuned:
    workloads = [gpu.workload("dense"), gpu.workload("streaming")]
    return tune_key(KEY, workloads, configs, BASE, gpu, budget_ms=1, **options)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_candidates_are_what_a_table_may_hold(key: Key) -> None:
    every, few = candidates(key), candidates(key, quick=True)
    assert len(set(every)) == len(every) >= 7
    assert set(few) < set(every) or key.arch == tuned.INTERPRETER_ARCH
    for config in (*every, shipped(key)):
        entry = {**key._asdict(), "dtype": "bfloat16", "config": dict(config)}
        assert checked_entry(entry, "here") == (key, config)
    assert shipped(key) not in every


def test_fields_are_those_of_the_configurations() -> None:
    from sparse_hf_kernels.sparse_attention.gluon.configs import BackwardConfig, ForwardConfig
    from sparse_hf_kernels.sparse_attention.triton.configs import TileConfig

    for (backend, kind), fields in FIELDS.items():
        cls = BackwardConfig if kind == "backward" else ForwardConfig
        names = TileConfig._fields if backend == "triton" else [each.name for each in dataclasses.fields(cls)]
        assert list(fields) == list(names), (backend, kind)


def test_only_right_candidates_that_run_can_win() -> None:
    fastest_is_wrong = {described(WRONG): 0.1, described(NAN): 0.1, described(FAST): 2.0, described(SLOW): 9.0}
    gpu = FakeGpu(fastest_is_wrong)
    lines: list[str] = []
    result = tune(gpu, [WRONG, NAN, LARGE, BROKEN, SLOW, FAST], progress=lines.append)
    assert result.config == FAST and result.baseline == BASE
    assert result.times_ms == {"dense": (2.0, 4.0), "streaming": (2.0, 4.0)} and result.ratio == pytest.approx(0.5)
    assert {skip.config: skip.reason for skip in result.skipped} == {
        WRONG: "wrong result",
        NAN: "wrong result",
        LARGE: "too large",
        BROKEN: "does not run",
    }
    assert result.skip_counts == {"wrong result": 2, "too large": 1, "does not run": 1} and result.num_tried == 6
    assert len(lines) == 6 and "rows 64" in lines[-1]
    assert "300000" in result.skipped[2].said
    # A candidate that was skipped never ran again, neither to be timed.
    assert gpu.runs.count(WRONG) == gpu.runs.count(LARGE) == 1 and gpu.runs.count(FAST) > 2


def test_the_table_in_force_comes_back() -> None:
    tune(FakeGpu(), [LARGE, FAST])
    assert tuned.active_table() is tuned.SHIPPED
    with pytest.raises(OutOfResources), tuned.in_force(tuned.TunedTable(source="x", configs={KEY: LARGE})):
        FakeGpu().run()
    assert tuned.active_table() is tuned.SHIPPED


def test_the_shipped_one_stays_unless_another_gains() -> None:
    result = tune(FakeGpu({described(FAST): 4.0 * 0.995, described(SLOW): 5.0}), [FAST, SLOW])
    assert result.config == BASE and result.ratio == 1 and result.entry()["config"] == dict(BASE)


@pytest.mark.parametrize(
    ("fast", "wins"),
    [
        ({"a": 3.9, "b": 3.9}, True),
        ({"a": 3.99, "b": 3.99}, False),  # gains a quarter of a percent
        ({"a": 2.0, "b": 4.07}, True),  # loses less than 2% in one
        ({"a": 2.0, "b": 4.1}, False),  # and more
        ({"a": 3.9, "b": float("nan")}, False),
    ],
)
def test_choice(fast: dict[str, float], wins: bool) -> None:
    assert choose({BASE: {"a": 4.0, "b": 4.0}, FAST: fast}, BASE) == (FAST if wins else BASE)


def test_the_smallest_geometric_mean_wins() -> None:
    # 0.5 * 1.0 = 0.5 against 0.75 * 0.6 = 0.45, though the sum of times favours the first.
    medians = {BASE: {"a": 8.0, "b": 2.0}, FAST: {"a": 4.0, "b": 2.0}, SLOW: {"a": 6.0, "b": 1.2}}
    assert choose(medians, BASE) == SLOW


def test_a_device_that_breaks_ends_the_search() -> None:
    gpu = FakeGpu()

    def synchronize() -> None:
        if gpu.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(ValueError, match=r"rows 16, .* broke the device \(RuntimeError: PassManager"):
        tune(gpu, [BROKEN, FAST], synchronize=synchronize)
    with pytest.raises(ValueError, match="the shipped configuration of triton forward, head_dim 128 does not run here"):
        tune_key(KEY, [gpu.workload("dense")], [], LARGE, gpu, budget_ms=1)


def test_a_missed_block_in_one_row_is_seen() -> None:
    q, k, v = (torch.randn(1, 4096, 32) for _ in range(3))
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    wrong = right.clone()
    keep = torch.ones(4096, dtype=torch.bool)
    keep[128:256] = False
    wrong[:, -1:] = torch.nn.functional.scaled_dot_product_attention(q[:, -1:], k[:, keep], v[:, keep])
    assert row_error(wrong, right) > 0.05 > 20 * ((wrong - right).norm() / right.norm()).item()
    assert row_error(right, right) == 0 and row_error(right.bfloat16(), right) < 5e-3
    wrong[0, 7, 7] = float("nan")
    assert not row_error(wrong, right) <= 1e9


def entry(**changes: Any) -> dict[str, Any]:
    values = {"backend": "triton", "kind": "forward", "arch": 80, "head_dim": 128, "dtype": "bfloat16"}
    return {**values, "config": dict(FAST), **changes}


def write(path: Path, *entries: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format_version": 1, "entries": list(entries)}))
    return path


def result_of(key: Key, config: Config) -> Tuned:
    return Tuned(key=key, config=config, baseline=BASE, times_ms={"dense": (1.0, 2.0)}, num_tried=3, skipped=())


def test_winners_replace_their_own_entries_alone(tmp_path: Path) -> None:
    path, other = tmp_path / "new" / "tuned.json", KEY._replace(kind="dq")
    write_kernel_table(path, [result_of(KEY, SLOW), result_of(other, FAST)])
    write_kernel_table(path, [result_of(KEY, FAST)])
    table = read_table(path)
    assert table.configs == {KEY: FAST, other: FAST}
    (first, _) = table.entries
    assert (first["time_ms"], first["baseline_ms"], first["baseline"]) == (1.0, 2.0, dict(BASE))
    assert first["workloads"] == {"dense": {"time_ms": 1.0, "baseline_ms": 2.0}} and first["device"]
    assert [p.name for p in path.parent.iterdir()] == ["tuned.json"], "nothing temporary stays"


def test_a_write_that_fails_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned.json"
    write_kernel_table(path, [result_of(KEY, SLOW)])
    before, seen = path.read_text(), []

    def fail(source: Path, target: Path) -> None:
        seen.append((Path(source).name, json.loads(Path(source).read_text()), path.read_text()))
        raise OSError(28, "No space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            write_kernel_table(path, [result_of(KEY, FAST)])
    (name, written, old) = seen[0]
    assert name == f".tuned.json.{os.getpid()}.tmp" and written["entries"][0]["config"] == dict(FAST) and old == before
    assert path.read_text() == before
    path.write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        write_kernel_table(path, [result_of(KEY, FAST)])
    assert path.read_text() == "{", "what is no table of ours is not overwritten"


def shipped_on(arch: int, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, ...]]:
    from sparse_hf_kernels.sparse_attention.triton import configs

    monkeypatch.setattr(configs, "interpreted", lambda: False)
    monkeypatch.setattr(configs, "architecture", lambda device: arch)
    return lambda head_dim=128, dtype=torch.bfloat16, which="forward": tuple(
        configs.tile_config(CPU, head_dim, dtype, which)
    )


def test_the_table_reaches_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_hf_kernels.sparse_attention.gluon import configs as gluon

    registers = {"consumer_registers": 232, "producer_registers": 40}
    own = {"rows": 128, "columns": 64, "slots": 4, "query_slots": 1, **registers}
    back = {"rows": 64, "columns": 128, "slots": 3, **registers}
    monkeypatch.setenv(
        tuned.VARIABLE,
        str(
            write(
                tmp_path / "mine.json",
                entry(),
                entry(backend="gluon", arch=90, config=own),
                entry(backend="gluon", kind="backward", arch=90, config=back),
            )
        ),
    )
    config = shipped_on(80, monkeypatch)
    assert config() == config(head_dim=96) == (64, 64, 4, 2)
    # Another head size, dtype, pass or GPU keeps what ships.
    assert config(head_dim=64) == (128, 64, 4, 3) and config(dtype=torch.float16) == (128, 64, 8, 3)
    assert config(which="dq") == (128, 32, 8, 3) and shipped_on(89, monkeypatch)() == (128, 64, 8, 2)
    assert gluon.forward_config(128, torch.bfloat16) == gluon.ForwardConfig(**own)
    assert gluon.forward_config(128, torch.float16) is gluon.FORWARD[128]
    assert gluon.backward_config(128, torch.bfloat16) == gluon.BackwardConfig(**back)
    assert gluon.backward_config(64, torch.bfloat16) is gluon.BACKWARD[64]


def test_the_table_is_found_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = shipped_on(80, monkeypatch)
    cached = tmp_path / "cache" / "sparse_hf" / "tuned.json"
    assert config() == (128, 64, 8, 3) and tuned.active_table() is tuned.SHIPPED
    write(cached, entry())
    assert config() == (128, 64, 8, 3), "looked for once"
    with tuned.in_force(None):
        assert config() == (64, 64, 4, 2) and tuned.active_table().source == str(cached)
        write(cached, "nonsense")
        assert config() == (64, 64, 4, 2), "read once"
    monkeypatch.setenv(tuned.VARIABLE, "")
    with tuned.in_force(None):
        assert tuned.active_table() is tuned.SHIPPED
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "none.json"))
    with tuned.in_force(None), pytest.raises(ValueError, match=r"none\.json is no file; unset it, or write"):
        config()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "exactly the keys"),
        ('{"format_version": 1, "entries": [], "more": 0}', "exactly the keys"),
        ('{"format_version": 2, "entries": []}', "format_version 1"),
        ([7], "an entry is a mapping"),
        ([entry(speed=3)], r"entry 0: unknown keys \['speed'\]; known: .*`sparse-hf tune kernels` writes a right one"),
        ([{k: v for k, v in entry().items() if k != "arch"}], r"keys \['arch'\] are missing"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("9" * 5000, "cannot be read as JSON"),
        ([entry(kind="sideways")], "unknown backend and kind"),
        ([entry(backend=[])], "unknown backend and kind"),
        ([entry(arch=False)], "arch must be one of"),
        ([entry(arch=75)], "arch must be one of"),
        ([entry(arch=[80])], "arch must be one of"),
        ([entry(backend="gluon", config={})], r"arch must be one of \[90\]"),
        ([entry(head_dim=96)], r"head_dim must be one of \[64, 128, 256\], got 96"),
        ([entry(dtype="int8")], "dtype must be one of"),
        ([entry(config=7)], "config must be a mapping"),
        ([entry(config={**dict(FAST), "num_ctas": 2})], r"config: unknown keys \['num_ctas'\]"),
        ([entry(config={"rows": 64})], r"config: keys \['columns', .*\] are missing"),
        ([entry(config={**dict(FAST), "rows": 48})], "rows must be one of"),
        ([entry(config={**dict(FAST), "rows": "64"})], "rows must be one of"),
        ([entry(config={**dict(FAST), "num_warps": True})], "num_warps must be one of"),
        ([entry(), entry(kind="dq"), entry()], "entry 2: a second one"),
    ],
)
def test_malformed_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Any, words: str) -> None:
    path = tmp_path / "mine.json"
    if isinstance(text, str):
        path.write_text(text)
    else:
        write(path, *text)
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    with pytest.raises(ValueError, match=words) as caught:
        shipped_on(80, monkeypatch)()
    assert "mine.json" in str(caught.value)


def test_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, absent = plan_kernels(KernelOptions(backend="gluon", head_dims=(128, 256)), CPU)
    assert [(key.kind, key.head_dim) for key in keys] == [("forward", 128), ("backward", 128), ("forward", 256)]
    assert len(absent) == 2 and "no decode kernel of its own" in absent[0] and "--backend triton" in absent[1]
    with pytest.raises(ValueError, match="nothing to tune: gluon has no decode"):
        plan_kernels(KernelOptions(backend="gluon", kinds=("decode",)), CPU)
    monkeypatch.setattr("sparse_hf.tune.plan._arch", lambda backend, device: 80)
    keys, _ = plan_kernels(KernelOptions(backend="triton", kinds=("backward", "decode"), head_dims=(64,)), CPU)
    assert [key.kind for key in keys] == ["dkdv", "dq", "decode"]
    assert num_steps(keys, KernelOptions(quick=True)) < num_steps(keys, KernelOptions())
    monkeypatch.delenv("SPARSE_HF_BACKEND", raising=False)
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(ValueError, match=r"'reference' serves cpu here .* nothing to tune"):
            plan_kernels(KernelOptions(), CPU)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="kernels are tuned on a CUDA device"):
            tuning_device()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"backend": "cuda"}, "backend must be one of gluon, triton; got 'cuda'"),
        ({"head_dims": (96,)}, "head_dim must be one of 64, 128, 256; got 96"),
        ({"dtypes": ("fp8",)}, "dtype must be one of"),
        ({"kinds": ("dq",)}, "kind must be one of forward, backward, decode"),
        ({"head_dims": ()}, "at least one head_dim"),
    ],
)
def test_wrong_options(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        KernelOptions(**values)


def test_workloads_are_refused_where_the_backend_cannot_serve() -> None:
    with pytest.raises(ValueError, match=r"gluon cannot be tuned on cpu: .*needs an NVIDIA GPU"):
        make_workloads(Key("gluon", "forward", 90, 64, torch.bfloat16), CPU, seq_len=64, num_heads=2, num_kv_heads=1)


def test_a_users_table_is_no_baseline() -> None:
    """The workloads are made under the shipped configurations, whatever table is in force."""
    seen = []

    def note(key: Key, device: torch.device, **sizes: int) -> list[Workload]:
        seen.append(tuned.active_table())
        assert sizes == {"seq_len": 2048, "num_heads": 32, "num_kv_heads": 8}
        return [FakeGpu().workload("dense")]

    mine = tuned.TunedTable(source="mine", configs={KEY: SLOW})
    with tuned.in_force(mine):
        (result,) = tune_kernels([KEY], KernelOptions(quick=True), CPU, FakeGpu(), make=note)
        assert tuned.active_table() is mine
    assert seen == [tuned.SHIPPED] and result.baseline == shipped(KEY)


@pytest.fixture
def fake_cli(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """The command line on a fake GPU of architecture 80."""
    gpu = FakeGpu({described(make(64, 64, 8, 2)): 1.0})
    monkeypatch.setattr("sparse_hf.tune.plan.tuning_device", lambda: (CPU, gpu))
    monkeypatch.setattr("sparse_hf.tune.plan._arch", lambda backend, device: 80)
    monkeypatch.setattr("sparse_hf.tune.workloads._workload", lambda key, device, name, *rest: gpu.workload(name))
    return gpu


def test_command_line(fake_cli: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["tune", "kernels", "--backend", "triton", "--kind", "forward", "--head-dim", "128"]
    shown = CliRunner().invoke(build_app(), command, env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    cached = tmp_path / "cache" / "sparse_hf" / "tuned.json"
    assert "rows 64, columns 64, num_warps 8, num_stages 2" in shown.stdout and "0.250" in shown.stdout
    assert f"wrote {cached}" in shown.stderr
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "mine.json"))
    told = CliRunner().invoke(build_app(), [*command, "--json", "--quick", "--dtype", "float16"])
    (found,) = json.loads(told.stdout)
    assert found["dtype"] == "float16" and found["skipped"] == {} and found["arch"] == 80
    assert read_table(tmp_path / "mine.json").entries[0] == found
    given = tmp_path / "given.json"
    CliRunner().invoke(build_app(), [*command, "--out", str(given), "--quick"], catch_exceptions=False)
    assert list(read_table(given).configs) == [KEY]
    # The winner is in force for the next process.
    monkeypatch.delenv(tuned.VARIABLE)
    with tuned.in_force(None):
        assert shipped_on(80, monkeypatch)() == (64, 64, 8, 2)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--head-dim", "many"), "--head-dim takes whole numbers"),
        (("--kind", "sideways"), "kind must be one of"),
        (("--backend", "gluon", "--kind", "decode"), "nothing to tune"),
    ],
)
def test_command_line_errors(
    fake_cli: FakeGpu,
    args: tuple[str, ...],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["sparse-hf", "tune", "kernels", *args])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    assert (end.value.code, captured.out) == (1, "")
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and words in captured.err


def test_env_says_which_table_is_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said() -> str:
        with tuned.in_force(None):
            shown = CliRunner().invoke(build_app(), ["env", "--json"], catch_exceptions=False)
        return json.loads(shown.stdout)["tables"]["tile configurations"]

    assert said().startswith("shipped with the package")
    path = write(tmp_path / "mine.json", entry(device="NVIDIA X1"), entry(kind="dq", device="NVIDIA X1"))
    monkeypatch.setenv(tuned.VARIABLE, str(path))
    assert said() == f"{path}, 2 entries of NVIDIA X1; others as shipped"
    write(path, entry(speed=1))
    assert said().startswith("refused: ") and "unknown keys ['speed']" in said()
