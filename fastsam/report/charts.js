"use strict";
// The figures: drawn by Plotly when they come into view, in the colors of the page.

const drawn = new Set();
const plotly = unpack(document.getElementById("plotly").textContent);

// The library is compressed; the browser has what it takes to run it.
async function unpack(encoded) {
  const bytes = Uint8Array.from(atob(encoded), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  return window.Plotly;
}

function colors() {
  const style = getComputedStyle(document.documentElement);
  return (name) => style.getPropertyValue(`--${name}`).trim();
}

function shownTrace(trace, color) {
  const meta = trace.meta ?? {};
  const own = meta.color === undefined ? color("faint") : color(`run-${meta.color}`);
  const shown = { ...trace, visible: !hiddenRuns.has(String(meta.run)) };
  if (trace.type === "heatmap") {
    shown.colorscale = [[0, color("ground")], [1, color("run-0")]];
    shown.colorbar = { ...trace.colorbar, outlinewidth: 0 };
    return shown;
  }
  shown.marker = { ...trace.marker, color: own };
  if (trace.type === "scatter") shown.line = { ...trace.line, color: own };
  for (const error of ["error_x", "error_y"]) if (trace[error]) shown[error] = { ...trace[error], color: own };
  return shown;
}

// A shape or an annotation, which disappears with the last of its runs.
function shownMark(mark, color) {
  const runs = (mark.name ?? "").split(" ").filter(Boolean);
  const shown = { ...mark, visible: !runs.length || runs.some((run) => !hiddenRuns.has(run)) };
  if (mark.type === "rect") return { ...shown, fillcolor: color("band") };
  if (mark.type === "line") return { ...shown, line: { ...mark.line, color: color("muted") } };
  return { ...shown, font: { color: color("muted"), size: 11 } };
}

function shownLayout(layout, color) {
  const axis = { gridcolor: color("line"), linecolor: color("line"), zerolinecolor: color("muted"), automargin: true };
  const shown = {
    showlegend: false,
    margin: { l: 48, r: 12, t: 12, b: 40 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: color("text") },
    hovermode: "closest",
    hoverlabel: { bgcolor: color("raised"), bordercolor: color("line"), font: { color: color("text") }, namelength: -1 },
    // A finger scrolls the page.
    dragmode: window.matchMedia("(pointer: coarse)").matches ? false : "zoom",
    ...layout,
    shapes: (layout.shapes ?? []).map((shape) => shownMark(shape, color)),
    annotations: (layout.annotations ?? []).map((note) => shownMark(note, color)),
  };
  for (const name of ["xaxis", "yaxis", "yaxis2"]) {
    if (layout[name]) shown[name] = { zeroline: false, ...axis, ...layout[name] };
  }
  return shown;
}

async function draw(box) {
  drawn.add(box);
  const Plotly = await plotly;
  const { data, layout } = report.charts[Number(box.dataset.chart)];
  const color = colors();
  const config = {
    responsive: true,
    displaylogo: false,
    displayModeBar: window.matchMedia("(hover: hover)").matches ? "hover" : false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };
  await Plotly.react(box, data.map((trace) => shownTrace(trace, color)), shownLayout(layout, color), config);
}

const inView = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (isIntersecting && !drawn.has(target)) draw(target);
  }
}, { rootMargin: "400px" });
const charts = [...document.querySelectorAll("[data-chart]")];
for (const box of charts) inView.observe(box);

document.addEventListener("change-of-view", () => {
  for (const box of drawn) draw(box);
});
window.addEventListener("beforeprint", () => {
  for (const box of charts) draw(box);
});
