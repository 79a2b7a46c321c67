// 页面自己执行的示例工具；算式由下面的小解析器算，从不 eval
export const SCHEMAS = [
  { type: "function", function: { name: "calculator", description: "计算算式", parameters: {
    type: "object", properties: { expression: { type: "string", description: "只含数字、+-*/^ 与括号" } }, required: ["expression"] } } },
  { type: "function", function: { name: "get_time", description: "现在的日期与时间", parameters: { type: "object", properties: {} } } },
];

// 递归下降：和 → 积 → 负号 → 幂 → 原子
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

export function runTool(name, argumentsText) {
  try {
    const given = JSON.parse(argumentsText || "{}");
    if (name === "calculator") return JSON.stringify({ result: calculate(String(given.expression ?? "")) });
    if (name === "get_time") return JSON.stringify({ time: new Date().toLocaleString("zh-CN") });
    return JSON.stringify({ error: `没有工具 ${name}` });
  } catch (error) {
    return JSON.stringify({ error: error.message });
  }
}
