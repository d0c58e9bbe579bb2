"use strict";
// Draws the plots of the data in #data. All text goes in as textContent; nothing is fetched.
const DATA = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const SYNC = uPlot.sync("step");
const DASHES = [[], [7, 4], [2, 3]];
let charts = [];

const color = name => getComputedStyle(root).getPropertyValue(name).trim();
const curveColor = n => n < 10 ? color("--c" + n) : `hsl(${(n * 47) % 360} 60% ${root.dataset.theme === "dark" ? 65 : 42}%)`;
const fade = (c, alpha) => c + (c[0] === "#" ? Math.round(255 * alpha).toString(16).padStart(2, "0") : "");
const option = id => document.getElementById(id);

function short(v) {
  if (v == null || !isFinite(v)) return "–";
  const a = Math.abs(v);
  for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
    const scaled = size === 1e4 ? 1e3 : size;
    if (a >= size) return Number((v / scaled).toPrecision(4)) + letter;
  }
  return a && a < 1e-3 ? v.toExponential(2).replace(/\.?0+e/, "e").replace("e-", "e−") : String(Number(v.toPrecision(4)));
}

// Steps as tokens of their run, where the page shows tokens: straight lines between the lines of the log.
function abscissa(run, steps) {
  const map = DATA.runs[run];
  if (option("axis").value === "step" || !map.tokens.length) return steps;
  let i = 0;
  return steps.map(step => {
    while (i < map.steps.length && map.steps[i] < step) i++;
    const s1 = i < map.steps.length ? map.steps[i] : map.steps.at(-1), t1 = i < map.steps.length ? map.tokens[i] : map.tokens.at(-1);
    const s0 = i ? map.steps[i - 1] : 0, t0 = i ? map.tokens[i - 1] : 0;
    return s1 === s0 ? t1 : t0 + (t1 - t0) * (Math.min(step, s1) - s0) / (s1 - s0);
  });
}

// A moving mean with exponential weights, without the bias of its start; it spans up to a fifth of the curve.
function smoothed(values, amount) {
  const weight = 1 - 1 / (1 + 0.2 * amount * amount * values.length);
  let sum = 0, norm = 0;
  return values.map(v => {
    if (v == null) return v;
    sum = weight * sum + (1 - weight) * v;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

function quantile(sorted, q) { return sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))]; }

// The y range for what is visible: [low, high, values above it, the greatest]. Outliers are cut off where the plot says so.
function visibleRange(u, plot) {
  const [x0, x1] = [u.scales.x.min ?? -Infinity, u.scales.x.max ?? Infinity], xs = u.data[0], values = [];
  u.series.forEach((series, n) => {
    if (!n || !series.show) return;
    const {low = [], high = []} = series.extra || {};
    u.data[n].forEach((v, i) => {
      if (v != null && xs[i] >= x0 && xs[i] <= x1) values.push(v, low[i] ?? v, high[i] ?? v);
    });
  });
  if (!values.length) return [0, 1, 0, 0];
  for (const anchor of plot.anchors) values.push(anchor.value * plot.anchorScale);
  values.sort((a, b) => a - b);
  let low = values[0], high = values.at(-1), above = 0;
  const most = high, usual = quantile(values, 0.985), floor = quantile(values, 0.01);
  if (plot.range.includes("clip") && option("clip").checked && values.length > 60) {
    const cut = usual + 0.2 * (usual - floor);
    if (cut > usual && most > cut) { high = cut; above = 1; }
  }
  if (plot.range.startsWith("zero")) low = Math.min(0, low);
  const pad = plot.range.startsWith("zero") ? 0 : 0.04 * (high - low) || 0.05 * Math.abs(high) || 1;
  return [low - pad, high + (0.05 * (high - low) || pad || 1), above, most];
}

// From 0 to the last step of all runs: every plot has the same axis.
function span() {
  const ends = DATA.runs.flatMap((run, n) => run.steps.length ? abscissa(n, [run.steps.at(-1)]) : []);
  return [0, Math.max(...ends, 0)].filter((x, n) => !n || x > 0);
}

function columns(plot) {
  const amount = Number(option("smooth").value) / 100, tables = [], series = [];
  plot.curves.forEach(curve => {
    const x = abscissa(curve.run, DATA.xs[curve.x]), table = [x], c = curveColor(curve.color);
    const style = {scale: "y", spanGaps: true, stroke: c, width: 1.6, dash: DASHES[curve.dash], points: {show: curve.points, size: 5, fill: c}};
    if (curve.smooth && amount) {
      table.push(curve.y);
      series.push({...style, label: curve.label, class: "raw", width: 1, dash: [], stroke: fade(c, 0.28), points: {show: false}, raw: true});
      table.push(smoothed(curve.mean.length ? curve.mean : curve.y, amount));
    } else table.push(curve.y);
    series.push({...style, label: curve.label, paired: curve.smooth && amount > 0, extra: {},
      value: (u, v, n, i) => {
        const shown = u.data[u.series[n].paired ? n - 1 : n];
        if (i == null) { i = shown.length - 1; while (i > 0 && shown[i] == null) i--; }
        return short(shown[i]) + (u.series[n].paired && shown[i] != null ? ` (${short(u.data[n][i])})` : "");
      }});
    tables.push(table);
  });
  tables.push([span()]);
  const data = uPlot.join(tables);
  // Intervals, on the x of all curves together.
  let n = 0;
  plot.curves.forEach(curve => {
    n += curve.smooth && amount ? 2 : 1;
    if (!curve.low.length) return;
    const at = new Map(abscissa(curve.run, DATA.xs[curve.x]).map((x, i) => [x, i]));
    for (const end of ["low", "high"]) series[n - 1].extra[end] = data[0].map(x => at.has(x) ? curve[end][at.get(x)] : null);
  });
  return [data, series];
}

function eventColor(kind) {
  if (/skip|fail|died/.test(kind)) return color("--c7");
  if (/re-weighted|changed|branch/.test(kind)) return color("--c4");
  if (/stopped|done/.test(kind)) return color("--c6");
  return /checkpoint/.test(kind) ? color("--c8") : color("--c2");
}

// Events as lines through the plot, checkpoints as ticks at its foot; intervals of scores; published values.
function drawOver(u, plot) {
  const ctx = u.ctx, {left, top, width, height} = u.bbox, ratio = devicePixelRatio;
  ctx.save();
  ctx.beginPath(); ctx.rect(left, top, width, height); ctx.clip();
  const line = (x0, y0, x1, y1, stroke, dash, thick = 1) => {
    ctx.beginPath(); ctx.strokeStyle = stroke; ctx.lineWidth = thick * ratio; ctx.setLineDash(dash.map(d => d * ratio));
    ctx.moveTo(x0, y0); ctx.lineTo(x1, y1); ctx.stroke();
  };
  if (option("events").checked) for (const group of DATA.events) {
    const many = group.steps.length > 60, tick = /^checkpoint|start|profile|dev/.test(group.kind) || many;
    abscissa(group.run, group.steps).forEach(x => {
      const at = u.valToPos(x, "x", true);
      if (at >= left && at <= left + width)
        line(at, top + height, at, tick ? top + height - 6 * ratio : top, fade(eventColor(group.kind), tick ? 0.9 : 0.55), tick ? [] : [4, 3]);
    });
  }
  u.series.forEach((series, n) => {
    if (!n || !series.show || !series.extra || !series.extra.low) return;
    series.extra.low.forEach((low, i) => {
      if (low == null) return;
      const x = u.valToPos(u.data[0][i], "x", true);
      line(x, u.valToPos(low, "y", true), x, u.valToPos(series.extra.high[i], "y", true), fade(curveColorOf(plot, n, u), 0.6), [], 1.5);
    });
  });
  ctx.font = `${11 * ratio}px system-ui, sans-serif`; ctx.fillStyle = color("--soft");
  plot.anchors.forEach(anchor => {
    const y = u.valToPos(anchor.value * plot.anchorScale, "y", true);
    line(left, y, left + width, y, color("--soft"), [6, 4]);
    ctx.fillText(anchor.model, left + 6 * ratio, y - 4 * ratio);
  });
  ctx.restore();
}
const curveColorOf = (plot, n, u) => { const s = u.series[n].stroke; return typeof s === "function" ? s(u, n) : s; };

// The nearest row in which a curve has a value: curves of different steps share one axis.
function nearest(u, n, i) {
  const values = u.data[n];
  if (n === 0 || values[i] != null) return i;
  for (let d = 1; d < values.length; d++) {
    if (values[i - d] != null) return i - d;
    if (values[i + d] != null) return i + d;
  }
  return i;
}

function axes(plot, labels) {
  const stroke = color("--soft"), grid = {stroke: color("--grid"), width: 1}, font = "12px system-ui, sans-serif";
  const y = labels
    ? {size: 150, splits: () => labels.map((_, i) => i), values: () => labels}
    : {size: 58, values: (u, ticks) => ticks.map(v => v == null ? "" : short(v))};
  return [{stroke, grid, ticks: grid, font, values: (u, ticks) => ticks.map(v => Number.isInteger(v) ? short(v) : "")},
    {stroke, grid, ticks: grid, font, scale: "y", ...y}];
}
const xLabel = () => option("axis").value;

function drawPlot(plot, figure) {
  const [data, series] = columns(plot), caption = figure.querySelector("figcaption"), holder = figure.querySelector(".chart");
  plot.anchorScale = plot.anchors.length ? 0.01 : 1; // published in %
  const say = above => {
    const parts = [plot.note, ...plot.anchors.map(a => `${a.model}: ${a.value} %, ${a.source}.`)];
    if (above) parts.push(`Cut off at the top: values up to ${short(above)}; "cut outliers" above shows them.`);
    caption.textContent = parts.filter(Boolean).join(" ");
  };
  const opts = {
    width: holder.clientWidth, height: 270, series: [{label: xLabel(), value: (u, v) => v == null ? short(u.data[0].at(-1)) : short(v)}, ...series],
    scales: {x: {time: false}, y: plot.range === "log" ? {distr: 3} : {range: u => visibleRange(u, plot).slice(0, 2)}},
    axes: axes(plot), legend: {live: true, markers: {width: 2}},
    cursor: {sync: {key: "step", setSeries: false}, dataIdx: nearest, points: {size: 6}, drag: {x: true, y: false}},
    hooks: {
      draw: [u => { drawOver(u, plot); if (plot.range !== "log") { const r = visibleRange(u, plot); say(r[2] ? r[3] : 0); } else say(0); }],
      setSeries: [(u, n, o) => { if (n && o.show != null && u.series[n].paired && u.series[n - 1].show !== o.show) u.setSeries(n - 1, {show: o.show}); }],
    },
  };
  charts.push([new uPlot(opts, data, holder), holder]);
}

function drawTimeline(figure) {
  const holder = figure.querySelector(".chart"), said = figure.querySelector(".happened");
  const kinds = [...new Set(DATA.events.map(group => group.kind))].reverse();
  const groups = DATA.events.filter(group => group.steps.length);
  const tables = groups.map(group => {
    const x = [...new Set(abscissa(group.run, group.steps))];
    return [x, x.map(() => kinds.indexOf(group.kind) + (DATA.runs.length > 1 ? 0.18 * (group.run - (DATA.runs.length - 1) / 2) / DATA.runs.length * 3 : 0))];
  });
  tables.push([span()]);
  const tint = group => DATA.runs.length > 1 ? curveColor(group.run) : eventColor(group.kind);
  const opts = {
    width: holder.clientWidth, height: 60 + 26 * kinds.length,
    series: [{label: xLabel()}, ...groups.map(group => ({label: group.kind, scale: "y", paths: () => null, stroke: tint(group), points: {show: true, size: 9, fill: tint(group)}}))],
    scales: {x: {time: false}, y: {range: () => [-0.6, kinds.length - 0.4]}},
    axes: axes(null, kinds), legend: {show: false},
    cursor: {sync: {key: "step", setSeries: false}, y: false, drag: {x: true, y: false}},
    hooks: {setCursor: [u => {
      if (u.cursor.left < 0) return;
      const x = u.posToVal(u.cursor.left, "x"), near = [];
      for (const group of groups) abscissa(group.run, group.steps).forEach((at, i) => near.push([Math.abs(at - x), group, i]));
      near.sort((a, b) => a[0] - b[0]);
      const reach = 6 * (u.scales.x.max - u.scales.x.min) / Math.max(1, u.over.clientWidth);
      said.textContent = near.filter(n => n[0] <= reach).slice(0, 4)
        .map(([, group, i]) => `${DATA.runs.length > 1 ? DATA.runs[group.run].name + ", " : ""}step ${group.steps[i]}: ${group.kind}. ${group.texts[i]}`).join("\n");
    }]},
  };
  said.style.whiteSpace = "pre-line";
  charts.push([new uPlot(opts, uPlot.join(tables), holder), holder]);
}

function drawAll() {
  for (const [chart] of charts) chart.destroy();
  charts = [];
  for (const figure of document.querySelectorAll("figure[data-plot]")) {
    if (figure.dataset.plot === "timeline") drawTimeline(figure);
    else drawPlot(DATA.plots[figure.dataset.plot], figure);
  }
  for (const chip of document.querySelectorAll(".chip")) chip.style.background = curveColor(Number(chip.dataset.color));
  queueMicrotask(() => { root.dataset.drawn = Math.round(performance.now()); }); // for the tests and the bench
}

root.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", e => { root.dataset.theme = e.matches ? "dark" : "light"; drawAll(); });
option("theme").addEventListener("click", () => { root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"; drawAll(); });
for (const id of ["axis", "smooth", "clip", "events"]) option(id).addEventListener("change", drawAll);
let wait, seen = innerWidth;
addEventListener("resize", () => {
  clearTimeout(wait);
  wait = setTimeout(() => {
    if (innerWidth !== seen) for (const [chart, holder] of charts) chart.setSize({width: holder.clientWidth, height: chart.height});
    seen = innerWidth;
  }, 150);
});
drawAll();
