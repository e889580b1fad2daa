"""Prints the report of a quantization: one line a layer, then the memory and everything that the user must know."""

from typing import Any

COLUMNS = {
    "layer": "layer",
    "shape": "out×in",
    "bits": "bits",
    "groups": "groups",
    "activations": "input",
    "clips": "clips",
    "kernel": "kernel",
    "mean_scale": "scale",
    "error": "error",
    "rtn_error": "RTN's",
    "weight_error": "weight's",
    "damping": "damping",
    "seconds": "s",
}


def _cell(line: dict[str, Any], key: str) -> str:
    if key == "shape":
        return "×".join(map(str, line["shape"]))
    if key == "clips":
        return f"{line['clip_low']:.3g}…{line['clip_high']:.3g}" if "clip_low" in line else ""
    value = line.get(key, "")
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def report_table(report: dict[str, Any]) -> str:
    """The layers as an aligned table; columns that no layer fills are left out."""
    rows = [[_cell(line, key) for key in COLUMNS] for line in report["layers"]]
    rows = [list(COLUMNS.values()), *rows]
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    padded = [[cell.ljust(width) for cell in column] for column, width in zip(columns, widths, strict=True)]
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))


def print_report(report: dict[str, Any]) -> None:
    """Table, memory, and then what must not be overlooked: weights only, fallbacks, layers worse than RTN."""
    print(report_table(report))
    if any("error" in line for line in report["layers"]):
        print(f"error: ‖(W − Ŵ)X̂‖² / ‖WX̂‖² over {report['calibration_tokens']} calibration tokens")
    if any("weight_error" in line for line in report["layers"]):
        print("weight's: ‖W − Ŵ‖² / ‖W‖²")
    memory = ", ".join(f"{name.replace('_', ' ')} {size / 2**20:.1f}" for name, size in report["memory_bytes"].items())
    total = sum(report["memory_bytes"].values()) / 2**20
    print(f"expected memory (MiB): {memory}; all together {total:.1f}")
    if "expected_seconds" in report:
        print(f"expected time: {report['expected_seconds']} s, from the first block on one batch")
    for message in report["messages"]:
        print(f"note: {message}")
    if report.get("fallbacks"):
        print(f"note: {len(report['fallbacks'])} layers fell back to another method: {', '.join(report['fallbacks'])}")
    if report.get("worse_than_rtn"):
        names = ", ".join(report["worse_than_rtn"])
        print(f"note: {len(report['worse_than_rtn'])} layers have a larger error than RTN: {names}")
