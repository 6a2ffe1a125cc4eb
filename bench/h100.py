"""Turns what bench/h100.sh has measured into its list of results, and prints it as a Markdown table.

Usage: h100.py FOLDER OUT, or h100.py --table RESULTS
"""
import json
import pathlib
import statistics
import sys


def rows_of_decoding(sweep):
    """One row a point; the baseline's three rounds are one row together."""
    names = {
        ("int4", 1): "scout-int4",
        ("int4", 0.25): "scout-int4-25",
        ("int4", 0.5): "scout-int4-50",
        ("int4", 0.75): "scout-int4-75",
        ("int8", "auto"): "scout-int8",
        ("int8", "fetch"): "scout-int8-fetch",
    }
    baseline = [p for p in sweep["points"] if p["model"] == sweep["baseline"] and p["status"] == "measured"]
    if baseline:
        yield row("8b-bf16", baseline)
    for point in sweep["points"]:
        settings = point["settings"]
        if point["model"] == sweep["baseline"]:
            continue
        name = names[settings["format"], settings.get("resident", settings.get("miss"))]
        if point["status"] == "measured":
            yield row(name, [point])
        else:
            print(f"{name}: {point['error']}", file=sys.stderr)


def row(name, points, prefill=False):
    """Of points that measured the same."""
    point = points[0]
    workload, facts = point["workload"], point["facts"]
    runs = []
    for p in points:
        for run in p["runs"]:
            if prefill:
                runs.append(workload["prompt_tokens"] / run["prefill_s"])
            else:
                runs.append(workload["batch"] * (workload["generated_tokens"] - 1) / run["decode_s"])
    phase = point["prefill" if prefill else "decode"]
    experts = phase["experts"] or {}
    tokens = statistics.median(runs)
    bound = point["bound"]["tokens_per_s"]  # of the way that the missed bytes take
    per_s = 1e-9 * tokens
    return {
        "work": name,
        "tokens_per_s": tokens,
        "bound_tokens_per_s": bound,
        "ratio_to_bound": tokens / bound,
        "predicted_tokens_per_s": point["predicted_tokens_per_s"],
        "resident": facts["resident_share"],
        "gpu_peak_bytes": point["memory"]["device_driver_bytes"],
        "hit_rate": experts.get("hit_rate"),
        "pcie_gb_per_s": experts.get("link_gb_per_s"),
        "cpu_gb_per_s": experts["cpu_bytes_per_token"] * per_s if experts else None,
        "runs": runs,
        "precision": facts["experts"] or facts["dtype"],
        "decode": facts["decode"],
        "batch": workload["batch"],
        "context": facts["context"],
        "prompt_tokens": workload["prompt_tokens"],
        "generated_tokens": workload["generated_tokens"],
        "load_s": point["load_s"],
    }


def collect(folder):
    def read(name):
        try:
            return json.loads((folder / name).read_text())
        except (OSError, json.JSONDecodeError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return None

    rows, machine = [], None
    for part in ("decode", "batch", "prefill"):
        sweep = read(f"{part}/results.json")
        if sweep is None:
            continue
        machine = sweep["machine"]
        if part == "decode":
            rows += rows_of_decoding(sweep)
            continue
        points = [p for p in sweep["points"] if p["status"] == "measured"]
        for point in (p for p in sweep["points"] if p["status"] != "measured"):
            print(f"{part}: {point['error']}", file=sys.stderr)
        if not points:
            continue
        if part == "batch":
            rows.append(row("scout-int8-b64", points))
        else:
            made = row("scout-int8-prefill", points, prefill=True)
            plan = read("plan.json")
            predicted = plan["predicted"]["prefill"] if plan else {}
            made["predicted_tokens_per_s"] = predicted.get("tokens_per_s")
            made["bound_tokens_per_s"] = predicted.get("bound_tokens_per_s")
            made["ratio_to_bound"] = made["tokens_per_s"] / made["bound_tokens_per_s"] if predicted else None
            rows.append(made)
    for made in rows:
        made["machine"] = machine
    return rows


def table(rows):
    print("| work | tokens/s | bound | of it | predicted | resident | GPU peak, GB | PCIe, GB/s | CPU, GB/s |")
    print("|---|---|---|---|---|---|---|---|---|")

    def cell(value, form="{:.1f}"):
        return "–" if value is None else form.format(value)

    for r in rows:
        cells = [
            f"`{r['work']}`",
            cell(r["tokens_per_s"], "{:,.1f}"),
            cell(r["bound_tokens_per_s"], "{:,.0f}"),
            cell(r["ratio_to_bound"], "{:.0%}"),
            cell(r["predicted_tokens_per_s"], "{:,.0f}"),
            cell(r["resident"], "{:.0%}"),
            cell(r["gpu_peak_bytes"] and r["gpu_peak_bytes"] / 1e9),
            cell(r["pcie_gb_per_s"]),
            cell(r["cpu_gb_per_s"]),
        ]
        print("| " + " | ".join(cells) + " |")


def main():
    if sys.argv[1] == "--table":
        table(json.loads(pathlib.Path(sys.argv[2]).read_text()))
        return
    rows = collect(pathlib.Path(sys.argv[1]))
    out = pathlib.Path(sys.argv[2])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(rows, indent=1) + "\n")
    table(rows)
    if len(rows) < 9:
        sys.exit(f"{len(rows)} of 9 results; see above")


main()
