"use strict";
// Curves of all runs over each other; seeds of one config as a mean and a band from least to most.

{
  const { el } = page;
  const PANELS = [
    { title: "Accuracy", unit: "share of problems; evaluations marked, training faint", tags: ["eval/accuracy", "train/accuracy"], percent: true },
    { title: "Reward", unit: "mean of a step", tags: ["train/reward_mean"] },
    { title: "Completion length", unit: "tokens, mean of a step", tags: ["train/avg_gen_length"] },
    { title: "Sampler gap", unit: "mean |sampler − trainer logprob|, nats", tags: ["sampler/logprob_diff_mean"], log: true },
    { title: "Entropy", unit: "nats a token, of those trained", tags: ["train/entropy"] },
    { title: "Gradient norm", unit: "before clipping at 1", tags: ["train/grad_norm"] },
  ];
  const hidden = new Set();
  let apart = false, extra = null;

  const shownGroups = () => {
    const { runs, groups } = page.overview;
    const all = apart ? runs.map((run, i) => ({ name: run.name, runs: [i] })) : groups;
    return all.map((group, i) => ({ ...group, look: page.line(i) }));
  };
  // The steps that any run of the group has, with mean, least and most of those that have them.
  const gathered = function (members, tag) {
    const at = new Map();
    for (const i of members) {
      const [steps, values] = page.overview.runs[i].metrics[tag] || [[], []];
      steps.forEach((step, k) => {
        if (!at.has(step)) at.set(step, []);
        if (values[k] !== null) at.get(step).push(values[k]);
      });
    }
    const steps = [...at.keys()].sort((a, b) => a - b);
    const of = (f) => steps.map((step) => (at.get(step).length ? f(at.get(step)) : null));
    return {
      steps, mean: of((v) => v.reduce((a, b) => a + b) / v.length),
      least: of((v) => Math.min(...v)), most: of((v) => Math.max(...v)),
    };
  };
  const traces = function (panel) {
    const found = [];
    for (const group of shownGroups()) {
      if (hidden.has(group.name)) continue;
      panel.tags.forEach((tag, place) => {
        const { steps, mean, least, most } = gathered(group.runs, tag);
        if (panel.log) { // an exact 0 has no place on it
          const smallest = Math.min(...most.filter((v) => v > 0));
          least.forEach((v, k) => { if (v !== null && v <= 0) least[k] = most[k] > 0 ? Math.min(smallest, most[k]) : null; });
          for (const values of [mean, most]) values.forEach((v, k) => { if (v !== null && v <= 0) values[k] = null; });
        }
        if (!steps.length) return;
        const faint = place > 0, marked = tag.startsWith("eval/") || steps.length === 1;
        const { color, dash } = group.look;
        if (group.runs.length > 1 && !faint) {
          const edge = { x: steps, mode: "lines", line: { width: 0 }, hoverinfo: "skip", connectgaps: true };
          found.push({ ...edge, y: least }, { ...edge, y: most, fill: "tonexty", fillcolor: page.faded(color, 0.16) });
        }
        found.push({
          x: steps, y: mean, name: page.plain(group.name).slice(0, 60) + (panel.tags.length > 1 ? `, ${tag}` : ""),
          mode: marked ? "lines+markers" : "lines", opacity: faint ? 0.4 : 1,
          line: { color, dash, width: faint ? 1.2 : 2.2 }, marker: { size: 6, color },
        });
      });
    }
    return found.map((trace) => ({ ...trace, name: (trace.name || "").replace(/[<>&]/g, " ") }));
  };
  const drawPanel = function (panel) {
    const lines = traces(panel);
    page.draw(panel.node, lines, {
      x: { title: { text: "step", standoff: 4, font: { size: 11 } }, rangemode: "tozero" },
      y: { ...(panel.percent ? { tickformat: ".0%" } : {}), ...(panel.log ? page.logarithmic(lines.flatMap((trace) => trace.y)) : {}) },
      layout: lines.length ? {} : { annotations: [{ text: "not logged", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }] },
    });
  };

  const legend = function () {
    const box = el("div", { className: "legend", role: "group", "aria-label": "Runs shown" });
    for (const group of shownGroups()) {
      const mark = el("i");
      mark.style.borderTopColor = group.look.color;
      if (group.look.dash !== "solid") mark.style.borderTopStyle = group.look.dash === "dot" ? "dotted" : "dashed";
      const count = group.runs.length > 1 ? ` · ${group.runs.length} seeds` : "";
      const single = group.runs.length === 1 ? differs(page.overview.runs[group.runs[0]]) : "";
      box.append(el("button", {
        type: "button", "aria-pressed": String(!hidden.has(group.name)),
        onclick: () => { if (!hidden.delete(group.name)) hidden.add(group.name); render(); },
      }, mark, page.plain(group.name) + count + (single ? ` · ${single}` : "")));
    }
    if (page.overview.groups.some((group) => group.runs.length > 1)) {
      box.append(el("button", { type: "button", id: "apart", "aria-pressed": String(apart), onclick: () => { apart = !apart; render(); } }, "Seeds apart"));
    }
    return box;
  };
  const words = (value) => (value === null ? "none" : Array.isArray(value) ? value.join(",") : String(value));
  const differs = (run) => Object.entries(run.differs).map(([k, v]) => `${k}=${page.plain(words(v))}`).join(" ");

  const ends = function (run, tag) {
    const values = (run.metrics[tag] || [[], []])[1].filter((v) => v !== null);
    return values.length ? { first: values[0], last: values[values.length - 1], best: Math.max(...values) } : {};
  };
  const table = function () {
    const { runs } = page.overview;
    const odd = [...new Set(runs.flatMap((run) => Object.keys(run.differs)))];
    const head = ["run", ...odd, "steps", "accuracy, first", "last", "best", "reward, last", "tokens, last", "time"];
    const rows = runs.map((run) => {
      const evals = ends(run, "eval/accuracy"), accuracy = "last" in evals ? evals : ends(run, "train/accuracy");
      const steps = (run.metrics["time/step"] || [[]])[0], time = Object.values(run.time).reduce((a, b) => a + b, 0);
      const cells = [page.plain(run.name), ...odd.map((o) => (o in run.differs ? page.plain(words(run.differs[o])) : "–")),
        `${steps.length ? steps[steps.length - 1] : 0} of ${run.options.n_grpo_steps ?? "?"}`,
        page.share(accuracy.first), page.share(accuracy.last), page.share(accuracy.best),
        page.number(ends(run, "train/reward_mean").last), page.number(ends(run, "train/avg_gen_length").last, 1), page.seconds(time)];
      return el("tr", {}, ...cells.map((cell) => el("td", {}, cell)));
    });
    return el("div", { className: "wide" }, el("table", { id: "runs" },
      el("thead", {}, el("tr", {}, ...head.map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, ...rows)));
  };

  const panels = function () {
    const tags = new Set(page.overview.runs.flatMap((run) => Object.keys(run.metrics)));
    const others = [...tags].filter((tag) => !PANELS.some((panel) => panel.tags.includes(tag))).sort();
    const more = page.select("Another curve", [["", "choose"], ...others.map((tag) => [tag, tag])], extra ? extra.tags[0] : "", (tag) => {
      extra = tag ? { title: tag, unit: "", tags: [tag] } : null;
      render();
    });
    return { more, list: extra ? [...PANELS, extra] : PANELS };
  };
  const render = function () {
    const root = document.getElementById("curves");
    const focused = document.activeElement && root.contains(document.activeElement)
      ? [...root.querySelectorAll("button, select")].indexOf(document.activeElement) : -1;
    const { more, list } = panels();
    const cards = list.map((panel) => {
      panel.node = el("div", { className: "plot" });
      return el("article", { className: "card", role: "img", "aria-label": `${panel.title} by step; the last values are in the table below` },
        el("header", {}, el("h3", {}, panel.title), el("span", { className: "unit" }, panel.unit)), panel.node);
    });
    const seeds = page.overview.groups.some((group) => group.runs.length > 1) && !apart;
    root.replaceChildren(...(page.overview.runs.length > 1 ? [legend()] : []), el("div", { className: "cards" }, ...cards),
      el("div", { className: "bar" }, more, seeds ? el("p", { className: "note" }, "Lines are means over seeds, bands reach from the least to the most.") : null),
      el("h2", {}, "Runs"), table());
    list.forEach(drawPanel);
    if (focused >= 0) root.querySelectorAll("button, select")[focused]?.focus();
  };
  page.views.curves = { show: render, update: render };
}
