// 数据：有哪些训练、勾选了哪些、各自读到的曲线与记录；定时去问服务器，没变的不重取
const MAX_SELECTED = 12;
const MAX_RECORDS = 3000;
const EVERY = 2000; // 毫秒；页面不在眼前时慢下来，不与训练抢算力
const EVERY_HIDDEN = 15000;

async function get(path) {
  const reply = await fetch(path);
  if (!reply.ok) throw Object.assign(new Error(String(reply.status)), { status: reply.status });
  return reply.json();
}

// 上次勾了哪些 [[id, 第几种颜色]]；没有存过、存的不成样子（同一端口上别的页面写的）给 null
function readChoice() {
  try {
    const saved = JSON.parse(localStorage.getItem("minimind.watch.selected"));
    const whole = (one) => Array.isArray(one) && typeof one[0] === "string" && Number.isInteger(one[1]);
    return Array.isArray(saved) && saved.every(whole) ? saved : null;
  } catch {
    return null;
  }
}

export class Store {
  // onChange()：任何数据变了
  constructor(onChange) {
    this.onChange = onChange;
    this.runs = []; // 服务器说的现状，新动过的在前
    this.details = new Map(); // id → {view, version, complete, keys, notes, records, exam}
    this.records = new Map(); // 一条记录的地址 → 值
    this.offline = false;
    this.loaded = false;
    this.view = { axis: "step", low: null, high: null };
    const saved = readChoice();
    this.slots = new Map(saved ?? []); // id → 第几种颜色
    this.fresh = saved === null;
    this.timer = 0;
    this.busy = false;
    this.again = false;
  }

  get selected() {
    return this.runs.filter((run) => this.slots.has(run.id));
  }

  // 勾上或去掉；满了勾不上，返回 false
  select(id, wanted) {
    if (wanted && !this.slots.has(id)) {
      const present = new Set(this.runs.map((run) => run.id));
      for (const old of this.slots.keys()) if (!present.has(old)) this.slots.delete(old);
      if (this.slots.size >= MAX_SELECTED) return false;
      const used = new Set(this.slots.values());
      this.slots.set(id, [...Array(MAX_SELECTED).keys()].find((slot) => !used.has(slot)));
    } else if (!wanted) {
      this.slots.delete(id);
      this.details.delete(id);
    }
    localStorage.setItem("minimind.watch.selected", JSON.stringify([...this.slots]));
    this.onChange();
    this.poll();
    return true;
  }

  look(view) {
    this.view = { ...this.view, ...view };
    this.poll();
  }

  // 问一遍；正在问就问完再问一遍
  async poll() {
    if (this.busy) {
      this.again = true;
      return;
    }
    this.busy = true;
    clearTimeout(this.timer);
    let unfinished = false;
    try {
      this.runs = (await get("/api/runs")).runs;
      this.offline = false;
      this.loaded = true;
      if (this.fresh && this.runs.length) {
        this.fresh = false;
        this.slots.set(this.runs[0].id, 0);
      }
      this.onChange();
      for (const run of this.selected) unfinished = !(await this.fetchDetail(run.id)) || unfinished;
    } catch (error) {
      if (!(error instanceof TypeError) && !error.status) throw error; // 不是连不上：是页面自己的毛病
      this.offline = true;
      this.onChange();
    } finally {
      this.busy = false;
      const wait = this.again || unfinished ? 0 : document.hidden ? EVERY_HIDDEN : EVERY;
      this.again = false;
      this.timer = setTimeout(() => this.poll(), wait);
    }
  }

  // 一次训练的曲线；返回读完了没有
  async fetchDetail(id) {
    const view = this.view;
    const known = this.details.get(id);
    const query = new URLSearchParams({ axis: view.axis });
    for (const key of ["low", "high"]) if (view[key] !== null) query.set(key, view[key]);
    if (known && known.view === view) query.set("have", known.version);
    let found;
    try {
      found = await get(`/api/run/${id}?${query}`);
    } catch (error) {
      if (error.status !== 404) throw error;
      this.details.delete(id); // 日志刚被删掉
      return true;
    }
    if (found.same) return true;
    if (known && known.version.split("-", 2).join() !== found.version.split("-", 2).join()) this.forget(id); // 重新训练过
    this.details.set(id, { ...found, view });
    this.onChange();
    return found.complete;
  }

  forget(id) {
    for (const key of this.records.keys()) if (key.startsWith(`${id}/`)) this.records.delete(key);
  }

  // 第 step 步（或之前最近的）的一份 kind；没有给 null
  async record(id, kind, step) {
    const steps = this.details.get(id)?.records[kind];
    if (!steps?.length) return null;
    const at = steps.findLast((one) => one <= step) ?? steps[0];
    const key = `${id}/${kind}/${at}`;
    if (!this.records.has(key)) {
      if (this.records.size > MAX_RECORDS) this.records.clear();
      const promise = get(`/api/run/${id}/record?${new URLSearchParams({ kind, step: at })}`).catch(() => {
        this.records.delete(key); // 下次再取
        return null;
      });
      this.records.set(key, promise);
    }
    return this.records.get(key);
  }
}
