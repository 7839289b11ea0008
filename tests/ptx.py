"""What a kernel's PTX does to global memory inside its loops: for the tests that read what Triton has compiled."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Sources = dict[str, frozenset[str]]  # register -> the arguments that its address may come from

_LABEL = re.compile(r"^(\$L__BB\w+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L__BB\w+)")
_PARAMETER = re.compile(r"ld\.param\.\w+\s+(%rd\d+), \[\w+_param_(\d+)\]")
_INSTRUCTION = re.compile(r"^(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*?);?$")
_ADDRESS = re.compile(r"\[\s*(%rd\d+)[^\]]*\]")
_TOUCHES = re.compile(r"(ld|st|atom|red)\.|cp\.async\.(?!wait_|commit_)")
_SPACE = re.compile(r"\.(param|shared|local|const|global)\b")
_WIDE = re.compile(r"%rd\d+")


@dataclass(frozen=True)
class Access:
    """One instruction that touches global memory.

    Attributes:
        store: whether it writes.
        arguments: the kernel's arguments that its address may come from; those of a tuple are name[k].
    """

    store: bool
    arguments: frozenset[str]


def parameters(names: Sequence[str], signature: Mapping[str, Any]) -> list[str]:
    """The arguments in the order of the PTX's parameters: constants have none, each part of a tuple has one."""
    return [part for name in names if name in signature for part in _parts(name, signature[name])]


def _parts(name: str, kind: Any) -> list[str]:
    return [f"{name}[{k}]" for k in range(len(kind))] if isinstance(kind, tuple) else [name]


def loops(ptx: str) -> list[list[str]]:
    """The lines of each outermost loop: from a label to the last branch back to it."""
    lines = [line.strip() for line in ptx.splitlines()]
    found = _spans(lines)
    return [lines[a : b + 1] for a, b in found if not any(c < a and b <= d for c, d in found)]


def innermost(lines: Sequence[str]) -> list[Sequence[str]]:
    """Of those with no loop inside, the lines of each."""
    found = _spans(lines)
    return [lines[a : b + 1] for a, b in found if not any(a < c and d <= b for c, d in found)]


def _spans(lines: Sequence[str]) -> list[tuple[int, int]]:
    """Where each loop begins and ends. A branch may leave the lines."""
    labels = {found[1]: k for k, line in enumerate(lines) if (found := _LABEL.match(line))}
    ends: dict[int, int] = {}
    for k, line in enumerate(lines):
        found = _BRANCH.search(line)
        if found and labels.get(found[1], k + 1) <= k:
            ends[labels[found[1]]] = k
    return list(ends.items())


def sources(ptx: str, names: Sequence[str]) -> Sources:
    """Through all arithmetic on 64-bit registers, whatever path it is on. A number that is loaded comes from no argument."""
    found: dict[str, set[str]] = {}
    flows = []
    for opcode, operands in _instructions(ptx.splitlines()):
        parameter = _PARAMETER.match(f"{opcode} {operands}")
        if parameter and int(parameter[2]) < len(names):
            found.setdefault(parameter[1], set()).add(names[int(parameter[2])])
        elif not opcode.startswith(("ld.", "st.", "cp.")):
            target, *others = _WIDE.findall(operands) or [""]
            flows.append((target, others))
    while _spread(found, flows):
        pass
    return {register: frozenset(arguments) for register, arguments in found.items()}


def _spread(found: dict[str, set[str]], flows: list[tuple[str, list[str]]]) -> bool:
    """One pass; whether anything was new."""
    grown = False
    for target, others in flows:
        new = set().union(*(found.get(other, set()) for other in others)) - found.get(target, set())
        if new:
            found.setdefault(target, set()).update(new)
            grown = True
    return grown


def accesses(lines: Sequence[str], of: Sources) -> list[Access]:
    """Of global memory, also by asynchronous copies. Raises ValueError: an access names no state space, or nothing tells whose it is."""
    result = []
    for opcode, operands in _instructions(lines):
        if _TOUCHES.match(opcode) and not _SPACE.search(opcode):
            raise ValueError(f"which memory does this touch? {opcode} {operands}")
        if ".global" in opcode:
            addresses = _ADDRESS.findall(operands)
            arguments = of.get(addresses[-1], frozenset()) if addresses else frozenset()
            if not arguments:
                raise ValueError(f"whose memory is this? {opcode} {operands}")
            result.append(Access(not opcode.startswith(("ld.", "cp.async")), arguments))
    return result


def _instructions(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        found = _INSTRUCTION.match(line.strip())
        if found:
            yield found[1], found[2]
