// What every widget of aoi_ssl shares: the frame with its toolbar, controls bound to traits, pictures in tiles, and a
// viewer that zooms and pans. Python puts this text before the widget's own, so that one module reaches the page.

const SVG = "http://www.w3.org/2000/svg";

/** Make an element: attributes, `on*` listeners, then children (elements or text). */
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), guard(node, value));
    else if (name === "class") node.className = value;
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null));
  return node;
}

// Errors: whatever fails in the page is told in the widget, and to Python, where `handle.error` says it

function tell(root, error) {
  if (!root?.fail) throw error;
  root.fail(error);
}

/** A listener of a part of a widget whose errors the widget tells. */
export function guard(node, call) {
  const failed = (e) => tell(node.closest(".aoi") ?? node.querySelector(".aoi"), e);
  return (...args) => {
    try {
      const done = call(...args);
      if (done?.catch) done.catch(failed);
      return done;
    } catch (e) { failed(e); }
  };
}

/** A `render` whose errors, and those of its listeners to traits and messages, the widget tells. */
export function failing(render) {
  return (context) => {
    const { model, el } = context, calls = new Map();
    const safe = (call) => { if (!calls.has(call)) calls.set(call, guard(el, call)); return calls.get(call); };
    const own = {
      get: (name) => model.get(name), set: (name, value) => model.set(name, value), save_changes: () => model.save_changes(), send: (...all) => model.send(...all),
      on: (name, call) => model.on(name, safe(call)), off: (name, call) => model.off(name, calls.get(call) ?? call),
    };
    return guard(el, render)({ ...context, model: own });
  };
}

const ICONS = {
  fit: "M3 7V3h4M13 3h4v4M17 13v4h-4M7 17H3v-4",
  plus: "M10 4v12M4 10h12",
  minus: "M4 10h12",
  close: "M5 5l10 10M15 5L5 15",
  undo: "M7 4L3 8l4 4M3 8h9a5 5 0 0 1 0 10H9",
  redo: "M13 4l4 4-4 4M17 8H8a5 5 0 0 0 0 10h3",
  keyboard: "M2 5h16v10H2zM5 8h.5M8 8h.5M11 8h.5M14 8h.5M6 12h8",
  save: "M4 3h10l3 3v11H4zM7 3v5h6V3M7 17v-5h6v5",
  next: "M7 4l6 6-6 6",
  previous: "M13 4l-6 6 6 6",
  check: "M4 10l4 4 8-9",
  pan: "M10 2v16M2 10h16M10 2L8 4.5M10 2l2 2.5M10 18l-2-2.5M10 18l2-2.5M2 10l2.5-2M2 10l2.5 2M18 10l-2.5-2M18 10l-2.5 2",
  brush: "M16 3l1.5 1.5L9 13l-2-2zM7 11c-2 0-3 1.500-3 3.500 0 1-1 2-2 2 3 1.500 7 .5 7-3.500",
  line: "M4 16L16 4M3 15l2 2M15 3l2 2",
  circle: "M10 3.500a6.500 6.500 0 1 0 .01 0z",
  polygon: "M4 6l7-3 6 6-4 8-8-2z",
  flood: "M9 3l7 7-6 6-7-7 6-6zM9 3V1M17 13c1.500 2 1.500 4 0 4s-1.500-2 0-4z",
  eraser: "M8 16L3 11l8-8 6 6-7 7zM8 16h9M7 7l6 6",
  bank: "M3 5c0-2.500 14-2.500 14 0v10c0 2.500-14 2.500-14 0zM3 5c0 2.500 14 2.500 14 0M3 10c0 2.500 14 2.500 14 0",
  star: "M10 3l2.200 4.600 5 .7-3.600 3.500.9 5L10 14.400l-4.500 2.400.9-5L2.800 8.300l5-.7z",
};

/** An element of a drawing. */
export function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export const icon = (name) => draw("svg", { viewBox: "0 0 20 20", "aria-hidden": "true" }, draw("path", { d: ICONS[name] }));

/** A button with an icon, a text, or both; the title is also its name for those who cannot see it. */
export function button(title, onclick, { glyph, text, ...more } = {}) {
  return make("button", { type: "button", class: "aoi-button", title, "aria-label": title, onclick, ...more },
    glyph ? icon(glyph) : null, text ?? null);
}

/** Listen to a trait, and call at once. */
export function watchTraits(model, names, call) {
  for (const name of [].concat(names)) model.on(`change:${name}`, call);
  call();
}

export function put(model, changes) {
  for (const [name, value] of Object.entries(changes)) model.set(name, value);
  model.save_changes();
}

/** A few options of which one holds: buttons side by side, or a list where there are many. */
export function choice(model, name, label, options, { list = options.length > 4, title = label } = {}) {
  if (list) {
    const select = make("select", { class: "aoi-select", title, "aria-label": label, onchange: () => put(model, { [name]: options[select.selectedIndex].value }) },
      options.map((o) => make("option", { title: o.title }, o.text)));
    watchTraits(model, name, () => (select.selectedIndex = options.findIndex((o) => o.value === model.get(name))));
    return make("label", { class: "aoi-field" }, make("span", {}, label), select);
  }
  const buttons = options.map((o) => make("button", {
    type: "button", class: "aoi-part", role: "radio", title: o.title ?? `${label}: ${o.text}`, onclick: () => put(model, { [name]: o.value }),
  }, o.text));
  watchTraits(model, name, () => buttons.forEach((b, i) => b.setAttribute("aria-checked", String(options[i].value === model.get(name)))));
  const along = (e) => {  // the arrow keys choose, as in any group of radio buttons
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key], at = buttons.indexOf(e.target);
    if (!step || at < 0) return;
    e.preventDefault();
    const next = buttons[(at + step + buttons.length) % buttons.length];
    next.focus();
    next.click();
  };
  const group = make("span", { class: "aoi-parts", role: "radiogroup", "aria-label": label, onkeydown: along }, buttons);
  return make("span", { class: "aoi-field" }, make("span", {}, label), group);
}

/** A slider for a number; where `off` is given, its lowest place means null and reads as that word. */
export function slider(model, name, label, { min = 0, max = 1, step = 0.01, off, digits = 2, title = label, lazy = false } = {}) {
  const input = make("input", { type: "range", min, max, step, title, "aria-label": label });
  const output = make("output", {});
  const read = () => {
    const value = Number(input.value);
    return off !== undefined && value <= min ? null : value;
  };
  input.addEventListener(lazy ? "change" : "input", () => put(model, { [name]: read() }));
  if (lazy) input.addEventListener("input", () => (output.textContent = Number(input.value).toFixed(digits)));
  watchTraits(model, name, () => {
    const value = model.get(name);
    input.value = value ?? min;
    output.textContent = value == null ? off ?? "" : value.toFixed(digits);
    input.setAttribute("aria-valuetext", output.textContent);
  });
  return make("label", { class: "aoi-field" }, make("span", {}, label), input, output);
}

export function toggle(model, name, text, title = text) {
  const b = button(title, () => put(model, { [name]: !model.get(name) }), { text });
  watchTraits(model, name, () => b.setAttribute("aria-pressed", String(!!model.get(name))));
  return b;
}

/** Which light lies under everything, and whether it is brightened. */
export function lightChoices(model) {
  const light = model.get("sources")[0].names.map((text, value) => ({ text, value }));
  if (light.length > 1) light.push({ text: "Mean", value: "mean" }, { text: "Colour", value: "colour", title: "All lights in false colour" });
  return [choice(model, "light", "Light", light, { list: light.length > 5 }),
    toggle(model, "stretch", "Stretch", "Brighten: the middle 99 % of the grey values from black to white")];
}

const OURS = new Set(["z", "y"]);  // of the keys with Ctrl or Cmd: undo and redo

/** Keys pressed in a widget are its own, not shortcuts of the notebook; those with Ctrl or Cmd, such as saving, stay the notebook's. */
function keepKeys(root) {
  const mark = (e) => {
    if (!root.isConnected) { window.removeEventListener("keydown", mark, true); return; }
    if (!root.contains(e.target)) return;
    const suppress = !(e.ctrlKey || e.metaKey) || OURS.has(e.key.toLowerCase());
    for (const part of [root, e.target]) part.toggleAttribute("data-lm-suppress-shortcuts", suppress);  // it looks at what has the focus first
  };
  root.addEventListener("focusin", () => window.addEventListener("keydown", mark, true));
}

/** The frame of a widget: toolbar, error area, body, and a foot with a status line and the keys. */
export function frame(model, el, { label, keys = [] }) {
  const bar = make("div", { class: "aoi-bar", role: "toolbar", "aria-label": `${label}: settings` });
  const body = make("div", { class: "aoi-body" });
  const status = make("div", { class: "aoi-status", role: "status", "aria-live": "polite" });
  const legend = make("div", { class: "aoi-legend" });
  const words = make("span", {});
  const error = make("div", { class: "aoi-error", role: "alert" }, words,
    button("Dismiss the error", () => put(model, { error: "" }), { glyph: "close" }));
  const list = make("dl", { class: "aoi-keys", hidden: true }, keys.map(([key, what]) => [make("dt", {}, key), make("dd", {}, what)]));
  const help = button("Keys and mouse", () => {
    list.hidden = !list.hidden;
    help.setAttribute("aria-expanded", String(!list.hidden));
  }, { glyph: "keyboard", "aria-expanded": "false" });
  const root = make("div", { class: "aoi", role: "group", "aria-label": label }, bar, error, body,
    make("div", { class: "aoi-foot" }, legend, status, keys.length ? help : null), list);
  keepKeys(root);
  watchTraits(model, "error", () => {
    words.textContent = model.get("error");
    error.hidden = !words.textContent;
  });
  root.fail = (e) => {
    const text = `In the page: ${e.message ?? e}`;
    console.error(e);
    if (model.get("error") !== text) put(model, { error: text });
  };
  el.append(root);
  return { root, bar, body, status, legend, error };
}

// Pixels

const bytesOf = (view) => new Uint8Array(view.buffer ?? view, view.byteOffset ?? 0, view.byteLength);

/** PNG files, three planes in each, to `count` planes of bytes. */
export async function decode(files, count) {
  const planes = [];
  let width = 0, height = 0;
  for (const file of files) {
    const bitmap = await createImageBitmap(new Blob([bytesOf(file)], { type: "image/png" }), { colorSpaceConversion: "none", premultiplyAlpha: "none" });
    ({ width, height } = bitmap);
    const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    const data = context.getImageData(0, 0, width, height).data;
    for (let c = 0; c < 3 && planes.length < count; c++) {
      const plane = new Uint8Array(width * height);
      for (let i = 0, j = c; i < plane.length; i++, j += 4) plane[i] = data[j];
      planes.push(plane);
    }
  }
  return { planes, width, height };
}

const TILE = 512;

/** One picture of many planes: an overview at once, and finer tiles from Python where one looks closer. */
export class Source {
  /** `index` is a place in the traits `sources` and `overviews`; with `prefix`, of traits of that name before them. */
  constructor(model, index, ready, prefix = "") {
    Object.assign(this, { model, index, ready, prefix, tiles: new Map(), version: 0, edits: 0 });
    this.receive = (message, buffers) => this.onTile(message, buffers);
    model.on("msg:custom", this.receive);
    this.renew = () => this.load();
    model.on(`change:${prefix}overviews`, this.renew);
    this.load();
  }

  async load() {
    const meta = this.model.get(`${this.prefix}sources`)[this.index], files = this.model.get(`${this.prefix}overviews`)[this.index];
    if (!meta || !files || this.files === files) return;
    this.files = files;
    const whole = await decode(files, meta.planes);
    if (this.files !== files) return;
    Object.assign(this, { meta, whole: { ...whole, key: "whole", x: 0, y: 0, side: 2 ** meta.level } });
    this.tiles.clear();
    this.stretched = null;
    this.version++;
    this.ready?.(this);
  }

  get height() { return this.meta?.height ?? 0; }
  get width() { return this.meta?.width ?? 0; }

  /** The parts that cover a view at `pixels` screen pixels for each image pixel: the overview, then finer tiles. */
  parts(box, pixels) {
    if (!this.whole) return [];
    const { side } = this.whole, found = [this.whole];
    if (this.meta.level === 0 || pixels * side <= 1.25) return found;
    const level = Math.max(0, Math.min(this.meta.level - 1, Math.floor(Math.log2(1 / pixels) + 0.25)));
    const step = TILE * 2 ** level;
    for (let row = Math.floor(Math.max(0, box.y0) / step); row * step < Math.min(this.height, box.y1); row++)
      for (let column = Math.floor(Math.max(0, box.x0) / step); column * step < Math.min(this.width, box.x1); column++) {
        const key = `${level}/${row}/${column}`, tile = this.tiles.get(key);
        if (tile?.planes) found.push(tile);
        if (!tile || (tile.stale && !tile.asked)) this.ask(key, level, row, column);
      }
    return found;
  }

  ask(key, level, row, column) {
    this.tiles.set(key, { ...this.tiles.get(key), asked: true });
    if (this.tiles.size > 96) this.tiles.delete(this.tiles.keys().next().value);
    this.model.send({ kind: "tile", source: this.prefix + this.index, level, row, column, stamp: this.meta.stamp });
  }

  async onTile(message, buffers) {
    if (message.kind === "update" && message.source === this.prefix + this.index && message.stamp === this.meta?.stamp) // one after the other, as they came
      await (this.updated = (this.updated ?? Promise.resolve()).catch(() => {}).then(() => this.update(message, buffers)));
    if (message.kind !== "tile" || message.source !== this.prefix + this.index || message.stamp !== this.meta?.stamp) return;
    const { level, row, column } = message, side = 2 ** level, key = `${level}/${row}/${column}`;
    const tile = await decode(buffers, this.meta.planes);
    this.tiles.set(key, { ...tile, key, x: column * TILE * side, y: row * TILE * side, side });
    this.ready?.(this);
  }

  /** Some planes of the overview have changed in Python, within a box; finer tiles are asked for again when they show. */
  async update({ start, count, y, x }, buffers) {
    const { whole } = this, part = await decode(buffers, count);
    if (whole !== this.whole) return;
    for (let c = 0; c < count; c++) for (let row = 0; row < part.height; row++)
      whole.planes[start + c].set(part.planes[c].subarray(row * part.width, (row + 1) * part.width), (y + row) * whole.width + x);
    const [top, left, bottom, right] = [y, x, y + part.height, x + part.width].map((v) => v * whole.side);
    for (const [key, tile] of this.tiles) // one that is on its way may come from before
      if (!tile.planes || (tile.x < right && left < tile.x + tile.width * tile.side && tile.y < bottom && top < tile.y + tile.height * tile.side))
        this.tiles.set(key, { ...tile, stale: true, asked: false });
    this.edits++;
    this.ready?.(this);
  }

  close() {
    this.model.off("msg:custom", this.receive);
    this.model.off(`change:${this.prefix}overviews`, this.renew);
  }
}

/** The weights of each light in red, green and blue, as Python made them (see show.false_colour). */
function lightWeights(meta, light) {
  if (light === "colour") return meta.colours;
  if (light === "mean") return Array.from({ length: meta.lights }, () => Array(3).fill(1 / meta.lights));
  return Array.from({ length: meta.lights }, (_, c) => Array(3).fill(c === light ? 1 : 0));
}

/** The grey values that become black and white: those of the file, or the middle 99 % of what is there. */
function lightRange(source, stretch) {
  const { black, white } = source.meta;
  const full = [(0 - black) / (white - black) * 255, (1 - black) / (white - black) * 255];
  return stretch ? (source.stretched ??= middle(source) ?? full) : full;
}

/** The ends of the middle 99 % of the grey values of a source; none if they are all alike. */
function middle(source) {
  const { lights } = source.meta;
  const counts = new Uint32Array(256);
  for (const plane of source.whole.planes.slice(0, lights)) for (let i = 0; i < plane.length; i += 3) counts[plane[i]]++;
  const total = counts.reduce((a, b) => a + b, 0), ends = [];
  for (const share of [0.005, 0.995]) {
    let sum = 0, value = 0;
    while (value < 255 && (sum += counts[value]) < share * total) value++;
    ends.push(value);
  }
  return ends[1] > ends[0] ? ends : null;
}

/** Colour the lights of one part into a canvas; kept, so that zooming costs nothing. */
export function ground(source, part, look) {
  const key = `${look.light}/${look.stretch}/${source.version}`;
  if (part.groundKey === key) return part.ground;
  part.groundKey = key;
  return (part.ground = colourLights(source, part, look, 0, 0, part.width, part.height));
}

/** Draw only a box of a part, coloured anew: for small pieces in another look than that of the viewer. */
export function cutOut(context, source, part, look, box) {
  const left = Math.max(0, Math.floor((box.x0 - part.x) / part.side)), top = Math.max(0, Math.floor((box.y0 - part.y) / part.side));
  const right = Math.min(part.width, Math.ceil((box.x1 - part.x) / part.side)), bottom = Math.min(part.height, Math.ceil((box.y1 - part.y) / part.side));
  if (right <= left || bottom <= top) return;
  const canvas = colourLights(source, part, look, left, top, right - left, bottom - top);
  context.drawImage(canvas, part.x + left * part.side, part.y + top * part.side, canvas.width * part.side, canvas.height * part.side);
}

function colourLights(source, part, { light, stretch }, left, top, width, height) {
  const weights = lightWeights(source.meta, light), [low, high] = lightRange(source, stretch);
  const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d");
  const image = context.createImageData(width, height), out = image.data, scale = 255 / (high - low);
  const planes = part.planes.slice(0, source.meta.lights);
  const tables = planes.map((_, c) => [0, 1, 2].map((k) => Float32Array.from({ length: 256 }, (_, v) => Math.min(255, Math.max(0, (v - low) * scale)) * weights[c][k])));
  for (let y = 0, j = 0; y < height; y++) for (let x = 0, i = (top + y) * part.width + left; x < width; x++, i++, j += 4) {
    let r = 0, g = 0, b = 0;
    for (let c = 0; c < planes.length; c++) {
      const v = planes[c][i], table = tables[c];
      r += table[0][v]; g += table[1][v]; b += table[2][v];
    }
    out[j] = r; out[j + 1] = g; out[j + 2] = b; out[j + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Where a plane is above a value, as ones and zeros. */
export function above(plane, value) {
  const out = new Uint8Array(plane.length);
  for (let i = 0; i < plane.length; i++) out[i] = plane[i] > value ? 1 : 0;
  return out;
}

/** Masks of ones and zeros (or null) as a transparent picture: filled, or striped, and outlined, as in show.overlay. */
export function masksOn({ width, height }, masks, colours, { alpha = 0.3, hatched = false } = {}) {
  const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d");
  const image = context.createImageData(width, height), out = image.data;
  masks.forEach((on, k) => {
    if (!on) return;
    const [r, g, b] = colours[k];
    for (let y = 0, i = 0; y < height; y++) for (let x = 0; x < width; x++, i++) {
      if (!on[i]) continue;
      const edge = (x > 0 && !on[i - 1]) || (x < width - 1 && !on[i + 1]) || (y > 0 && !on[i - width]) || (y < height - 1 && !on[i + width]);
      if (hatched && !edge && (x + y) % 8 > 1) continue;
      const j = 4 * i, a = edge ? 1 : alpha, before = out[j + 3] / 255 * (1 - a), after = a + before;
      out[j] = (r * a + out[j] * before) / after;
      out[j + 1] = (g * a + out[j + 1] * before) / after;
      out[j + 2] = (b * a + out[j + 2] * before) / after;
      out[j + 3] = after * 255;
    }
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Draw what `make` makes of each part, made anew only when the key changes. */
export function drawParts(context, parts, slot, key, make) {
  for (const part of parts) {
    part.slots ??= {};
    if (part.slots[slot]?.key !== key) part.slots[slot] = { key, canvas: make(part) };
    context.drawImage(part.slots[slot].canvas, part.x, part.y, part.width * part.side, part.height * part.side);
  }
}

/** A grid of colours, one a patch, as a small canvas to be drawn large; `colour(i, out, at)` writes four bytes. */
export function gridCanvas(rows, columns, colour) {
  const canvas = new OffscreenCanvas(columns, rows), context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  for (let i = 0; i < rows * columns; i++) colour(i, image.data, 4 * i);
  context.putImageData(image, 0, 0);
  return canvas;
}

// The viewer

const STEP = 1.25;

/** One picture that is looked at: wheel or + and - zoom, dragging pans, a click or a key acts on the place. */
export class Viewer {
  constructor({ label, source, look, paint, act = {}, view, onView }) {
    Object.assign(this, { source, look, paint, act, onView, view: view ?? { zoom: 1, x: null, y: null } });
    this.canvas = make("canvas", { class: "aoi-canvas", tabindex: 0, role: "application", "aria-roledescription": "image viewer", "aria-label": label });
    const zoomed = (factor) => { this.zoomBy(factor); this.canvas.focus(); };
    this.tools = make("div", { class: "aoi-zoom" },
      button("Zoom in", () => zoomed(STEP * STEP), { glyph: "plus" }),
      button("Zoom out", () => zoomed(1 / (STEP * STEP)), { glyph: "minus" }),
      button("Show all of it", () => { this.fit(); this.canvas.focus(); }, { glyph: "fit" }));
    this.root = make("div", { class: "aoi-view" }, this.canvas, this.tools);
    this.listen();
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.root);
  }

  listen() {
    const on = (name, call, options) => this.canvas.addEventListener(name, guard(this.canvas, call), options);
    on("pointerdown", (e) => this.down(e));
    on("pointermove", (e) => this.move(e));
    on("pointerup", (e) => this.up(e));
    on("pointercancel", () => (this.drag = null));
    on("pointerleave", () => { if (!this.drag) this.act.hover?.(null); });
    on("dblclick", (e) => { e.preventDefault(); this.act.double?.(this.place(e), e); });
    on("wheel", (e) => {
      if (!e.ctrlKey && document.activeElement !== this.canvas && this.canvas.getRootNode().activeElement !== this.canvas) return;
      e.preventDefault();
      this.zoomBy(STEP ** (-Math.sign(e.deltaY)), this.place(e));
    }, { passive: false });
    on("keydown", (e) => this.key(e));
  }

  resize() {
    if (!this.source.meta) return;
    const wide = this.root.clientWidth, aspect = this.source.height / this.source.width;
    const high = Math.round(Math.min(wide * Math.min(aspect, 1.6), this.most ?? 620));
    if (wide < 8) return;
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    this.canvas.style.height = `${high}px`;
    this.size = { wide, high, ratio };
    if (this.canvas.width !== Math.round(wide * ratio) || this.canvas.height !== Math.round(high * ratio)) {
      this.canvas.width = Math.round(wide * ratio);
      this.canvas.height = Math.round(high * ratio);
    }
    this.draw();
  }

  /** Screen pixels for each image pixel, and where the image's corner lies. */
  transform() {
    const { wide, high } = this.size, { width, height } = this.source;
    const scale = Math.min(wide / width, high / height) * this.view.zoom;
    const half = { x: wide / 2 / scale, y: high / 2 / scale };
    const hold = (centre, half, size) => half * 2 >= size ? size / 2 : Math.min(size - half, Math.max(half, centre ?? size / 2));
    const x = hold(this.view.x, half.x, width), y = hold(this.view.y, half.y, height);
    return { scale, left: wide / 2 - x * scale, top: high / 2 - y * scale, x, y, half };
  }

  /** The image pixel under an event, which may lie outside. */
  place(e) {
    const box = this.canvas.getBoundingClientRect(), t = this.transform();
    return { x: (e.clientX - box.left - t.left) / t.scale, y: (e.clientY - box.top - t.top) / t.scale };
  }

  inside(p) { return p.x >= 0 && p.y >= 0 && p.x < this.source.width && p.y < this.source.height; }

  setView(view, { tell = true } = {}) {
    this.view = { ...this.view, ...view };
    if (this.size && this.source.meta) {
      const t = this.transform();
      Object.assign(this.view, { x: t.x, y: t.y });
    }
    this.draw();
    if (tell) this.onView?.(this.view);
  }

  fit() { this.setView({ zoom: 1, x: null, y: null }); }

  zoomBy(factor, at) {
    const before = this.transform(), zoom = Math.min(64, Math.max(1, this.view.zoom * factor));
    const p = at ?? { x: before.x, y: before.y }, change = this.view.zoom / zoom;
    this.setView({ zoom, x: p.x + (before.x - p.x) * change, y: p.y + (before.y - p.y) * change });
  }

  /** Move the view so that a place can be seen. */
  reveal(p) {
    const t = this.transform();
    if (Math.abs(p.x - t.x) > t.half.x * 0.9 || Math.abs(p.y - t.y) > t.half.y * 0.9) this.setView({ x: p.x, y: p.y });
  }

  down(e) {
    if (e.button > 1) return;
    this.canvas.focus({ preventScroll: true });
    try { this.canvas.setPointerCapture(e.pointerId); } catch { /* a pointer that is already gone */ }
    const p = this.place(e);
    this.drag = { start: p, view: this.transform(), x: e.clientX, y: e.clientY, moved: false };
    if (e.button === 0 && this.act.stroke) this.drag.stroke = this.act.stroke(p, e) !== false;
  }

  move(e) {
    const p = this.place(e);
    if (!this.drag) { this.act.hover?.(this.inside(p) ? p : null, e); return; }
    const dx = e.clientX - this.drag.x, dy = e.clientY - this.drag.y;
    this.drag.moved ||= Math.hypot(dx, dy) > 3;
    if (this.drag.stroke) {
      const fine = e.getCoalescedEvents?.() ?? [];
      for (const one of fine.length ? fine : [e]) this.act.extend?.(this.place(one), e);
    } else if (this.drag.moved) {
      this.canvas.classList.add("aoi-grabbed");
      const { scale, x, y } = this.drag.view;
      this.setView({ x: x - dx / scale, y: y - dy / scale }, { tell: false });
    }
  }

  up(e) {
    const drag = this.drag, p = this.place(e);
    this.drag = null;
    this.canvas.classList.remove("aoi-grabbed");
    if (!drag) return;
    if (drag.stroke) this.act.finish?.(p, e);
    else if (drag.moved) this.onView?.(this.view);
    else if (this.inside(p)) this.act.click?.(p, e);
  }

  key(e) {
    if (this.act.key?.(e)) { e.preventDefault(); e.stopPropagation(); return; }
    const pan = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[e.key];
    if (e.key === "+" || e.key === "=") this.zoomBy(STEP);
    else if (e.key === "-") this.zoomBy(1 / STEP);
    else if (e.key === "0") this.fit();
    else if (pan && !e.metaKey && !e.ctrlKey) {
      const t = this.transform();
      this.setView({ x: t.x + pan[0] * t.half.x / 4, y: t.y + pan[1] * t.half.y / 4 });
    } else return;
    e.preventDefault();
    e.stopPropagation();
  }

  draw() {
    if (this.waiting || !this.size || !this.source.whole) return;
    this.waiting = requestAnimationFrame(guard(this.canvas, () => { this.waiting = null; this.drawNow(); }));
  }

  drawNow() {
    const context = this.canvas.getContext("2d"), t = this.transform(), { ratio, wide, high } = this.size, look = this.look();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "#101418";
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    context.setTransform(ratio * t.scale, 0, 0, ratio * t.scale, ratio * t.left, ratio * t.top);
    context.imageSmoothingEnabled = t.scale * ratio < 3;
    context.imageSmoothingQuality = "high";
    const box = { x0: -t.left / t.scale, y0: -t.top / t.scale, x1: (wide - t.left) / t.scale, y1: (high - t.top) / t.scale };
    context.save();
    context.beginPath();
    context.rect(0, 0, this.source.width, this.source.height);
    context.clip();
    this.shown = this.source.parts(box, t.scale * ratio);
    for (const part of this.shown) context.drawImage(ground(this.source, part, look), part.x, part.y, part.width * part.side, part.height * part.side);
    this.paint?.(context, { ...t, parts: this.shown, pixel: 1 / t.scale, box });
    context.restore();
    this.root.dataset.drawn = String(Number(this.root.dataset.drawn ?? 0) + 1);
    this.onDrawn?.();
  }

  close() { this.observer.disconnect(); if (this.waiting) cancelAnimationFrame(this.waiting); }
}

/** A square in a picture that can be seen on any ground: a light line around a dark one. */
export function markBox(context, x, y, side, pixel, { colour = "#D55E00", line = 2, dashed = false } = {}) {
  context.save();
  if (dashed) context.setLineDash([4 * pixel, 3 * pixel]);
  for (const [style, width] of [["#FFFFFF", line + 2], [colour, line]]) {
    context.strokeStyle = style;
    context.lineWidth = width * pixel;
    context.strokeRect(x, y, side, side);
  }
  context.restore();
}

/** A swatch and a name, as a button that switches a class on and off, or plain. */
export function swatch(name, colour, { onclick, fill = "pale" } = {}) {
  const paint = `rgb(${colour.map(Math.round).join(" ")})`;
  const box = make("i", { class: `aoi-swatch aoi-${fill}`, style: `--colour: ${paint}` });
  return onclick ? make("button", { type: "button", class: "aoi-button aoi-class", onclick }, box, name) : make("span", { class: "aoi-class" }, box, name);
}

/** A horizontal colour scale with the values at its ends. */
export function colourBar(table, ends, label) {
  const [low, high] = ends.map((v) => (typeof v === "number" ? v.toFixed(2) : v));
  const canvas = make("canvas", { width: 128, height: 1, role: "img", "aria-label": `Colour scale from ${low} to ${high}` });
  const context = canvas.getContext("2d"), image = context.createImageData(128, 1);
  for (let i = 0; i < 128; i++) image.data.set([...table.slice(6 * i, 6 * i + 3), 255], 4 * i);
  context.putImageData(image, 0, 0);
  return make("span", { class: "aoi-scale" }, make("span", {}, label), make("span", {}, low), canvas, make("span", {}, high));
}

export const table256 = (model, name) => bytesOf(model.get("scales_rgb")[name]);

/** Patches of a bank as buttons with pictures: a click shows the patch in its image. */
export class NearList {
  constructor(model) {
    this.model = model;
    this.root = make("div", { class: "aoi-near" });
    for (const name of ["near", "thumbs", "bank_note"]) model.on(`change:${name}`, () => this.show());
    model.on("change:place", () => this.press());
    this.show();
  }

  show() {
    const near = this.model.get("near"), thumbs = this.model.get("thumbs");
    if (near.length !== thumbs.length) return;
    this.close();
    this.urls = thumbs.map((bytes) => URL.createObjectURL(new Blob([bytesOf(bytes)], { type: "image/png" })));
    const banks = [...new Set(near.map((n) => n.bank))];
    this.root.replaceChildren(...banks.flatMap((bank) => [bank && make("p", { class: "aoi-bank" }, `Remembered by ${bank}`), ...near.map((n, i) => (n.bank === bank ? this.one(n, i) : null))]).filter(Boolean));
    if (this.model.get("bank_note")) this.root.append(make("p", { class: "aoi-note" }, this.model.get("bank_note")));
    this.press();
  }

  one(n, i) {
    const similarity = n.similarity.toFixed(3), classes = n.labels || "no class", weight = n.weight == null ? "" : `, weight ${n.weight.toFixed(2)}`;
    return make("button", {
      type: "button", title: `${n.stem}, ${n.device}: row ${n.row}, column ${n.column}; similarity ${similarity}${weight}; ${classes}. Click to see it in its place.`,
      onclick: () => this.model.send({ kind: "place", key: n.key, ...(n.bank && { bank: n.bank }) }),
    }, make("img", { src: this.urls[i], alt: `bank patch ${i + 1}: ${classes}` }), make("b", {}, similarity), make("span", {}, n.stem), make("span", {}, n.device));
  }

  press() {
    const place = this.model.get("place"), near = this.model.get("near");
    [...this.root.querySelectorAll("button")].forEach((b, i) => b.setAttribute("aria-pressed", String(near[i]?.key === place?.key && near[i]?.bank === place?.bank)));
  }

  close() { this.urls?.forEach((url) => URL.revokeObjectURL(url)); }
}

/** The image of a bank with one of its patches in its place. */
export class PlaceView {
  constructor(model, look) {
    Object.assign(this, { model, look });
    this.root = make("div", { hidden: true });
    watchTraits(model, "place", () => this.show());
  }

  show() {
    const place = this.model.get("place");
    if (!place?.stem) { this.close(); this.root.hidden = true; this.onChange?.(); return; }
    if (!this.source) this.open();
    this.root.hidden = false;
    this.title.textContent = this.title.title = `Bank: ${place.stem}`;
    this.aim();
    this.onChange?.();
  }

  open() {
    const colours = this.model.get("class_colours");
    this.title = make("span", {});
    this.source = new Source(this.model, 0, () => { this.viewer.resize(); this.aim(); }, "place_");
    this.viewer = new Viewer({
      label: "bank image with the neighbour in its place", source: this.source, look: this.look,
      paint: (context, { parts, pixel }) => {
        const lights = this.source.meta.lights, place = this.model.get("place");
        drawParts(context, parts, "masks", "", (part) => masksOn(part, part.planes.slice(lights).map((p) => above(p, 127)), colours));
        if (place?.stem) markBox(context, place.x, place.y, place.side, pixel, { line: 3 });
      },
    });
    this.viewer.most = 340;
    const legend = make("div", { class: "aoi-legend" }, this.model.get("classes").map((name, k) => swatch(name, colours[k])));
    const close = button("Close the bank image", () => put(this.model, { place: null }), { glyph: "close" });
    this.root.append(make("figure", { class: "aoi-figure" }, make("figcaption", {}, this.title, close), this.viewer.root, legend));
  }

  aim() {
    const place = this.model.get("place");
    if (!place?.stem || !this.source.meta) return;
    const { width, height } = this.source, half = place.side / 2;
    this.viewer.setView({ zoom: Math.max(1, Math.min(width, height) / (place.side * 14)), x: place.x + half, y: place.y + half });
  }

  close() {
    this.viewer?.close();
    this.source?.close();
    this.source = this.viewer = null;
    this.root.replaceChildren();
  }
}

export { bytesOf };
