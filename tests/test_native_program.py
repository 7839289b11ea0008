"""The native engine's checks of a program and of a call, and its threads across calls, callers and forks."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
from native_case import Case

from pckernels.instructions import Activation, Code, Instruction, Op, OuterProduct, Phase
from pckernels.memory import Memory

native = pytest.importorskip("pckernels._native", reason="the native engine is not built")

POOL = (2, 6, 6, 0, 2, 2, 2, 2, 0, 0, 1, 1, 0, 3, 3, 0)
CONV = (2, 6, 6, 3, 3, 3, 1, 1, 0, 0, 1, 1, 1, 4, 4)


def refused(instruction: Instruction, **sizes: Any) -> str:
    """What the engine says of an instruction in an arena of 100 rows, with one weight (4, 5), one io of 7 and one gradient of 6."""
    with pytest.raises(ValueError, match=rf"^instruction 1 \({instruction.op.name}\): ") as error:
        program([Instruction(Op.FILL, n=1, out=0, f=(0.0,)), instruction], **sizes)
    return str(error.value)


def program(
    instructions: list[Instruction], phases: list[Phase] | None = None, products: tuple[OuterProduct, ...] = (), rows: int = 100
) -> Any:
    code = Code(tuple(phases or [Phase(tuple(instructions), 0, 0)]), rows, 1, 1, 1, 3, 2, products)
    words, table = code.encoded()
    product_words = [[p.weight, p.bias, p.g_slot, p.x_slot, p.positions, p.inputs, p.outputs, p.x_stride, p.x_offset] for p in products]
    return native.Program(
        words.numpy(),
        table.numpy(),
        torch.tensor(product_words, dtype=torch.int32).reshape(-1, 9).numpy(),
        torch.tensor([p.coefficient for p in products], dtype=torch.float32).numpy(),
        rows,
        [(4, 5)],
        [7],
        [6],
        3,
        2,
    )


@pytest.mark.parametrize(
    ("instruction", "said"),
    [
        (Instruction(Op.FILL, n=5, out=96), "out = rows 96 to 100 lie outside the arena of 100 rows"),
        (Instruction(Op.FILL, n=5), "out = rows -1"),
        (Instruction(Op.FILL, n=-1, out=0), "n = -1"),
        (Instruction(Op.FILL, n=1, out=0, accumulate=True), "cannot accumulate"),
        (Instruction(Op.ADD, n=5, out=0, a=98), "a = rows 98 to 102"),
        (Instruction(Op.MUL_CHANGE, n=5, out=0, a=0, b=0, c=0, d=99), "d = rows 99"),
        (Instruction(Op.LOAD, n=5, out=0, slot=1, p=(7, 0)), "io 1 does not exist; there are 1"),
        (Instruction(Op.LOAD, n=5, out=0, slot=0, p=(8, 0)), "io 0 has 7 elements where 8"),
        (Instruction(Op.LOAD, n=5, out=0, slot=0, p=(7, 3)), "elements 3 to 7 lie outside a row of 7"),
        (Instruction(Op.STORE, n=5, a=-2, slot=0, p=(7, 0)), "a = rows -2"),
        (Instruction(Op.COPY, out=0, a=0, p=(3, 4, 5, 50)), "a = rows 0 to 103"),
        (Instruction(Op.COPY, out=0, a=50, p=(3, 4, 2, 4)), "overlap in out"),
        (Instruction(Op.LINEAR, out=0, a=50, slot=0, p=(1, 4, 4)), "weight 0 has 20 elements where 16"),
        (Instruction(Op.LINEAR, out=0, a=50, slot=2, p=(1, 5, 4)), "weight 2 does not exist"),
        (Instruction(Op.LINEAR, out=0, a=50, slot=0, slot2=0, p=(1, 5, 4)), "weight 0 has 20 elements where 4"),
        (Instruction(Op.LINEAR, out=0, a=96, slot=0, p=(1, 5, 4)), "a = rows 96 to 100"),
        (Instruction(Op.LINEAR_T, out=97, a=0, slot=0, p=(1, 5, 4)), "out = rows 97 to 101"),
        (Instruction(Op.LINEAR, out=0, a=0, slot=0, p=(2**30, 5, 4)), "outside the arena"),
        (Instruction(Op.ACT, n=1, out=0, a=0, p=(len(Activation),)), f"no activation {len(Activation)}"),
        (Instruction(Op.ACT, n=1, out=0, p=(1,)), "a is missing"),
        (Instruction(Op.CONV, out=0, a=0, slot=0, p=(*CONV[:13], 5, 4)), "p13 = 5 should be 4"),
        (Instruction(Op.CONV, out=0, a=0, slot=0, p=CONV), "weight 0 has 20 elements where 54"),
        (Instruction(Op.CONV, out=0, a=0, slot=0, p=(*CONV[:12], 2, 4, 4)), "groups must divide"),
        (Instruction(Op.CONV_LEARN, a=0, b=0, slot=0, p=CONV), "gradient 0 has 6 elements where 54"),
        (Instruction(Op.MAXPOOL, out=90, a=0, b=0, p=POOL), "out = rows 90 to 107"),
        (Instruction(Op.MAXPOOL_GRAD, out=0, a=0, p=POOL), "b = rows -1"),
        (Instruction(Op.AVGPOOL, out=0, a=0, p=(*POOL[:10], 2, 1, 0, 3, 3, 0)), "no dilation"),
        (Instruction(Op.AVGPOOL, out=0, a=0, p=(*POOL[:13], 4, 3, 0)), "hold an element"),
        (Instruction(Op.LOSS, n=6, out=0, a=0, c=0, slot=2, p=(0, 0)), "energy 2 does not exist"),
        (Instruction(Op.LOSS, n=6, out=0, a=0, c=0, slot=0, p=(2, 0)), "no loss 2"),
        (Instruction(Op.LOSS, n=6, out=0, a=0, c=0, slot=0, p=(1, 4)), "not a number of rows"),
        (Instruction(Op.LOSS, n=6, out=0, a=0, c=0, slot=0, slot2=0, p=(0, 0)), "io 0 has 7 elements where 1"),
        (Instruction(Op.SUM_LEARN, a=0, slot=0, p=(1, 7, 1)), "gradient 0 has 6 elements where 7"),
        (Instruction(Op.GATHER, n=5, out=98, a=98, p=(5,)), "out = rows 98 to 102"),
        (Instruction(Op.GATHER, n=5, out=16, a=32, p=(5,)), "a = row 32 does not come before"),
        (Instruction(Op.GATHER, n=5, out=0, a=0, p=(0,)), "p0 = 0 must be positive"),
    ],
)
def test_an_operand_outside_of_what_it_names_is_refused(instruction: Instruction, said: str) -> None:
    assert said in refused(instruction)


def test_an_unknown_operation_is_refused() -> None:
    words, phases = torch.full((1, 32), 77, dtype=torch.int32), torch.tensor([[1, 0, 0]], dtype=torch.int32)
    with pytest.raises(ValueError, match="instruction 0 has the unknown operation 77"):
        native.Program(words, phases, b"", b"", 1, [], [], [], 0, 0)


@pytest.mark.parametrize(
    ("product", "said"),
    [
        (OuterProduct(0, -1, 1, 0, 1, 2, 3, 7, 0), "io slot does not exist"),
        (OuterProduct(0, -1, 0, 0, 1, 2, 3, 7, 0), "a row of g"),
        (OuterProduct(-1, 0, 0, 0, 1, 2, 7, 7, 6), "ends beyond its row"),
        (OuterProduct(0, -1, 0, 0, 1, 2, 7, 7, 0), "another size"),
        (OuterProduct(-1, 1, 0, 0, 1, 2, 7, 7, 0), "does not exist"),
    ],
)
def test_a_product_that_does_not_fit_is_refused(product: OuterProduct, said: str) -> None:
    with pytest.raises(ValueError, match=rf"^product 0: .*{said}"):
        program([], products=(product,))


def test_phases_must_fit() -> None:
    fill = Instruction(Op.FILL, n=1, out=0)
    with pytest.raises(ValueError, match="steps 0 to 3"):
        program([], [Phase((fill,), 0, 4)])
    with pytest.raises(ValueError, match="rows of 32"):
        native.Program(b"1234", b"", b"", b"", 1, [], [], [], 0, 0)


def test_a_call_must_fit() -> None:
    runnable, memory = program([]), torch.zeros(64)
    good = ([memory.data_ptr()], [memory.data_ptr()], [memory.data_ptr()], torch.zeros(8, dtype=torch.float64).data_ptr())
    with pytest.raises(ValueError, match="weights has 0 addresses; the program has 1"):
        runnable.run([], *good[1:], 1, 1)
    for batch, threads, message in ((-1, 1, "batch"), (1, 0, "threads"), (1, 5000, "threads")):
        with pytest.raises(ValueError, match=message):
            runnable.run(*good, batch, threads)
    with pytest.raises(ValueError, match="io must be addresses"):
        runnable.run(good[0], [0], *good[2:], 1, 1)
    with pytest.raises(ValueError, match="energies"):
        runnable.run(*good[:3], 0, 1, 1)


def network(batch: int) -> Case:
    case = Case(batch)
    w = case.weight(torch.randn(40, 30))
    x, out, back = case.load(torch.randn(batch, 30)), case.array(40), case.array(30)
    case.add(Op.LINEAR, out=out, a=x, slot=w, p=(1, 30, 40))
    case.add(Op.LINEAR_T, out=back, a=out, slot=w, p=(1, 30, 40))
    case.add(Op.NORM, n=30, a=back, slot=0, f=(1.0,))
    case.store(back, 30)
    return case


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(x.equal(y) for x, y in zip(a, b, strict=True))


def test_callers_in_several_threads_do_not_disturb_each_other() -> None:
    cases = [network(batch) for batch in (1, 17, 40, 64)]
    expected = [case.run(native) for case in cases]
    bad: list[int] = []

    def call(k: int) -> None:
        for _ in range(30):
            if not same(cases[k].run(native, 1 + k % 3), expected[k]):
                bad.append(k)

    callers = [threading.Thread(target=call, args=(k,)) for k in range(len(cases))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not bad


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_threads_work_in_a_forked_child() -> None:
    case = network(64)
    expected = case.run(native, 2)
    child = os.fork()
    if child == 0:
        os._exit(0 if same(case.run(native, 2), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_info_says_what_was_compiled_and_why_one_was_chosen() -> None:
    info = native.info()
    assert info["instruction_sets"][-1] == "baseline" and info["chosen"] in info["instruction_sets"]
    assert info["why"] and info["compiler"] and info["version"]
    with pytest.raises(ValueError, match="not compiled"):
        native.choose_instruction_set("mmx")


def guarded(values: torch.Tensor, fill: float = 7.0) -> torch.Tensor:
    """A copy with a margin of `fill` on both sides, to see writes beyond it."""
    room = torch.full((values.numel() + 128,), fill)
    room[64:-64] = values.flatten()
    return room


@pytest.mark.parametrize("batch", [1, 5, 17])
def test_nothing_is_written_beyond_the_results(batch: int) -> None:
    case = network(batch)
    memory = case.memory(torch.float32)
    rooms = [guarded(tensor) for tensor in memory.io]
    inner = Memory(memory.weights, [room[64:-64] for room in rooms], [], memory.energies)
    weights, io = ([tensor.data_ptr() for tensor in tensors] for tensors in (inner.weights, inner.io))
    case.program(native).run(weights, io, [], memory.energies.data_ptr(), batch, 3)
    assert all(bool((room[:64] == 7).all() and (room[-64:] == 7).all()) for room in rooms)
