// 左边的清单与上面的卡片：每次训练到第几步、多快、还要多久、体征的话
import { $, phrase, words } from "/shared/page.js";
import { duration, el, short, whole } from "./format.js";

const COLORS = 8;
const MAX_STEPS = 4; // 同一句体征至多列出最近几步

export const colorOf = (slot) => getComputedStyle(document.documentElement).getPropertyValue(`--c${slot % COLORS}`).trim();
export const isDashed = (slot) => slot >= COLORS;
export const fullName = (run) => (run.folder ? `${run.folder}/${run.name}` : run.name);
export const swatchOf = (slot) => el("span", { className: "swatch", style: { background: `var(--c${slot % COLORS})` } });

const progress = (run) => (run.total ? words.of(whole(run.step), whole(run.total)) : words.steps(whole(run.step)));

// 依次把 rows 画进 box，同一个 id 的节点留着（焦点与滚动不丢），多余的去掉
function keyed(box, rows, make, fill) {
  const old = new Map([...box.children].map((node) => [node.dataset.id, node]));
  rows.forEach((row, i) => {
    const node = old.get(row.id) ?? make(row);
    old.delete(row.id);
    fill(node, row);
    if (box.children[i] !== node) box.insertBefore(node, box.children[i] ?? null);
  });
  for (const node of old.values()) node.remove();
}

export function drawList(store) {
  const wanted = $("filter").value.trim().toLowerCase();
  const rows = store.runs.filter((run) => fullName(run).toLowerCase().includes(wanted));
  keyed($("list"), rows, (run) => {
    const box = el("input", { type: "checkbox" });
    box.addEventListener("change", () => {
      if (!store.select(run.id, box.checked)) {
        box.checked = false;
        phrase($("status"), () => words.full);
      }
    });
    return el("li", { dataset: { id: run.id } }, el("label", {}, box, el("span", { className: "swatch" }), el("span", { className: "name" }), el("span", { className: "meta" })));
  }, (node, run) => {
    const [box, swatch, name, meta] = node.firstChild.children;
    const slot = store.slots.get(run.id);
    box.checked = slot !== undefined;
    swatch.style.background = slot === undefined ? "transparent" : `var(--c${slot % COLORS})`;
    name.textContent = name.title = fullName(run);
    meta.textContent = `${words[run.state]} · ${progress(run)}`;
    node.dataset.state = run.state;
  });
}

export function drawCards(store) {
  keyed($("cards"), store.selected, (run) => el("article", { className: "card", dataset: { id: run.id } }), (node, run) => {
    const opened = node.querySelector("details")?.open ?? false;
    node.dataset.state = run.state;
    node.replaceChildren(...cardParts(run, store, opened));
  });
}

function cardParts(run, store, opened) {
  const facts = [];
  const fact = (label, value) => facts.push(el("span", { className: "fact" }, el("small", { textContent: label }), el("b", { textContent: value })));
  for (const key of ["loss", "val_loss", "val_bpb", "reward", "val_reward"]) if (run[key] !== null) fact(words.names[key], short(run[key]));
  if (run.mfu !== null) fact(words.names.mfu, `${(100 * run.mfu).toFixed(0)}%`);
  const speed = run.tokens_per_s !== null ? words.speed(whole(run.tokens_per_s)) : null;
  const left = run.state === "running" && run.left !== null ? words.left(duration(run.left)) : null;
  const line = [progress(run), speed, run.time !== null ? duration(run.time) : null, left].filter(Boolean).join(" · ");
  const bar = run.total ? el("div", { className: "progress" }, el("i", { style: { width: `${Math.min(100, (100 * run.step) / run.total)}%` } })) : null;
  return [
    el("h2", {}, swatchOf(store.slots.get(run.id)), el("span", { className: "name", textContent: fullName(run) }), el("span", { className: "state", textContent: words[run.state] })),
    bar,
    el("p", { className: "meta", textContent: line }),
    el("div", { className: "facts" }, ...facts),
    vitals(store.details.get(run.id)?.notes ?? [], opened),
  ].filter(Boolean);
}

// 体征：同一句话说过几次只写一遍；最近的两句，更早的折起来
function vitals(notes, opened) {
  if (!notes.length) return el("p", { className: "vitals well", textContent: words.healthy });
  const steps = new Map(); // 话 → 说过的步，最近说的排在最后
  for (const [step, text] of notes) {
    const earlier = steps.get(text) ?? [];
    steps.delete(text);
    steps.set(text, [...earlier, step]);
  }
  const say = ([text, at]) => {
    const shown = at.slice(-MAX_STEPS).map(whole).join(", ");
    return el("p", { textContent: `${words.at(at.length > MAX_STEPS ? `…, ${shown}` : shown)}：${text}` });
  };
  const all = [...steps].reverse();
  const older = all.slice(2);
  const more = older.length ? el("details", { open: opened }, el("summary", { textContent: words.earlier(older.length) }), ...older.map(say)) : null;
  return el("div", { className: "vitals" }, el("small", { textContent: words.vitals }), ...all.slice(0, 2).map(say), more);
}
