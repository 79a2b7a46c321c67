// 一张曲线图：画布上的坐标、线与带，指着看数，横着拖放大
import { $, words } from "/shared/page.js";
import { axisValue, el, metricName, short } from "./format.js";

const MARGIN = { left: 52, right: 10, top: 8, bottom: 22 };
const HEIGHT = 190;
const DOTS = 40; // 点这么少的（验证）画出每个点，也不平滑
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// 刻度：1、2、5 乘十的幂，大约 count 个
export function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
  const found = [];
  // 数很大而范围很窄时 k 加一还是它自己，所以个数也有限
  for (let k = Math.ceil(low / step); k * step <= high + step * 1e-9 && found.length <= 2 * count; k++) found.push(k * step);
  return found;
}

// 指数平滑；开头按看过的点数修正，不会从 0 爬起
export function smoothed(values, weight) {
  let sum = 0;
  let seen = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    seen = weight * seen + (1 - weight);
    return sum / seen;
  });
}

export class Chart {
  // onZoom(low, high)：拖出一段；onZoom(null) 复原
  constructor(key, onZoom) {
    this.key = key;
    this.series = [];
    this.title = el("figcaption");
    this.canvas = el("canvas");
    this.node = el("figure", { className: "chart", dataset: { key } }, this.title, this.canvas);
    this.drag = null;
    this.canvas.addEventListener("pointerdown", (event) => {
      this.drag = { from: event.offsetX, to: event.offsetX };
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (this.drag) this.drag.to = event.offsetX;
      this.paint();
      this.point(event);
    });
    this.canvas.addEventListener("pointerup", () => {
      const { from, to } = this.drag ?? { from: 0, to: 0 };
      this.drag = null;
      if (Math.abs(to - from) > 8 && this.scale) onZoom(...[from, to].map((pixel) => this.scale.value(pixel)).sort((a, b) => a - b));
      else this.paint();
    });
    this.canvas.addEventListener("pointercancel", () => { this.drag = null; this.leave(); });
    this.canvas.addEventListener("pointerleave", () => this.leave());
    this.canvas.addEventListener("dblclick", () => onZoom(null));
  }

  // series：[{name, color, dash, x, y, lo, hi}]；view：{axis, smooth, log}
  draw(series, view) {
    Object.assign(this, { series, view });
    this.node.dataset.series = series.length;
    this.node.dataset.points = series.reduce((sum, one) => sum + one.x.length, 0);
    this.title.textContent = metricName(this.key);
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", words.series(metricName(this.key), series.length));
    for (const one of series) one.line = view.smooth > 0 && one.x.length > DOTS ? smoothed(one.y, view.smooth) : one.y;
    this.paint();
  }

  range() {
    let [left, right, low, high] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const { x, y, lo, hi } of this.series) {
      for (let i = 0; i < x.length; i++) {
        if (y[i] === null || x[i] === null) continue;
        left = Math.min(left, x[i]);
        right = Math.max(right, x[i]);
        low = Math.min(low, lo?.[i] ?? y[i]);
        high = Math.max(high, hi?.[i] ?? y[i]);
      }
    }
    return [left, right, low, high];
  }

  paint() {
    const width = this.canvas.clientWidth;
    if (!width || !this.view) return; // 折起来了
    const ratio = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(HEIGHT * ratio);
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    let [left, right, low, high] = this.range();
    if (left > right) return;
    if (left === right) [left, right] = [left - 0.5, right + 0.5];
    const logarithmic = this.view.log && low > 0;
    const bend = logarithmic ? Math.log10 : (value) => value;
    let [bottom, top] = [bend(low), bend(high)];
    const room = (top - bottom) * 0.05 || Math.abs(top) * 0.1 || 1;
    [bottom, top] = [bottom - room, top + room];
    const inner = { width: width - MARGIN.left - MARGIN.right, height: HEIGHT - MARGIN.top - MARGIN.bottom };
    const px = (value) => MARGIN.left + ((value - left) / (right - left)) * inner.width;
    const py = (value) => MARGIN.top + (1 - (bend(value) - bottom) / (top - bottom)) * inner.height;
    this.scale = { px, py, value: (pixel) => left + Math.min(1, Math.max(0, (pixel - MARGIN.left) / inner.width)) * (right - left) };

    this.frame(pen, { left, right, bottom, top, logarithmic, inner, px });
    pen.save();
    pen.beginPath();
    pen.rect(MARGIN.left, MARGIN.top - 4, inner.width + 4, inner.height + 8);
    pen.clip();
    for (const one of this.series) this.curve(pen, one);
    pen.restore();
    if (this.drag) {
      pen.fillStyle = css("--accent");
      pen.globalAlpha = 0.15;
      pen.fillRect(Math.min(this.drag.from, this.drag.to), MARGIN.top, Math.abs(this.drag.to - this.drag.from), inner.height);
      pen.globalAlpha = 1;
    }
  }

  frame(pen, { left, right, bottom, top, logarithmic, inner, px }) {
    pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    pen.fillStyle = css("--dim");
    pen.strokeStyle = css("--line");
    pen.lineWidth = 1;
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    for (const value of ticks(bottom, top, 4)) {
      const y = Math.round(MARGIN.top + (1 - (value - bottom) / (top - bottom)) * inner.height) + 0.5;
      pen.beginPath();
      pen.moveTo(MARGIN.left, y);
      pen.lineTo(MARGIN.left + inner.width, y);
      pen.stroke();
      pen.fillText(short(logarithmic ? 10 ** value : Number(value.toPrecision(12))), MARGIN.left - 6, y);
    }
    pen.textBaseline = "top";
    for (const value of ticks(left, right, Math.max(2, Math.floor(inner.width / 90)))) {
      const text = axisValue(this.view.axis, value);
      const half = pen.measureText(text).width / 2;
      pen.textAlign = "center";
      pen.fillText(text, Math.min(px(value), MARGIN.left + inner.width + MARGIN.right - half), HEIGHT - MARGIN.bottom + 6);
    }
  }

  curve(pen, { x, y, lo, hi, line, color, dash }) {
    const { px, py } = this.scale;
    pen.strokeStyle = pen.fillStyle = color;
    pen.setLineDash([]);
    if (lo) {
      pen.globalAlpha = 0.16;
      pen.beginPath();
      for (let i = 0; i < x.length; i++) pen.lineTo(px(x[i]), py(hi[i]));
      for (let i = x.length - 1; i >= 0; i--) pen.lineTo(px(x[i]), py(lo[i]));
      pen.fill();
    }
    const path = (values) => {
      pen.beginPath();
      for (let i = 0; i < x.length; i++) if (values[i] !== null) pen.lineTo(px(x[i]), py(values[i]));
      pen.stroke();
    };
    pen.lineJoin = "round";
    if (line !== y && !lo) {
      pen.globalAlpha = 0.25;
      pen.lineWidth = 1;
      path(y);
    }
    pen.globalAlpha = 1;
    pen.lineWidth = 1.75;
    pen.setLineDash(dash ? [5, 4] : []);
    path(line);
    pen.setLineDash([]);
    if (x.length <= DOTS) {
      for (let i = 0; i < x.length; i++) {
        if (line[i] === null) continue;
        pen.beginPath();
        pen.arc(px(x[i]), py(line[i]), 2.4, 0, 7);
        pen.fill();
      }
    }
  }

  // 指着的地方：竖线、各条线上最近的点、提示里的数（没有平滑过的）
  point(event) {
    if (!this.scale || !this.series.length) return;
    const at = this.scale.value(event.offsetX);
    const pen = this.canvas.getContext("2d");
    const rows = [];
    let anchor = null;
    for (const one of this.series) {
      const i = nearest(one.x, at);
      if (i < 0 || one.y[i] === null) continue;
      if (anchor === null || Math.abs(one.x[i] - at) < Math.abs(anchor - at)) anchor = one.x[i];
      pen.fillStyle = one.color;
      pen.beginPath();
      pen.arc(this.scale.px(one.x[i]), this.scale.py(one.line[i]), 4, 0, 7);
      pen.fill();
      const swatch = el("span", { className: "swatch", style: { background: one.color } });
      rows.push([one.y[i], el("tr", {}, el("td", {}, swatch), el("td", { textContent: short(one.y[i]) }), el("td", { textContent: one.name }))]);
    }
    if (anchor === null) return;
    const x = this.scale.px(anchor);
    pen.strokeStyle = css("--dim");
    pen.globalAlpha = 0.5;
    pen.beginPath();
    pen.moveTo(x, MARGIN.top);
    pen.lineTo(x, HEIGHT - MARGIN.bottom);
    pen.stroke();
    pen.globalAlpha = 1;
    rows.sort((a, b) => b[0] - a[0]);
    const head = axisValue(this.view.axis, anchor);
    const tip = $("tip");
    tip.replaceChildren(
      el("div", { className: "where", textContent: this.view.axis === "step" ? words.at(head) : head }),
      el("table", {}, el("tbody", {}, ...rows.map((row) => row[1]))),
    );
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${Math.max(8, Math.min(event.clientY + 14, innerHeight - box.height - 8))}px`;
  }

  leave() {
    $("tip").hidden = true;
    this.paint();
  }
}

// 递增的数里离 value 最近的是第几个
function nearest(sorted, value) {
  let [low, high] = [0, sorted.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1;
    else high = middle;
  }
  return low > 0 && value - sorted[low - 1] < sorted[low] - value ? low - 1 : low;
}
