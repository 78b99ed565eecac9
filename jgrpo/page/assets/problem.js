"use strict";
// One problem through the steps of a run, and across runs.

{
  const { el } = page;
  let problems = null, key = null, found = null, plot = null, asked = 0;
  const root = () => document.getElementById("problem");

  const load = async function () {
    const mine = ++asked;
    try {
      if (!problems) {
        root().replaceChildren(el("p", { className: "note" }, "Reading the problems of all steps …"));
        problems = await page.get("/api/problems");
      }
      if (!problems.length) {
        root().replaceChildren(el("p", { className: "note" }, "No completions are here yet."));
        problems = null;
        return;
      }
      key = key || problems[0].key;
      const answer = await page.get(`/api/problem?key=${key}`);
      if (mine !== asked) return;
      found = answer;
    } catch (error) {
      root().replaceChildren(el("p", { className: "error" }, page.visible(error.message)));
      return;
    }
    render();
  };

  const swatch = (run) => {
    const mark = el("span", { className: "swatch" });
    mark.style.backgroundColor = page.line(run).color;
    return mark;
  };
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const draw = function () {
    const lines = page.overview.runs.map((run, i) => {
      const met = found.met.filter((m) => m.run === i);
      const { color } = page.line(i);
      return {
        x: met.map((m) => m.step), y: met.map((m) => mean(m.rows.map((row) => (row.right ? 1 : 0)))),
        name: page.plain(run.name).replace(/[<>&]/g, " "), mode: "lines+markers", line: { color, width: 1.4, dash: "dot" }, marker: { size: 8, color },
      };
    }).filter((line) => line.x.length);
    page.draw(plot, lines, { x: { title: { text: "step", standoff: 4, font: { size: 11 } }, rangemode: "tozero" }, y: { tickformat: ".0%", range: [-0.06, 1.06] } });
  };

  const render = function () {
    const options = problems.map((p) => [p.key, `${p.times} × ${page.plain(p.text).replace(/\s+/g, " ").slice(0, 70)}`]);
    if (!problems.some((p) => p.key === key)) options.unshift([key, page.plain(found.text).slice(0, 70)]);
    plot = el("div", { className: "plot" });
    const detail = el("article", { className: "detail", id: "answer", "aria-live": "polite" }, el("p", { className: "note" }, "Choose a completion from the table."));
    const pick = (m, row, button) => {
      root().querySelectorAll("td [aria-pressed]").forEach((b) => b.setAttribute("aria-pressed", "false"));
      button.setAttribute("aria-pressed", "true");
      page.openCompletion(detail, m.run, m.step, row.row);
    };
    const rows = [...found.met].sort((a, b) => a.step - b.step || a.run - b.run).map((m) => el("tr", {},
      el("td", {}, String(m.step)), ...(page.overview.runs.length > 1 ? [el("td", { className: "text" }, swatch(m.run), page.plain(page.overview.runs[m.run].name))] : []),
      el("td", { className: "text" }, el("span", { className: "group" }, ...m.rows.map((row) => {
        const button = el("button", { type: "button", "aria-pressed": "false", title: `advantage ${page.signed(row.advantage)}, ${row.n_tokens} tokens`, onclick: () => pick(m, row, button) }, page.mark(row.right));
        return button;
      }))),
      el("td", {}, `${m.rows.filter((row) => row.right).length} of ${m.rows.length}`),
      el("td", {}, page.number(mean(m.rows.map((row) => row.n_tokens)), 1))));
    const head = ["step", ...(page.overview.runs.length > 1 ? ["run"] : []), "completions", "right", "tokens"];
    root().replaceChildren(
      el("div", { className: "bar" }, page.select("Problem", options, key, (next) => { key = next; load(); })),
      page.longText(found.text, el("pre", { className: "raw" })),
      el("p", { className: "note" }, "gold ", page.visible(found.gold.slice(0, 500))),
      el("h2", {}, "Share of its completions that are right"),
      el("article", { className: "card", role: "img", "aria-label": "Share right by step; the same numbers are in the table below" }, plot),
      el("h2", {}, "Where it came"),
      el("div", { className: "wide" }, el("table", { id: "met" }, el("thead", {}, el("tr", {}, ...head.map((h) => el("th", { scope: "col", className: h === "run" || h === "completions" ? "text" : "" }, h)))), el("tbody", {}, ...rows))),
      el("h2", {}, "Completion"), detail);
    draw();
    root().querySelector("td [aria-pressed]")?.click();
  };
  page.views.problem = {
    show: (where) => { if (where.key) key = where.key; load(); },
    update: () => {},
    theme: () => { if (found && plot) draw(); },
    where: () => ({ key }),
  };
}
