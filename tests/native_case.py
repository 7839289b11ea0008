"""Code made by hand, for tests of what runs it: arrays of the arena, and the io tensors that fill and read them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pckernels.instructions import Code, Instruction, Op, OuterProduct, Phase
from pckernels.interpreter import execute
from pckernels.memory import Memory


class Case:
    """A code under construction, and its tensors in float64."""

    def __init__(self, batch: int):
        self.batch, self.rows, self.energies = batch, 0, 1
        self.io: list[Tensor] = []
        self.results: set[int] = set()
        self.weights: list[Tensor] = []
        self.gradients: list[tuple[int, ...]] = []
        self.instructions: list[Instruction] = []
        self.products: list[OuterProduct] = []

    def array(self, n: int) -> int:
        self.rows += n
        return self.rows - n

    def tensor(self, value: Tensor) -> int:
        self.io.append(value.double().reshape(self.batch, -1))
        return len(self.io) - 1

    def weight(self, value: Tensor) -> int:
        self.weights.append(value.double())
        return len(self.weights) - 1

    def gradient(self, *shape: int) -> int:
        self.gradients.append(shape)
        return len(self.gradients) - 1

    def load(self, value: Tensor) -> int:
        slot = self.tensor(value)
        n = self.io[slot].shape[1]
        row = self.array(n)
        self.add(Op.LOAD, n=n, out=row, slot=slot, p=(n, 0))
        return row

    def add(self, op: Op, **operands: Any) -> None:
        self.instructions.append(Instruction(op, barrier=True, **operands))

    def result(self, n: int) -> int:
        slot = self.tensor(torch.full((self.batch, n), float("nan")))
        self.results.add(slot)
        return slot

    def store(self, row: int, n: int) -> int:
        slot = self.result(n)
        self.add(Op.STORE, n=n, a=row, slot=slot, p=(n, 0))
        return slot

    @property
    def code(self) -> Code:
        phases = (Phase(tuple(self.instructions), 0, 0),)
        sizes = (len(self.weights), len(self.io), len(self.gradients))
        return Code(phases, self.rows, *sizes, 0, self.energies, tuple(self.products))

    def memory(self, dtype: torch.dtype) -> Memory:
        weights = [weight.to(dtype) for weight in self.weights]
        gradients = [torch.full(shape, float("nan"), dtype=dtype) for shape in self.gradients]
        energies = torch.full((self.code.steps + 1, self.energies), float("nan"), dtype=torch.float64)
        return Memory(weights, [tensor.to(dtype) for tensor in self.io], gradients, energies)

    def outcome(self, memory: Memory) -> list[Tensor]:
        return [*(memory.io[slot] for slot in sorted(self.results)), *memory.gradients, memory.energies]

    def expected(self, factor: float = 1.0) -> list[Tensor]:
        memory = self.memory(torch.float64)
        execute(self.code, memory, self.batch, factor)
        return self.outcome(memory)

    def program(self, native: Any) -> Any:
        return native_program(native, self.code, self.memory(torch.float32))

    def run(self, native: Any, threads: int = 1, tile_groups: int = 0, factor: float = 1.0) -> list[Tensor]:
        memory = self.memory(torch.float32)
        addresses = ([tensor.data_ptr() for tensor in tensors] for tensors in (memory.weights, memory.io, memory.gradients))
        self.program(native).run(*addresses, memory.energies.data_ptr(), self.batch, threads, factor, tile_groups)
        return self.outcome(memory)


def native_program(native: Any, code: Code, memory: Memory) -> Any:
    """The engine's copy of code whose tensors are those of `memory`; io is (B, elements)."""
    code = getattr(native, "prepared", lambda found: found)(code)
    words, phases = code.encoded()
    products, coefficients = product_table(code)
    return native.Program(
        words=words.numpy(),
        phases=phases.numpy(),
        products=products.numpy(),
        coefficients=coefficients.numpy(),
        rows=code.rows,
        weights=[(weight.numel(), 1) for weight in memory.weights],
        io=[tensor.shape[1] for tensor in memory.io],
        gradients=[gradient.numel() for gradient in memory.gradients],
        steps=code.steps,
        energies=code.energies,
    )


def product_table(code: Code) -> tuple[Tensor, Tensor]:
    rows = [[p.weight, p.bias, p.g_slot, p.x_slot, p.positions, p.inputs, p.outputs, p.x_stride, p.x_offset] for p in code.products]
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 9), torch.tensor([p.coefficient for p in code.products], dtype=torch.float32)


def write_case(path: Path, code: Code, memory: Memory, batch: int) -> None:
    """The binary file that csrc/tests/case_file.h reads."""
    words, phases = code.encoded()
    products, coefficients = product_table(code)
    sizes = [code.rows, len(memory.weights), len(memory.io), len(memory.gradients), code.steps, code.energies]
    header = [*sizes, len(words), len(phases), len(products), batch]
    with path.open("wb") as file:
        file.write(b"PCKCASE1" + struct.pack(f"<{len(header)}i", *header))
        for table in (words, phases, products, coefficients):
            file.write(table.numpy().tobytes())
        for count in (*(w.numel() for w in memory.weights), *(x.shape[1] for x in memory.io), *(g.numel() for g in memory.gradients)):
            file.write(struct.pack("<q", count))
        for tensor in (*memory.weights, *memory.io):
            file.write(tensor.float().contiguous().numpy().tobytes())
