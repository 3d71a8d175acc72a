"""report.html: self-contained, from the files of a run, honest about what it shows."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from trainer.run.metrics import MetricsWriter
from trainer.view.charts import Chart, Series, round_quantity, thin, tick_label, ticks
from trainer.view.report import write_report

SUMMARY = {
    "type": "gpt2",
    "score": {"bits_per_byte": 1.985, "kind": "exact", "standard_error": 0.0, "comparable": True},
    "yardsticks": {"uniform": 8.0, "6-gram": 1.91, "xz": 1.55},
    "steps": 1750,
    "tokens": 86_000_000,
    "seconds": 163.0,
}


@pytest.fixture
def run(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(10, 1010, 10):
        line = {
            "step": step,
            "tokens": 100 * step,
            "seconds": 0.1 * step,
            "grad_norm": 0.5,
            "lr/matrix": 0.02,
        }
        writer.write(
            line | {"loss": 3 + 50 / step, "bits_per_byte": 2 + 30 / step, "lr/head": 1e-3, "lr/scalar": 1e-3}
        )
        if step % 250 == 0:
            writer.write(
                {
                    "step": step,
                    "tokens": 100 * step,
                    "seconds": 0.1 * step,
                    "val_bits_per_byte": 2 + 40 / step,
                }
            )
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "config.yaml").write_text(
        "defaults: [training, _self_]\ntype: gpt2\nmodel_cfg: {n_layers: 4}\n"
    )
    (tmp_path / "manifest.json").write_text(
        json.dumps({"roles": [{"role": "matrix"}], "parameters": {"total": 1967616}})
    )
    (tmp_path / "samples.txt").write_text(
        "--- step 500 ---\nold\n\n--- step 1000 ---\n<b>{{SCRIPT}}\x1b</b>\n\n"
    )
    return tmp_path


class Page(HTMLParser):
    """Collects tags, attributes and text; refuses unbalanced markup."""

    VOID = {"meta", "br", "link", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_self_contained_small_and_well_formed(run):
    path = write_report(run)
    text = path.read_text()
    assert path == run / "report.html"
    assert len(text) < 300_000
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object"}
    assert not [attrs for _, attrs in page.tags if {"src", "href"} & attrs.keys()]
    assert not re.search(r"https?://|url\(|@import|fetch\(", text)
    assert "prefers-color-scheme: dark" in text


def test_title_has_type_and_score(run):
    assert "<title>gpt2: 1.985 bits per byte</title>" in write_report(run).read_text()
    bound = SUMMARY | {"score": SUMMARY["score"] | {"kind": "bound", "standard_error": 0.004}}
    (run / "summary.json").write_text(json.dumps(bound))
    assert "<title>gpt2: &lt;= 1.985 ± 0.004 bits per byte</title>" in write_report(run).read_text()


def test_score_stands_among_the_yardsticks(run):
    text = write_report(run).read_text()
    rows = re.findall(r'<tr class="(ours)?"><th>(.*?)</th>.*?width:([\d.]+)%.*?"number">(.*?)</td>', text)
    assert rows == [
        ("", "xz", "19.4", "1.550"),
        ("", "6-gram", "23.9", "1.910"),
        ("ours", "this model", "24.8", "1.985"),
        ("", "uniform", "100.0", "8.000"),
    ]
    assert "sees the whole file" in text


def test_curves_come_from_the_metrics_over_three_axes(run):
    text = write_report(run).read_text()
    names = re.findall(r'data-name="(.*?)"', text)
    # Rates that never differ share a curve.
    for name in (
        "training",
        "held out",
        "training, nats per token",
        "matrix",
        "head, scalar",
        "before clipping",
    ):
        assert names.count(name) == 3, name
    assert "over the log interval" not in names  # no tokens_per_second in these metrics
    (first,) = re.findall(r'<svg [^>]*data-x0="10" data-x1="1000" [^>]*data-axis="step">.*?</svg>', text)[:1]
    curve, held_out = re.findall(r'points="(.*?)"', first)
    assert len(curve.split()) == 100
    assert len(held_out.split()) == first.count("<circle") == 4
    assert 'data-axis="tokens"' in text
    assert 'data-x1="100"' in text  # seconds


def titles(text):
    return re.findall(r"<figcaption><b>(.*?)</b>", text)


def logged(path, *lines):
    writer = MetricsWriter(path)
    for step, line in enumerate(lines, start=1):
        writer.write({"step": step, "tokens": step, "seconds": step, **line})
    return write_report(path).read_text()


def test_every_metric_has_a_chart(tmp_path):
    text = logged(
        tmp_path,
        {
            "loss": 3.0,
            "loss_ce": 3.0,
            "loss_aux": 1.0,
            "depth": 2.0,
            "nelbo_t0": 5.0,
            "nelbo_t1": 4.0,
            "n2": 1,
        },
        {
            "val_depth": 2.5,
            "val_bits_per_byte": 2.0,
            "val_kind": "exact",
            "val_comparable": True,
            "val_tokens": 9,
        },
    )
    assert titles(text) == ["Bits per byte", "Loss", "Loss terms", "depth", "nelbo_t, training", "n2"]
    names = re.findall(r'data-axis="step">.*?</svg>', text)
    assert [re.findall(r'data-name="(.*?)"', svg) for svg in names[2:]] == [
        ["ce", "aux"],
        ["training", "held out"],
        ["0", "1"],
        ["training"],
    ]


def test_metrics_of_a_kind_have_a_chart_for_each_text(tmp_path):
    text = logged(tmp_path, {"n_0": 1.0, "n_1": 2.0}, {"val_n_0": 3.0, "val_n_1": 4.0, "val_seen": 5.0})
    assert titles(text) == ["n, training", "n, held out", "seen"]


def test_many_metrics_of_a_kind_are_told_apart_and_stay_small(tmp_path):
    loads = [{f"load_{i}": math.sin(i * s) for i in range(64)} for s in range(500)]
    text = logged(tmp_path, *loads)
    assert titles(text) == ["load, training"] * 4
    first = re.findall(r'data-axis="step">.*?</svg>', text)[0]
    styles = re.findall(r'<polyline class="(.*?)"', first)
    assert len(set(styles)) == len(styles) == 16
    assert "polyline.d2" in text and len(text) < 300_000


def test_samples_are_escaped_newest_first(run):
    text = write_report(run).read_text()
    assert r"<pre>&lt;b&gt;{{SCRIPT}}\x1b&lt;/b&gt;</pre>" in text
    assert text.index("step 1000") < text.index("step 500")


def test_what_was_kept_of_a_text_is_drawn_before_the_samples(run):
    assert "What the model did with a text" not in write_report(run).read_text()
    found = {"text": "ab", "tokens": [[0, 1], [1, 2]], "maps": []}
    found["spans"] = [{"name": "stage 1", "spans": [[0, 1, ""], [1, 2, ""]]}]
    (run / "annotation.json").write_text(json.dumps(found))
    text = write_report(run).read_text()
    assert text.count("<mark") == 2 and "<summary>stage 1</summary>" in text
    assert text.index("What the model did with a text") < text.index("samples.txt")


def test_settings_and_manifest_are_listed(run):
    text = write_report(run).read_text()
    assert "<th>model_cfg.n_layers</th><td>4</td>" in text
    assert "<th>roles.0.role</th><td>matrix</td>" in text


@pytest.mark.parametrize(
    ("device", "names"),
    [("cpu", ("peak memory", "of no file")), ("cuda", ("peak memory, device", "memory, host"))],
)
def test_memory_is_called_by_where_it_is(run, device, names):
    used = {"peak_memory_bytes": 937_000_000, "anonymous_memory_bytes": 1_200_000_000}
    (run / "summary.json").write_text(json.dumps(SUMMARY | used))
    (run / "manifest.json").write_text(json.dumps({"execution": {"device": device}}))
    page = write_report(run).read_text()
    for name, value in zip(names, ("937MB", "1.20GB"), strict=True):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in page


def test_interrupted_run_and_non_finite_values(run):
    for name in ("summary.json", "manifest.json", "samples.txt"):
        (run / name).unlink()
    MetricsWriter(run).write(
        {"step": 1010, "tokens": 1, "seconds": 1, "loss": math.nan, "bits_per_byte": math.inf}
    )
    text = write_report(run).read_text()
    assert "<title>gpt2</title>" in text
    assert "data-name" in text
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", text)).lower()


def test_run_without_any_log_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    page = Page(write_report(tmp_path).read_text())
    assert "svg" not in {tag for tag, _ in page.tags}


def test_long_run_stays_small(tmp_path):
    writer = MetricsWriter(tmp_path)
    path = tmp_path / "metrics.jsonl"
    keys = ("loss", "bits_per_byte", "grad_norm", "tokens_per_second", "lr/a", "lr/b", "lr/c")
    lines = [
        {"step": s, "tokens": s * 999, "seconds": s / 7, **{k: math.sin(s) + i for i, k in enumerate(keys)}}
        for s in range(5000)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    writer.truncate_after(math.inf)
    assert write_report(tmp_path).stat().st_size < 300_000


# --- charts -------------------------------------------------------------------------------------------


def test_thinning_keeps_the_mean_and_drops_what_is_not_finite():
    points = [(float(i), float(i % 7)) for i in range(1000)]
    thinned = thin([*points, (1000.0, math.nan)], limit=100)
    assert len(thinned) == 100
    assert thinned[0] == (4.5, sum(i % 7 for i in range(10)) / 10)
    assert sum(y for _, y in thinned) / 100 == pytest.approx(sum(y for _, y in points) / 1000)
    assert thin(points[:50], limit=100) == points[:50]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (1.93, 4.1, [1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]),
        (-3.0, 7.0, [-4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0]),
    ],
)
def test_ticks_are_round_and_cover(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_tick_labels():
    assert [tick_label(v, [0, 0.5, 1]) for v in (0, 0.5, 1)] == ["0.0", "0.5", "1.0"]
    assert tick_label(0.0006, [0, 0.0006]) == "6.0e-04"
    assert tick_label(12_000, [0, 12_000]) == "12k"
    assert [round_quantity(v) for v in (1500, 100_000, 250)] == ["1.5k", "100k", "250"]


def test_first_losses_do_not_flatten_the_rest():
    points = [(float(i), 100.0 if i < 2 else 3.0 + 0.001 * i) for i in range(200)]
    svg = Chart("step", [Series("a", points)]).svg()
    assert float(re.search(r'data-y1="([\d.]+)"', svg)[1]) < 4


def test_flat_and_single_points_are_drawn():
    for points in ([(5.0, 2.0)], [(0.0, 0.0), (1.0, 0.0)]):
        svg = Chart("step", [Series("a", points, marked=True)]).svg()
        assert svg.count("<circle") == len(points)
        assert "nan" not in svg
        assert "inf" not in svg


def test_held_out_text_that_stands_in_training_is_shown_with_the_worst_documents(run):
    overlap = {
        "share_in_training": 0.031,
        "share_in_training_before_dropping": 0.22,
        "estimate": False,
        "dropped": {"documents": 2, "bytes": 34567},
        "worst": [{"document": "<cp437>.py", "bytes": 34000, "share": 0.99, "dropped": True}],
    }
    (run / "manifest.json").write_text(json.dumps({"data": {"overlap": overlap}}))
    text = Page(write_report(run).read_text()).text
    assert (
        "3.1% of the held-out bytes, after 2 near copies (34,567 bytes) were dropped; 22.0% with them" in text
    )
    assert "<cp437>.py" in text and "99% of 34,000 bytes, dropped" in text
