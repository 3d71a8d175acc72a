"use strict";

// Everything that a stranger may have written (names of runs, texts) reaches the page by textContent alone.
const data = JSON.parse(document.getElementById("data").textContent);
const figure = document.getElementById("chart");
const svg = figure && figure.querySelector("svg");
const tip = document.getElementById("tip");
const NAMES = { tokens: "tokens", bytes: "bytes of text", flops: "FLOPs", seconds: "time of training" };
const LEFT = 54, RIGHT = 14, TOP = 12, BOTTOM = 40;
const MOST_IN_TIP = 9;

// --- curves -------------------------------------------------------------------------------------------------

// [lowest, highest, base64 of uint16]: in equal ratios for what was spent, in equal steps for bits. "=": as the tokens.
function unpacked([low, high, text], ratios) {
  const raw = atob(text), values = new Float64Array(raw.length / 2);
  for (let i = 0; i < values.length; i++) {
    const share = (raw.charCodeAt(2 * i) + 256 * raw.charCodeAt(2 * i + 1)) / 65535;
    values[i] = ratios ? low * Math.pow(high / low, share) : low + (high - low) * share;
  }
  return values;
}
const kept = new Map();
function column(run, which, name) {
  const packed = run[which] && run[which][name];
  if (!packed) return null;
  const [low, high, text] = packed, steps = text === "=" ? run[which].tokens[2] : text;
  if (!kept.has(packed)) kept.set(packed, unpacked([low, high, steps], name !== "bits"));
  return kept.get(packed);
}
// A mean around each point, whose weights fall off with the distance in the chart to either side: points that are kept of
// a long curve do not stand at equal distances.
function smoothed(values, at, reach) {
  if (!reach) return values;
  const pass = (order) => {
    const sums = new Float64Array(values.length), masses = new Float64Array(values.length);
    let sum = 0, mass = 0, before = NaN;
    for (const i of order) {
      const kept = Number.isNaN(before) ? 0 : Math.exp(-Math.abs(at[i] - before) / reach);
      sums[i] = sum = kept * sum + values[i];
      masses[i] = mass = kept * mass + 1;
      before = at[i];
    }
    return [sums, masses];
  };
  const order = [...values.keys()], [s, m] = pass(order), [t, n] = pass(order.reverse());
  return values.map((v, i) => (s[i] + t[i] - v) / (m[i] + n[i] - 1));
}

// --- what is shown ------------------------------------------------------------------------------------------

const state = { axis: "tokens", curve: data.start, logx: true, logy: false, smooth: 0, apart: false, zoom: null };
const hidden = new Set();
let drawn = [], lit = -1, frame = null;

function curves() {
  const fair = data.runs.some((run) => !run.apart && !run.slow);
  let late = 0, without = 0, other = 0, aside = 0;
  const found = [];
  data.runs.forEach((run, index) => {
    if (run.apart && !state.apart) { other += Boolean(run[state.curve]); return; }
    if (hidden.has(run.group)) return;
    const bits = column(run, state.curve, "bits"), xs = column(run, state.curve, state.axis);
    if (!bits) return;
    if (!xs) { without++; return; }
    if (state.curve === "held_out" && run.aside && !state.apart) { aside++; return; }
    if (state.axis === "seconds" && run.slow && fair && !state.apart) { late++; return; }
    found.push({ index, run, xs, ys: bits });
  });
  const told = [];
  const runs = (n) => (n === 1 ? "1 run" : `${n} runs`);
  if (other) told.push(`${runs(other)} set apart, see below, not drawn.`);
  if (aside) told.push(`${runs(aside)} not drawn: scores on the way are of other documents.`);
  if (late) told.push(`${runs(late)} not drawn over time: shared a machine, or ran on another; see the remarks.`);
  if (state.axis === "seconds" && !fair) told.push("Every run shared its machine: time says less.");
  if (without) told.push(`${runs(without)} without a count of ${NAMES[state.axis]}.`);
  document.getElementById("told").textContent = told.join(" ");
  return found;
}

function range(values, log, cut) {
  let sorted = values.filter((v) => Number.isFinite(v) && (!log || v > 0)).sort((a, b) => a - b);
  if (!sorted.length) return [log ? 1 : 0, log ? 10 : 1];
  let low = sorted[0], high = sorted[sorted.length - 1 - (cut && sorted.length > 30 ? Math.floor(0.03 * sorted.length) : 0)];
  if (!(high > low)) { low *= 0.9; high = high * 1.1 || 1; }
  return [low, high];
}
function padded([low, high], log) {
  if (log) { const by = Math.pow(high / low, 0.04); return [low / by, high * by]; }
  const by = 0.04 * (high - low);
  return [low - by, high + by];
}
function ticks(low, high, count, log) {
  if (log && high / low >= 10) {
    const found = [], few = Math.log10(high / low) > 3;
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
      for (const m of few ? [1] : [1, 2, 5]) found.push(m * Math.pow(10, e));
    const inside = found.filter((v) => v >= low && v <= high);
    const every = Math.ceil(inside.length / (count + 3));
    return inside.filter((_, i) => i % every === 0);
  }
  const rough = (high - low) / count, power = Math.pow(10, Math.floor(Math.log10(rough)));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}
function quantity(v, digits = 3) {
  for (const [unit, scale] of [["E", 1e18], ["P", 1e15], ["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]])
    if (v >= 0.9995 * scale) return `${Number((v / scale).toPrecision(digits))}${unit}`;
  return String(Number(v.toPrecision(digits)));
}
function duration(s) {
  if (s < 60) return `${Number(s.toPrecision(3))}s`;
  if (s < 3600) return `${Math.floor(s / 60)}m${String(Math.round(s % 60)).padStart(2, "0")}s`;
  return `${Math.floor(s / 3600)}h${String(Math.floor((s % 3600) / 60)).padStart(2, "0")}m`;
}
const said = (x) => (state.axis === "seconds" ? duration(x) : quantity(x));
// A colour and a dash for each group, as many as can be told apart; the others are grey.
function style(group) {
  return group < 18 ? `s${group % 6}${group >= 6 ? ` d${Math.floor(group / 6)}` : ""}` : "rest";
}

function draw() {
  drawn = curves();
  const width = Math.max(300, figure.clientWidth - 18), height = Math.round(Math.min(460, Math.max(270, width * 0.46)));
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const all = (key) => drawn.flatMap((c) => Array.from(c[key]));
  const ends = ([low, high]) => (state.logx ? [low / Math.pow(high / low, 0.02), high * Math.pow(high / low, 0.02)] : [0, high * 1.02]);
  const lines = data.entropy.filter((e) => !state.logy || e > 0);
  let [x0, x1] = state.zoom ? state.zoom.x : ends(range(all("xs"), state.logx, false));
  const fx = state.logx ? Math.log : (v) => v, fy = state.logy ? Math.log : (v) => v;
  const w = width - LEFT - RIGHT, h = height - TOP - BOTTOM;
  const px = (x) => LEFT + ((fx(x) - fx(x0)) / (fx(x1) - fx(x0))) * w;
  for (const c of drawn) {
    c.px = Float64Array.from(c.xs, px);
    c.ys = smoothed(c.ys, c.px, 0.2 * state.smooth * state.smooth * w);
  }
  let [y0, y1] = state.zoom ? state.zoom.y : padded(range([...all("ys"), ...lines], state.logy, state.curve === "training"), state.logy);
  const py = (y) => TOP + ((fy(y1) - fy(y)) / (fy(y1) - fy(y0))) * h;
  const back = (p, from, size, a, b, log) => {
    const share = (p - from) / size;
    return log ? a * Math.pow(b / a, share) : a + (b - a) * share;
  };
  frame = { width, height, w, h, x: (p) => back(p, LEFT, w, x0, x1, state.logx), y: (p) => back(p, TOP, h, y1, y0, state.logy) };
  const parts = [`<defs><clipPath id="inside"><rect x="${LEFT}" y="${TOP - 4}" width="${w + 4}" height="${h + 8}"/></clipPath></defs>`];
  const ys = ticks(y0, y1, 5, state.logy), digits = Math.max(0, Math.min(4, -Math.floor(Math.log10((ys[1] ?? ys[0] + 1) - ys[0]) + 1e-9)));
  for (const y of ys)
    parts.push(`<path class="grid" d="M${LEFT} ${py(y).toFixed(1)}h${w}"/><text class="y" x="${LEFT - 8}" y="${(py(y) + 4).toFixed(1)}">${y.toFixed(digits)}</text>`);
  for (const x of ticks(x0, x1, Math.max(2, Math.floor(w / 110)), state.logx))
    if (x > 0 || !state.logx)
      parts.push(`<path class="grid" d="M${px(x).toFixed(1)} ${TOP}v${h}"/><text class="x" x="${px(x).toFixed(1)}" y="${height - 22}">${said(x)}</text>`);
  parts.push(`<text class="x" x="${LEFT + w / 2}" y="${height - 5}">${NAMES[state.axis]}</text><g clip-path="url(#inside)">`);
  for (const e of lines) {
    parts.push(`<path class="entropy" d="M${LEFT} ${py(e).toFixed(1)}h${w}"/><text class="entropy-name" x="${width - RIGHT - 4}" y="${(py(e) - 5).toFixed(1)}">entropy of the text ${e.toFixed(3)}</text>`);
  }
  const few = state.curve === "held_out" && drawn.reduce((n, c) => n + c.xs.length, 0) <= 900;
  // The first groups lie on top.
  for (const c of [...drawn].reverse()) {
    c.py = Float64Array.from(c.ys, py);
    let d = "";
    for (let i = 0; i < c.px.length; i++)
      if (Number.isFinite(c.px[i]) && Number.isFinite(c.py[i])) d += `${d ? "L" : "M"}${c.px[i].toFixed(1)} ${c.py[i].toFixed(1)}`;
    const css = style(c.run.group) + (c.run.apart ? " set-apart" : "");
    parts.push(`<path class="curve ${css}" data-run="${c.index}" d="${d}"/>`);
    if (few || c.px.length === 1)
      for (let i = 0; i < c.px.length; i++)
        if (Number.isFinite(c.px[i])) parts.push(`<circle class="${style(c.run.group)}${c.run.bound ? " bound" : ""}" data-run="${c.index}" cx="${c.px[i].toFixed(1)}" cy="${c.py[i].toFixed(1)}" r="${c.run.bound ? 3.4 : 3}"/>`);
  }
  svg.innerHTML = `${parts.join("")}</g><path class="cross" d=""/><rect class="picked" width="0" height="0"/>`;
  if (!drawn.length) svg.innerHTML += `<text class="x" x="${width / 2}" y="${height / 2}">nothing to draw</text>`;
  svg.dataset.curves = drawn.length;
  svg.dataset.x = `${x0} ${x1}`;
  const there = new Set(drawn.map((c) => c.run.group));
  for (const key of document.querySelectorAll("#keys button")) key.classList.toggle("away", !there.has(Number(key.dataset.group)));
  light(lit);
  press();
}

// --- switches -----------------------------------------------------------------------------------------------

const buttons = document.querySelectorAll("button[data-set], button[data-turn]");
function press() {
  for (const b of buttons) {
    const { set, value, turn } = b.dataset;
    b.setAttribute("aria-pressed", String(set ? state[set] === value : state[turn]));
  }
  document.getElementById("whole").disabled = !state.zoom;
}
function keysOfGroups() {
  const box = document.getElementById("keys");
  data.groups.forEach((group, index) => {
    const b = document.createElement("button");
    b.type = "button";
    b.dataset.group = index;
    b.setAttribute("aria-pressed", "true");
    b.title = "show or hide";
    const i = document.createElement("i"), span = document.createElement("span");
    i.className = style(index);
    const bound = data.runs.some((run) => run.group === index && run.bound);
    span.textContent = `${bound ? "≤ " : ""}${group.name}`;
    b.append(i, span);
    b.addEventListener("click", () => {
      hidden.has(index) ? hidden.delete(index) : hidden.add(index);
      b.setAttribute("aria-pressed", String(!hidden.has(index)));
      draw();
    });
    b.addEventListener("pointerenter", () => light(data.runs.findIndex((run) => run.group === index)));
    b.addEventListener("pointerleave", () => light(-1));
    box.append(b);
  });
}

// One run before all others: in the chart and in its row.
function light(index) {
  lit = index;
  const group = index < 0 ? -1 : data.runs[index].group;
  for (const part of svg.querySelectorAll("[data-run]")) {
    const of = Number(part.dataset.run);
    part.classList.toggle("faint", group >= 0 && data.runs[of].group !== group);
    part.classList.toggle("strong", of === index);
  }
  for (const row of document.querySelectorAll("tr[data-run]")) row.classList.toggle("lit", Number(row.dataset.run) === index);
}

// --- pointing -----------------------------------------------------------------------------------------------

function nearest(values, at) {
  let low = 0, high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    values[middle] < at ? (low = middle) : (high = middle);
  }
  return Math.abs(values[low] - at) <= Math.abs(values[high] - at) ? low : high;
}
function place(event) {
  const box = svg.getBoundingClientRect(), scale = frame.width / box.width;
  return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
}
let from = null;
function point(event) {
  const [x, y] = place(event);
  if (from) {
    const pick = svg.querySelector(".picked");
    const at = [Math.min(x, from[0]), Math.min(y, from[1])];
    pick.setAttribute("x", at[0]); pick.setAttribute("y", at[1]);
    pick.setAttribute("width", Math.abs(x - from[0])); pick.setAttribute("height", Math.abs(y - from[1]));
    return;
  }
  const found = drawn.map((c) => { const i = nearest(c.px, x); return { c, i, far: Math.abs(c.py[i] - y), off: Math.abs(c.px[i] - x) }; })
    .filter((f) => f.off < frame.w / 4)
    .sort((a, b) => a.far - b.far).slice(0, MOST_IN_TIP);
  if (!found.length) return leave();
  const first = found[0];
  if (first.c.index !== lit) light(first.c.index);
  svg.querySelector(".cross").setAttribute("d", `M${first.c.px[first.i].toFixed(1)} ${TOP}v${frame.h}`);
  tip.replaceChildren();
  const head = document.createElement("div");
  head.textContent = `${said(first.c.xs[first.i])}${state.axis === "seconds" ? "" : ` ${NAMES[state.axis]}`}`;
  tip.append(head);
  for (const { c, i } of found.sort((a, b) => a.c.ys[a.i] - b.c.ys[b.i])) {
    const line = document.createElement("div"), mark = document.createElement("i"), name = document.createElement("span"), value = document.createElement("b");
    mark.className = style(c.run.group);
    name.textContent = c.run.name;
    value.textContent = `${c.run.bound ? "≤ " : ""}${c.ys[i].toFixed(3)}`;
    line.append(mark, name, value);
    tip.append(line);
  }
  tip.hidden = false;
  const box = figure.getBoundingClientRect(), at = event.clientX - box.left;
  const right = at > box.width / 2;
  tip.style.left = right ? "auto" : `${at + 16}px`;
  tip.style.right = right ? `${box.width - at + 16}px` : "auto";
  tip.style.top = `${Math.max(4, Math.min(event.clientY - box.top - 30, box.height - tip.offsetHeight - 8))}px`;
}
function leave() {
  tip.hidden = true;
  svg.querySelector(".cross")?.setAttribute("d", "");
  if (lit >= 0) light(-1);
}
// From one corner to the other: what lies between fills the chart.
function zoom(a, b) {
  const far = Math.abs(a[0] - b[0]) > 8;
  if (!far) return;
  const clip = (v, low, size) => Math.max(low, Math.min(low + size, v));
  const xs = [a[0], b[0]].map((v) => frame.x(clip(v, LEFT, frame.w))).sort((p, q) => p - q);
  let ys = [a[1], b[1]].map((v) => frame.y(clip(v, TOP, frame.h))).sort((p, q) => p - q);
  if (Math.abs(a[1] - b[1]) < 8) ys = [frame.y(TOP + frame.h), frame.y(TOP)];
  state.zoom = { x: xs, y: ys };
  draw();
}
function whole() { state.zoom = null; draw(); }

if (svg) {
  for (const b of buttons)
    b.addEventListener("click", () => {
      const { set, value, turn } = b.dataset;
      if (set) state[set] = value; else state[turn] = !state[turn];
      state.zoom = null;
      draw();
    });
  const slider = document.getElementById("smooth");
  slider.addEventListener("input", () => { state.smooth = Number(slider.value); draw(); });
  document.getElementById("whole").addEventListener("click", whole);
  svg.addEventListener("pointerdown", (event) => {
    if (event.button || event.pointerType === "touch") return;
    leave();
    from = place(event);
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointerup", (event) => { const a = from; from = null; if (a) { svg.querySelector(".picked").setAttribute("width", 0); zoom(a, place(event)); } });
  svg.addEventListener("pointercancel", () => { from = null; });
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", (event) => { if (event.pointerType === "touch") point(event); });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("dblclick", whole);
  for (const row of document.querySelectorAll("tr[data-run]")) {
    row.addEventListener("pointerenter", () => light(Number(row.dataset.run)));
    row.addEventListener("pointerleave", () => light(-1));
  }
  document.getElementById("thinned").textContent = data.thinned;
  keysOfGroups();
  let before = 0;
  new ResizeObserver(() => { if (figure.clientWidth !== before) { before = figure.clientWidth; draw(); } }).observe(figure);
  draw();
}

// --- tables -------------------------------------------------------------------------------------------------

// A cell as a number, where it is one: 1.23M, 2m05s, ≤ 1.234 ± 0.005.
function number(text) {
  const time = /^(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:([\d.]+)s)?$/.exec(text);
  if (text && time) return ((Number(time[1] ?? 0) * 24 + Number(time[2] ?? 0)) * 60 + Number(time[3] ?? 0)) * 60 + Number(time[4] ?? 0);
  const found = /^(?:≤ )?(-?[\d.,]+(?:e[+-]?\d+)?)([kMGTPE]?)/.exec(text);
  if (!found) return NaN;
  return Number(found[1].replaceAll(",", "")) * Math.pow(10, 3 * " kMGTPE".indexOf(found[2] || " "));
}
for (const table of document.querySelectorAll("table.runs"))
  table.querySelectorAll("thead th").forEach((head, index) => {
    head.tabIndex = 0;
    const sort = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.querySelectorAll("thead th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const of = (row) => row.cells[index].textContent.trim();
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [p, q] = [number(of(a)), number(of(b))];
        if (Number.isNaN(p) !== Number.isNaN(q)) return Number.isNaN(p) - Number.isNaN(q);
        return (up ? 1 : -1) * (Number.isNaN(p) ? of(a).localeCompare(of(b)) : p - q);
      });
      table.tBodies[0].append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });

// On paper nothing can be opened.
const closed = new Set();
addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details:not([open])")) { closed.add(d); d.open = true; } });
addEventListener("afterprint", () => { for (const d of closed) d.open = false; closed.clear(); });
