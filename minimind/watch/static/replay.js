// 回看：拖到第几步，就看那一步同样的提示怎么答、采样的得分、专家的负载、各任务的正确率
import { $, words } from "/shared/page.js";
import { el, short, whole } from "./format.js";
import { fullName, swatchOf } from "./lists.js";

const KINDS = ["samples", "rollouts", "expert_load"];
let steps = [];
let follow = true; // 停在最右边时，新的一步来了就跟着走
let turn = 0; // 拖得快时，晚到的旧应答不要

const list = (value) => (Array.isArray(value) ? value : []);
const object = (value) => (value !== null && typeof value === "object" && !Array.isArray(value) ? value : {});
const text = (value) => (typeof value === "string" ? value : value === undefined || value === null ? "" : JSON.stringify(value));

export function watchSlider(store) {
  $("moment").addEventListener("input", () => {
    follow = Number($("moment").value) === steps.length - 1;
    show(store);
  });
}

// 数据变了：滑块的范围随之变，人停在哪一步就还在哪一步
export function drawReplay(store) {
  const all = new Set();
  for (const run of store.selected) {
    const records = store.details.get(run.id)?.records ?? {};
    for (const kind of [...KINDS, "tasks"]) for (const step of records[kind] ?? []) all.add(step);
  }
  const at = steps[Number($("moment").value)];
  steps = [...all].sort((a, b) => a - b);
  const kept = steps.findLastIndex((step) => step <= at);
  $("moment").max = Math.max(0, steps.length - 1);
  $("moment").value = follow || at === undefined ? steps.length - 1 : Math.max(0, kept);
  $("slider").hidden = steps.length < 2;
  show(store);
}

async function show(store) {
  const mine = ++turn;
  const step = steps[Number($("moment").value)] ?? 0;
  $("at").value = words.at(whole(step));
  $("moment").setAttribute("aria-valuetext", words.at(whole(step)));
  const columns = await Promise.all(store.selected.map(async (run) => {
    const [samples, rollouts, load, tasks] = await Promise.all([...KINDS, "tasks"].map((kind) => store.record(run.id, kind, step)));
    return { run, samples, rollouts, load, tasks, exam: store.details.get(run.id)?.exam ?? {} };
  }));
  if (mine !== turn) return;
  const shown = columns.filter((column) => column.samples || column.rollouts || column.load);
  $("replay").hidden = !steps.length;
  $("columns").replaceChildren(...shown.map((column) => columnOf(column, store)));
  drawTasks(columns, store);
}

function columnOf({ run, samples, rollouts, load }, store) {
  const head = (found) => (found ? ` · ${words.at(whole(found.step))}` : "");
  const part = (title, found, ...nodes) => (found ? el("section", {}, el("h4", { textContent: title + head(found) }), ...nodes) : null);
  return el("article", { className: "column", dataset: { id: run.id } },
    el("h3", {}, swatchOf(store.slots.get(run.id)), el("span", { className: "name", textContent: fullName(run) })),
    part(words.samples, samples, ...list(samples?.value).map((one) => exchange(object(one)))),
    part(words.rollouts, rollouts, ...list(rollouts?.value).map((one) => rollout(object(one)))),
    part(words.expert_load, load, heat(list(load?.value))));
}

function exchange({ prompt, answer }) {
  const written = text(answer);
  return el("dl", { className: "exchange" },
    el("dt", { title: words.prompt, textContent: text(prompt) }),
    el("dd", { title: words.answer, textContent: written || words.nothing, className: written ? "" : "hint" }));
}

// 一条采样的回答：总分与各条奖励，条的长短是它占各条里最大的多少
function rollout(one) {
  const parts = Object.entries(object(one.parts)).filter(([, value]) => typeof value === "number");
  const most = Math.max(...parts.map(([, value]) => Math.abs(value)), 1e-9);
  const rows = parts.map(([name, value]) => el("tr", {}, el("td", { textContent: name }), el("td", { textContent: short(value) }),
    el("td", {}, el("span", { className: value < 0 ? "bar minus" : "bar", style: { width: `${(100 * Math.abs(value)) / most}%` } }))));
  const kind = { best: words.best, median: words.median, worst: words.worst }[one.kind] ?? text(one.kind);
  const reward = typeof one.reward === "number" ? `${kind} · ${words.reward} ${short(one.reward)}` : kind;
  return el("div", { className: "rollout", dataset: { kind: text(one.kind) } }, el("b", { textContent: reward }), exchange(one), el("table", { className: "parts" }, el("tbody", {}, ...rows)));
}

// 每层一行、每个专家一格：颜色深浅是它分到的份额，平均分时各格同色
function heat(layers) {
  const rows = layers.map((shares, layer) => el("tr", {}, el("th", { textContent: words.layer(layer + 1) }), ...list(shares).map((share, i) => {
    const value = typeof share === "number" ? share : 0;
    const percent = `${(100 * value).toFixed(0)}%`;
    return el("td", { textContent: percent, title: `${words.expert(i + 1)}：${percent}`, style: { "--heat": `${Math.min(100, 50 * value * list(shares).length)}%` } });
  })));
  return el("div", { className: "wide" }, el("table", { className: "heat" }, el("tbody", {}, ...rows)));
}

// 一行一个任务，一列一次训练（考试另成一列）
function drawTasks(columns, store) {
  const shown = columns.flatMap(({ run, tasks, exam }) => [
    ...(tasks ? [{ run, title: words.at(whole(tasks.step)), scores: object(tasks.value) }] : []),
    ...(Object.keys(exam).length ? [{ run, title: words.exam, scores: exam }] : []),
  ]);
  const names = [...new Set(shown.flatMap((one) => Object.keys(one.scores)))];
  $("exam").hidden = !names.length;
  const head = el("tr", {}, el("th"), ...shown.map(({ run, title }) => el("th", {}, swatchOf(store.slots.get(run.id)), el("span", { textContent: `${fullName(run)} · ${title}` }))));
  const rows = names.map((name) => el("tr", {}, el("th", { textContent: name }), ...shown.map(({ run, scores }) => {
    const score = scores[name];
    if (typeof score !== "number") return el("td", { textContent: words.missing });
    const style = { width: `${Math.max(0, Math.min(100, 100 * score))}%`, background: `var(--c${store.slots.get(run.id) % 8})` };
    return el("td", {}, el("span", { className: "score" }, el("i", { style })), el("span", { textContent: `${(100 * score).toFixed(1)}%` }));
  })));
  $("tasks").replaceChildren(el("thead", {}, head), el("tbody", {}, ...rows));
}
