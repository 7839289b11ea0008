"""Benchmarks: wrong numbers are never timed, ledgers are right, ratios are guarded, and what is shown comes from the JSON."""

from __future__ import annotations

import copy
import json
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pckernels as pck
from pckernels import bench
from pckernels.backends import graph, host, selection
from pckernels.benchmarks import (
    ceilings,
    contenders,
    curves,
    eager,
    goals,
    guard,
    ledger,
    models,
    page,
    peers,
    record,
    runner,
    tables,
    timing,
    verification,
)
from pckernels.benchmarks.cases import CLOSED, EXACT, GPU, PAPER_MLP, SUITES, Case, rule_name, strict, suite
from pckernels.cli import main

SMALL = models.mlp((12, 20, 16, 3))
CEILINGS = ceilings.Ceilings(products=1e10, device=1e10, cache=1e11, chip=1e11)
SETTING = runner.Setting(torch.device("cpu"), 1, CEILINGS)
ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_case(**changes) -> Case:
    case = Case(SMALL, 5, strict(6), SUITES, ("loop",), {"host / loop": 0.5}, seconds=0.05)
    return replace(case, **changes)


def shrink(monkeypatch) -> None:
    """The command line with two small cases, curves left out and ceilings known."""
    monkeypatch.setattr(bench, "suite", lambda name: [small_case(axes=("batch",)), small_case(batch=2, axes=("batch",))])
    monkeypatch.setattr(bench, "_curves", lambda setting, name: {})
    monkeypatch.setattr(ceilings, "measure", lambda device: CEILINGS)


@pytest.fixture
def small_suite(monkeypatch):
    shrink(monkeypatch)


def break_kernel(monkeypatch, factor: float) -> None:
    """A kernel whose first gradient is a little off."""
    execute = host.execute

    def wrong(code, memory, batch, sign):
        execute(code, memory, batch, sign)
        if memory.gradients:
            memory.gradients[0] *= factor

    monkeypatch.setattr(host, "execute", wrong)
    monkeypatch.setattr(runner, "DRAWS", 2)


# No time without the right numbers


def test_a_case_that_agrees_is_timed():
    row = runner.run(small_case(), SETTING)
    assert "refused" not in row
    assert [c["name"] for c in row["contenders"]] == ["host", "autograd", "loop"]
    assert all(c["ms"]["median"] > 0 and c["off"] <= c["limit"] for c in row["contenders"])
    assert {r["other"] for r in row["ratios"]} == {"autograd", "loop"}
    assert row["ledger"]["floor_ms"] > 0


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_kernel_is_never_timed(monkeypatch, factor):
    break_kernel(monkeypatch, factor)
    monkeypatch.setattr(runner, "_timed", lambda *_: pytest.fail("it was timed"))
    row = runner.run(small_case(), SETTING)
    assert "host" in row["refused"] and "nothing of it was timed" in row["refused"]
    assert row["contenders"] == [] and row["ratios"] == []


@pytest.mark.parametrize("rival", ["loop", "autograd"])
def test_a_rival_that_computes_something_else_is_refused_too(monkeypatch, rival):
    monkeypatch.setattr(runner, "DRAWS", 1)
    if rival == "loop":
        loop = eager.LOOPS["mlp"]
        monkeypatch.setitem(eager.LOOPS, "mlp", lambda *a: [1.05 * gradient for gradient in loop(*a)])
    else:
        made = contenders.RIVALS["autograd"]
        wrong = lambda arena, name: replace(made(arena, name), gradients=lambda: [torch.zeros(1)])  # noqa: E731
        monkeypatch.setitem(contenders.RIVALS, "autograd", wrong)
    assert rival in runner.run(small_case(), SETTING)["refused"]


def test_the_command_prints_no_time_of_a_wrong_kernel(monkeypatch, capsys, tmp_path, small_suite):
    break_kernel(monkeypatch, 1.01)
    assert main(["bench", "--json", str(tmp_path / "b.json")]) == 1
    printed = capsys.readouterr().out
    assert "REFUSED" in printed and "more than 1e-03" in printed
    rows = [line for line in printed.splitlines() if line.startswith("MLP")]
    assert len(rows) == 2 and all("not measured: refused" in row for row in rows)  # its goals, and no row of the table of times
    assert '"median"' not in (tmp_path / "b.json").read_text()


def test_a_kink_that_rounding_crosses_is_drawn_anew(monkeypatch):
    """A wrong kernel is wrong on all data; one that is off on the first draw alone is not refused."""
    draws = []
    verify = runner.verify

    def once(case, arena, fit):
        draws.append(arena)
        if len(draws) == 1:
            raise verification.Disagreement("a kink")
        return verify(case, arena, fit)

    monkeypatch.setattr(runner, "verify", once)
    assert "refused" not in runner.run(small_case(), SETTING)
    assert len(draws) == 2 and not torch.equal(draws[0].x, draws[1].x)


# A training step, and calls in a CUDA graph


@pytest.mark.parametrize("backend", ["host", "graph"])
def test_a_training_step_ends_with_the_optimizer_and_changes_no_weight(monkeypatch, backend):
    stepped = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: stepped.append(self) or step(self))
    monkeypatch.setattr(contenders, "OURS_ON_CPU", {backend: contenders._backend(backend)})
    case = small_case(rule=EXACT, goals={}, trains=True)
    before = [parameter.clone() for parameter in runner._arena(case, SETTING, 0).module.parameters()]
    arena = runner._arena(case, SETTING, 0)
    found, refused = contenders.contenders(arena)
    assert [c.name for c in found] == [backend, "autograd"] and "optimizer" in refused["loop"]
    runner.verify(case, arena, found)
    assert len(stepped) == 2 and len(set(map(id, stepped))) == 2  # each has one of its own
    assert all(torch.equal(a, b) for a, b in zip(before, arena.module.parameters(), strict=True))
    assert case.name.endswith("exact (zero divergence), with SGD's step")


def test_ours_too_is_captured_in_a_cuda_graph_where_calls_do_not_wait(monkeypatch):
    """The wiring alone, with a recording that runs at once: what a GPU does with it a GPU has to tell."""
    checks = []
    arena = runner._arena(small_case(), SETTING, 0)

    def recorded(run):
        checks.append(arena.network.check)
        return run, run()

    monkeypatch.setattr(contenders, "recorded", recorded)
    made = contenders._captured(contenders._deferred(contenders._backend("host")))(arena, "host, CUDA graph")
    assert made.ours and made.computes == "rule" and checks == ["deferred"]
    plain = contenders._backend("host")(arena, "host")
    runner.verify(arena.case, arena, [made, plain])
    assert arena.network.check == "sync"  # whoever runs sets it
    assert {"cuda", "cuda, CUDA graph", "graph", "graph, CUDA graph", "graph, unfused", "triton"} == set(contenders.OURS_ON_GPU)


def test_the_graph_tier_takes_part_as_plain_pytorch_too(monkeypatch):
    """Beside what lies between products in one launch: the same by PyTorch's own kernels, at every call."""
    fused = []
    network = types.SimpleNamespace(
        infer=lambda *_: fused.append(graph.options.get().fused) or types.SimpleNamespace(backend="graph", plan=""),
        backward=lambda *_: fused.append(graph.options.get().fused),
    )
    monkeypatch.setattr(contenders.Arena, "network", network)
    arena = runner._arena(small_case(), SETTING, 0)
    for name, wanted in (("graph", None), ("graph, unfused", False)):
        contenders.OURS_ON_GPU[name](arena, name).run()
        assert fused == [wanted, wanted] and graph.options.get().fused is None
        fused.clear()


def test_what_auto_takes_and_the_graph_tier_take_part_on_a_cpu():
    """Where a case asks for them: beside the engine, so that a reader sees whether "auto" takes what is fastest."""
    found, _ = contenders.contenders(runner._arena(small_case(tiers=True), SETTING, 0))
    assert [c.name for c in found] == ["host", "auto", "graph", "autograd", "loop"]
    assert found[1].plan == f"host: {found[0].plan}"
    learns = small_case(rule=pck.Incremental(3, 0.1, weight_rate=0.1), tiers=True)
    found, refused = contenders.contenders(runner._arena(learns, SETTING, 0))
    assert [c.name for c in found] == ["auto", "graph", "autograd"] and set(refused) == {"host", "loop"}
    assert found[0].plan.startswith("reference: ") and found[0].limit == learns.limit_of_values
    assert found[1].limit == learns.limit


def test_a_recording_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    """PyTorch's own context does not, where the end of the capture raises in its turn."""
    now, calls = ["main"], []

    class Fake:
        def __init__(self, *_):
            self.wait_stream = lambda other: None

        __enter__ = lambda self: None  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731

    class Capture(Fake):
        def __enter__(self):
            now[0] = "capturing"

        def __exit__(self, *_):
            raise RuntimeError("the capture has ended badly")

    main = Fake()
    for name, fake in {"Stream": Fake, "stream": Fake, "CUDAGraph": Fake, "graph": Capture, "current_stream": lambda: main}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: now.__setitem__(0, stream))
    with pytest.raises(RuntimeError, match="ended badly"):
        timing.recorded(lambda: calls.append(now[0]))
    assert now[0] is main and calls == ["main"] * 3 + ["capturing"]


def test_a_rival_that_fails_stops_nobody_else(monkeypatch):
    monkeypatch.setitem(contenders.RIVALS, "loop", lambda arena, name: 1 / 0)
    row = runner.run(small_case(), SETTING)
    assert [c["name"] for c in row["contenders"]] == ["host", "autograd"]
    assert row["not_here"]["loop"] == "it failed: ZeroDivisionError: division by zero"
    monkeypatch.setattr(contenders, "OURS_ON_CPU", {"host": lambda arena, name: 1 / 0})
    with pytest.raises(ZeroDivisionError):
        runner.run(small_case(), SETTING)


@pytest.mark.parametrize(("taken", "stands"), [("host", "host"), ("reference", "auto")])
def test_auto_stands_for_ours_only_where_it_took_what_has_no_times_of_its_own(taken, stands):
    """Else the faster of two timings of one backend would be compared with one of everyone else."""
    rows = [{"name": name, "ours": True, "threads": 1, "plan": "", "ms": {"median": ms}} for name, ms in (("host", 2.0), ("graph", 3.0))]
    rows.append({**rows[0], "name": "auto", "plan": f"{taken}: strict dynamics", "ms": {"median": 1.9}})
    assert record.fastest_of_ours({"contenders": rows})["name"] == stands


# The loops by hand


@pytest.mark.parametrize(
    ("model", "momentum"),
    [
        (SMALL, 0.0),
        (models.deep_mlp(5, 8), 0.0),
        (models.Model("rnn", lambda: models.RNN(4, 6, 3), (5, 4), (3,), "rnn"), 0.0),
        (models.Model("lstm", lambda: models.LSTM(4, 5, 3), (4, 4), (4, 3), "lstm"), 0.0),
        (models.CNN, 0.0),
        (models.CNN, 0.6),
        (replace(models.VGG, build=lambda: models.VGG5(channels=(3, 4, 4, 5))), 0.6),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_loop_by_hand_is_the_reference(model, momentum):
    torch.manual_seed(1)
    module, (x, target) = model.build().double(), model.data(3)
    x, target = x.double(), target.double()
    options = {"momentum": momentum} if momentum else {}
    found = eager.LOOPS[model.loop](module, x, target, 4, 0.1, **options)
    pck.PCNetwork(module, strict(4, momentum), backend="reference", **model.pc).backward(x, target)
    assert verification.distance(found, verification.gradients_of(module)) < 1e-9


@pytest.mark.parametrize(("oracle", "rule"), [("loop", strict(6)), ("autograd", EXACT), ("autograd", CLOSED)])
def test_an_oracle_that_takes_less_time_is_the_reference(oracle, rule):
    case = small_case(rule=rule, oracle=oracle)
    arena = runner._arena(case, SETTING, 0)
    quick, slow = (verification.oracles(replace(case, oracle=name), arena.module, arena.x, arena.target) for name in (oracle, "reference"))
    assert quick.source != slow.source and verification.distance(quick.rule, slow.rule) < 1e-9
    assert all(not isinstance(c.rule, pck.Strict) for name in SUITES for c in suite(name) if c.oracle == "autograd")


# The registry


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_has_each_case_once_and_knows_all_rivals(name):
    cases = suite(name)
    assert len({case.name for case in cases}) == len(cases) > 10
    for case in cases:
        assert set(case.rivals) <= {*contenders.RIVALS, contenders.TWO_THREADS}
        assert all(" / " in goal for goal in case.goals)
        assert "loop" not in case.rivals or case.model.loop in eager.LOOPS


def test_every_rule_has_a_row_on_the_perceptron_of_the_paper():
    rows = [case for case in suite("cpu") if case.model.name.startswith(PAPER_MLP.name) and case.batch == 64]
    assert {type(case.rule) for case in rows} == set(pck.rules.Rule.__subclasses__())
    assert {case.rule.solver for case in rows if isinstance(case.rule, pck.FixedPrediction)} == {"iterate", "closed_form"}
    assert any(case.rule.dynamics.is_nudged for case in rows) and any(case.model.precision for case in rows)
    for case in rows:
        if case.model.precision or not isinstance(case.rule, pck.Strict) or case.rule.dynamics.is_nudged:
            arena = runner._arena(replace(case, model=SMALL), SETTING, 0)  # no loop by hand may stand for another rule
            with pytest.raises(pck.Unsupported, match="no loop by hand"):
                contenders._loop(replace(arena, case=case), "loop")


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (strict(8, 0.6), "strict T=8, momentum 0.6"),
        (CLOSED, "fixed prediction T=200, rate 1, closed form"),
        (pck.Incremental(20, 0.1), "incremental T=20"),
        (pck.Strict(20, 0.1, nudge=("centered", 0.1)), "strict T=20, nudged by 0.1 and -0.1"),
        (pck.Relaxed(strict(3), "learned", False, "random"), "strict T=3, learned feedback, without f', random error weights"),
        (pck.Relaxed(EXACT, "random"), "exact (zero divergence), random feedback"),
    ],
)
def test_the_name_of_a_rule_says_what_is_not_usual(rule, name):
    assert rule_name(rule) == name


def test_the_goals_of_the_native_engine_are_in_the_cpu_suite():
    goals = {case.name: case.goals for case in suite("cpu")}
    assert goals["MLP 784-300-300-10, batch 64, strict T=20"]["host / loop"] == 0.5
    assert goals["MLP 784-300-300-10, batch 1, strict T=20"]["host / loop"] == 0.25
    assert goals["the paper's CNN, batch 64, strict T=20"]["host / autograd"] == 3.0
    assert goals["the paper's CNN, batch 64, strict T=100"]["host / autograd"] == 14.0
    assert goals["RNN 256, 8 letters, batch 1, strict T=20"]["host / loop"] == 0.33
    assert goals["LSTM 256, 50 letters, batch 64, strict T=20"]["host / loop"] == 0.4
    assert goals["MLP 784-300-300-10, batch 256, strict T=20"]["host, two threads / host"] == pytest.approx(1 / 1.7, abs=1e-3)
    assert sorted(case.steps for case in suite("cpu") if case.accuracy == 5e-4) == [1, 5, 8, 20]
    assert "quick" not in GPU


# The ledger


def code_for(model: models.Model, rule, batch: int):
    torch.manual_seed(0)
    module, (x, _) = model.build(), model.data(batch)
    code = selection.code_for(pck.PCNetwork(module, rule, **model.pc).trace(x), rule.dynamics, batch)
    assert not isinstance(code, str), code
    return code


def test_products_of_a_perceptron_are_those_counted_on_paper():
    plain = ledger.ledger(code_for(models.mlp(), strict(20), 1), 1, 1)
    assert plain.step.products == 2 * 300 * 300 + 2 * 300 * 10  # a product and its transpose, the clamped first one hoisted
    gram = ledger.ledger(code_for(models.mlp(), strict(20), 64), 64, 16)
    assert gram.step.products == 64 * (300 * 300 + 2 * 300 * 10)  # one product saved
    forward, learn = 784 * 300 + 300 * 300 + 300 * 10, 784 * 300 + 300 * 300 + 300 * 10
    assert gram.once.products == 64 * (forward + learn + 300 * 300) + 300 * 300 * 300  # W^T h at the end, and W W^T
    assert gram.tiles == 4 and gram.step.weights == 4 * 4 * (300 * 300 + 2 * 300 * 10)


def test_the_light_cone_is_left_out_and_steps_are_all_alike():
    short, long = (ledger.ledger(code_for(models.mlp(), strict(steps), 64), 64, 16) for steps in (20, 50))
    assert long.step == short.step
    assert long.loop.products - short.loop.products == 30 * short.step.products
    assert short.loop.products < 20 * short.step.products  # what lies behind the light cone in the first step


def test_products_of_a_convolution_and_bytes_that_leave_the_chip():
    found = ledger.ledger(code_for(models.CNN, strict(20), 2), 2, 16)
    conv2, linear = 16 * 10 * 10 * 6 * 25, 1600 * 200 + 200 * 150 + 150 * 10
    assert found.step.products == 2 * 2 * (conv2 + linear)
    weights = 2 * (16 * 6 * 25 + linear)
    assert found.leaving(resident=False) == 4 * weights + found.step.device
    assert found.leaving(resident=True) == found.step.device == 8 * 6  # the energies of six vertices
    assert found.step.chip > found.leaving(resident=True)


def test_a_sweep_moves_every_weight_and_sample_once():
    found = ledger.ledger(code_for(models.mlp(), EXACT, 64), 64, 16)
    assert found.step == ledger.Count()
    weights = 784 * 300 + 300 * 300 + 300 * 10
    assert found.total.products == 64 * (2 * weights + 300 * 300 + 300 * 10)
    assert found.total.device > 4 * (2 * weights + 64 * (784 + 10))


def test_ceilings_bound_a_count_from_below():
    count = ledger.Count(products=1e9, chip=1e9, weights=1e10, device=1e8)
    assert CEILINGS.floor(count, resident=True) == pytest.approx(100.0)
    assert CEILINGS.floor(count, resident=False) == pytest.approx(100.0)
    found = types.SimpleNamespace(multi_processor_count=132, clock_rate=1_755_000)  # kHz
    assert ceilings.shared_memory_rate(found) == pytest.approx(132 * 32 * 4 * 1.755e9)
    assert ceilings.shared_memory_rate(types.SimpleNamespace(multi_processor_count=132)) == 0
    with pytest.raises(ValueError, match="1 sample or more"):
        ledger.ledger(code_for(SMALL, strict(2), 1), 1, 0)


# Memory does not grow with T


def test_state_and_results_do_not_grow_with_the_number_of_steps():
    """The form of the code may differ between few and many steps (Gram or not), and never by more than an array or two."""
    module, (x, _) = models.mlp().build(), models.mlp().data(8)
    sizes = curves.state_bytes(pck.PCNetwork(module, strict(1)), x, (1, 10, 100, 1000))
    assert set(sizes) == {"1", "10", "100", "1000"}
    assert sizes["100"] == sizes["1000"]
    assert max(sizes.values()) < 1.1 * min(sizes.values())


def test_the_peak_of_a_call_does_not_rise_with_the_number_of_steps():
    found = curves.memory(torch.device("cpu"), [replace(which, batch=16) for which in curves.MEMORIES])
    if not found:
        pytest.skip("this system does not say what the peak of resident memory is")
    kept = 1000 * found[0]["state_bytes"]["1000"]  # if every step were kept: 250 MiB
    assert kept > 2**28
    assert [(row["model"].split()[0], row["backend"]) for row in found] == [("MLP", "host"), ("RNN", "host"), ("MLP", "graph")]
    assert all(max(row["bytes"].values()) - min(row["bytes"].values()) < 2**20 for row in found)


def test_memory_of_what_the_engine_does_not_take_is_the_graph_tiers(monkeypatch):
    """As on a GPU of a network that does not fit: the row says whose memory it is."""
    monkeypatch.setattr(curves, "backend_for", lambda device: "triton")
    for row in curves.memory(torch.device("cpu"), [curves.Memory(SMALL, 4, (1, 2))]):
        assert row["backend"] == "graph" and "state_bytes" not in row


def test_memory_that_grows_with_the_number_of_steps_is_seen(monkeypatch):
    """As if a backend kept 256 KiB of every step until its call ends."""
    call = curves._call

    def keeps(network, x, target):
        kept = [torch.ones(1 << 16) for _ in range(network.rule.steps)]
        call(network, x, target)
        return kept

    monkeypatch.setattr(curves, "_call", keeps)
    found = curves.memory(torch.device("cpu"), [curves.Memory(SMALL, 4, (1, 400), "graph")])
    if not found:
        pytest.skip("this system does not say what the peak of resident memory is")
    (goal,) = goals.reached({"suite": "cpu", "cases": [], "left_out": [], "curves": {"memory": found}})
    assert goal.met is False


# What is shown comes from the JSON


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A record that the command has written."""
    path = tmp_path_factory.mktemp("bench") / "made.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch)
        assert main(["bench", "--json", str(path)]) == 0
    return path


@pytest.fixture
def made(file) -> record.Record:
    return record.read(file)


def test_a_record_says_where_it_was_made(made):
    machine = made["machine"]
    assert machine["threads"] == 1 and machine["versions"]["torch"] == torch.__version__ and machine["processor"]
    assert set(made["load"]) == {"before", "after", "other_work"}
    assert made["ceilings"] == {"products": 1e10, "device": 1e10, "cache": 1e11, "chip": 1e11}


def test_the_page_holds_everything_in_itself(made, tmp_path):
    path = page.write(with_curves(made), tmp_path / "new")
    content = path.read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", content)
    assert not re.search(r"https?://", re.sub(r"base64,[\w+/=]+", "", content))
    assert content.count("data:image/svg+xml;base64") == len(list((tmp_path / "new").glob("*.png"))) == 5
    for case in made["cases"]:
        assert case["name"] in content
    assert "{{" not in content


def with_curves(made: record.Record) -> record.Record:
    points = [{"family": "autograd", "rule": "loss.backward()", "off": 1e-7, "ms": 2.0}]
    points += [{"family": "fixed", "rule": f"T={T}", "off": 0.9**T, "ms": 0.1 * T} for T in (1, 2, 4)]
    times = {"ms": {"20": 2.0, "40": 4.0}, "ms_a_step": 0.1, "bend": 0.0, "predicted_ms_a_step": 0.09, "floor_ms_a_step": 0.04}
    parts = [{"what": "linear, 1 x 3 x 4", "count": 48.0, "ns": 0.02, "ms": 0.09}]
    slope = {"model": "MLP", "rule": "strict", "batch": 4, **times, "parts": parts}
    missing = {"model": "CNN", "rule": "strict", "batch": 4, "not_measured": "no engine"}
    memory = {"model": "MLP", "batch": 4, "bytes": {"1": 0, "10": 4096}, "state_bytes": {"1": 100000, "10": 100000}}
    return {**made, "curves": {"errors": {"model": "MLP", "batch": 4, "points": points}, "slopes": [slope, missing], "memory": memory}}


def test_the_command_draws_from_a_file_without_measuring(file, made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measured", lambda args: pytest.fail("it measured"))
    assert main(["bench", "--from", str(file), "--out", str(tmp_path / "drawn")]) == 0
    assert (tmp_path / "drawn" / "report.html").exists()
    assert made["cases"][0]["name"] in capsys.readouterr().out


def test_a_refused_case_stands_on_the_page_without_a_time(made, tmp_path):
    bad = copy.deepcopy(made)
    bad["cases"][0] = {**bad["cases"][0], "contenders": [], "ratios": [], "refused": "nothing of it was timed."}
    content = page.write(bad, tmp_path / "bad").read_text()
    assert "nothing of it was timed." in content


def test_tables_are_rewritten_between_their_marks(made, tmp_path):
    text = tmp_path / "page.md"
    begin = tables.BEGIN.format(name="targets")
    text.write_text(f"before\n{begin}\nold\n{tables.END}\nafter\n")
    assert tables.rewrite(text, made)
    content = text.read_text()
    assert content.startswith("before\n") and content.endswith("after\n") and "old" not in content
    assert "| host / loop |" in content
    assert not tables.rewrite(text, made)
    for wrong, words in (("nothing", "no mark"), (tables.BEGIN.format(name="chairs"), "no table 'chairs'"), (begin, "behind it")):
        with pytest.raises(ValueError, match=words):
            tables.rewritten(wrong, made)


@pytest.mark.parametrize("content", ["not json", "[]", '{"schema": 99, "cases": []}'])
def test_a_file_that_is_no_record_is_refused_in_a_sentence(tmp_path, content, capsys):
    (tmp_path / "x.json").write_text(content)
    for option in ("--from", "--check"):
        assert main(["bench", option, str(tmp_path / "x.json")]) == 2
        assert "pckernels bench" in capsys.readouterr().err
    assert main(["bench", "--from", str(tmp_path / "none.json")]) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threads", "0"], "1 or more"),
        (["--case", "no such case"], "No case of the suite"),
        (["--against", "tensorflow"], "no rival 'tensorflow'"),
        (["--peer", "pcx"], "NAME=PYTHON"),
        (["--peer", "jaxley=python"], "no peer 'jaxley'"),
    ],
)
def test_bad_arguments_are_a_sentence(arguments, words, capsys, small_suite):
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_only_the_rivals_that_are_asked_for_take_part(small_suite, tmp_path):
    assert main(["bench", "--against", "loop", "--json", str(tmp_path / "b.json")]) == 0
    for case in record.read(tmp_path / "b.json")["cases"]:
        assert [c["name"] for c in case["contenders"]] == ["host", "loop"]


# Peers, each in a process of its own

SCRIPT = """
import json, sys, numpy as np, torch
from pckernels.benchmarks import eager, models
data = np.load(sys.argv[1])
task = json.loads(str(data["task"]))
module = models.mlp((12, 20, 16, 3)).build()
with torch.no_grad():
    for k, parameter in enumerate(module.parameters()):
        parameter.copy_(torch.from_numpy(data[f"weight{k}"]))
found = eager.mlp(module, torch.from_numpy(data["x"]), torch.from_numpy(data["target"]), task["steps"], task["rate"])
gradients = {f"gradient{k}": FACTOR * g.numpy() for k, g in enumerate(found)}
np.savez(sys.argv[2], times=np.array([1.0, 2.0, 3.0]), versions="peer 1.0", **gradients)
"""


@pytest.mark.parametrize(("script", "words"), [("1.1", "away from its float64 oracle"), ("broken", "NameError"), ("1.0", "")])
def test_a_peer_is_timed_only_if_it_computes_the_same(tmp_path, monkeypatch, script, words):
    (tmp_path / "run_pcx.py").write_text(SCRIPT.replace("FACTOR", script))
    monkeypatch.setattr(peers, "SCRIPTS", tmp_path)
    row = runner.run(small_case(peers=True), replace(SETTING, peers={"pcx": sys.executable}))
    found = record.contender(row, "pcx")
    if words:
        assert found is None and words in row["not_here"]["pcx"]
    else:
        assert found["ms"]["median"] == 2.0 and "peer 1.0" in found["plan"]
        assert any(r["other"] == "pcx" for r in row["ratios"])


def test_a_peer_that_is_not_there_is_named_with_the_reason():
    row = runner.run(small_case(peers=True), replace(SETTING, peers={"pcx": "no-such-python"}))
    assert "did not answer" in row["not_here"]["pcx"]
    row = runner.run(small_case(peers=True, rule=EXACT), replace(SETTING, peers={"pcx": sys.executable}))
    assert "perceptrons" in row["not_here"]["pcx"]


def test_what_was_measured_is_written_before_the_end(monkeypatch, small_suite, tmp_path):
    """Whoever ends a run early has the JSON of what came before."""
    path, seen = tmp_path / "b.json", []
    run = runner.run

    def watched(case, setting):
        seen.append(record.read(path) if path.exists() else None)
        return run(case, setting)

    monkeypatch.setattr(bench, "run_case", watched)
    assert main(["bench", "--json", str(path)]) == 0
    assert seen[0] is None and len(seen[1]["cases"]) == 1 and len(seen[1]["left_out"]) == 1
    assert len(tables.times(seen[1])[1]) > 1 and tables.summary(seen[1]) and tables.provenance(seen[1])
    assert record.read(path)["left_out"] == []


def test_goals_are_measured_first_on_a_gpu_and_a_failure_ends_no_run(monkeypatch):
    on_gpu = replace(SETTING, device=torch.device("cuda"))
    names = [part.name for part in bench._parts(suite("gpu"), on_gpu, "gpu", whole=True)]
    curve = ["depths", "slopes", "memory", "errors"]
    start = names.index("depths")
    assert names[start : start + 4] == curve
    assert "VGG5, batch 128, strict T=8, momentum 0.6" in names[:start] and "MLP 784-300-300-10, batch 8192, strict T=20" in names[:start]
    assert "MLP 784-300-300-10, batch 64, strict T=10" in names[start + 4 :]
    assert [part.name for part in bench._parts([small_case()], SETTING, "cpu", whole=True)][1:] == curve[1:]
    assert [part.name for part in bench._parts([small_case()], SETTING, "cpu", whole=False)] == [small_case().name]

    def fails(case, setting):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(bench, "run_case", fails)
    found = {"cases": []}
    bench._add_case(small_case(), on_gpu, found)
    assert "CUDA out of memory" in found["cases"][0]["refused"]
    with pytest.raises(RuntimeError):
        bench._add_case(small_case(), SETTING, found)


def test_the_time_of_a_step_at_two_depths(monkeypatch):
    monkeypatch.setattr(curves, "DEPTH_STEPS", (2, 4))
    monkeypatch.setattr(curves, "DEPTHS", (3, 4))
    monkeypatch.setattr(curves, "WIDTH", 16)
    found = curves.depths(SETTING, 0.05)
    assert set(found["ms_a_step"]) == set(found["floor_ms_a_step"]) == {"3", "4"}
    assert found["backend_3"] == "host" and all(floor > 0 for floor in found["floor_ms_a_step"].values())
    monkeypatch.setattr(curves, "backend_for", lambda device: "triton")
    assert curves.depths(SETTING, 0.05)["backend_4"] == "graph"


def test_a_curve_that_disagrees_says_so(monkeypatch):
    found = {"curves": {}}

    def disagrees():
        raise verification.Disagreement("numbers disagree")

    bench._add_curve("slopes", disagrees, found)
    assert found["curves"] == {"refused": {"slopes": "numbers disagree"}}


def test_no_case_begins_after_the_limit(small_suite, tmp_path, capsys):
    assert main(["bench", "--limit", "0", "--json", str(tmp_path / "b.json")]) == 0
    found = record.read(tmp_path / "b.json")
    assert found["cases"] == [] and len(found["left_out"]) == 2
    assert "LEFT OUT" in capsys.readouterr().out


# The guard


def fabricated(ratio: float, factor: float = 1.0) -> record.Record:
    """A record of one case, whose times are all `factor` times what they were."""
    ms = {"median": factor, "low": factor, "high": factor, "min": factor, "max": factor, "rounds": 5}
    rows = [{"name": "host", "ours": True, "ms": {**ms, "median": ratio * factor}}, {"name": "loop", "ours": False, "ms": ms}]
    case = {"name": "case", "contenders": rows, "ratios": [{"ours": "host", "other": "loop", "median": ratio}]}
    return {"schema": record.SCHEMA, "machine": {"processor": "one"}, "cases": [case]}


@pytest.mark.parametrize(
    ("now", "factor", "good"),
    [(0.5, 1.0, True), (0.6, 1.0, True), (0.63, 1.0, False), (5.0, 1.0, False), (0.1, 1.0, True), (0.5, 10.0, True), (0.66, 0.1, False)],
)
def test_the_guard_fails_on_a_lost_ratio_and_never_on_a_time(now, factor, good):
    found, lines = guard.verdict(fabricated(0.5), fabricated(now, factor))
    assert found is good
    assert ("LOST" in lines[0]) is not good


def test_the_guard_fails_where_a_ratio_has_gone_or_is_not_a_number():
    fresh = fabricated(0.5)
    fresh["cases"].append({"name": "other", "contenders": [], "ratios": [{"ours": "host", "other": "loop", "median": 1.0}]})
    committed = copy.deepcopy(fresh)
    fresh["cases"][0] = {"name": "case", "refused": "numbers disagree", "contenders": [], "ratios": []}
    assert guard.verdict(committed, fresh)[0] is False
    fresh["cases"][0] = {"name": "case", "contenders": [], "ratios": []}
    good, lines = guard.verdict(committed, fresh)
    assert not good and "GONE  case: host" in lines
    assert guard.verdict(fabricated(0.5), fabricated(float("nan")))[0] is False
    with pytest.raises(ValueError, match="no ratio in common"):
        guard.verdict(fabricated(0.5), {**fabricated(0.5), "cases": []})


def test_the_guard_is_the_exit_code_of_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "before.json").write_text(json.dumps(fabricated(0.5)))
    monkeypatch.setattr(tables, "summary", lambda found: "")
    monkeypatch.setattr(tables, "provenance", lambda found: "")
    for now, code in ((0.55, 0), (0.7, 1)):
        monkeypatch.setattr(bench, "measured", lambda args, now=now: fabricated(now))
        assert main(["bench", "--check", str(tmp_path / "before.json")]) == code
    assert "LOST" in capsys.readouterr().out


# What is committed


@pytest.mark.parametrize("name", ["README.md", "bench/README.md"])
def test_tables_are_those_of_the_committed_run(name):
    content = (ROOT / name).read_text(encoding="utf-8")
    assert tables.rewritten(content, record.read(ROOT / "bench" / "results" / "cpu.json")) == content


def test_the_committed_run_guards_every_goal_of_the_quick_suite():
    committed = record.read(ROOT / "bench" / "results" / "cpu.json")
    with_goals = {case.name for case in suite("quick") if any(goal.startswith("host") for goal in case.goals)}
    assert with_goals <= {case["name"] for case in record.timed(committed)}
    good, lines = guard.verdict(committed, committed)
    assert good and len(lines) > 20
