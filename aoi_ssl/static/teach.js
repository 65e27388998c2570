// teach: paint labels, and see at once what they teach. Strokes are drawn here and rasterised in Python, which answers with pixels.
import { Source, Viewer, above, button, choice, drawParts, failing, frame, lightChoices, make, masksOn, put, slider, swatch, toggle, watchTraits } from "./base.js";

const TOOLS = [
  ["brush", "Brush (B): drag", "b"], ["line", "Line (L): drag along a wire", "l"], ["circle", "Circle (C): drag from the centre of a ball", "c"],
  ["polygon", "Polygon (P): click the corners; a double click closes. By keyboard, Enter adds a corner, and Enter again closes", "p"], ["flood", "Flood (F): click an even area", "f"],
  ["eraser", "Eraser (E): back to unlabelled", "e"], ["pan", "Pan (V): drag the picture", "v"],
];
const PATIENCE = 5000; // ms without an answer, after which the user is told
const KEYS = [
  ["B L C P F E V", "tools"], ["1 to 9, 0", "class; background"], ["[ and ]", "thinner, thicker"], ["Ctrl+Z, Ctrl+Shift+Z", "undo, redo"], ["Arrow keys", "move a cursor; with Shift by 16"],
  ["Enter", "paint at the cursor; with line and circle: begin, then end; with a polygon: a corner, and again at the same place: close"], ["Esc", "give up what is begun"], ["A", "accept the prediction"], ["N, Shift+N", "next, previous image"],
  ["Middle button", "pan"], ["Wheel, + and -", "zoom; Home shows all"],
];

class Teacher {
  constructor(model, el) {
    this.model = model;
    this.page = frame(model, el, { label: "teach by painting labels", keys: KEYS });
    this.classes = this.get("classes");
    this.pending = new Map();
    this.asked = new Map();
    this.count = 0;
    this.tag = Math.random().toString(36).slice(2); // a handle may be shown in several places
    this.silent = make("div", { class: "aoi-error aoi-silent", role: "alert", hidden: true });
    this.page.error.after(this.silent);
    this.views = [this.mainView(), this.nextView()];
    this.toolbar();
    this.lay();
    this.watch();
  }

  /** The traits hold the pictures as they were when the image was chosen: once they are here, ask for what was painted since. */
  loaded() {
    if (this.fresh || !this.views?.every((v) => v.source.whole)) return;
    this.fresh = true;
    this.send("refresh");
  }

  get(name) { return this.model.get(name); }

  /** Ask Python, which says when it is done: what waits for long is told. */
  send(kind, more = {}) {
    const id = `${this.tag}/${++this.count}`;
    this.asked.set(id, Date.now());
    this.clock ??= setInterval(() => this.tellWaiting(), 500);
    try { this.model.send({ kind, ...more, id }); } catch (e) { console.error(e); } // a kernel that was shut down: it is told as one that is silent
    return id;
  }

  tellWaiting() {
    const since = Math.min(...this.asked.values()), late = Date.now() - since > PATIENCE, strokes = this.pending.size;
    this.silent.hidden = !late;
    const lost = strokes ? ` ${strokes === 1 ? "1 stroke is" : `${strokes} strokes are`} not taken yet.` : "";
    if (late) this.silent.textContent = `The kernel does not answer.${lost} If it is not just busy, run the cell again.`;
    if (!this.asked.size) { clearInterval(this.clock); this.clock = null; }
  }

  // parts of the page

  toolbar() {
    const { bar } = this.page, { model } = this;
    this.tools = TOOLS.map(([name, title]) => [name, button(title, () => this.pick(name), { glyph: name, "aria-pressed": "false" })]);
    this.undo = button("Undo (Ctrl+Z)", () => this.send("undo"), { glyph: "undo" });
    this.redo = button("Redo (Ctrl+Shift+Z)", () => this.send("redo"), { glyph: "redo" });
    bar.append(make("span", { class: "aoi-group", role: "group", "aria-label": "tool" }, this.tools.map(([, b]) => b)),
      slider(model, "size", "Width", { min: 1, max: 64, step: 1, digits: 0, title: "Width of brush, line and eraser in pixels" }),
      slider(model, "tolerance", "Tolerance", { min: 0, max: 0.5, title: "How far the grey value may differ for the flood" }),
      toggle(model, "only", "Replace", "What is painted has this class only; otherwise classes overlap"),
      make("span", { class: "aoi-group" }, this.undo, this.redo),
      ...lightChoices(model), toggle(model, "show_labels", "Labels"), toggle(model, "show_prediction", "Prediction"), slider(model, "opacity", "Opacity"));
    const colours = this.get("class_colours");
    this.swatches = this.classes.map((name, k) => swatch(name, colours[k], { onclick: () => put(model, { brush: name }) }));
    this.swatches.push(swatch("background", [120, 128, 136], { onclick: () => put(model, { brush: "background" }) }));
    this.swatches.forEach((s, k) => (s.title = k < this.classes.length ? `Paint ${this.classes[k]} (${k + 1})` : "Paint what is none of the classes (0)"));
    this.palette = make("div", { class: "aoi-bar aoi-palette", role: "group", "aria-label": "class" }, make("span", { class: "aoi-note" }, "Paint"), this.swatches);
    bar.after(this.palette);
  }

  mainView() {
    const source = new Source(this.model, 0, () => { this.title.textContent = this.title.title = source.meta.name; viewer.resize(); this.loaded(); });
    const viewer = new Viewer({
      label: "image to label", source, look: () => ({ light: this.get("light"), stretch: this.get("stretch") }), paint: (context, view) => this.paint(context, view),
      view: { ...this.get("view") }, onView: (view) => put(this.model, { view: { ...view } }),
      act: {
        stroke: (p) => this.begin(p), extend: (p) => this.extend(p), finish: () => this.finish(), hover: (p) => this.hover(p), click: (p) => this.click(p),
        double: () => this.closePolygon(), key: (e) => this.onKey(e),
      },
    });
    viewer.most = 640;
    this.title = make("span", {});
    this.where = make("span", { class: "aoi-value" });
    return { source, viewer, root: make("figure", { class: "aoi-figure aoi-main" }, make("figcaption", {}, this.title, this.where), viewer.root) };
  }

  nextView() {
    const title = make("span", {}), caption = make("figcaption", {}, title, button("Go to this image (N)", () => this.send("go", { index: this.get("next_index") }), { glyph: "next" }));
    const source = new Source(this.model, 1, () => { title.textContent = title.title = `Next: ${source.meta.name}`; viewer.resize(); this.loaded(); });
    const viewer = new Viewer({
      label: "prediction of the next image", source, look: () => ({ light: this.get("light"), stretch: this.get("stretch") }),
      paint: (context, { parts }) => this.paintPrediction(context, parts, source, 0),
    });
    viewer.most = 240;
    return { source, viewer, root: make("figure", { class: "aoi-figure" }, caption, viewer.root) };
  }

  lay() {
    this.names = make("select", { class: "aoi-select", "aria-label": "image", onchange: () => this.send("go", { index: this.names.selectedIndex }) });
    const pager = make("div", { class: "aoi-pager" }, button("Previous image (Shift+N)", () => this.step(-1), { glyph: "previous" }), this.names,
      button("Next image (N)", () => this.step(1), { glyph: "next" }), button("The image that would teach most", () => this.send("suggest"), { glyph: "star" }));
    this.rows = this.classes.map((name, k) => this.classRow(name, k));
    this.unlabelled = make("td", {});
    this.facts = make("table", { class: "aoi-table" }, make("tr", {}, ["", "labelled", "predicted", "threshold"].map((text) => make("th", {}, text))),
      this.rows.map((row) => row.root), make("tr", {}, make("th", {}, "unlabelled"), this.unlabelled));
    const act = (text, title, kind, glyph) => button(title, () => this.send(kind), { text, glyph });
    this.bankButton = act("Into the bank", "Put the labels of this image into the bank", "learn", "bank");
    const actions = make("div", { class: "aoi-actions" }, act("Accept", "Accept the prediction wherever nothing is labelled (A)", "accept", "check"),
      act("Rest is background", "All that is not labelled is background", "rest"), this.bankButton, act("Save", "Save the masks of all images that have labels", "save", "save"));
    this.question = make("div", { class: "aoi-question", role: "alertdialog", hidden: true });
    this.bankLine = make("p", { class: "aoi-note" });
    this.kept = make("p", { class: "aoi-note aoi-kept" });
    this.odd = make("ul", { class: "aoi-odd", role: "status", "aria-label": "look again" });
    const side = make("div", { class: "aoi-side aoi-wide" }, pager, this.facts, actions, this.question, this.odd,
      make("div", { class: "aoi-group" }, toggle(this.model, "learning", "Learn from each stroke", "Put the labels into the bank after each stroke, and predict anew")), this.bankLine, this.kept, this.views[1].root);
    this.page.body.append(this.views[0].root, side);
    const grey = [120, 128, 136];
    this.page.legend.append(swatch("labelled: filled", grey), swatch("predicted: striped", grey, { fill: "hatched" }));
  }

  /** A class in the table: its shares, its threshold, and a way to give a threshold that was set by hand back to the bank. */
  classRow(name, k) {
    const input = make("input", { type: "range", min: 0, max: 1, step: 0.02, "aria-label": `threshold of ${name}`, title: "Above this probability a pixel is predicted" });
    const output = make("button", { type: "button", class: "aoi-held", onclick: () => this.send("release", { class: name }) });
    const labelled = make("td", {}), predicted = make("td", {});
    input.addEventListener("input", () => { // drawn at once, told to Python at the end
      this.model.set("cuts", this.get("cuts").map((v, i) => (i === k ? Number(input.value) : v)));
    });
    input.addEventListener("change", () => this.model.save_changes());
    const root = make("tr", {}, make("th", {}, swatch(name, this.get("class_colours")[k])), labelled, predicted, make("td", {}, make("span", { class: "aoi-cut" }, input, output)));
    return { root, labelled, predicted, input, output };
  }

  showCuts() {
    const cuts = this.get("cuts"), mine = this.get("by_hand");
    this.rows.forEach(({ input, output }, k) => {
      const name = this.classes[k], hand = mine.includes(name), value = cuts[k].toFixed(2);
      input.value = cuts[k];
      input.setAttribute("aria-valuetext", `${value}, ${hand ? "set by hand" : "chosen by the bank"}`);
      output.textContent = value;
      output.disabled = !hand;
      output.title = hand ? `Set by hand. Click: the bank chooses the threshold of ${name} again` : "Chosen by the bank";
      output.setAttribute("aria-label", output.title);
    });
  }

  watch() {
    const { model } = this, redraw = () => this.views.forEach((v) => v.viewer.draw());
    for (const name of ["light", "stretch", "opacity", "show_labels", "show_prediction", "cuts"]) model.on(`change:${name}`, redraw);
    model.on("change:view", () => this.views[0].viewer.setView(this.get("view"), { tell: false }));
    model.on("msg:custom", (message) => {
      if (message.done == null) return;
      this.asked.delete(message.done);
      this.pending.delete(message.done);
      this.tellWaiting();
      this.views[0].viewer.draw();
    });
    watchTraits(model, "tool", () => this.tools.forEach(([name, b]) => b.setAttribute("aria-pressed", String(name === this.get("tool")))));
    watchTraits(model, "brush", () => this.swatches.forEach((s, k) => s.setAttribute("aria-pressed", String((this.classes[k] ?? "background") === this.get("brush")))));
    watchTraits(model, ["state", "names", "index"], () => this.showState());
    watchTraits(model, "question", () => this.showQuestion());
    watchTraits(model, "kept", () => (this.kept.textContent = this.get("kept")));
    watchTraits(model, ["cuts", "by_hand"], () => this.showCuts());
    for (const name of ["index", "tool"]) model.on(`change:${name}`, () => { this.shape = null; this.cursor = null; redraw(); });
  }

  showState() {
    const names = this.get("names"), index = this.get("index"), s = this.get("state"), percent = (v) => `${(100 * v).toFixed(v < 0.0995 ? 2 : 1)} %`;
    if (this.names.childElementCount !== names.length) this.names.replaceChildren(...names.map((n) => make("option", {}, n)));
    names.forEach((n, i) => (this.names.children[i].textContent = `${s.marks?.[i] ?? ""} ${n}`.trim()));
    this.names.selectedIndex = index;
    this.where.textContent = `${index + 1} of ${names.length}`;
    this.undo.disabled = !s.undo;
    this.redo.disabled = !s.redo;
    if (s.shares == null) return;
    this.rows.forEach((row, k) => {
      row.labelled.textContent = percent(s.shares[k]);
      row.predicted.textContent = s.predicted ? percent(s.predicted[k]) : "–";
    });
    this.unlabelled.textContent = percent(s.unlabelled);
    this.odd.replaceChildren(...(s.odd ?? []).map((text) => make("li", {}, text)));
    this.bankLine.textContent = s.hint || s.bank;
  }

  showQuestion() {
    const text = this.get("question");
    this.question.hidden = !text;
    if (!text) return;
    const verb = text.match(/([^.]*) them\?$/)?.[1].trim() ?? "Replace"; // the question ends with what is to be done
    this.question.replaceChildren(make("p", {}, text), make("div", { class: "aoi-group" },
      button(`${verb} them`, () => this.send("save", { overwrite: true }), { text: verb }), button("Save nothing", () => put(this.model, { question: "" }), { text: "Cancel" })));
    this.question.querySelector("button:last-of-type").focus();
  }

  // drawing

  colour(name = this.get("brush")) {
    const k = this.classes.indexOf(name);
    return `rgb(${(k < 0 ? [190, 198, 206] : this.get("class_colours")[k]).join(" ")})`;
  }

  paintPrediction(context, parts, source, start) {
    if (!this.get("show_prediction")) return;
    const K = this.classes.length, cuts = this.get("cuts"), colours = this.get("class_colours"), alpha = Math.min(1, this.get("opacity") + 0.25);
    drawParts(context, parts, "prediction", JSON.stringify([cuts, alpha, source.edits, source.version]), (part) =>
      masksOn(part, part.planes.slice(source.meta.lights + start, source.meta.lights + start + K).map((p, k) => above(p, cuts[k] * 255)), colours, { alpha, hatched: true }));
  }

  paint(context, { parts, pixel }) {
    const { source } = this.views[0], K = this.classes.length, { lights } = source.meta, colours = this.get("class_colours");
    context.imageSmoothingEnabled = false;
    this.paintPrediction(context, parts, source, K + 1);
    if (this.get("show_labels")) {
      const alpha = Math.min(1, this.get("opacity") + 0.25);
      drawParts(context, parts, "labels", JSON.stringify([alpha, source.edits, source.version]), (part) => {
        const planes = part.planes.slice(lights, lights + K + 1), masks = planes.slice(0, K).map((p) => above(p, 127)), known = planes[K];
        const bare = known.map((v, i) => (v > 127 && !masks.some((m) => m[i]) ? 1 : 0));
        return masksOn(part, [bare, ...masks], [[190, 198, 206], ...colours], { alpha });
      });
    }
    context.lineCap = context.lineJoin = "round";
    for (const op of this.pending.values()) this.trace(context, op, pixel);
    if (this.shape) this.trace(context, this.shape, pixel);
    this.paintCursor(context, pixel);
  }

  /** Draw a stroke that Python has not answered yet. */
  trace(context, { tool, points, size, name }, pixel) {
    const colour = tool === "eraser" ? "#FFFFFF" : this.colour(name), [[x, y]] = points;
    context.save();
    context.globalAlpha = 0.6;
    context.strokeStyle = context.fillStyle = colour;
    context.beginPath();
    if (tool === "circle") {
      context.arc(x, y, Math.max(pixel, Math.hypot(points.at(-1)[0] - x, points.at(-1)[1] - y)), 0, 2 * Math.PI);
      context.fill();
    } else if (tool === "flood") {
      context.arc(x, y, 5 * pixel, 0, 2 * Math.PI);
      context.fill();
    } else {
      context.moveTo(x, y);
      for (const [a, b] of points.slice(1)) context.lineTo(a, b);
      if (tool === "polygon") {
        context.globalAlpha = 0.35;
        context.fill();
        context.globalAlpha = 1;
        context.lineWidth = 2 * pixel;
        context.stroke();
        for (const [a, b] of points) { context.beginPath(); context.arc(a, b, 3.5 * pixel, 0, 2 * Math.PI); context.fill(); }
      } else {
        if (points.length === 1) context.lineTo(x + 1e-3, y);
        context.lineWidth = size;
        context.stroke();
      }
    }
    context.restore();
  }

  paintCursor(context, pixel) {
    const at = this.cursor ?? this.pointer, tool = this.get("tool");
    if (!at || tool === "pan") return;
    const r = ["brush", "line", "eraser"].includes(tool) ? this.get("size") / 2 : 3 * pixel;
    for (const [style, width] of [["#FFFFFF", 3], ["#1F2328", 1]]) {
      context.strokeStyle = style;
      context.lineWidth = width * pixel;
      context.beginPath();
      context.arc(at.x, at.y, Math.max(r, 1.5 * pixel), 0, 2 * Math.PI);
      if (this.cursor) for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) { context.moveTo(at.x + dx * (r + 3 * pixel), at.y + dy * (r + 3 * pixel)); context.lineTo(at.x + dx * (r + 9 * pixel), at.y + dy * (r + 9 * pixel)); }
      context.stroke();
    }
  }

  // strokes

  pick(tool) { put(this.model, { tool }); }

  start(p) { this.shape = { tool: this.get("tool"), name: this.get("brush"), size: this.get("size"), points: [[p.x, p.y]] }; }

  begin(p) {
    this.cursor = null;
    const tool = this.get("tool");
    if (!["brush", "line", "circle", "eraser"].includes(tool)) return false;
    this.start(p);
    this.views[0].viewer.draw();
    return true;
  }

  extend(p) {
    if (!this.shape) return;
    const { points, tool } = this.shape, last = points.at(-1);
    if (tool === "line" || tool === "circle") this.shape.points = [points[0], [p.x, p.y]];
    else if (Math.hypot(p.x - last[0], p.y - last[1]) >= 0.5) points.push([p.x, p.y]);
    this.pointer = p;
    this.views[0].viewer.draw();
  }

  finish() {
    const shape = this.shape;
    this.shape = null;
    if (!shape || (shape.tool === "circle" && shape.points.length < 2)) return;
    this.commit(shape);
  }

  commit({ tool, name, size, points }) {
    const round = points.map(([x, y]) => [Math.round(x * 100) / 100, Math.round(y * 100) / 100]);
    const id = this.send("paint", { tool, class: tool === "eraser" ? null : name, points: round, size });
    this.pending.set(id, { tool, name, size, points: round });
    this.views[0].viewer.draw();
  }

  /** A click, or Enter: a corner of a polygon that is there already, the first (within `near` pixels) or the last, closes it. */
  click(p, near = 8 * this.pixel()) {
    const tool = this.get("tool"), to = ([x, y]) => Math.hypot(p.x - x, p.y - y);
    if (tool === "flood") { this.start(p); this.finish(); }
    if (tool !== "polygon") return;
    const points = this.shape?.points;
    if (!points) this.start(p);
    else if (to(points.at(-1)) < near / 2 || (points.length > 2 && to(points[0]) < near)) return this.closePolygon();
    else points.push([p.x, p.y]);
    this.views[0].viewer.draw();
  }

  closePolygon() {
    if (this.get("tool") !== "polygon" || !this.shape) return;
    if (this.shape.points.length > 2) this.finish();
    else this.page.status.textContent = "A polygon needs three corners.";
  }

  pixel() { return 1 / this.views[0].viewer.transform().scale; }

  hover(p) {
    this.pointer = p;
    if (p) this.cursor = null;
    this.views[0].viewer.draw();
    this.tell(p);
  }

  tell(p) {
    const { status } = this.page, { source } = this.views[0], K = this.classes.length;
    if (!p || !source.whole) { status.textContent = ""; return; }
    const { whole } = source, i = Math.min(whole.height - 1, Math.floor(p.y / whole.side)) * whole.width + Math.min(whole.width - 1, Math.floor(p.x / whole.side));
    const planes = whole.planes.slice(source.meta.lights), labels = this.classes.filter((_, k) => planes[k][i] > 127);
    const label = planes[K][i] > 127 ? labels.join(", ") || "background" : "unlabelled";
    const guess = this.classes.map((c, k) => [c, planes[K + 1 + k][i] / 255]).filter(([, v]) => v > 0.05).map(([c, v]) => `${c} ${v.toFixed(2)}`).join(", ");
    status.textContent = `y ${Math.floor(p.y)}, x ${Math.floor(p.x)}: ${label}${guess ? `; predicted ${guess}` : ""}`;
  }

  step(by) {
    const n = this.get("names").length;
    this.send("go", { index: (this.get("index") + by + n) % n });
  }

  // keys

  onKey(e) {
    const { viewer, source } = this.views[0], command = e.ctrlKey || e.metaKey, tool = this.get("tool"), key = e.key.toLowerCase();
    if (command && key === "z") this.send(e.shiftKey ? "redo" : "undo");
    else if (command && key === "y") this.send("redo");
    else if (command) return false;
    else if (e.key.startsWith("Arrow")) {
      const [dy, dx] = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[e.key], far = e.shiftKey ? 16 : 1;
      const at = this.cursor ?? this.pointer ?? { x: source.width / 2, y: source.height / 2 }, to = (v, d, n) => Math.min(n - 0.5, Math.max(0.5, Math.floor(v) + 0.5 + d * far));
      this.cursor = { x: to(at.x, dx, source.width), y: to(at.y, dy, source.height) };
      viewer.reveal(this.cursor);
      if (this.shape && (tool === "line" || tool === "circle")) this.shape.points = [this.shape.points[0], [this.cursor.x, this.cursor.y]];
      this.tell(this.cursor);
      viewer.draw();
    } else if (e.key === "Enter") this.enter(e);
    else if (e.key === "Escape") { this.shape = null; viewer.draw(); }
    else if (e.key === "Home") viewer.fit();
    else if (/^[0-9]$/.test(e.key)) put(this.model, { brush: this.classes[Number(e.key) - 1] ?? "background" });
    else if (e.key === "[" || e.key === "]") put(this.model, { size: Math.min(64, Math.max(1, this.get("size") + (e.key === "]" ? 1 : -1))) });
    else if (key === "a") this.send("accept");
    else if (key === "n") this.step(e.shiftKey ? -1 : 1);
    else if (TOOLS.some(([, , k]) => k === key)) this.pick(TOOLS.find(([, , k]) => k === key)[0]);
    else return false;
    return true;
  }

  enter() {
    const at = this.cursor ?? this.pointer, tool = this.get("tool");
    if (tool === "polygon" && this.shape && !this.cursor) return this.closePolygon();
    if (!at) return;
    if ((tool === "line" || tool === "circle") && this.shape) { this.finish(); return; }
    if (tool === "polygon") { this.click(at, 1); return; }
    this.start(at);
    if (tool !== "line" && tool !== "circle") this.finish();
    this.views[0].viewer.draw();
  }

  close() { clearInterval(this.clock); this.views.forEach((v) => { v.viewer.close(); v.source.close(); }); }
}

function render({ model, el }) {
  const widget = new Teacher(model, el);
  el.aoi = widget;
  return () => widget.close();
}

export default { render: failing(render) };
