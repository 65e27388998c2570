// watch: a training run, live or finished: its curves, what it rebuilds, and what it finds similar as it learns.
import { Source, Viewer, button, bytesOf, colourBar, draw, failing, frame, gridCanvas, lightChoices, make, markBox, put, slider, table256, toggle, watchTraits } from "./base.js";

const KEYS = [
  ["Mask ratio", "how much is hidden before it is rebuilt"], ["Click, arrow keys", "the patch that is followed over the time of training"], ["Drag", "pan"], ["Wheel, + and -", "zoom, once the picture has the focus; 0 shows all"],
];
const SERIES = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"];

class Watcher {
  constructor(model, el) {
    this.model = model;
    this.page = frame(model, el, { label: "watch a training run", keys: KEYS });
    this.toolbar();
    this.charts = make("div", { class: "aoi-charts" });
    this.page.body.append(this.charts);
    this.pictures = [];
    this.times = [];
    this.drawn = make("div", { class: "aoi-section" });
    this.over = make("div", { class: "aoi-section" });
    this.page.body.append(this.drawn, this.over);
    watchTraits(model, "has_rebuilt", () => this.showRebuilt());
    watchTraits(model, "snapshots", () => this.showTimes());
    this.watch();
  }

  // sections: they appear when there is something to show in them

  showRebuilt() {
    if (this.pictures.length || !this.get("has_rebuilt")) return;
    const { model } = this;
    this.pictures = ["image", "seen", "rebuilt"].map((name, i) => this.picture(name, i));
    this.fill(this.drawn, "Rebuilt from what is left", this.pictures, slider(model, "mask_ratio", "Mask ratio", { min: 0.05, max: 0.95, lazy: true }), button("Hide other patches", () => put(model, { seed: this.get("seed") + 1 }), { text: "Other patches" }));
  }

  showTimes() {
    this.times.forEach((v) => this.drop(v));
    this.times = this.get("snapshots").map((name, i) => this.time(name, i));
    if (!this.times.length) { this.over.replaceChildren(); return; }
    const scale = colourBar(table256(this.model, "viridis"), ["low", "high"], "Cosine, on the scale of each map");
    this.fill(this.over, "Similar to the held patch, over time", this.times, scale);
    this.showLimits();
  }

  showLimits() {
    const limits = this.get("limits"), names = this.get("snapshots");
    this.times.forEach(({ title }, i) => (title.textContent = limits[i] ? `${names[i]}: ${limits[i][0].toFixed(2)} to ${limits[i][1].toFixed(2)}` : names[i]));
  }

  drop({ viewer, source }) { viewer.close(); source.close(); }

  get(name) { return this.model.get(name); }

  toolbar() {
    this.live = make("span", { class: "aoi-live", role: "status" });
    this.page.bar.append(toggle(this.model, "log", "Logarithmic"), ...(this.get("sources").length ? lightChoices(this.model) : []), this.live);
  }

  fill(section, title, views, ...controls) {
    section.replaceChildren(make("div", { class: "aoi-bar" }, make("b", {}, title), controls), make("div", { class: "aoi-views" }, views.map((v) => v.root)));
  }

  picture(name, index) {
    const source = new Source(this.model, index, () => viewer.resize());
    const viewer = new Viewer({
      label: name, source, look: () => ({ light: this.get("light"), stretch: this.get("stretch") }), view: { ...this.get("view") }, onView: (view) => put(this.model, { view: { ...view } }),
    });
    viewer.most = 340;
    return { source, viewer, root: make("figure", { class: "aoi-figure" }, make("figcaption", {}, make("span", {}, name)), viewer.root) };
  }

  time(name, index) {
    const source = new Source(this.model, 0, () => viewer.resize());
    const viewer = new Viewer({
      label: `similarity to the held patch, ${name}`, source, look: () => ({ light: this.get("light"), stretch: this.get("stretch") }),
      paint: (context, { pixel }) => this.paintTime(index, context, pixel), view: { ...this.get("view") }, onView: (view) => put(this.model, { view: { ...view } }),
      act: { click: (p) => this.hold(p), key: (e) => this.onKey(e) },
    });
    viewer.most = 340;
    const title = make("span", { title: "How similar: the lowest tenth, and the most similar patch that is not held" }, name);
    return { source, viewer, title, root: make("figure", { class: "aoi-figure" }, make("figcaption", {}, title), viewer.root) };
  }

  get views() { return this.pictures.concat(this.times); }

  watch() {
    const { model } = this, redraw = () => this.views.forEach((v) => v.viewer.draw());
    for (const name of ["light", "stretch", "maps", "held", "grid"]) model.on(`change:${name}`, redraw);
    model.on("change:limits", () => this.showLimits());
    model.on("change:view", () => this.views.forEach((v) => v.viewer.setView(this.get("view"), { tell: false })));
    watchTraits(model, ["series", "log"], () => this.showCharts());
    watchTraits(model, "status", () => { this.live.textContent = this.get("status"); this.live.classList.toggle("aoi-running", this.get("live")); });
    this.timer = setInterval(() => { if (this.get("live") && this.page.root.isConnected && !document.hidden) model.send({ kind: "poll" }); }, 1000 * this.get("every"));
  }

  // curves

  showCharts() {
    const groups = new Map();
    for (const s of this.get("series")) {
      const key = s.column.includes("loss") ? "loss" : s.column;
      groups.set(key, [...(groups.get(key) ?? []), s]);
    }
    this.charts.replaceChildren(...[...groups].map(([name, list]) => this.chart(name, list)));
    if (!groups.size) this.charts.append(make("p", { class: "aoi-note" }, "No step has been taken yet."));
  }

  chart(name, list) {
    const wide = 380, high = 200, left = 46, right = 10, top = 8, bottom = 30, log = this.get("log") && list.every((s) => s.y.every((v) => v > 0)), scale = (v) => (log ? Math.log10(v) : v);
    const xs = list.flatMap((s) => s.x), ys = list.flatMap((s) => s.y).map(scale), reach = (v) => v.reduce(([a, b], c) => [Math.min(a, c), Math.max(b, c)], [Infinity, -Infinity]);
    const [x0, x1] = reach(xs), [y0, y1] = reach(ys), padY = (y1 - y0) * 0.05 || 0.5;
    const px = (v) => left + (x1 > x0 ? (v - x0) / (x1 - x0) : 0.5) * (wide - left - right), py = (v) => top + (1 - (v - y0 + padY) / (y1 - y0 + 2 * padY)) * (high - top - bottom);
    const short = (v) => (Math.abs(v) >= 1e4 || (v && Math.abs(v) < 1e-2) ? v.toExponential(0) : String(Number(v.toPrecision(3))));
    const nodes = [draw("path", { class: "aoi-axis", d: `M${left} ${top}V${high - bottom}H${wide - right}` })];
    for (let i = 0; i <= 3; i++) {
      const x = x0 + (x1 - x0) * i / 3, y = y0 + (y1 - y0) * i / 3;
      nodes.push(draw("text", { x: px(x), y: high - bottom + 13, "text-anchor": i === 3 ? "end" : "middle" }, short(Math.round(x))), draw("text", { x: left - 5, y: py(y) + 3, "text-anchor": "end" }, short(log ? 10 ** y : y)));
      nodes.push(draw("path", { class: "aoi-grid", d: `M${left} ${py(y)}H${wide - right}` }));
    }
    nodes.push(draw("text", { x: (left + wide - right) / 2, y: high - 3, "text-anchor": "middle" }, this.get("along")));
    list.forEach((s, i) => {
      const colour = SERIES[i % SERIES.length], points = (y) => s.x.map((v, j) => `${px(v).toFixed(1)},${py(scale(y[j])).toFixed(1)}`).join(" ");
      if (s.trend) nodes.push(draw("polyline", { points: points(s.y), stroke: colour, opacity: 0.25 }));
      nodes.push(draw("polyline", { points: points(s.trend ?? s.y), stroke: colour }));
      if (s.x.length < 30) s.x.forEach((v, j) => nodes.push(draw("circle", { cx: px(v), cy: py(scale(s.y[j])), r: 2.5, fill: colour })));
    });
    const words = list.map((s) => `${s.label}: ${short((s.trend ?? s.y).at(-1))} at the end`).join("; ");
    const svg = draw("svg", { class: "aoi-curve aoi-chart", viewBox: `0 0 ${wide} ${high}`, role: "img", "aria-label": words }, ...nodes);
    svg.addEventListener("pointermove", (e) => {
      const box = svg.getBoundingClientRect(), at = x0 + (x1 - x0) * Math.min(1, Math.max(0, ((e.clientX - box.left) / box.width * wide - left) / (wide - left - right)));
      this.page.status.textContent = list.map((s) => { const j = s.x.reduce((best, v, k) => (Math.abs(v - at) < Math.abs(s.x[best] - at) ? k : best), 0); return `${s.label} ${short((s.trend ?? s.y)[j])} at ${Math.round(s.x[j])}`; }).join(", ");
    });
    const legend = list.length > 1 ? make("div", { class: "aoi-legend" }, list.map((s, i) => make("span", { class: "aoi-class" }, make("i", { class: "aoi-stroke", style: `--colour: ${SERIES[i % SERIES.length]}` }), s.label))) : null;
    return make("figure", { class: "aoi-figure" }, make("figcaption", {}, make("span", {}, name.replaceAll("_", " "))), svg, legend);
  }

  // over time

  paintTime(index, context, pixel) {
    const { rows, columns, patch } = this.get("grid"), map = this.get("maps")[index], held = this.get("held");
    if (map?.byteLength === rows * columns) {
      const values = bytesOf(map), table = table256(this.model, "viridis");
      context.imageSmoothingEnabled = false;
      context.drawImage(gridCanvas(rows, columns, (i, out, at) => {
        for (let c = 0; c < 3; c++) out[at + c] = table[3 * values[i] + c];
        out[at + 3] = 255 * 0.65 * (0.3 + 0.7 * values[i] / 255);
      }), 0, 0, columns * patch, rows * patch);
    }
    if (held?.length) markBox(context, Math.floor(held[1] / patch) * patch, Math.floor(held[0] / patch) * patch, patch, pixel);
  }

  hold(p) { put(this.model, { held: [Math.floor(p.y), Math.floor(p.x)] }); }

  onKey(e) {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[e.key], held = this.get("held"), { rows, columns, patch } = this.get("grid");
    if (!move) return false;
    const { width, height } = this.times[0].source, start = held?.length ? held : [height / 2, width / 2], to = (v, d, n, most) => Math.min(most - 1, Math.min(n - 1, Math.max(0, Math.floor(v / patch) + d)) * patch + (patch >> 1));
    put(this.model, { held: [to(start[0], move[0], rows, height), to(start[1], move[1], columns, width)] });
    return true;
  }

  close() {
    clearInterval(this.timer);
    this.views.forEach((v) => this.drop(v));
  }
}

function render({ model, el }) {
  const widget = new Watcher(model, el);
  el.aoi = widget;
  return () => widget.close();
}

export default { render: failing(render) };
