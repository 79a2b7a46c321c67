// 页面自己执行的示例工具；名字、说明与结果的写法同 minimind chat --tools 的，在微世界上练过的模型直接会用
export const SCHEMAS = [
  { type: "function", function: { name: "calculator", description: "计算算式", parameters: { type: "object", properties: { expression: { type: "string" } } } } },
  { type: "function", function: { name: "get_time", description: "查时间", parameters: { type: "object", properties: {} } } },
];

// 算式由递归下降解析，从不 eval：和 → 积 → 负号 → 幂 → 原子
export function calculate(text) {
  const tokens = text.replace(/×/g, "*").replace(/÷/g, "/").match(/\d+(\.\d+)?|[-+*/^()]|\S/g) ?? [];
  let at = 0;
  const take = (wanted) => (tokens[at] === wanted ? (at++, true) : false);
  function atom() {
    if (take("(")) {
      const value = sum();
      if (!take(")")) throw new Error("括号没有配对");
      return value;
    }
    if (!/^\d/.test(tokens[at] ?? "")) throw new Error(`看不懂 ${tokens[at] ?? "结尾"}`);
    return Number(tokens[at++]);
  }
  function power() {
    const base = atom();
    return take("^") ? base ** signed() : base;
  }
  function signed() {
    return take("-") ? -signed() : power();
  }
  function product() {
    let value = signed();
    for (;;) {
      if (take("*")) value *= signed();
      else if (take("/")) value /= signed();
      else return value;
    }
  }
  function sum() {
    let value = product();
    for (;;) {
      if (take("+")) value += product();
      else if (take("-")) value -= product();
      else return value;
    }
  }
  const value = sum();
  if (at < tokens.length) throw new Error(`多出 ${tokens[at]}`);
  if (!Number.isFinite(value)) throw new Error("结果不是有限的数");
  return value;
}

// 此刻，按浏览器的时区
function readClock(now = new Date()) {
  const two = (number) => String(number).padStart(2, "0");
  return {
    time: `${now.getHours()}:${two(now.getMinutes())}`,
    date: `${now.getFullYear()}-${two(now.getMonth() + 1)}-${two(now.getDate())}`,
    weekday: `星期${"日一二三四五六"[now.getDay()]}`,
  };
}

// 15 位有效数字：0.1+0.2 写成 0.3
const calculator = ({ expression }) => ({ result: String(Number(calculate(String(expression ?? "")).toPrecision(15))) });
const TOOLS = { calculator, get_time: () => readClock() };

// 与训练数据里的写法相同：冒号与逗号之后有空格
const dump = (values) => `{${Object.entries(values).map(([key, value]) => `${JSON.stringify(key)}: ${JSON.stringify(value)}`).join(", ")}}`;

export function runTool(name, argumentsText) {
  try {
    if (!Object.hasOwn(TOOLS, name)) throw new Error(`没有工具 ${name}`);
    return dump(TOOLS[name](JSON.parse(argumentsText || "{}")));
  } catch (error) {
    return dump({ error: error.message });
  }
}
