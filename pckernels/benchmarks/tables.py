"""Tables from a record: for the terminal, and in Markdown between marks in a file, where a command rewrites them."""

from __future__ import annotations

import re
from pathlib import Path

from pckernels.benchmarks.goals import reached
from pckernels.benchmarks.record import Record, fastest_of_ours, refused, timed

BEGIN, END = "<!-- table: {name} -->", "<!-- end of table -->"
Table = tuple[list[str], list[list[str]]]


def milliseconds(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def count(value: float) -> str:
    """A large number, in thousands, millions or billions."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """Bytes, in the largest unit of which there is at least one."""
    for factor, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def times(record: Record) -> Table:
    """Case by case: everyone's median and quartiles, how far off the numbers are, and ours over theirs."""
    rows = []
    for case in timed(record):
        ours = fastest_of_ours(case)
        for c in case["contenders"]:
            ratio = next((r["median"] for r in case["ratios"] if r["ours"] == ours["name"] and r["other"] == c["name"]), None)
            spread = f"{milliseconds(c['ms']['low'])} - {milliseconds(c['ms']['high'])}"
            shown = "" if ratio is None else f"{ratio:.2f}"
            what = c["computes"] if c["computes"] == "backprop" else "PC"
            off = f"{c['off']:.0e}" + (f" ({c['proof']['how']} {c['proof']['off']:.0e})" if "proof" in c else "")
            rows.append([case["name"], c["name"], what, milliseconds(c["ms"]["median"]), spread, shown, off])
    return ["case", "who", "computes", "ms", "middle half", "ours / theirs", "off float64"], rows


def targets(record: Record) -> Table:
    """Every goal, met or not or not measured, with the spread of what was found, the floor and the products alone."""
    rows = []
    for goal in reached(record):
        times = ["" if ms is None else milliseconds(ms) for ms in (goal.ours, goal.floor, goal.alone)]
        rows.append([goal.case, goal.what, goal.found, goal.spread, goal.goal, goal.verdict, *times])
    return ["case", "what", "found", "middle half", "goal", "", "ours, ms", "floor, ms", "products alone, ms"], rows


def ledgers(record: Record) -> Table:
    """Per case: what was counted, what the ceilings allow, how far off we are."""
    rows = []
    for case in timed(record):
        book = case["ledger"]
        if book is None:
            continue
        took = fastest_of_ours(case)["ms"]["median"]
        rows.append(
            [
                case["name"],
                count(book["multiply_adds"]),
                size(book["device_bytes"]),
                size(book["weight_bytes_read_by_tiles"]),
                size(book["chip_bytes"]),
                size(book["bytes_leaving_the_chip_a_step"]),
                size(book["bytes_leaving_with_a_launch_an_operation"]),
                milliseconds(book["floor_ms"]),
                f"{took / book['floor_ms']:.1f}x",
                f"{took / book['products_alone_ms']:.1f}x",
            ]
        )
    head = ["case", "multiply-adds", "memory", "weights", "state", "off chip a step", "launch an op: a step", "floor, ms", "ours / floor"]
    return [*head, "ours / products alone"], rows


TABLES = {"times": times, "targets": targets, "ledgers": ledgers}


def text(table: Table) -> str:
    """For a terminal: columns as wide as they must be."""
    head, rows = table
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        padded = [cell.ljust(width) if k < 2 else cell.rjust(width) for k, (cell, width) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(padded).rstrip()

    return "\n".join(line(cells) for cells in (head, *rows))


def markdown(table: Table) -> str:
    """As Markdown."""
    head, rows = table
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def summary(record: Record) -> str:
    """What a run prints at its end."""
    parts = [text(times(record))]
    if targets(record)[1]:
        parts.append(text(targets(record)))
    parts += [f"REFUSED  {case['refused']}" for case in refused(record)]
    parts += [f"LEFT OUT, as no time was left: {name}" for name in record["left_out"]]
    return "\n\n".join(parts)


def provenance(record: Record) -> str:
    """Where and when, in a line."""
    machine, load = record["machine"], record["load"]
    busy = f"; load average {load['before'][0]:.1f} before and {load['after'][0]:.1f} after" if load["before"] else ""
    other = ", OTHER WORK RAN BESIDE IT" if load["other_work"] else ""
    gpu = machine["gpu"] if record["suite"] == "gpu" else None
    where = f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors; " if gpu else ""
    return (
        f"{where}{machine['processor']}, {machine['cores']} cores, {machine['instructions']}, {machine['threads']} thread(s), "
        f"PyTorch {machine['versions']['torch']}, {record['date']}{busy}{other}."
    )


def rewrite(path: str | Path, record: Record) -> bool:
    """Put the record's tables between their marks in a file; whether that changed it.

    Raises:
        ValueError: a mark names no table, or the file has none.
    """
    path = Path(path)
    before = path.read_text(encoding="utf-8")
    after = rewritten(before, record)
    path.write_text(after, encoding="utf-8")
    return after != before


def rewritten(content: str, record: Record) -> str:
    """The text with the record's tables between their marks."""
    found = re.findall(re.escape(BEGIN).replace(r"\{name\}", "(.+?)"), content)
    if not found:
        raise ValueError(f"There is no mark such as {BEGIN.format(name='times')!r}, after which a table could be written.")
    for name in found:
        if name not in TABLES:
            raise ValueError(f"There is no table {name!r}; choose from {', '.join(TABLES)}.")
        before, rest = content.split(BEGIN.format(name=name), 1)
        _, end, after = rest.partition(END)
        if not end:
            raise ValueError(f"The table {name!r} has no {END!r} behind it.")
        whole = f"{BEGIN.format(name=name)}\n{provenance(record)}\n\n{markdown(TABLES[name](record))}\n{END}"
        content = before + whole + after
    return content
