"""The summary of `bench/gpu/run.py`: goals and measurements, then all rows, in Markdown."""

import json
from pathlib import Path
from typing import Any

import chart

SHARE_OF_PEAK = {
    "preact18": {64: 0.25, 128: 0.33, 512: 0.40},
    "wrn28_10": {64: 0.40, 128: 0.48, 512: 0.55},
}
"""Goals of the whole IAT step in bf16 on an H200, as shares of its matrix peak."""
EPOCH_SECONDS = {
    "preact18": {64: 5.6, 128: 4.3, 512: 3.5},
    "wrn28_10": {64: 33.0, 128: 28.0, 512: 24.0},
}
OVER_PLAIN, GRAPH_OVER_EAGER, OF_COPY = 6.7, 2.0, 0.85
LARGE = 4096
"""Batch size at which kernels are compared with a copy."""
UNBOUNDED = ("mixed_cross_entropy",)
"""Kernels that move so few bytes at any batch size that the bandwidth does not limit them."""


def summary(out: Path) -> str:
    """Return the summary of the JSON files in `out`."""
    parts = {
        file.stem: json.loads(file.read_text())
        for file in sorted(out.glob("*.json"), key=lambda file: file.stat().st_mtime)
    }
    rows = [row for part in parts.values() for row in part.get("rows", [])]
    sections = [
        "# GPU run",
        _machine(parts.get("ceilings", {})),
        "## Parts\n\n" + chart.markdown([_ending(name, part) for name, part in parts.items()]),
    ]
    tables = {
        "Goals": _goals(rows),
        "Step": [_shown(row) for row in rows if row.get("what") == "step"],
        "PGD-7": [_shown(row) for row in rows if row.get("what") == "attack"],
        "Kernels": _kernels(rows),
        "Where a step's time goes": [_profile(row) for row in rows if row.get("shares")],
    }
    sections += [f"## {title}\n\n{chart.markdown(rows)}" for title, rows in tables.items() if rows]
    errors = [row for row in rows if "error" in row]
    if errors:
        shown = [f"### {row['what']}\n\n```\n{row['error'][-1500:]}\n```" for row in errors[:10]]
        sections.append("## Errors\n\n" + "\n\n".join(shown))
    return "\n\n".join(sections) + "\n"


def _machine(ceilings: dict[str, Any]) -> str:
    machine = ceilings.get("machine")
    if machine is None:
        return "The machine was not described: the part `ceilings` did not run."
    peaks = {
        name: ceilings.get(f"{name}_flop_per_s", 0) / 1e12 for name in ("bf16", "tf32", "fp32")
    }
    lines = [
        f"{machine['device']}, driver {machine['driver']}; {machine['cpu']}; Python "
        f"{machine['python']}, torch {machine['packages']['torch']}, triton "
        f"{machine['packages']['triton']}; commit {machine['commit']}"
        f"{' with changes' if machine['changed_files'] else ''}.",
        f"Copy {ceilings.get('copy_bytes_per_s', 0) / 1e12:.3g} TB/s; matrix product in TFLOP/s: "
        + ", ".join(f"{name} {peak:.3g}" for name, peak in peaks.items() if peak)
        + ".",
    ]
    return "\n".join(lines)


def _ending(name: str, part: dict[str, Any]) -> dict[str, Any]:
    counts = ", ".join(f"{n} {kind}" for kind, n in part.get("counts", {}).items())
    errors = sum("error" in row for row in part.get("rows", []))
    return {
        "part": name,
        "ended": part.get("ending", "under way"),
        "seconds": part.get("wall_s"),
        "rows": len(part.get("rows", [])),
        "errors": errors,
        "tests": counts or None,
    }


def _goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each goal: its value, the measurement or None, and whether it is met."""
    steps = {
        (row["network"], row["batch"], row["engine"], row["method"]): row
        for row in rows
        if row.get("what") == "step"
    }

    def step(network: str, batch: int, engine: str, method: str = "IAT") -> dict[str, Any]:
        return steps.get((network, batch, engine, method), {})

    found = []
    for network, goals in SHARE_OF_PEAK.items():
        for batch, goal in goals.items():
            name, row = f"{network}, batch {batch}", step(network, batch, "graph")
            found.append(_goal(f"{name}: IAT step, share of peak", goal, row.get("of_peak"), 1))
            seconds = EPOCH_SECONDS[network][batch]
            found.append(_goal(f"{name}: epoch in s", seconds, row.get("epoch_s"), -1))
            ratio = row.get("over_plain")
            found.append(_goal(f"{name}: IAT over plain step", OVER_PLAIN, ratio, -1))
        eager, graph = (step(network, 64, engine).get("seconds") for engine in ("eager", "graph"))
        gain = eager / graph if eager and graph else None
        found.append(_goal(f"{network}, batch 64: graph over eager", GRAPH_OVER_EAGER, gain, 1))
    for row in rows:
        large = row.get("what") == "kernel" and row["batch"] == LARGE and "of_copy" in row
        if large and row["implementation"] == "kernel" and row["op"] not in UNBOUNDED:
            name = f"{row['op']} {row['direction']}, batch {LARGE}: share of a copy's rate"
            found.append(_goal(name, OF_COPY, row["of_copy"], 1))
    return found


def _goal(what: str, goal: float, measured: float | None, sense: int) -> dict[str, Any]:
    met = None if measured is None else "yes" if sense * (measured - goal) >= 0 else "no"
    return {"what": what, "goal": goal, "measured": measured, "met": met}


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    names = {
        "network": "network", "batch": "batch", "engine": "engine", "method": "method",
        "name": "implementation", "images_per_s": "images/s", "of_peak": "of peak",
        "epoch_s": "epoch s", "over_plain": "over plain",
    }  # fmt: skip
    shown = {title: row[key] for key, title in names.items() if key in row}
    return shown | {"ms": 1e3 * row["seconds"]}


def _kernels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each op, direction and batch: microseconds of each implementation."""
    table: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row.get("what") != "kernel" or "implementation" not in row:
            continue
        key = row["op"], row["direction"], row["batch"]
        line = table.setdefault(key, dict(zip(("op", "direction", "batch"), key, strict=True)))
        line[f"{row['implementation']} us"] = 1e6 * row.get("replayed_s", row["launched_s"])
        if row["implementation"] == "kernel":
            line["of copy"] = row["of_copy"]
    return list(table.values())


def _profile(row: dict[str, Any]) -> dict[str, Any]:
    shares = {kind: f"{100 * share:.1f} %" for kind, share in row["shares"].items()}
    head = {key: row[key] for key in ("network", "engine", "batch")}
    return head | {"ms": row["step_us"] / 1e3} | shares
