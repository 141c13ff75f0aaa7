// Charts on canvas: lines over time, bars by rank, a heatmap. Each is reached by Tab, read with the arrow keys or the
// pointer, and drawn once a frame at most.

import { announce, h, text } from "./dom.js";
import * as format from "./format.js";

const FONT = "11px system-ui, sans-serif";
const SCHEME = matchMedia("(prefers-color-scheme: dark)");
// Luminance only rises (dark theme) or only falls (light), so that the scale reads without telling hues apart.
const HEAT = {
  light: ["#f1f4f9", "#cddcee", "#93b8de", "#4f87c4", "#29559a", "#1a2f6b", "#150f3a"],
  dark: ["#171c24", "#1d3557", "#2a5c8f", "#4589b3", "#84b8b4", "#d6dd9c", "#fff6c2"],
};
const theme = { colours: null, heat: null };
SCHEME.addEventListener("change", () => {
  theme.colours = theme.heat = null;
  for (const plot of Plot.all) plot.redraw();
});

function colours() {
  if (theme.colours) return theme.colours;
  const style = getComputedStyle(document.documentElement);
  const names = ["text", "muted", "line", "panel", "before", "after", "limit", "used", "peak", "focus"];
  return (theme.colours = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()])));
}

/** 256 colours as canvas pixels (ABGR, little-endian), from the lowest load to the highest. */
export function heatColours() {
  if (theme.heat) return theme.heat;
  const stops = HEAT[SCHEME.matches ? "dark" : "light"].map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  theme.heat = Uint32Array.from({ length: 256 }, (_, index) => {
    const place = (index / 255) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    const [red, green, blue] = [0, 1, 2].map((c) => Math.round(stops[low][c] + (place - low) * (stops[low + 1][c] - stops[low][c])));
    return (255 << 24) | (blue << 16) | (green << 8) | red;
  });
  return theme.heat;
}

/** A canvas with a frame, a cursor that keys and pointer move, and a tip that says what is under it. */
class Plot {
  static all = new Set();

  constructor(place, name) {
    this.name = name;
    this.margin = { top: 8, right: 10, bottom: 20, left: 40 };
    this.canvas = h("canvas", { tabindex: 0, role: "application", "aria-roledescription": "chart", "aria-label": name });
    this.tip = h("div", { class: "tip", hidden: true });
    this.none = h("p", { class: "empty", hidden: true });
    place.append(this.canvas, this.tip, this.none);
    this.place = place;
    this.height = Number(place.dataset.height);
    this.problem = "Waiting for the first figures.";
    this.cursor = null;
    this.watch();
    Plot.all.add(this);
  }

  watch() {
    new ResizeObserver(() => this.redraw()).observe(this.place);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.setCursor(null));
    this.canvas.addEventListener("blur", () => this.setCursor(null));
    this.canvas.addEventListener("keydown", (event) => this.press(event));
  }

  /** Draw in the next frame; `problem` instead of a chart where there is nothing to draw. */
  redraw(problem = this.problem) {
    this.problem = problem;
    this.pending ??= requestAnimationFrame(() => {
      this.pending = null;
      this.paint();
    });
  }

  paint() {
    this.none.hidden = !this.problem;
    this.canvas.hidden = Boolean(this.problem);
    text(this.none, this.problem ?? "");
    const width = this.place.clientWidth;
    if (!width || this.problem) return this.showTip();
    if ("fill" in this.place.dataset) this.height = this.place.clientHeight;
    const scale = devicePixelRatio || 1;
    this.width = width;
    const [across, down] = [Math.round(width * scale), Math.round(this.height * scale)];
    if (this.canvas.width !== across || this.canvas.height !== down) {
      Object.assign(this.canvas, { width: across, height: down });
      this.canvas.style.blockSize = `${this.height}px`;
    }
    const { top, right, bottom, left } = this.margin;
    this.box = { x: left, y: top, w: Math.max(width - left - right, 10), h: Math.max(this.height - top - bottom, 10) };
    const pen = this.canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, this.height);
    pen.font = FONT;
    this.draw(pen, this.box, colours());
    this.showTip();
  }

  label(pen, words, x, y, { align = "left", baseline = "middle", colour = colours().muted } = {}) {
    Object.assign(pen, { fillStyle: colour, textAlign: align, textBaseline: baseline });
    pen.fillText(words, x, y);
  }

  rule(pen, x1, y1, x2, y2, colour, { dash = [], width = 1 } = {}) {
    pen.save();
    Object.assign(pen, { strokeStyle: colour, lineWidth: width });
    pen.setLineDash(dash);
    pen.beginPath();
    pen.moveTo(x1, y1);
    pen.lineTo(x2, y2);
    pen.stroke();
    pen.restore();
  }

  point(event) {
    if (!this.box) return;
    const at = this.locate(event.offsetX - this.box.x, event.offsetY - this.box.y);
    this.setCursor(at, false);
  }

  press(event) {
    if (event.key === "Escape") return this.setCursor(null);
    if (event.altKey || event.metaKey || this.problem) return;
    const next = this.move(event.key, this.cursor, event.ctrlKey);
    if (!next) return;
    event.preventDefault();
    this.setCursor(next, true);
  }

  setCursor(cursor, isSpoken) {
    if (JSON.stringify(cursor) === JSON.stringify(this.cursor)) return;
    this.cursor = cursor;
    this.redraw();
    if (cursor && isSpoken) announce(this.describe(cursor).join(", "));
  }

  showTip() {
    const words = this.cursor && !this.problem && this.box ? this.describe(this.cursor) : null;
    this.tip.hidden = !words;
    if (!words) return;
    this.tip.replaceChildren(...words.map((line, index) => h(index ? "span" : "b", {}, line)));
    const { x, y } = this.anchor(this.cursor);
    const room = this.width - this.tip.offsetWidth - 4;
    this.tip.style.insetInlineStart = `${Math.max(4, Math.min(x + 12, room))}px`;
    this.tip.style.insetBlockStart = `${Math.max(0, y < this.tip.offsetHeight + 16 ? y + 14 : y - this.tip.offsetHeight - 10)}px`;
  }
}

/** Imbalance before and after over time, with the threshold. points: {time_s, before, after} in order of time. */
export class TimeChart extends Plot {
  constructor(place, name) {
    super(place, name);
    this.margin.left = 34;
    Object.assign(this, { points: [], threshold: null, span: 300, now: 0, gap: 5 });
  }

  update({ points, threshold, span, now, gap }) {
    Object.assign(this, { points: points.filter((point) => point.time_s > now - span - gap), threshold, span, now, gap });
    const shown = this.points.filter((point) => point.before !== null);
    const last = shown.at(-1);
    if (this.cursor) this.cursor.at = Math.min(this.cursor.at, shown.length - 1);
    this.shown = shown;
    this.canvas.setAttribute(
      "aria-label",
      last ? `${this.name} over ${format.seconds(span)}: now ${format.ratio(last.before)} before, ${format.ratio(last.after)} after. Arrow keys read points.` : this.name,
    );
    this.redraw(last ? null : `No token in the last ${format.seconds(span)}: the engine is idle, or nothing counts (mode off).`);
  }

  scale() {
    const highest = this.points.reduce((top, point) => Math.max(top, point.before ?? 1, point.after ?? 1), this.threshold ?? 1);
    const top = niceTop(highest * 1.04);
    const isLog = top > 10;
    const share = isLog ? (value) => Math.log(Math.max(value, 1)) / Math.log(top) : (value) => (Math.max(value, 1) - 1) / (top - 1);
    return { top, isLog, y: (value) => this.box.y + this.box.h * (1 - share(value)) };
  }

  x(time_s) {
    return this.box.x + this.box.w * (1 - (this.now - time_s) / this.span);
  }

  draw(pen, box, colour) {
    const { top, isLog, y } = this.scale();
    for (const value of isLog ? logTicks(top) : linearTicks(top)) {
      this.rule(pen, box.x, y(value), box.x + box.w, y(value), colour.line);
      this.label(pen, format.count(value), box.x - 6, y(value), { align: "right" });
    }
    this.drawTimes(pen, box);
    pen.save();
    pen.beginPath();
    pen.rect(box.x, box.y - 4, box.w, box.h + 8);
    pen.clip();
    this.drawLine(pen, y, "before", colour.before, 1.5);
    this.drawLine(pen, y, "after", colour.after, 2);
    pen.restore();
    if (this.threshold) {
      this.rule(pen, box.x, y(this.threshold), box.x + box.w, y(this.threshold), colour.limit, { dash: [5, 4], width: 1.25 });
    }
    if (this.cursor) this.drawCursor(pen, box, y, colour);
  }

  drawTimes(pen, box) {
    const step = [10, 30, 60, 120, 300, 600, 900, 1800].find((one) => (this.span / one) * 62 < box.w) ?? 3600;
    for (let time = Math.ceil((this.now - this.span) / step) * step; time <= this.now; time += step) {
      const x = this.x(time);
      if (x < box.x + 14 || x > box.x + box.w - 18) continue;
      this.label(pen, format.clock(time).slice(-8, step < 60 ? undefined : -3), x, box.y + box.h + 12, { align: "center" });
    }
  }

  drawLine(pen, y, name, colour, width) {
    Object.assign(pen, { strokeStyle: colour, lineWidth: width, lineJoin: "round", lineCap: "round" });
    pen.beginPath();
    let before = null;
    for (const point of this.points) {
      if (point[name] === null) {
        before = null;
        continue;
      }
      const x = this.x(point.time_s);
      if (before === null || point.time_s - before > this.gap) {
        pen.moveTo(x - 0.5, y(point[name])); // a lone point is seen too
        pen.lineTo(x, y(point[name]));
      } else pen.lineTo(x, y(point[name]));
      before = point.time_s;
    }
    pen.stroke();
  }

  drawCursor(pen, box, y, colour) {
    const point = this.shown[this.cursor.at];
    const x = this.x(point.time_s);
    this.rule(pen, x, box.y, x, box.y + box.h, colour.muted);
    for (const name of ["before", "after"]) dot(pen, x, y(point[name]), colour[name], colour.panel);
  }

  locate(x) {
    const time = this.now - this.span * (1 - x / this.box.w);
    const best = this.shown.reduce((near, point, at) => (Math.abs(point.time_s - time) < Math.abs(this.shown[near].time_s - time) ? at : near), 0);
    return { at: best };
  }

  move(pressed, cursor) {
    const last = this.shown.length - 1;
    const at = cursor?.at ?? last;
    const to = { ArrowLeft: cursor ? at - 1 : at, ArrowRight: at + 1, Home: 0, End: last, PageUp: at - 10, PageDown: at + 10 }[pressed];
    return to === undefined ? null : { at: Math.max(0, Math.min(to, last)) };
  }

  describe({ at }) {
    const point = this.shown[at];
    return [format.clock(point.time_s), `before ${format.ratio(point.before)}`, `after ${format.ratio(point.after)}`, `${format.count(point.tokens)} tokens`];
  }

  anchor({ at }) {
    return { x: this.x(this.shown[at].time_s), y: this.box.y + 20 };
  }
}

/**
 * Bars by rank. fills and frames: {name, values, colour} (a fill stands in a frame, or beside another fill);
 * ticks: short lines across; line: {value, name}.
 */
export class Bars extends Plot {
  constructor(place, name, { unit = format.count, item = "rank" } = {}) {
    super(place, name);
    this.margin.left = 52;
    Object.assign(this, { unit, item, number: 0, fills: [], frames: [], ticks: [], line: null });
  }

  update({ fills, frames = [], ticks = [], line = null, problem = null, note = () => [] }) {
    const number = fills[0].values.length;
    Object.assign(this, { fills, frames, ticks, line, number, note });
    if (this.cursor && this.cursor.at >= number) this.cursor = null;
    this.canvas.setAttribute("aria-label", `${this.name}, ${format.plural(number, this.item)}. Arrow keys read values.`);
    this.redraw(problem);
  }

  scale() {
    let highest = this.line?.value ?? 0;
    for (const { values } of [...this.fills, ...this.frames, ...this.ticks]) for (const value of values) if (value > highest) highest = value;
    return highest * 1.06 || 1;
  }

  draw(pen, box, colour) {
    const top = this.scale();
    const y = (value) => box.y + box.h * (1 - value / top);
    const step = this.unit === format.bytes ? 2 ** Math.floor(Math.log2(top / 2)) : niceStep(top / 3);
    for (let value = 0; value <= top; value += step) {
      this.rule(pen, box.x, y(value), box.x + box.w, y(value), colour.line);
      this.label(pen, this.unit(value), box.x - 6, y(value), { align: "right" });
    }
    const across = box.w / this.number;
    this.drawNumbers(pen, box, across);
    for (let at = 0; at < this.number; at++) this.drawGroup(pen, at, box, across, y, colour);
    if (this.line && this.line.value > 0) this.rule(pen, box.x, y(this.line.value), box.x + box.w, y(this.line.value), colour.limit, { dash: [5, 4], width: 1.25 });
  }

  drawNumbers(pen, box, across) {
    const every = niceStep(26 / across) < 1 ? 1 : Math.ceil(niceStep(26 / across));
    for (let at = 0; at < this.number; at += every) {
      this.label(pen, String(at), box.x + (at + 0.5) * across, box.y + box.h + 12, { align: "center" });
    }
  }

  drawGroup(pen, at, box, across, y, colour) {
    const gap = across > 6 ? Math.min(across * 0.25, 16) : across > 3 ? 1 : 0;
    const limit = 72;
    const width = Math.max(Math.min(across - gap, limit), 1);
    const x = box.x + at * across + (across - width) / 2;
    const floor = box.y + box.h;
    for (const { values, colour: name } of this.frames) {
      Object.assign(pen, { strokeStyle: colour[name], lineWidth: 1 });
      if (width > 6) pen.strokeRect(x + 0.5, y(values[at]), width - 1, floor - y(values[at]));
      else this.rule(pen, box.x + at * across, y(values[at]), box.x + (at + 1) * across, y(values[at]), colour[name]);
    }
    const each = width / this.fills.length;
    this.fills.forEach(({ values, colour: name }, index) => {
      pen.fillStyle = colour[name];
      const height = values[at] > 0 ? Math.max(floor - y(values[at]), 1) : 0;
      pen.fillRect(x + index * each, floor - height, each > 4 ? each - 1 : each, height);
    });
    for (const { values, colour: name } of this.ticks) {
      if (values[at] > 0) this.rule(pen, x, y(values[at]), x + width, y(values[at]), colour[name], { width: 2 });
    }
    if (this.cursor?.at === at) {
      Object.assign(pen, { strokeStyle: colour.focus, lineWidth: 1.5 });
      pen.strokeRect(x - 2, box.y, width + 4, box.h);
    }
  }

  locate(x) {
    return { at: Math.max(0, Math.min(Math.floor((x / this.box.w) * this.number), this.number - 1)) };
  }

  move(pressed, cursor) {
    const last = this.number - 1;
    const at = cursor?.at ?? -1;
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last, PageUp: at - 10, PageDown: at + 10 }[pressed];
    return to === undefined ? null : { at: Math.max(0, Math.min(to, last)) };
  }

  describe({ at }) {
    const parts = [...this.fills, ...this.ticks, ...this.frames].map(({ name, values }) => `${name} ${this.unit(values[at])}`);
    return [`${this.item} ${at}`, ...parts, ...this.note(at)];
  }

  anchor({ at }) {
    return { x: this.box.x + ((at + 0.5) * this.box.w) / this.number, y: this.box.y + 24 };
  }
}

/** Layers x ranks or experts: each cell's load against its layer's mean, and each layer's imbalance beside it. */
export class Heatmap extends Plot {
  constructor(place, name, scale) {
    super(place, name);
    this.legend = scale;
    this.cells = document.createElement("canvas");
    this.margin = { top: 4, right: 70, bottom: 20, left: 40 };
  }

  /** matrix: LoadMatrix of llep/views.py; limit: the imbalance from which a layer is balanced. */
  update(matrix, limit, problem) {
    Object.assign(this, { matrix, limit });
    const started = performance.now();
    if (!problem) this.prepare();
    this.preparing = performance.now() - started;
    this.redraw(problem);
  }

  prepare() {
    const { values, by } = this.matrix;
    this.down = values.length;
    this.across = values[0]?.length ?? 0;
    this.means = values.map((row) => row.reduce((sum, value) => sum + value, 0) / row.length);
    this.top = 4;
    values.forEach((row, at) => {
      for (const value of row) if (value > this.top * this.means[at]) this.top = 2 ** Math.ceil(Math.log2(value / this.means[at]));
    });
    if (this.cursor && (this.cursor.row >= this.down || this.cursor.column >= this.across)) this.cursor = null;
    const size = `${format.plural(this.down, "layer")} by ${format.plural(this.across, by)}`;
    this.canvas.setAttribute("aria-label", `${this.name}: ${size}. Arrow keys read cells, H goes to the hottest.`);
    this.height = Math.min(Math.max(this.down * 20, 80), Math.max(Number(this.place.dataset.height), this.down * 6), 640) + 24;
  }

  draw(pen, box, colour) {
    const started = performance.now();
    this.paintCells();
    pen.imageSmoothingEnabled = false;
    pen.drawImage(this.cells, box.x, box.y, box.w, box.h);
    const [width, height] = [box.w / this.across, box.h / this.down];
    this.drawGrid(pen, box, width, height, colour);
    this.drawNumbers(pen, box, width, height);
    this.drawImbalance(pen, box, height, colour);
    if (this.cursor) {
      Object.assign(pen, { strokeStyle: colour.focus, lineWidth: 2 });
      pen.strokeRect(box.x + this.cursor.column * width - 1, box.y + this.cursor.row * height - 1, width + 2, height + 2);
    }
    this.drawLegend();
    performance.clearMeasures("llep:heatmap");
    performance.measure("llep:heatmap", { start: started - this.preparing }); // the newest one, for bench/page.py
    this.preparing = 0;
  }

  /** One pixel a cell; the browser makes them large. */
  paintCells() {
    const palette = heatColours();
    Object.assign(this.cells, { width: this.across, height: this.down });
    const pen = this.cells.getContext("2d");
    const image = pen.createImageData(this.across, this.down);
    const pixels = new Uint32Array(image.data.buffer);
    const top = Math.log2(this.top);
    let at = 0;
    this.matrix.values.forEach((row, line) => {
      const mean = this.means[line];
      for (const value of row) pixels[at++] = mean > 0 ? palette[shade(value / mean, top)] : 0;
    });
    pen.putImageData(image, 0, 0);
  }

  drawGrid(pen, box, width, height, colour) {
    if (height >= 9) for (let row = 1; row < this.down; row++) this.rule(pen, box.x, box.y + row * height, box.x + box.w, box.y + row * height, colour.panel);
    if (width >= 9) for (let column = 1; column < this.across; column++) this.rule(pen, box.x + column * width, box.y, box.x + column * width, box.y + box.h, colour.panel);
  }

  drawNumbers(pen, box, width, height) {
    const everyRow = Math.ceil(14 / height), everyColumn = Math.ceil(niceStep(Math.max(28 / width, 1)));
    for (let row = 0; row < this.down; row += everyRow) {
      this.label(pen, String(this.matrix.layers[row]), box.x - 6, box.y + (row + 0.5) * height, { align: "right" });
    }
    for (let column = 0; column < this.across; column += everyColumn) {
      this.label(pen, String(column), box.x + (column + 0.5) * width, box.y + box.h + 12, { align: "center" });
    }
  }

  /** Bars at the right edge: how uneven each layer's row is; over the threshold in another shade. */
  drawImbalance(pen, box, height, colour) {
    const left = box.x + box.w + 8, room = this.margin.right - 12;
    const ratios = this.matrix.imbalance_ratio;
    const top = Math.max(2, ...ratios.map((ratio) => ratio ?? 1));
    const length = (value) => (room * Math.log(value)) / Math.log(top);
    ratios.forEach((ratio, row) => {
      if (ratio === null) return;
      const isOver = this.limit !== null && ratio >= this.limit;
      pen.fillStyle = isOver ? colour.before : colour.after;
      pen.fillRect(left, box.y + row * height + (height > 4 ? 1 : 0), Math.max(length(ratio), 1.5), Math.max(height - (height > 4 ? 2 : 0.5), 1));
    });
    if (this.limit > 1 && this.limit <= top) {
      this.rule(pen, left + length(this.limit), box.y, left + length(this.limit), box.y + box.h, colour.limit, { dash: [4, 3] });
    }
    this.label(pen, "max/mean", left, box.y + box.h + 12);
  }

  drawLegend() {
    const version = `${this.top} ${SCHEME.matches}`;
    if (this.legend.dataset.version === version) return;
    this.legend.dataset.version = version;
    const bar = document.createElement("canvas");
    Object.assign(bar, { width: 256, height: 1 });
    const pen = bar.getContext("2d");
    const image = pen.createImageData(256, 1);
    new Uint32Array(image.data.buffer).set(heatColours());
    pen.putImageData(image, 0, 0);
    this.legend.replaceChildren("0", bar, `${this.top}× fair share`);
  }

  locate(x, y) {
    const column = Math.floor((x / this.box.w) * this.across), row = Math.floor((y / this.box.h) * this.down);
    return column >= 0 && row >= 0 && column < this.across && row < this.down ? { row, column } : null;
  }

  move(pressed, cursor, isWhole) {
    if (pressed.toLowerCase() === "h") return this.hottest();
    const { row, column } = cursor ?? { row: 0, column: pressed.startsWith("Arrow") ? -1 : 0 };
    const [lastRow, lastColumn] = [this.down - 1, this.across - 1];
    const to = {
      ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1],
      ArrowUp: [row - 1, column],
      ArrowDown: [row + 1, column],
      PageUp: [row - 10, column],
      PageDown: [row + 10, column],
      Home: [isWhole ? 0 : row, 0],
      End: [isWhole ? lastRow : row, lastColumn],
    }[pressed];
    return to ? { row: Math.max(0, Math.min(to[0], lastRow)), column: Math.max(0, Math.min(to[1], lastColumn)) } : null;
  }

  hottest() {
    const best = { row: 0, column: 0, load: -1 };
    this.matrix.values.forEach((values, row) =>
      values.forEach((value, column) => {
        if (this.means[row] > 0 && value / this.means[row] > best.load) Object.assign(best, { row, column, load: value / this.means[row] });
      }),
    );
    return { row: best.row, column: best.column };
  }

  describe({ row, column }) {
    const value = this.matrix.values[row][column];
    const share = this.means[row] > 0 ? `${format.ratio(value / this.means[row])}× fair share` : "no pair in this layer";
    return [`layer ${this.matrix.layers[row]}, ${this.matrix.by} ${column}`, `${format.count(value)} pairs`, share, `layer's max / mean ${format.ratio(this.matrix.imbalance_ratio[row])}`];
  }

  anchor({ row, column }) {
    return { x: this.box.x + ((column + 0.5) * this.box.w) / this.across, y: this.box.y + ((row + 0.5) * this.box.h) / this.down };
  }
}

/** Place in the palette: no load is the lowest, the fair share at a third, from there each doubling an equal step. */
function shade(load, top) {
  const place = load <= 1 ? load / 3 : 1 / 3 + (2 / 3) * (Math.log2(load) / top);
  return Math.min(255, Math.round(place * 255));
}

function dot(pen, x, y, colour, edge) {
  Object.assign(pen, { fillStyle: colour, strokeStyle: edge, lineWidth: 1.5 });
  pen.beginPath();
  pen.arc(x, y, 4, 0, 2 * Math.PI);
  pen.fill();
  pen.stroke();
}

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].find((step) => step * power >= rough) * power;
}

function niceTop(highest) {
  const tops = [1.5, 2, 2.5, 3, 4, 5, 6, 8, 10];
  return tops.find((top) => top >= highest) ?? 2 ** Math.ceil(Math.log2(highest));
}

function linearTicks(top) {
  if (top > 5) return [1, 2, 4, 6, 8, 10].filter((tick) => tick <= top);
  const step = top > 2.5 ? 1 : top > 1.5 ? 0.5 : 0.25;
  return Array.from({ length: Math.floor((top - 1) / step + 1e-9) + 1 }, (_, index) => 1 + index * step);
}

function logTicks(top) {
  return [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096].filter((tick) => tick <= top);
}
