// inspect: what a segmenter made of an image, at any threshold, against the truth, and why.
import { NearList, PlaceView, Source, Viewer, above, button, choice, colourBar, draw, drawParts, failing, frame, lightChoices, make, markBox, masksOn, put, slider, swatch, table256 } from "./base.js";

const KEYS = [
  ["Click, Enter", "ask why this pixel has its label"], ["Arrow keys", "move by a pixel; with Shift by 16"], ["Esc", "ask no more"], ["1 to 9", "class on and off"],
  ["Drag", "pan"], ["Wheel, + and -", "zoom, once the picture has the focus; 0 shows all"],
];
const SERIES = ["#0072B2", "#E69F00", "#009E73", "#CC79A7"];

class Inspector {
  constructor(model, el) {
    this.model = model;
    this.page = frame(model, el, { label: "inspect a segmentation", keys: KEYS });
    this.classes = this.get("classes");
    this.segmenters = this.get("segmenters");
    this.truth = this.get("has_truth");
    this.source = new Source(model, 0, () => { this.views.forEach((v) => v.viewer.resize()); this.refresh(); });
    const panels = this.segmenters.map((_, s) => s).concat(this.truth ? ["truth"] : []);
    this.views = panels.map((p) => this.figure(p));
    this.toolbar();
    this.lay();
    this.watch();
  }

  get(name) { return this.model.get(name); }

  toolbar() {
    const modes = [{ text: "Mask", value: "mask" }];
    if (this.truth) modes.push({ text: "Errors", value: "errors", title: "Hits, false alarms and misses of the classes that are on" });
    modes.push({ text: "Probability", value: "probability", title: "The largest probability of the classes that are on" });
    if (this.get("has_novelty")) modes.push({ text: "Novelty", value: "novelty", title: "How unlike anything known each place is" });
    modes.push({ text: "Image", value: "none" });
    this.page.bar.append(...lightChoices(this.model), choice(this.model, "overlay", "Show", modes, { list: false }), slider(this.model, "opacity", "Opacity"));
  }

  figure(panel) {
    const title = make("span", {}, panel === "truth" ? "truth" : this.segmenters[panel]), value = make("span", { class: "aoi-value" });
    const viewer = new Viewer({
      label: panel === "truth" ? "the truth" : `prediction of ${this.segmenters[panel]}`, source: this.source,
      look: () => ({ light: this.get("light"), stretch: this.get("stretch") }), paint: (context, view) => this.paint(panel, context, view),
      act: { hover: (p) => this.tell(p), click: (p) => this.ask(p), key: (e) => this.onKey(e) },
      view: { ...this.get("view") },
      onView: (view) => put(this.model, { view: { ...view } }),
    });
    viewer.most = 560;
    return { panel, viewer, value, root: make("figure", { class: "aoi-figure" }, make("figcaption", {}, title, value), viewer.root) };
  }

  lay() {
    this.rows = make("div", { class: "aoi-classes" }, this.classes.map((name, k) => this.row(name, k)));
    this.curveHead = make("span", {});
    this.curve = draw("svg", { class: "aoi-curve", viewBox: "0 0 220 120" });
    this.why = make("div", {});
    this.near = this.get("has_bank") ? new NearList(this.model) : null;
    this.place = new PlaceView(this.model, () => ({ light: this.get("light"), stretch: this.get("stretch") }));
    this.whyHead = make("span", {}, "Why this pixel?");
    const notes = this.get("novelty_notes").map((note, s) => (note ? make("p", { class: "aoi-note" }, this.segmenters.length > 1 ? make("b", {}, `${this.segmenters[s]}: `) : null, note) : null));
    const views = make("div", { class: "aoi-views" }, this.views.map((v) => v.root), this.place.root);
    const answer = make("div", { class: "aoi-answer" }, make("div", { class: "aoi-head" }, this.whyHead), this.why, this.near?.root);
    const apply = button("Give the thresholds to the segmenters", () => this.model.send({ kind: "apply" }), { text: "Apply" });
    const side = make("div", { class: "aoi-side" }, answer, // first, so that it is beside the pictures and not below the screen
      make("div", {}, make("div", { class: "aoi-head" }, make("span", {}, "Classes and thresholds"), apply), this.rows),
      this.truth ? make("div", {}, make("div", { class: "aoi-head" }, this.curveHead), this.curve) : null,
      notes.some(Boolean) ? make("div", {}, make("div", { class: "aoi-head" }, make("span", {}, "To be trusted?")), notes) : null);
    this.page.body.append(views, side);
  }

  row(name, k) {
    const colour = this.get("class_colours")[k];
    const on = swatch(name, colour, { onclick: () => { this.flip(k); this.focus(k); } });
    on.title = `${name}: on or off`;
    const lines = this.segmenters.map((segmenter, s) => {
      const input = make("input", { type: "range", min: 0, max: 1, step: 0.01, "aria-label": `threshold of ${name}, ${segmenter}` });
      input.addEventListener("input", () => {
        const all = this.get("thresholds").map((list) => [...list]);
        all[s][k] = Number(input.value);
        put(this.model, { thresholds: all });
      });
      input.addEventListener("focus", () => this.focus(k));
      const output = make("output", {}), value = make("b", {});
      return { input, output, value, root: make("div", { class: "aoi-line" }, make("span", { title: segmenter }, segmenter), input, output, value) };
    });
    const root = make("div", { onclick: () => this.focus(k) }, on, lines.map((l) => l.root));
    this.lines ??= [];
    this.lines[k] = { on, lines, root };
    return root;
  }

  flip(k) { put(this.model, { shown: this.get("shown").map((v, i) => (i === k ? !v : v)) }); }

  focus(k) { if (this.get("focus") !== k) put(this.model, { focus: k }); }

  watch() {
    const { model } = this;
    for (const name of ["light", "stretch", "opacity", "overlay", "thresholds", "shown", "focus", "curves"]) model.on(`change:${name}`, () => this.refresh());
    model.on("change:pixel", () => this.views.forEach((v) => v.viewer.draw()));
    for (const name of ["why", "pixel"]) model.on(`change:${name}`, () => this.showWhy());
    model.on("change:view", () => this.views.forEach((v) => v.viewer.setView(this.get("view"), { tell: false })));
    this.showWhy();
    this.refresh();
  }

  refresh() {
    this.views.forEach((v) => v.viewer.draw());
    this.place?.viewer?.draw();
    this.showNumbers();
    this.showCurve();
    this.legend();
  }

  // numbers

  /** A figure of the curve of a segmenter and class at its threshold; null where it is 0 / 0. */
  at(s, k, what) { return this.get("curves")[s]?.[k]?.[what][Math.round(this.get("thresholds")[s][k] * 100)] ?? null; }

  showNumbers() {
    const thresholds = this.get("thresholds"), shown = this.get("shown"), word = (v) => (v == null ? "–" : v.toFixed(2));
    this.lines.forEach(({ on, lines, root }, k) => {
      on.setAttribute("aria-pressed", String(shown[k]));
      root.classList.toggle("aoi-focus", this.truth && this.get("focus") === k);
      lines.forEach(({ input, output, value }, s) => {
        input.value = thresholds[s][k];
        output.textContent = thresholds[s][k].toFixed(2);
        value.textContent = this.truth ? `IoU ${word(this.at(s, k, "iou"))}` : `${(100 * (this.at(s, k, "share") ?? 0)).toFixed(1)} %`;
      });
    });
    for (const { panel, value } of this.views) {
      if (panel === "truth" || !this.truth) continue;
      const ious = this.classes.map((_, k) => this.at(panel, k, "iou")).filter((v) => v != null);
      value.textContent = ious.length ? `mIoU ${(ious.reduce((a, b) => a + b, 0) / ious.length).toFixed(3)}` : "";
    }
  }

  showCurve() {
    if (!this.truth) return;
    const k = this.get("focus"), left = 30, top = 6, wide = 184, high = 88;
    this.curveHead.textContent = `Precision and recall: ${this.classes[k]}`;
    const x = (v) => left + v * wide, y = (v) => top + (1 - v) * high, nodes = [draw("path", { class: "aoi-axis", d: `M${left} ${top}V${top + high}H${left + wide}` })];
    for (const v of [0, 0.5, 1]) nodes.push(draw("text", { x: x(v), y: top + high + 11, "text-anchor": "middle" }, String(v)), draw("text", { x: left - 4, y: y(v) + 3, "text-anchor": "end" }, String(v)));
    nodes.push(draw("text", { x: x(0.5), y: top + high + 22, "text-anchor": "middle" }, "recall"), draw("text", { x: 8, y: y(0.5), "text-anchor": "middle", transform: `rotate(-90 8 ${y(0.5)})` }, "precision"));
    const words = [];
    this.segmenters.forEach((name, s) => {
      const curve = this.get("curves")[s]?.[k];
      if (!curve) return;
      const points = curve.recall.map((r, i) => [r, curve.precision[i]]).filter(([r, p]) => r != null && p != null);
      const colour = SERIES[s % SERIES.length], r = this.at(s, k, "recall"), p = this.at(s, k, "precision");
      nodes.push(draw("polyline", { points: points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" "), stroke: colour }));
      if (r != null && p != null) nodes.push(draw("circle", { cx: x(r), cy: y(p), r: 4, fill: colour, stroke: "#fff", "stroke-width": 1.5 }));
      if (this.segmenters.length > 1) nodes.push(draw("text", { x: left + 6, y: top + high - 6 - 12 * (this.segmenters.length - 1 - s), style: `fill: ${colour}; font-weight: 700` }, name));
      words.push(`${name}: precision ${p?.toFixed(2) ?? "none"}, recall ${r?.toFixed(2) ?? "none"}`);
    });
    this.curve.replaceChildren(...nodes);
    this.curve.setAttribute("role", "img");
    this.curve.setAttribute("aria-label", words.join("; "));
  }

  legend() {
    const overlay = this.get("overlay"), { legend } = this.page, errors = this.get("error_colours");
    if (overlay === "errors") legend.replaceChildren(...Object.entries(errors).map(([name, colour]) => swatch(name, colour, { fill: "solid" })));
    else if (overlay === "probability") legend.replaceChildren(colourBar(table256(this.model, "viridis"), [0, 1], "Probability"));
    else if (overlay === "novelty") legend.replaceChildren(colourBar(table256(this.model, "magma"), this.get("novelty_limits"), this.get("novelty_label").replace(/^n/, "N")));
    else legend.replaceChildren();
  }

  // drawing

  /** The planes of a part that belong to a panel: probabilities, truth, what is ignored, novelty. */
  planes(part, panel) {
    const K = this.classes.length, { lights } = this.source.meta, S = this.segmenters.length, from = (n, count) => part.planes.slice(lights + n, lights + n + count);
    return {
      probability: panel === "truth" ? [] : from(panel * K, K),
      truth: this.truth ? from(S * K, K) : [], ignore: this.truth ? from((S + 1) * K, K) : [],
      novelty: this.get("has_novelty") && panel !== "truth" ? from((S + (this.truth ? 2 : 0)) * K + panel, 1)[0] : null,
    };
  }

  paint(panel, context, { parts, pixel }) {
    const overlay = this.get("overlay"), shown = this.get("shown"), thresholds = panel === "truth" ? [] : this.get("thresholds")[panel], opacity = this.get("opacity");
    const key = JSON.stringify([overlay, shown, thresholds, opacity, this.source.version]);
    context.imageSmoothingEnabled = false;
    if (overlay !== "none") drawParts(context, parts, `panel${panel}`, key, (part) => this.overlay(part, panel, { overlay, shown, thresholds, opacity }));
    const at = this.cursor ?? this.get("pixel");
    if (at?.y != null) this.cross(context, at, pixel);
  }

  cross(context, { x, y }, pixel) {
    for (const [style, width] of [["#FFFFFF", 4], ["#D55E00", 2]]) {
      context.strokeStyle = style;
      context.lineWidth = width * pixel;
      context.beginPath();
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
        context.moveTo(x + 0.5 + dx * 4 * pixel, y + 0.5 + dy * 4 * pixel);
        context.lineTo(x + 0.5 + dx * 12 * pixel, y + 0.5 + dy * 12 * pixel);
      }
      context.stroke();
    }
    if (pixel < 0.5) markBox(context, x, y, 1, pixel, { line: 1 });
  }

  overlay(part, panel, { overlay, shown, thresholds, opacity }) {
    const { probability, truth, ignore, novelty } = this.planes(part, panel), colours = this.get("class_colours");
    const predicted = probability.map((p, k) => (shown[k] ? above(p, thresholds[k] * 255) : null)), real = truth.map((t, k) => (shown[k] ? above(t, 127) : null));
    if (panel === "truth") return masksOn(part, real, colours, { alpha: opacity });
    if (overlay === "mask") return masksOn(part, predicted, colours, { alpha: opacity });
    const canvas = new OffscreenCanvas(part.width, part.height), context = canvas.getContext("2d"), image = context.createImageData(part.width, part.height);
    if (overlay === "errors") this.errors(image.data, predicted, real, ignore.map((p) => above(p, 127)));
    else {
      const table = table256(this.model, overlay === "novelty" ? "magma" : "viridis"), lists = overlay === "novelty" ? [novelty] : probability.filter((_, k) => shown[k]);
      for (let i = 0, j = 0; i < part.width * part.height; i++, j += 4) {
        let v = 0;
        for (const list of lists) if (list[i] > v) v = list[i];
        for (let c = 0; c < 3; c++) image.data[j + c] = table[3 * v + c];
        image.data[j + 3] = 255 * Math.min(1, opacity + 0.35) * (0.3 + 0.7 * v / 255);
      }
    }
    context.putImageData(image, 0, 0);
    return canvas;
  }

  errors(out, predicted, real, ignore) {
    const [hit, wrong, missed] = Object.values(this.get("error_colours"));
    for (let i = 0, j = 0; j < out.length; i++, j += 4) {
      let colour = null, rank = 0;
      for (let k = 0; k < predicted.length; k++) {
        if (!predicted[k] || ignore[k]?.[i]) continue;
        const p = predicted[k][i], t = real[k][i];
        if (t && !p && rank < 3) { colour = missed; rank = 3; }
        else if (p && !t && rank < 2) { colour = wrong; rank = 2; }
        else if (p && t && rank < 1) { colour = hit; rank = 1; }
      }
      if (colour) { out.set(colour, j); out[j + 3] = 235; } else { out[j] = out[j + 1] = out[j + 2] = 0; out[j + 3] = 110; }
    }
  }

  // why

  ask(p) {
    this.cursor = null;
    put(this.model, { pixel: { y: Math.floor(p.y), x: Math.floor(p.x) } });
  }

  onKey(e) {
    const step = e.shiftKey ? 16 : 1, move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[e.key];
    if (move) {
      const start = this.cursor ?? (this.get("pixel")?.y != null ? this.get("pixel") : { y: this.source.height >> 1, x: this.source.width >> 1 });
      const to = (v, d, n) => Math.min(n - 1, Math.max(0, v + d * step));
      this.cursor = { y: to(start.y, move[0], this.source.height), x: to(start.x, move[1], this.source.width) };
      this.views.forEach((v) => v.viewer.reveal(this.cursor));
      this.tell(this.cursor);
    } else if (e.key === "Enter" && this.cursor) this.ask(this.cursor);
    else if (e.key === "Escape") { this.cursor = null; put(this.model, { pixel: null, place: null }); }
    else if (/^[1-9]$/.test(e.key) && Number(e.key) <= this.classes.length) this.flip(Number(e.key) - 1);
    else return false;
    this.views.forEach((v) => v.viewer.draw());
    return true;
  }

  /** What is under the pointer, from the overview: the kernel is not asked. */
  tell(p) {
    const { status } = this.page;
    if (!p || !this.source.whole) { status.textContent = "Click a pixel to ask why."; return; }
    const y = Math.floor(p.y), x = Math.floor(p.x), { whole } = this.source, i = Math.min(whole.height - 1, Math.floor(y / whole.side)) * whole.width + Math.min(whole.width - 1, Math.floor(x / whole.side));
    const words = this.segmenters.map((name, s) => {
      const found = this.planes(whole, s).probability.map((plane, k) => [this.classes[k], plane[i] / 255]).filter(([, v]) => v > 0.005).sort((a, b) => b[1] - a[1]);
      return `${name}: ${found.length ? found.slice(0, 3).map(([c, v]) => `${c} ${v.toFixed(2)}`).join(", ") : "nothing"}`;
    });
    status.textContent = `y ${y}, x ${x} – ${words.join("; ")}`;
  }

  showWhy() {
    const why = this.get("why"), pixel = this.get("pixel");
    if (pixel?.y == null || !why.length) {
      this.whyHead.textContent = "Why this pixel?";
      this.why.replaceChildren(make("p", { class: "aoi-note" }, "Click a pixel to see what it was taken for, and by which memories."));
      return;
    }
    this.whyHead.textContent = `Why this pixel? y ${pixel.y}, x ${pixel.x}`;
    const head = make("tr", {}, make("th", {}, ""), why.map((w) => make("th", { title: w.name }, w.name)), this.truth ? make("th", {}, "truth") : null);
    const body = this.classes.map((name, k) => make("tr", {}, make("th", {}, name),
      why.map((w) => make("td", { class: w.probabilities[k] > w.thresholds[k] ? "aoi-yes" : "", title: `threshold ${w.thresholds[k].toFixed(2)}` }, w.probabilities[k].toFixed(2))),
      this.truth ? make("td", {}, why[0].ignored[k] ? "?" : why[0].truth[k] ? "yes" : "no") : null));
    this.why.replaceChildren(make("table", { class: "aoi-table" }, head, body));
  }

  close() {
    this.views.forEach((v) => v.viewer.close());
    this.source.close();
    this.place.close();
    this.near?.close();
  }
}

function render({ model, el }) {
  const widget = new Inspector(model, el);
  el.aoi = widget;
  return () => widget.close();
}

export default { render: failing(render) };
