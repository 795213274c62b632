"""Reads `out/*.jsonl` and writes the tables: targets first, then every figure, then the conditions.

`python benchmarks/report.py [--write FILE]` prints Markdown. With `--write` it also replaces, in that file, what stands
between the two marker comments (docs/performance.md has them). A target that has not been measured is shown as such.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from kit.processes import HERE
from kit.targets import TARGETS

BEGIN, END = "<!-- benchmarks/report.py: begin -->", "<!-- benchmarks/report.py: end -->"
LABELS = ("case", "loop", "layout")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--figures", type=Path, default=HERE / "out", help="folder of the .jsonl files")
    args = parser.parse_args()
    text = report([json.loads(line) for path in sorted(args.figures.glob("*.jsonl")) for line in path.open()])
    print(text)
    if args.write:
        before, rest = args.write.read_text().split(BEGIN)
        after = rest.split(END)[1]
        args.write.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def report(lines: list[dict]) -> str:
    by_kind = defaultdict(list)
    for line in lines:
        by_kind[line["kind"]].append(line)
    parts = ["### Targets\n", targets(by_kind["target"])]
    benches = defaultdict(list)
    for line in by_kind["figure"]:
        benches[line["bench"]].append(line)
    for bench, rows in benches.items():
        parts += [f"### `{bench}.py`\n", figures(rows)]
        skipped = [line for line in by_kind["skipped"] if line["bench"] == bench]
        parts += [f"Not measured: {line['case']} ({where(line, *LABELS[1:])}): {line['why']}.\n" for line in skipped]
    if by_kind["conditions"]:
        parts += ["### Conditions\n", conditions(by_kind["conditions"][-1])]
    return "\n".join(parts)


def targets(measured: list[dict]) -> str:
    rows = []
    for name, target in TARGETS.items():
        found = [line for line in measured if line["target"] == name]
        rows += [
            [target.what, where(line), str(target), spread(line), "yes" if line["met"] else "**no**"] for line in found
        ] or [[target.what, "", str(target), "not measured", ""]]
    return table(["what", "where", "target", "median (min to max)", "met"], rows)


def figures(lines: list[dict]) -> str:
    """A row for each case and place; a table for each set of metrics, as not all cases have the same."""
    cases: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for line in lines:
        cases[line["case"], where(line, *LABELS[1:], "rate")][line["metric"]] = spread(line)
    tables: dict[tuple[str, ...], list[list[str]]] = defaultdict(list)
    for key, metrics in cases.items():
        tables[tuple(metrics)].append([*key, *metrics.values()])
    return "\n".join(table(["case", "where", *metrics], rows) for metrics, rows in tables.items())


def conditions(line: dict) -> str:
    return table(["", ""], [[key, value] for key, value in line.items() if key != "kind"])


def where(line: dict, *labels: str) -> str:
    parts = [f"{line[label]}/s" if label == "rate" else line[label] for label in labels or LABELS if label in line]
    return ", ".join(parts)


def spread(line: dict) -> str:
    """The median over the rounds, and between what they were."""
    if line["rounds"] == 1:
        return number(line["median"])
    return f"{number(line['median'])} ({number(line['min'])} to {number(line['max'])})"


def number(value: float) -> str:
    """Three significant digits; thousands apart."""
    if abs(value) >= 1000:
        digits = len(str(int(abs(value)))) - 3
        return f"{round(value, -digits):,.0f}".replace(",", " ")
    return f"{value:.3g}"


def table(head: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
