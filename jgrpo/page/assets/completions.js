"use strict";
// The completions of a step: a list that is filtered and sorted, and one of them, token by token.

{
  const { el } = page;
  const FILTERS = [
    ["all", "All", () => true],
    ["right", "Right", (row) => row.right === true],
    ["boxed", "Wrong and boxed", (row) => row.right === false && row.answer !== null],
    ["unboxed", "No box", (row) => row.answer === null],
    ["truncated", "Truncated", (row) => row.truncated],
  ];
  const down = (f) => (a, b) => (f(b) ?? -Infinity) - (f(a) ?? -Infinity) || a.row - b.row;
  const SORTS = {
    sampled: ["as sampled", (a, b) => a.row - b.row],
    advantage: ["highest advantage", down((row) => row.advantage)],
    lowest: ["lowest advantage", down((row) => -row.advantage)],
    gap: ["largest gap", down((row) => row.largest_gap)],
    longest: ["longest", down((row) => row.n_tokens)],
  };
  const AT_ONCE = 300; // rows of a list
  const state = { run: 0, step: null, row: null, filter: "all", sort: "sampled", many: AT_ONCE };
  let answer = null, asked = 0;

  const root = () => document.getElementById("completions");
  const filtered = () => {
    const keep = FILTERS.find(([name]) => name === state.filter)[2];
    return answer.rows.filter(keep).sort(SORTS[state.sort][1]);
  };

  const load = async function () {
    const steps = page.overview.runs[state.run].steps;
    if (!steps.length) {
      root().replaceChildren(controls(), el("p", { className: "note" }, "No step of this run is here yet."));
      return;
    }
    if (!steps.includes(state.step)) state.step = steps[steps.length - 1];
    const mine = ++asked;
    try {
      const found = await page.get(`/api/step?run=${state.run}&step=${state.step}`);
      if (mine !== asked) return;
      answer = found;
    } catch (error) {
      if (mine === asked) root().replaceChildren(controls(), el("p", { className: "error" }, page.visible(error.message)));
      return;
    }
    state.many = AT_ONCE;
    render();
  };

  const controls = function () {
    const { runs } = page.overview, { steps } = runs[state.run];
    const at = steps.indexOf(state.step);
    const go = (step) => { Object.assign(state, { step, row: null }); load(); };
    const bar = el("div", { className: "bar" });
    if (runs.length > 1) {
      bar.append(page.select("Run", runs.map((run, i) => [i, page.plain(run.name)]), state.run, (i) => {
        Object.assign(state, { run: Number(i), row: null });
        load();
      }));
    }
    bar.append(el("span", { className: "choice" },
      el("button", { type: "button", "aria-label": "Step before", id: "before", disabled: at <= 0, onclick: () => go(steps[at - 1]) }, "‹"),
      page.select("Step", steps.map((s) => [s, String(s)]), state.step, (s) => go(Number(s))),
      el("button", { type: "button", "aria-label": "Step after", id: "after", disabled: at < 0 || at === steps.length - 1, onclick: () => go(steps[at + 1]) }, "›")));
    if (!answer) return bar;
    const filters = FILTERS.map(([value, text, keep]) => {
      const n = answer.rows.filter(keep).length;
      return { value, text: `${text} ${n}`, disabled: !n && value !== state.filter };
    });
    bar.append(page.choice("Which", filters, state.filter, (filter) => { state.filter = filter; state.row = null; render(); }));
    const sorts = Object.entries(SORTS).filter(([name]) => name !== "gap" || answer.rows.some((row) => row.largest_gap !== null));
    bar.append(page.select("Sort", sorts.map(([name, [text]]) => [name, text]), state.sort, (sort) => { state.sort = sort; state.row = null; render(); }));
    return bar;
  };

  const item = (row) => el("button", {
    type: "button", "data-row": row.row, "aria-current": String(row.row === state.row), tabIndex: row.row === state.row ? 0 : -1,
    onclick: () => choose(row.row),
  }, page.mark(row.right), el("span", { className: "start" }, page.visible(row.text.trim()) ),
    el("span", { className: "figures" }, [
      `advantage ${page.signed(row.advantage)}`, `reward ${page.number(row.reward, 2)}`, `${row.n_tokens} tokens`,
      row.truncated ? "truncated" : null, row.largest_gap === null || state.sort !== "gap" ? null : `gap ${page.number(row.largest_gap)}`,
    ].filter(Boolean).join(" · ")));

  const render = function () {
    const rows = filtered();
    if (!rows.some((row) => row.row === state.row)) state.row = rows.length ? rows[0].row : null;
    const list = el("div", { className: "list", "aria-label": "Completions", role: "group", onkeydown: move });
    list.append(...rows.slice(0, state.many).map(item));
    if (rows.length > state.many) {
      list.append(el("button", { type: "button", onclick: () => { state.many += AT_ONCE; render(); } }, "", `${rows.length - state.many} more`));
    }
    if (!rows.length) list.append(el("p", { className: "note" }, "None is like that."));
    const detail = el("article", { className: "detail", id: "one", "aria-live": "polite" });
    root().replaceChildren(controls(), el("div", { className: "reader" }, list, detail));
    if (state.row === null) detail.remove();
    else open(detail, state.run, state.step, state.row);
  };
  const choose = function (row) {
    state.row = row;
    for (const button of root().querySelectorAll(".list [data-row]")) {
      const here = Number(button.dataset.row) === row;
      button.setAttribute("aria-current", String(here));
      button.tabIndex = here ? 0 : -1;
    }
    open(document.getElementById("one"), state.run, state.step, row);
  };
  const move = function (event) {
    const way = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
    const buttons = [...root().querySelectorAll(".list [data-row]")];
    const to = buttons[buttons.indexOf(document.activeElement) + way];
    if (!way || !to) return;
    event.preventDefault();
    to.focus();
    choose(Number(to.dataset.row));
  };

  // -- one completion

  const COLOURS = {
    none: ["Plain", null, null],
    logprob: ["Logprob", "logprobs", "the tokens that surprised the policy; full colour at −5 nats"],
    gap: ["Gap", "gaps", "sampler against trainer"],
    entropy: ["Entropy", "entropies", "how open the choice was; full colour at 2 nats"],
  };
  let colour = "logprob";
  const openings = new WeakMap();

  const open = async function (detail, run, step, row) {
    const mine = (openings.get(detail) || 0) + 1;
    openings.set(detail, mine);
    let one;
    try {
      one = await page.get(`/api/completion?run=${run}&step=${step}&row=${row}`);
    } catch (error) {
      if (openings.get(detail) === mine) detail.replaceChildren(el("p", { className: "error" }, page.visible(error.message)));
      return;
    }
    if (openings.get(detail) === mine) show(detail, one, run, step, row);
  };
  page.openCompletion = open;

  const fact = (name, value, code) => value === null || value === undefined ? null
    : el("div", {}, el("dt", {}, name), el("dd", { className: code ? "code" : "" }, typeof value === "string" ? page.visible(value) : value));
  const show = function (detail, one, run, step, row) {
    const verdict = one.right === null ? "Not graded" : one.right ? "Right" : one.answer === null ? "Wrong: no box" : "Wrong";
    const parts = Object.entries(one.reward_parts);
    const head = el("p", { className: "verdict" }, page.mark(one.right), ` ${verdict}`, one.truncated ? ", truncated" : "");
    const facts = el("dl", { className: "facts" },
      fact("answer", one.answer === null ? "–" : one.answer.slice(0, 500), true), fact("gold", one.gold.slice(0, 500), true),
      fact("advantage", page.signed(one.advantage)), fact("reward", page.number(one.reward)),
      ...(parts.length > 1 ? parts.map(([name, value]) => fact(name, page.number(value))) : []),
      fact("tokens", String(one.n_tokens)), fact("ended by", one.finish_reason === "length" ? "max_tokens" : "its end token"),
      fact("largest gap", one.largest_gap === null ? null : page.number(one.largest_gap)));
    const siblings = page.overview && answer && detail.id === "one" ? group(answer, row) : null;
    const problem = page.longText(one.problem, el("pre", { className: "raw" }));
    const prompt = el("details", {}, el("summary", {}, "The whole prompt"), page.longText(one.prompt, el("pre", { className: "raw" })));
    const onward = detail.id === "one" ? el("button", { type: "button", id: "through", onclick: () => page.go("problem", { key: one.key }) }, "This problem through the steps") : null;
    detail.replaceChildren(head, facts, ...(siblings ? [siblings] : []), el("h3", {}, "Problem"), problem, prompt, ...completion(one), ...(onward ? [onward] : []));
  };
  const group = function ({ rows }, row) {
    const { problem } = rows.find((other) => other.row === row);
    const box = el("div", { className: "group", role: "group", "aria-label": "The group" }, el("span", { className: "note" }, "Its group"));
    for (const other of rows.filter((r) => r.problem === problem)) {
      box.append(el("button", {
        type: "button", "aria-pressed": String(other.row === row), onclick: () => choose(other.row),
        title: `advantage ${page.signed(other.advantage)}, ${other.n_tokens} tokens`,
      }, page.mark(other.right)));
    }
    return box;
  };

  const completion = function (one) {
    const box = el("pre", { className: "raw", id: "tokens", tabIndex: 0, "aria-label": "Completion; arrow keys go through its tokens" });
    const token = el("p", { className: "token", id: "token", "aria-live": "polite" });
    const scale = el("span", { className: "scale" });
    const missing = (name) => one.pieces === null ? one.no_pieces : !one[COLOURS[name][1]]
      ? { gap: "The trainer's logprobs were not kept: it computes them of completions with an advantage alone.", entropy: "Entropies were not kept.", logprob: "The sampler's logprobs were not kept." }[name] : null;
    const options = Object.entries(COLOURS).map(([value, [text]]) => ({ value, text, disabled: value !== "none" && missing(value), title: value !== "none" ? missing(value) || "" : "" }));
    const chosen = colour === "none" || missing(colour) ? "none" : colour;
    const bar = el("div", { className: "bar" }, el("h3", {}, "Completion"));
    const paint = function (name) {
      bar.querySelector(".choice")?.remove();
      bar.append(page.choice("Colour by", options, name, (next) => { colour = next; paint(next); }), scale);
      fill(box, one, name);
      const [, , meaning] = COLOURS[name];
      scale.replaceChildren(...(meaning ? [el("i"), name === "gap" ? `${meaning}; full colour at ${page.number(fullGap(one))} nats` : meaning] : []));
    };
    paint(chosen);
    if (one.pieces) watch(box, token, one);
    const why = [...new Set(["logprob", "gap", "entropy"].map(missing).filter(Boolean))];
    return [bar, box, token, ...(why.length ? [el("p", { className: "note" }, why.join(" "))] : [])];
  };
  const fullGap = (one) => Math.max(1e-6, ...one.gaps.map(Math.abs));
  const strength = (name, one) => ({
    none: () => 0,
    logprob: (i) => -one.logprobs[i] / 5,
    gap: (() => { const most = one.gaps ? fullGap(one) : 1; return (i) => Math.abs(one.gaps[i]) / most; })(),
    entropy: (i) => one.entropies[i] / 2,
  })[name];
  const MOST_SPANS = 20000;
  const fill = function (box, one, name) {
    if (!one.pieces) { box.replaceChildren(); page.longText(one.completion, box); return; }
    const parts = document.createDocumentFragment(), of = strength(name, one);
    one.pieces.slice(0, MOST_SPANS).forEach((piece, i) => {
      const last = i === one.pieces.length - 1 && piece === "" && one.finish_reason === "stop";
      const span = el("span", { "data-i": i }, last ? el("b", { title: "the end token" }, "end") : page.visible(piece.length > SHOWN ? piece.slice(0, SHOWN) + "…" : piece));
      const alpha = Math.min(1, Math.max(0, of(i))) * 0.75;
      if (alpha > 0.01) span.style.backgroundColor = `rgba(${page.css("--hot")}, ${alpha.toFixed(3)})`;
      parts.append(span);
    });
    if (one.pieces.length > MOST_SPANS) parts.append(page.longText(one.pieces.slice(MOST_SPANS).join(""), el("span")));
    box.replaceChildren(parts);
  };
  const watch = function (box, said, one) {
    let at = -1;
    const tell = function (i) {
      box.querySelector(".here")?.classList.remove("here");
      const span = box.querySelector(`[data-i="${i}"]`);
      if (!span) return;
      at = i;
      span.classList.add("here");
      const { logprobs, gaps, entropies } = one;
      said.textContent = [`token ${i + 1} of ${one.pieces.length}`, `id ${one.token_ids[i]}`,
        logprobs ? `logprob ${page.number(logprobs[i])} (probability ${page.share(Math.exp(logprobs[i]))})` : null,
        gaps ? `gap ${page.number(gaps[i])}` : null, entropies ? `entropy ${page.number(entropies[i])}` : null].filter(Boolean).join(" · ");
    };
    box.addEventListener("mouseover", (event) => {
      const span = event.target.closest("[data-i]");
      if (span) tell(Number(span.dataset.i));
    });
    box.addEventListener("keydown", (event) => {
      const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!way) return;
      event.preventDefault();
      tell(Math.min(one.pieces.length - 1, Math.max(0, at + way)));
    });
  };

  page.views.completions = {
    show: (where) => {
      for (const name of ["run", "step", "row"]) if (name in where) state[name] = Number(where[name]);
      if (!page.overview.runs[state.run]) state.run = 0;
      load();
    },
    update: () => {
      if (!answer) return load();
      if (root().contains(document.activeElement) && document.activeElement.tagName === "SELECT") return;
      root().querySelector(".bar")?.replaceWith(controls());
    },
    where: () => ({ run: state.run, step: state.step }),
  };
}
