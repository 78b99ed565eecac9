"use strict";
// Health at a glance: a table of all runs, and each measure of one with the value of worry; the time.

{
  const { el } = page;
  let chosen = 0;
  const value = (m, v) => v === null ? "not finite" : m.unit === "share" ? page.share(v) : page.number(v);
  const worrying = (run) => run.health.filter((m) => m.worrying);
  page.worries = () => page.overview.runs.reduce((n, run) => n + worrying(run).length, 0);
  const sign = (m) => m.worrying ? el("span", { className: "bad" }, `▲ ${value(m, m.worst)}`) : el("span", {}, value(m, m.worst));

  const table = function () {
    const { runs } = page.overview;
    const titles = new Map(runs.flatMap((run) => run.health.map((m) => [m.tag, m.title])));
    const rows = runs.map((run, i) => el("tr", { className: i === chosen ? "chosen" : "" },
      el("td", {}, el("button", { type: "button", "aria-pressed": String(i === chosen), onclick: () => { chosen = i; render(); } }, page.plain(run.name))),
      ...[...titles.keys()].map((tag) => {
        const m = run.health.find((other) => other.tag === tag);
        return el("td", {}, m ? sign(m) : "–");
      })));
    return el("div", { className: "wide" }, el("table", { id: "healths" },
      el("thead", {}, el("tr", {}, ...["run", ...titles.values()].map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, ...rows)));
  };
  const card = function (m) {
    m.node = el("div", { className: "plot small" });
    const state = m.worrying ? el("span", { className: "bad" }, `▲ above at ${m.worrying} of ${m.steps.length} steps`) : el("span", { className: "good" }, "✓ fine");
    const limit = m.worry ? `worry above ${m.unit === "share" ? page.share(m.worry) : page.number(m.worry)}` : "worry above 0";
    return el("article", { className: "card" }, el("header", {}, el("h3", {}, m.title), state),
      el("p", { className: "big" }, value(m, m.last), el("span", { className: "unit" }, ` ${m.unit === "share" ? "" : m.unit} at the last step`)),
      el("p", { className: "unit" }, `largest ${value(m, m.worst)} at step ${m.at} · ${limit}`), m.node, el("p", { className: "note" }, m.why));
  };
  const spark = function (m, colour) {
    const log = m.unit === "nats" && m.values.some((v) => v > 0);
    page.draw(m.node, [{ x: m.steps, y: log ? m.values.map((v) => (v > 0 ? v : null)) : m.values, mode: m.steps.length > 1 ? "lines" : "markers", line: { color: colour, width: 1.8 }, name: "" },
      { x: [m.steps[0], m.steps[m.steps.length - 1]], y: [m.worry, m.worry], mode: "lines", line: { color: page.css("--bad"), width: 1, dash: "dot" }, hoverinfo: "skip" }],
    { x: { showticklabels: false }, y: { nticks: 3, showgrid: false,  ...(log ? page.logarithmic([...m.values, m.worry]) : { rangemode: "tozero" }) } });
  };
  const time = function (node) {
    const { runs } = page.overview, shown = runs.slice(0, 40);
    const phases = [...new Set(shown.flatMap((run) => Object.keys(run.time)))];
    node.style.height = `${90 + 30 * shown.length}px`;
    page.draw(node, phases.map((phase, i) => ({
      type: "bar", orientation: "h", name: phase, marker: { color: page.line(i).color }, y: shown.map((run) => `${page.plain(run.name).replace(/[<>&]/g, " ")} `), x: shown.map((run) => run.time[phase] || 0),
      hovertemplate: "%{x:.1f} s",
    })), { x: { showgrid: true, ticksuffix: " s" }, y: { autorange: "reversed", type: "category", nticks: undefined },
      layout: { barmode: "stack", showlegend: true, legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" }, bargap: 0.35, hovermode: "closest", margin: { l: 8, r: 8, t: 36, b: 28 } } });
  };

  const render = function () {
    if (!page.overview.runs[chosen]) chosen = 0;
    const run = page.overview.runs[chosen], bars = el("div", { className: "plot" });
    const root = document.getElementById("health");
    const said = run.health.length ? run.health.map(card) : [el("p", { className: "note" }, "No step is logged yet.")];
    root.replaceChildren(el("h2", {}, "Largest values of each run"), table(),
      el("h2", {}, page.plain(run.name)), el("div", { className: "cards" }, ...said), el("h2", {}, "Where the time went"),
      el("article", { className: "card", role: "img", "aria-label": "Seconds of each run by phase" }, bars));
    run.health.forEach((m) => spark(m, page.line(0).color));
    time(bars);
  };
  page.views.health = { show: render, update: render };

  let n = 0;
  const report = async function () {
    const root = document.getElementById("report"), { reports } = page.overview;
    if (!reports.length) return;
    const box = el("div", { className: "report" });
    root.replaceChildren(...(reports.length > 1 ? [el("div", { className: "bar" }, page.select("Report", reports.map((name, i) => [i, page.plain(name)]), n, (i) => { n = Number(i); report(); }))] : []), box);
    try {
      const { html } = await page.get(`/api/report?n=${n}`); // made by a Markdown reader that passes no HTML on
      box.append(...new DOMParser().parseFromString(html, "text/html").body.childNodes);
    } catch (error) {
      box.append(el("p", { className: "error" }, page.visible(error.message)));
    }
  };
  page.views.report = { show: report, update: () => {}, theme: () => {} };
}
