#!/usr/bin/env python3
"""Runs a sweep for real, opens its report in a headless browser, and asks the page whether every plot has drawn its
data: datasets with finite values, elements inside the plot area, and pixels of the dataset's colour on the canvas.

Usage: report_test.py LIGHTER SOURCE_DIR [--screenshots DIR]
Exit code 77 where there is no browser (CTest shows the test as skipped)."""
import argparse, json, pathlib, re, shutil, subprocess, sys, tempfile

BROWSERS = ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome"]

# Runs in the page, after its own scripts, and leaves what it finds in the document.
PROBE = """
<script>
const found = {plots: {}, errors: window.reportErrors, rows: document.querySelectorAll('#table tbody tr').length,
  baseline: document.querySelector('#table tbody tr').textContent, empty: [...document.querySelectorAll('.empty')].map(e => e.textContent),
  title: document.querySelector('h1').textContent, network: performance.getEntriesByType('resource').map(e => e.name)};
for (const canvas of document.querySelectorAll('canvas')) {
  const chart = Chart.getChart(canvas);
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const near = (r, g, b, i) => Math.abs(pixels[i] - r) < 24 && Math.abs(pixels[i + 1] - g) < 24 && Math.abs(pixels[i + 2] - b) < 24 && pixels[i + 3] > 60;
  const colour = c => { const d = document.createElement('canvas').getContext('2d'); d.fillStyle = c; d.fillRect(0, 0, 1, 1); return d.getImageData(0, 0, 1, 1).data; };
  found.plots[canvas.id] = !chart ? null : chart.data.datasets.map((set, index) => {
    const area = chart.chartArea, elements = chart.getDatasetMeta(index).data;
    const inside = elements.filter(e => Number.isFinite(e.x) && Number.isFinite(e.y) && e.x >= area.left - 2 && e.x <= area.right + 2 && e.y >= area.top - 2 && e.y <= area.bottom + 2).length;
    let background = set.backgroundColor;
    if (Array.isArray(background)) background = background[0];
    const [r, g, b] = colour(chart.config.type === 'bar' ? background : set.borderColor);
    let count = 0;
    for (let i = 0; i < pixels.length; i += 4) count += near(r, g, b, i);
    const values = set.data.map(d => typeof d === 'number' ? d : Array.isArray(d.x) ? d.x[1] - d.x[0] : d.y);
    return {label: set.label || '', values: values.length, finite: values.every(Number.isFinite), some: values.some(v => v > 0), inside, pixels: count};
  });
}
// Sorting: twice by the second column turns the order round.
const column = () => [...document.querySelectorAll('#table tbody tr')].filter(r => !r.querySelector('.failed')).map(r => parseFloat(r.children[1].textContent.replace(',', '')));
const press = () => document.querySelectorAll('#table th button')[1].click();
try { press(); found.ascending = column(); press(); found.descending = column(); } catch (e) { found.errors.push(e.message); }
const out = document.createElement('script');
out.type = 'application/json'; out.id = 'probe'; out.textContent = JSON.stringify(found).replace(/</g, '\\\\u003c');
document.body.append(out);
</script>
"""
CATCH = "<script>window.reportErrors = []; addEventListener('error', e => reportErrors.push(e.message));</script>"


def browse(browser, page, *arguments, fragment=""):
    with tempfile.TemporaryDirectory() as profile:
        return subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
             f"--user-data-dir={profile}", "--window-size=1240,3400", "--virtual-time-budget=10000", *arguments,
             page.resolve().as_uri() + fragment], capture_output=True, text=True, timeout=120)


def probe(browser, report, folder):
    html = report.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", html), "the report fetches something"
    page = folder / "probed.html"
    page.write_text(html.replace("<head>", "<head>" + CATCH, 1).replace("</body>", PROBE + "</body>"))
    run = browse(browser, page, "--dump-dom")
    match = re.search(r'<script type="application/json" id="probe">(.*?)</script>', run.stdout, re.S)
    assert match, "the page did not get to the end of its scripts: " + run.stderr[-2000:]
    return json.loads(match.group(1))


def check_plots(found, results):
    assert found["errors"] == [], found["errors"]
    assert found["network"] == [], found["network"]
    assert found["title"] == results["name"]
    shown = [p for p in results["points"] if p["round"] in (None, "first")]
    assert found["rows"] == len(shown), (found["rows"], len(shown))
    assert set(found["plots"]) == {"penalty", "speed", "latency", "memory", "timeline"}, set(found["plots"])
    for name, datasets in found["plots"].items():
        assert datasets, f"{name}: nothing drawn"
        for data in datasets:
            what = f"{name}, '{data['label']}': {data}"
            assert data["values"] > 0 and data["finite"] and data["some"], what
            # A stacked class may be 0 in some points, and the bound's line may leave the plot.
            assert data["inside"] > 0, what
            assert data["pixels"] >= 20, what
    measured = [p for p in shown if p["status"] == "measured"]
    assert len(found["plots"]["latency"]) >= 2
    bounds = [d for d in found["plots"]["penalty"] if d["label"].startswith("bound")]
    assert bounds, "the bound is not drawn into the penalty's plot"
    assert found["ascending"] == sorted(found["ascending"]) and found["descending"] == found["ascending"][::-1]
    assert len(found["ascending"]) == len(measured)


def with_results(html, results):
    """The page with other data in it."""
    data = json.dumps(results).replace("<", "\\u003c")
    changed, count = re.subn(r"^const results = .*;$", lambda _: f"const results = {data};", html, flags=re.M)
    assert count == 1, count
    return changed


def check_poor_data(browser, report, results, folder):
    """The baseline's first round failed: another stands for it. Nothing decoded, or nothing worked at all: said, no error."""
    page = folder / "poor.html"

    def probe_of(change):
        poor = json.loads(json.dumps(results))
        change(poor)
        page.write_text(with_results(report.read_text(), poor))
        return probe(browser, page, folder)

    def fail(points):
        for point in points:
            figures = [k for k, v in point.items() if isinstance(v, dict) and k not in ("workload", "settings")]
            point.update({k: None for k in [*figures, "penalty", "prefill_penalty", "load_s", "predicted_tokens_per_s"]})
            point.update(status="failed", runs=[], error={"kind": "DeviceError", "message": "fell off the bus"})

    found = probe_of(lambda r: fail(r["points"][:1]))
    assert found["errors"] == [] and found["baseline"].startswith(results["points"][0]["label"]), found["errors"]
    assert "failed" not in found["baseline"], found["baseline"]
    assert any(d["label"].startswith("baseline") for d in found["plots"]["speed"])

    def no_decode(r):
        for point in r["points"]:
            point.update(decode_tokens_per_s=None, inter_token_ms=None, decode=None, bound=None, penalty=None)
            for run in point["runs"]:
                run["token_ms"] = []
    found = probe_of(no_decode)
    assert set(found["plots"]) == {"memory", "timeline"}, set(found["plots"])
    assert found["empty"][0] == "No point made more than one token, so there is no decode speed.", found["empty"]
    found = probe_of(lambda r: fail(r["points"]))
    assert found["plots"] == {} and len(found["empty"]) == 5, found["empty"]
    assert found["rows"] == len([p for p in results["points"] if p["round"] in (None, "first")])


def check_alone(browser, report, folder):
    """report.html#penalty is one plot, for a picture."""
    picture = folder / "penalty.png"
    dom = browse(browser, report, "--dump-dom", fragment="#penalty").stdout
    assert '<body class="alone">' in dom, dom[-500:]
    shown = [part for part in re.findall(r"<section([^>]*)>", dom) if "display: none" not in part]
    assert len(shown) == 1, shown
    browse(browser, report, f"--screenshot={picture}", fragment="#penalty")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000


def check_schema(results, source):
    """With jsonschema where Python has it (Debian: python3-jsonschema)."""
    try:
        import jsonschema
    except ImportError:
        print("Python has no jsonschema here: results.json was not validated")
        return
    schema = json.loads((source / "bench/results.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(results)
    # The schema means what it says: a damaged file does not pass.
    for damage in (lambda r: r.pop("machine"), lambda r: r["points"][0].update(surprise=1),
                   lambda r: r["points"][0].update(status="maybe"), lambda r: r["points"][0]["memory"].update(classes=None)):
        damaged = json.loads(json.dumps(results))
        damage(damaged)
        assert not validator.is_valid(damaged), damage


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("lighter")
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("--screenshots", type=pathlib.Path)
    parser.add_argument("--results", type=pathlib.Path, help="look at this folder instead of running the sweep")
    options = parser.parse_args()
    browser = next((path for path in map(shutil.which, BROWSERS) if path), None)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        out = options.results or folder / "demo"
        if not options.results:
            run = subprocess.run([options.lighter, "bench", options.source / "configs/bench-demo.yaml", "--out", out],
                                 capture_output=True, text=True, timeout=300)
            assert run.returncode == 0, run.stderr
        for name in ("results.json", "results.csv", "table.md", "report.html"):
            assert (out / name).stat().st_size > 0, name
        results = json.loads((out / "results.json").read_text())
        if not options.results:
            assert results["complete"] and results["drift"]["share"] >= 0
            failed = [p for p in results["points"] if p["status"] == "failed"]
            assert len(failed) == 1 and failed[0]["error"]["kind"] == "CapacityError", failed
        check_schema(results, options.source)
        if not browser:
            print("no browser is installed here (one of: " + ", ".join(BROWSERS) + "): the page was not opened")
            sys.exit(77)
        check_plots(probe(browser, out / "report.html", folder), results)
        check_alone(browser, out / "report.html", folder)
        if not options.results:
            check_poor_data(browser, out / "report.html", results, folder)
        if options.screenshots:
            options.screenshots.mkdir(parents=True, exist_ok=True)
            for mode, flags in (("light", []), ("dark", ["--blink-settings=preferredColorScheme=0"])):
                browse(browser, out / "report.html", f"--screenshot={options.screenshots / (mode + '.png')}", *flags)
        print("every plot has drawn its data")


main()
