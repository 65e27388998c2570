// explore: hold patches, see what is similar to them in this image, in others and in the bank.
import { NearList, PlaceView, Source, Viewer, button, bytesOf, choice, colourBar, cutOut, failing, frame, gridCanvas, lightChoices, make, markBox, put, slider, table256, toggle } from "./base.js";

const KEYS = [
  ["Click, Enter", "hold the patch"], ["Shift + click", "add one: the mean of all held"], ["Alt + click", "subtract one"],
  ["Arrow keys", "move by a patch; with Shift by 4"], ["Esc", "let go of all"], ["Drag", "pan"], ["Wheel, + and -", "zoom, once the picture has the focus; 0 shows all"],
];

/** The grids of patch embeddings of all images, and what a click computes: one product of a matrix and a vector. */
class Grids {
  constructor(model) {
    this.model = model;
    this.load();
  }

  load() {
    const keys = this.model.get("packed"), sizes = this.model.get("packed_scales");
    this.grids = this.model.get("grids").map((grid, i) => ({
      ...grid, keys: new Int8Array(bytesOf(keys[i]).buffer, bytesOf(keys[i]).byteOffset, bytesOf(keys[i]).byteLength),
      sizes: new Float32Array(bytesOf(sizes[i]).slice().buffer),
    }));
  }

  /** One embedding, of length 1. */
  vector({ image, row, column }) {
    const { keys, sizes, columns, dim } = this.grids[image], at = row * columns + column;
    return Float32Array.from(keys.subarray(at * dim, (at + 1) * dim), (v) => v * sizes[at]);
  }

  /** The mean of the held embeddings less the mean of the subtracted ones, of length 1. */
  query(held) {
    const sum = new Float32Array(this.grids[0].dim);
    for (const minus of [false, true]) {
      const some = held.filter((h) => !!h.minus === minus);
      for (const one of some) this.vector(one).forEach((v, d) => (sum[d] += (minus ? -v : v) / some.length));
    }
    const length = Math.hypot(...sum) || 1;
    return sum.map((v) => v / length);
  }

  similarity(image, query) {
    const { keys, sizes, dim } = this.grids[image], out = new Float32Array(sizes.length), whole = dim - dim % 4;
    for (let i = 0, at = 0; i < out.length; i++, at += dim) {  // four sums at once: three times as fast
      let a = 0, b = 0, c = 0, e = 0, d = 0;
      for (; d < whole; d += 4) {
        a += keys[at + d] * query[d];
        b += keys[at + d + 1] * query[d + 1];
        c += keys[at + d + 2] * query[d + 2];
        e += keys[at + d + 3] * query[d + 3];
      }
      for (; d < dim; d++) a += keys[at + d] * query[d];
      out[i] = (a + b + c + e) * sizes[i];
    }
    return out;
  }
}

class Explorer {
  constructor(model, el) {
    this.model = model;
    this.page = frame(model, el, { label: "explore patch similarity", keys: KEYS });
    this.grids = new Grids(model);
    this.cursor = null;
    this.hover = null;
    this.toolbar();
    this.views = model.get("grids").map((_, i) => this.figure(i));
    this.lay();
    this.watch();
  }

  get(name) { return this.model.get(name); }

  toolbar() {
    const { model, page } = this, parts = [];
    parts.push(...lightChoices(model));
    parts.push(choice(model, "overlay", "Show", [
      { text: "Similarity", value: "similarity" }, { text: "PCA", value: "pca", title: "The first three principal components of the embeddings as red, green and blue" }, { text: "Image", value: "none" }]));
    parts.push(slider(model, "opacity", "Opacity"));
    parts.push(slider(model, "threshold", "Threshold", { off: "off", title: "Colour only patches that are at least so similar" }));
    parts.push(choice(model, "colours", "Scale", this.get("colour_names").map((value) => ({ text: value, value })), { list: true }));
    parts.push(choice(model, "space", "Features", this.get("spaces").map((value) => ({ text: value[0].toUpperCase() + value.slice(1), value }))));
    if (this.get("layers").length > 1) parts.push(choice(model, "layer", "Layer", this.get("layers").map((value) => ({ text: value == null ? "all in use" : `block ${value}`, value })), { list: true }));
    page.bar.append(...parts);
  }

  figure(index) {
    const title = make("span", {}), caption = make("figcaption", {}, title);
    const source = new Source(this.model, index, () => {
      title.textContent = title.title = source.meta.name;
      viewer.resize();
      if (this.chips) { this.showPatches(); this.showHeld(); }
    });
    const viewer = new Viewer({
      label: index ? `other image ${index}: similarity to the held patches` : "image: hold a patch to see what is similar to it",
      source, look: () => ({ light: this.get("light"), stretch: this.get("stretch") }),
      paint: (context, view) => this.paint(index, context, view),
      act: { hover: (p) => this.onHover(index, p), click: (p, e) => this.hold(this.patchAt(index, p), e), key: (e) => this.onKey(index, e) },
      view: index ? undefined : { ...this.get("view") }, onView: index ? undefined : (view) => put(this.model, { view: { ...view } }),
    });
    viewer.most = index ? 300 : 620;
    return { source, viewer, root: make("figure", { class: "aoi-figure" }, caption, viewer.root) };
  }

  lay() {
    const [first, ...others] = this.views, { body } = this.page;
    first.root.classList.add("aoi-main");
    body.append(first.root);
    this.place = new PlaceView(this.model, () => ({ light: this.get("light"), stretch: this.get("stretch") }));
    this.more = make("div", { class: "aoi-more" }, this.place.root, others.map((v) => v.root));
    this.place.onChange = () => (this.more.hidden = !others.length && this.place.root.hidden);
    this.place.onChange();
    this.patches = make("div", { class: "aoi-patches" });
    this.chips = make("div", { class: "aoi-chips" });
    this.near = this.get("has_bank") ? new NearList(this.model) : null;
    this.clear = button("Let go of all held patches", () => put(this.model, { held: [] }), { glyph: "close" });
    this.side = make("div", { class: "aoi-side" },
      make("div", {}, make("div", { class: "aoi-head" }, this.patchName = make("span", {}, "Patch")), this.patches),
      make("div", {}, make("div", { class: "aoi-head" }, make("span", {}, "Held"), this.clear), this.chips),
      this.near && make("div", {}, make("div", { class: "aoi-head" }, make("span", {}, "Nearest in the bank")), this.near.root));
    body.append(this.more, this.side);
  }

  watch() {
    const { model } = this, redraw = () => this.views.forEach((v) => v.viewer.draw());
    for (const name of ["light", "stretch", "opacity", "threshold", "colours", "overlay", "limits"]) model.on(`change:${name}`, () => { redraw(); this.legend(); });
    for (const name of ["light", "stretch"]) model.on(`change:${name}`, () => { this.showPatches(); this.showHeld(); this.place.viewer?.draw(); });
    model.on("change:packed_scales", () => { this.grids.load(); this.pca = this.asked = null; this.update(); });
    model.on("change:pca", () => { this.pca = null; redraw(); });
    model.on("change:held", () => this.update());
    model.on("change:view", () => { const v = this.get("view"); this.views[0].viewer.setView(v, { tell: false }); });
    this.update();
  }

  patchAt(image, p) {
    const { patch, rows, columns } = this.grids.grids[image];
    return { image, row: Math.min(rows - 1, Math.max(0, Math.floor(p.y / patch))), column: Math.min(columns - 1, Math.max(0, Math.floor(p.x / patch))) };
  }

  // what is held and hovered

  hold(one, e) {
    this.cursor = one;
    const held = this.get("held"), minus = e.altKey, add = e.shiftKey || minus;
    const same = (h) => h.image === one.image && h.row === one.row && h.column === one.column;
    if (add && held.some(same)) put(this.model, { held: held.filter((h) => !same(h)) });
    else put(this.model, { held: add ? [...held, { ...one, minus }] : [{ ...one, minus: false }] });
  }

  onHover(image, p) {
    const next = p && this.patchAt(image, p);
    if (JSON.stringify(next) === JSON.stringify(this.hover)) return;
    this.hover = next;
    if (next) this.cursor = null;
    this.update({ hover: true });
  }

  onKey(image, e) {
    const step = e.shiftKey ? 4 : 1, move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[e.key];
    const { rows, columns, patch } = this.grids.grids[image];
    if (move) {
      const last = this.get("held").at(-1), start = this.cursor?.image === image ? this.cursor : last?.image === image ? last : { row: rows >> 1, column: columns >> 1 };
      const to = (v, d, n) => Math.min(n - 1, Math.max(0, v + d * step));
      this.cursor = { image, row: to(start.row, move[0], rows), column: to(start.column, move[1], columns) };
      this.hover = null;
      this.views[image].viewer.reveal({ x: (this.cursor.column + 0.5) * patch, y: (this.cursor.row + 0.5) * patch });
      this.update({ hover: true });
      return true;
    }
    if (e.key === "Enter" && (this.cursor ?? this.hover)) { this.hold(this.cursor ?? this.hover, e); return true; }
    if (e.key === "Escape") { this.cursor = null; put(this.model, { held: [] }); this.update(); return true; }
    return false;
  }

  update({ hover = false } = {}) {
    const held = this.get("held"), shown = held.length ? held : this.current() ? [this.current()] : [];
    if (!hover || !held.length) {
      const asked = JSON.stringify(shown);
      if (asked !== this.asked) {  // a large image has many millions of products
        const query = shown.length && this.grids.query(shown);
        this.maps = shown.length ? this.views.map((_, i) => this.grids.similarity(i, query)) : null;
        this.asked = asked;
      }
    }
    this.views.forEach((v) => v.viewer.draw());
    this.legend();
    this.showPatches();
    if (!hover) this.showHeld();
    this.tell();
  }

  current() { return this.cursor ?? this.hover; }

  /** The ends of the colour scale, as show.scale_limits: the lowest tenth, and the most similar patch that is not held. */
  limits() {
    const own = this.get("limits");
    if (own || !this.maps) return own ?? [0, 1];
    if (this.range?.maps !== this.maps) {
      const held = this.get("held").length ? this.get("held") : [this.current()];
      const values = this.maps.map((map, i) => map.filter((_, k) => !held.some((h) => h.image === i && h.row * this.grids.grids[i].columns + h.column === k)));
      const all = new Float32Array(values.reduce((n, v) => n + v.length, 0));
      values.reduce((at, v) => { all.set(v, at); return at + v.length; }, 0);
      all.sort();
      this.range = { maps: this.maps, ends: all.length ? [all[Math.floor(all.length / 10)], all[all.length - 1]] : [0, 1] };
    }
    return this.range.ends;
  }

  // drawing

  paint(image, context, { pixel }) {
    const { rows, columns, patch } = this.grids.grids[image], overlay = this.get("overlay"), opacity = this.get("opacity");
    context.imageSmoothingEnabled = false;
    if (overlay === "pca") {
      this.pca ??= this.get("pca").map((bytes, i) => { const rgb = bytesOf(bytes), g = this.grids.grids[i]; return gridCanvas(g.rows, g.columns, (k, out, at) => { out.set(rgb.subarray(3 * k, 3 * k + 3), at); out[at + 3] = 255; }); });
      context.globalAlpha = opacity;
      context.drawImage(this.pca[image], 0, 0, columns * patch, rows * patch);
      context.globalAlpha = 1;
    } else if (overlay === "similarity" && this.maps) {
      const map = this.maps[image], table = table256(this.model, this.get("colours")), [low, high] = this.limits(), threshold = this.get("threshold");
      const canvas = gridCanvas(rows, columns, (i, out, to) => {
        const share = Math.min(1, Math.max(0, (map[i] - low) / Math.max(high - low, 1e-6))), at = 3 * Math.round(share * 255);
        for (let c = 0; c < 3; c++) out[to + c] = table[at + c];
        out[to + 3] = Math.round(255 * opacity * (threshold == null ? 0.3 + 0.7 * share : map[i] >= threshold ? 1 : 0));
      });
      context.drawImage(canvas, 0, 0, columns * patch, rows * patch);
    }
    for (const one of this.get("held")) if (one.image === image) markBox(context, one.column * patch, one.row * patch, patch, pixel, { colour: one.minus ? "#0072B2" : "#D55E00", dashed: one.minus });
    const at = this.current();
    if (at?.image === image) markBox(context, at.column * patch, at.row * patch, patch, pixel, { colour: "#1F2328", line: 1 });
  }

  legend() {
    const overlay = this.get("overlay"), { legend } = this.page;
    if (overlay === "similarity" && this.maps) legend.replaceChildren(colourBar(table256(this.model, this.get("colours")), this.limits(), "Cosine"));
    else legend.replaceChildren(overlay === "pca" ? make("span", { class: "aoi-note" }, "Principal components 1, 2, 3 as red, green, blue") : "");
  }

  tell() {
    const at = this.current() ?? this.get("held").at(-1), { status } = this.page;
    if (!at) { status.textContent = "Move over the image; click to hold a patch."; return; }
    const { patch, columns } = this.grids.grids[at.image], y = at.row * patch, x = at.column * patch;
    const value = this.maps ? `, similarity ${this.maps[at.image][at.row * columns + at.column].toFixed(3)}` : "";
    const where = at.image ? `${this.views[at.image].source.meta?.name ?? "other image"}: ` : "";
    status.textContent = `${where}row ${at.row}, column ${at.column} (y ${y}, x ${x})${value}`;
  }

  // the side

  crop(one, canvas, light, margin) {
    const { source } = this.views[one.image], { patch } = this.grids.grids[one.image], context = canvas.getContext("2d");
    const side = patch * (1 + 2 * margin), scale = 148 / side, left = (one.column - margin) * patch, top = (one.row - margin) * patch;
    canvas.width = canvas.height = 148;
    context.setTransform(scale, 0, 0, scale, -left * scale, -top * scale);
    context.imageSmoothingEnabled = false;
    const look = { light, stretch: this.get("stretch") };
    const box = { x0: left, y0: top, x1: Math.min(source.width, left + side), y1: Math.min(source.height, top + side) };
    for (const part of source.parts(box, scale)) cutOut(context, source, part, look, box);
    if (margin) markBox(context, one.column * patch, one.row * patch, patch, 1 / scale, { line: 2, colour: "#1F2328" });
  }

  showPatches() {
    const one = this.current() ?? this.get("held").at(-1), names = this.get("sources")[0].names;
    const lights = names.length > 1 ? names.map((name, c) => [name, c]).slice(0, 4).concat([["colour", "colour"]]) : [[names[0], 0]];
    if (this.patches.childElementCount !== lights.length)
      this.patches.replaceChildren(...lights.map(([name]) => make("figure", {}, make("canvas", { role: "img", "aria-label": `the patch under ${name}` }), make("figcaption", {}, name))));
    this.patchName.textContent = one ? `Patch: row ${one.row}, column ${one.column}` : "Patch";
    [...this.patches.querySelectorAll("canvas")].forEach((canvas, i) => one ? this.crop(one, canvas, lights[i][1], 1) : (canvas.width = canvas.height = 148));
  }

  showHeld() {
    const held = this.get("held");
    this.clear.hidden = !held.length;
    if (!held.length) { this.chips.replaceChildren(make("p", { class: "aoi-note" }, "Nothing yet. Shift adds a patch, Alt subtracts one.")); return; }
    this.chips.replaceChildren(...held.map((one, i) => {
      const canvas = make("canvas", { "aria-hidden": "true" }), sign = one.minus ? "−" : held.length > 1 ? "+" : "";
      this.crop(one, canvas, this.get("light"), 0);
      return make("span", { class: "aoi-chip" }, canvas, `${sign}${one.row}, ${one.column}`,
        button(`Let go of row ${one.row}, column ${one.column}`, () => put(this.model, { held: held.filter((_, j) => j !== i) }), { glyph: "close" }));
    }));
  }

  close() {
    this.views.forEach((v) => { v.viewer.close(); v.source.close(); });
    this.place.close();
    this.near?.close();
  }
}

function render({ model, el }) {
  const widget = new Explorer(model, el);
  el.aoi = widget;
  return () => widget.close();
}

export default { render: failing(render) };
