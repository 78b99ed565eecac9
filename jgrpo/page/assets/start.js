"use strict";
// Which view is shown (kept in the address, so that a link leads there), and following a run.

{
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const EVERY_MS = 4000;
  let now = null;

  const read = function () {
    const [view, query] = location.hash.replace(/^#\/?/, "").split("?");
    return [view in page.views ? view : "curves", Object.fromEntries(new URLSearchParams(query || ""))];
  };
  page.go = function (view, where) {
    const query = new URLSearchParams(where || {}).toString();
    const hash = `#/${view}${query ? `?${query}` : ""}`;
    if (location.hash === hash) show();
    else location.hash = hash;
  };
  const show = function () {
    const [view, where] = read();
    now = view;
    for (const tab of tabs) {
      const here = tab.dataset.view === view;
      tab.setAttribute("aria-selected", String(here));
      tab.tabIndex = here ? 0 : -1;
      document.getElementById(tab.dataset.view).hidden = !here;
    }
    page.views[view].show(where);
  };
  const head = function () {
    const { runs, reports, whole } = page.overview;
    document.getElementById("tab-report").hidden = !reports.length;
    const worries = page.worries(), tab = document.getElementById("tab-health");
    tab.replaceChildren("Health", ...(worries ? [page.el("span", { className: "count", title: `${worries} worth a look` }, String(worries))] : []));
    const names = runs.length === 1 ? page.plain(runs[0].folder) : `${runs.length} runs`;
    document.title = `jgrpo: ${names}`;
    const going = runs.filter((run) => { const s = (run.metrics["time/step"] || [[]])[0]; return !s.length || s[s.length - 1] < run.options.n_grpo_steps; });
    document.getElementById("state").textContent = names + (whole ? going.length ? ` · ${going.length} not finished` : "" : " · a copy");
  };
  const follow = async function () {
    const start = performance.now();
    try {
      if (!document.hidden) {
        const overview = await page.get("/api/runs");
        if (JSON.stringify(overview) !== JSON.stringify(page.overview)) {
          page.overview = overview;
          head();
          page.views[now].update();
        }
      }
    } catch (error) {
      document.getElementById("state").textContent = "the server does not answer";
    }
    setTimeout(follow, Math.max(EVERY_MS, 10 * (performance.now() - start)));
  };

  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => page.go(tab.dataset.view));
    tab.addEventListener("keydown", (event) => {
      const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!way) return;
      const seen = tabs.filter((t) => !t.hidden);
      const next = seen[(seen.indexOf(tab) + way + seen.length) % seen.length];
      next.focus();
      page.go(next.dataset.view);
    });
  });
  addEventListener("hashchange", show);
  page.onTheme(() => { const view = page.views[now]; (view.theme || view.show)({}); });
  page.get("/api/runs").then((overview) => {
    page.overview = overview;
    head();
    show();
    document.body.dataset.ready = "yes";
    if (!page.answers) setTimeout(follow, EVERY_MS);
  }).catch((error) => {
    document.querySelector("main").replaceChildren(page.el("p", { className: "error" }, page.visible(error.message)));
  });
}
