// 数怎么写、元素怎么建；日志里来的文字一律用 textContent，不当标记
import { words } from "/shared/page.js";

export function el(name, properties = {}, ...children) {
  const node = document.createElement(name);
  const { dataset, style, ...rest } = properties;
  Object.assign(node, rest);
  Object.assign(node.dataset, dataset);
  for (const [key, value] of Object.entries(style ?? {})) node.style.setProperty(key, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

const UNITS = [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k", 1e3]];

export function short(value) {
  if (value === null || value === undefined) return words.missing;
  const size = Math.abs(value);
  for (const [least, unit, divisor = least] of UNITS) if (size >= least) return `${trim((value / divisor).toPrecision(3))}${unit}`;
  if (size !== 0 && size < 1e-3) return value.toExponential(1).replace("e-", "e−");
  return size >= 100 ? String(Math.round(value * 10) / 10) : trim(value.toPrecision(4));
}

const trim = (text) => (text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text);

export const whole = (value) => Math.round(value).toLocaleString("en-US");

export function duration(seconds) {
  const all = Math.max(0, Math.round(seconds));
  if (all < 60) return words.seconds(all);
  if (all < 3600) return words.minutes(Math.floor(all / 60), String(all % 60).padStart(2, "0"));
  return words.hours(Math.floor(all / 3600), String(Math.floor((all % 3600) / 60)).padStart(2, "0"));
}

export function metricName(key) {
  if (Object.hasOwn(words.names, key)) return words.names[key];
  return key.startsWith("reward_") ? words.part(key.slice(7)) : key;
}

export function axisValue(axis, value) {
  return axis === "time" ? duration(value) : axis === "tokens" ? short(value) : whole(value);
}
