"use strict";
// What every view uses: elements, numbers, text of any origin, answers, and pictures.

const page = { overview: null, views: {}, where: {} };
const embedded = document.getElementById("answers");
page.answers = embedded ? JSON.parse(embedded.textContent) : null;

// An element; a child that is a string becomes text, never markup.
page.el = function (tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && !name.startsWith("aria")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
};

page.get = async function (path) {
  if (page.answers) {
    if (path in page.answers) return page.answers[path];
    throw new Error("That is not in this file; the one who sent it can show it: python -m jgrpo.view");
  }
  const reply = await fetch(path);
  const answer = await reply.json();
  if (!reply.ok) throw new Error(answer.error || reply.statusText);
  return answer;
};

// Characters that cannot be seen, or that move others about: shown as what they are.
const UNSEEN = /(?![\n\t])[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]/gu;
const escaped = (c) => {
  const n = c.codePointAt(0);
  return n === 27 ? "\\e" : n === 13 ? "\\r" : `U+${n.toString(16).toUpperCase().padStart(4, "0")}`;
};
page.visible = function (text) {
  const parts = document.createDocumentFragment();
  let last = 0;
  for (const match of text.matchAll(UNSEEN)) {
    if (match.index > last) parts.append(text.slice(last, match.index));
    parts.append(page.el("b", { title: "a character that cannot be seen" }, escaped(match[0])));
    last = match.index + match[0].length;
  }
  if (last < text.length) parts.append(text.slice(last));
  return parts;
};
page.plain = (text) => text.replace(UNSEEN, escaped);

const SHOWN = 50000; // characters; a browser is slow on a text of megabytes
page.longText = function (text, into) {
  into.append(page.visible(text.slice(0, SHOWN)));
  if (text.length > SHOWN) {
    const rest = page.el("button", {
      onclick: () => rest.replaceWith(page.visible(text.slice(SHOWN))),
    }, `Show the other ${(text.length - SHOWN).toLocaleString("en")} characters`);
    into.append(page.el("br"), rest);
  }
  return into;
};

page.number = function (value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6) return value.toExponential(1);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 100 ? value.toFixed(1) : value.toFixed(digits);
};
page.signed = (value, digits = 2) =>
  value === null || value === undefined ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
page.share = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(1)} %`);
page.seconds = (s) => (s < 120 ? `${s.toFixed(1)} s` : s < 7200 ? `${(s / 60).toFixed(1)} min` : `${(s / 3600).toFixed(1)} h`);
page.mark = (right) => right === null ? page.el("span", { className: "mark", title: "not graded" }, "·")
  : right ? page.el("span", { className: "mark good", title: "right" }, "✓")
  : page.el("span", { className: "mark bad", title: "wrong" }, "✗");

page.select = function (label, options, chosen, change) {
  const select = page.el("select", { "aria-label": label, onchange: () => change(select.value) });
  for (const [value, text] of options) {
    select.append(page.el("option", { value: String(value) }, text));
  }
  select.value = String(chosen);
  return page.el("label", {}, label, select);
};
page.choice = function (label, options, chosen, change) {
  const group = page.el("span", { className: "choice", role: "group", "aria-label": label });
  for (const { value, text, disabled, title } of options) {
    group.append(page.el("button", {
      type: "button", "aria-pressed": String(value === chosen), disabled: Boolean(disabled),
      title: title || "", "data-value": value, onclick: () => change(value),
    }, text));
  }
  return group;
};

// -- pictures

const dark = matchMedia("(prefers-color-scheme: dark)");
const LIGHT_LINES = ["#0072B2", "#D55E00", "#009E73", "#B4508C", "#A87900", "#3A8FC4", "#3c3c3c"];
const DARK_LINES = ["#5db4ee", "#f2894d", "#35c79b", "#e29ac6", "#e3b341", "#a5d6f7", "#d8d8d8"];
const DASHES = ["solid", "dash", "dot", "dashdot"]; // where there are more lines than colours
page.line = (i) => ({ color: (dark.matches ? DARK_LINES : LIGHT_LINES)[i % 7], dash: DASHES[Math.floor(i / 7) % 4] });
page.onTheme = (redraw) => dark.addEventListener("change", redraw);
page.css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
page.faded = (colour, alpha) => {
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  return `rgba(${r}, ${g}, ${b}, ${alpha})`;
};
// Ticks of a logarithmic axis: powers of ten, and 2 and 5 between them where there are few.
page.logarithmic = function (values) {
  const logs = values.filter((v) => v > 0).map(Math.log10);
  if (!logs.length) return {};
  const low = Math.floor(Math.min(...logs)), high = Math.ceil(Math.max(...logs)) , few = high - low < 3;
  const every = Math.max(1, Math.ceil((high - low) / 5)), tickvals = [];
  for (let e = low; e <= high; e += every) tickvals.push(...(few ? [1, 2, 5] : [1]).map((m) => m * 10 ** e));
  return { type: "log", tickvals, ticktext: tickvals.map((v) => v.toExponential(0)) };
};
page.draw = function (node, traces, axes = {}) {
  const soft = page.css("--soft"), line = page.css("--line");
  const axis = { gridcolor: line, linecolor: line, zeroline: false, tickcolor: line, automargin: true, fixedrange: true };
  const layout = {
    margin: { l: 8, r: 8, t: 10, b: 8 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: page.css("--text"), size: 12, color: soft }, showlegend: false, hovermode: "x unified",
    hoverlabel: { bgcolor: page.css("--card"), bordercolor: line, font: { color: page.css("--ink"), size: 12 } },
    ...axes.layout,
    xaxis: { ...axis, showgrid: false, ...axes.x }, yaxis: { ...axis, nticks: 6, ...axes.y },
  };
  return Plotly.react(node, traces, layout, { displayModeBar: false, responsive: true });
};
