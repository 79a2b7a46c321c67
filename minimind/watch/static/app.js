// 看训练的页面：把数据、清单、曲线与回看连起来；不依赖任何外部文件
import { $, onRestyle, openPage, phrase, words } from "/shared/page.js";
import { Chart } from "./chart.js";
import { colorOf, drawCards, drawList, fullName, isDashed } from "./lists.js";
import { drawReplay, watchSlider } from "./replay.js";
import { Store } from "./store.js";
import { WORDS } from "./words.js";

// 先看这几样，别的（与不认识的）折起来
const MAIN = ["loss", "reward", "val_reward", "val_loss", "val_bpb", "accuracy", "margin"];
const isMain = (key) => MAIN.includes(key) || (key.startsWith("reward_") && key !== "reward_std") || key === "tokens_per_s";
const charts = new Map();
const store = new Store(redraw);

function redraw() {
  drawList(store);
  drawCards(store);
  drawCharts();
  drawReplay(store);
  const chosen = store.selected.length > 0;
  $("tools").hidden = !chosen;
  $("empty").hidden = chosen || !store.loaded;
  phrase($("empty"), () => (store.runs.length ? words.pick : words.none));
  const reading = store.selected.some((run) => store.details.get(run.id)?.complete === false);
  if (store.offline) phrase($("status"), () => words.offline);
  else if (reading) phrase($("status"), () => words.reading);
  else if (store.loaded) {
    const now = new Date().toLocaleTimeString("en-GB");
    phrase($("status"), () => words.updated(now));
  }
  document.body.classList.toggle("offline", store.offline);
}

function drawCharts() {
  const keys = new Set();
  for (const run of store.selected) for (const key of Object.keys(store.details.get(run.id)?.keys ?? {})) keys.add(key);
  const rank = (key) => (MAIN.includes(key) ? MAIN.indexOf(key) : isMain(key) ? MAIN.length : MAIN.length + 1);
  const order = [...keys].filter((key) => key !== store.view.axis).sort((a, b) => rank(a) - rank(b) || (a < b ? -1 : 1));
  for (const [key, chart] of charts) {
    if (!keys.has(key)) {
      chart.node.remove();
      charts.delete(key);
    }
  }
  const boxes = { true: $("charts"), false: $("morecharts") };
  const places = { true: 0, false: 0 };
  $("more").hidden = order.every(isMain);
  const view = { axis: store.view.axis, smooth: Number($("smooth").value), log: $("log").checked };
  for (const key of order) {
    if (!charts.has(key)) charts.set(key, new Chart(key, zoom));
    const chart = charts.get(key);
    const box = boxes[isMain(key)];
    const place = places[isMain(key)]++;
    if (box.children[place] !== chart.node) box.insertBefore(chart.node, box.children[place] ?? null);
    const series = [];
    for (const run of store.selected) {
      const curve = store.details.get(run.id)?.keys[key];
      const slot = store.slots.get(run.id);
      if (curve?.x.length) series.push({ ...curve, name: fullName(run), color: colorOf(slot), dash: isDashed(slot) });
    }
    chart.draw(series, view);
  }
}

function zoom(low, high = null) {
  store.look({ low, high });
  $("reset").hidden = low === null;
}

function showRuns(open) {
  $("runs").hidden = !open;
  $("menu").setAttribute("aria-expanded", String(open));
}

// ---------------------------------------------------------------- 操作

$("menu").addEventListener("click", () => showRuns($("runs").hidden));
$("filter").addEventListener("input", () => drawList(store));
$("axis").addEventListener("change", () => {
  zoom(null);
  store.look({ axis: $("axis").value });
});
for (const id of ["smooth", "log"]) $(id).addEventListener("input", drawCharts);
$("reset").addEventListener("click", () => zoom(null));
$("more").addEventListener("toggle", drawCharts);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && matchMedia("(max-width: 40rem)").matches) showRuns(false);
});
document.addEventListener("visibilitychange", () => document.hidden || store.poll());
new ResizeObserver(() => drawCharts()).observe($("scroll"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

openPage(WORDS);
onRestyle(redraw);
showRuns(innerWidth >= 800);
watchSlider(store);
store.poll();
