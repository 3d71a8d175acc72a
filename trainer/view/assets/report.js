"use strict";

// The x axis: the chart of every axis is in the page, CSS shows the one that <body data-axis> names.
const buttons = document.querySelectorAll("button[data-axis]");
function show(axis) {
  document.body.dataset.axis = axis;
  for (const b of buttons) b.setAttribute("aria-pressed", b.dataset.axis === axis);
}
for (const b of buttons) b.addEventListener("click", () => show(b.dataset.axis));
show(document.body.dataset.axis);

// Pointing at a chart prints the nearest values, read back from the drawn points.
function duration(s) {
  return s < 60 ? `${s.toFixed(1)} s` : `${Math.floor(s / 60)}m${String(Math.floor(s % 60)).padStart(2, "0")}s`;
}
function short(v) { return v.toLocaleString("en", { maximumSignificantDigits: 4 }); }
function value(fraction, low, high) { return low + fraction * (high - low); }
for (const svg of document.querySelectorAll("svg[data-axis]")) {
  const [width, height] = svg.getAttribute("viewBox").split(" ").slice(2).map(Number);
  const [left, right, top, bottom] = svg.dataset.frame.split(" ").map(Number);
  const range = ["x0", "x1", "y0", "y1"].map((k) => Number(svg.dataset[k]));
  const curves = [...svg.querySelectorAll("polyline")].map((line) => ({
    name: line.dataset.name,
    points: line.getAttribute("points").split(" ").map((p) => p.split(",").map(Number)),
  }));
  const out = svg.closest("figure").querySelector("output");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    let x = 0;
    const values = curves.map(({ points }, index) => {
      const p = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
      if (index === 0) x = value((p[0] - left) / (width - left - right), range[0], range[1]);
      return value((height - bottom - p[1]) / (height - top - bottom), range[2], range[3]);
    });
    const where = svg.dataset.axis === "seconds" ? duration(x) : Math.round(x).toLocaleString("en");
    out.textContent = `${where}: ${values.map(short).join(" · ")}`;
  });
  svg.addEventListener("pointerleave", () => { out.textContent = ""; });
}

// Pointing at a map names the row and the column: its own labels, or what begins at the token.
for (const svg of document.querySelectorAll("svg.map")) {
  const width = Number(svg.getAttribute("viewBox").split(" ")[2]);
  const [left, tall] = svg.dataset.frame.split(" ").map(Number);
  const [rows, columns] = svg.dataset.size.split(" ").map(Number);
  const names = (own) => JSON.parse(own ?? svg.closest("section").dataset.tokens);
  const [ofRows, ofColumns] = [names(svg.dataset.rows), names(svg.dataset.columns)];
  const out = svg.closest("figure").querySelector("output");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = width / box.width;
    const r = Math.floor((((event.clientY - box.top) * scale) / tall) * rows);
    const c = Math.floor((((event.clientX - box.left) * scale - left) / (width - left)) * columns);
    const inside = r >= 0 && r < rows && c >= 0 && c < columns;
    out.textContent = inside ? `row ${r}: ${ofRows[r]} · column ${c}: ${ofColumns[c]}` : "";
  });
  svg.addEventListener("pointerleave", () => { out.textContent = ""; });
}
