"""The page in a real Chromium: clicks, filters, keys, hostile text, no error in its console."""

import shutil
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from page_runs import HOSTILE, a_run, completion

from jgrpo.page.server import Server
from jgrpo.run.rundir import json_line, write_rollouts
from jgrpo.view import given, write

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

BINARY, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (BINARY and DRIVER), reason="no chromium and chromedriver here (apt-get install them)"
    ),
]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
)  # fmt: skip


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BINARY
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    runs = [a_run(root / name, seed=seed, lora_r=r) for name, seed, r in
            (("a", 0, 1), ("b", 1, 1), ("c", 0, 4))]  # fmt: skip
    rows = [completion(HOSTILE, HOSTILE, right=False, advantage=0.0),
            completion(HOSTILE, "x" * 3_000_000, right=False, advantage=0.0)]  # fmt: skip
    write_rollouts(runs[2], 4, rows)
    (root / "report.md").write_text("# What it found\n\n<script>window.broken = 3</script>\n")
    return root


@pytest.fixture
def page(chromium, folder):
    """Opens the page at a view; whatever its console says at the end is a failure."""
    with Server(given([folder]), 0) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        chromium.get_log("browser")
        yield partial(opened, chromium, server.url)
        assert chromium.execute_script("return window.broken") is None
        assert not chromium.get_log("browser")
        chromium.get("about:blank")
        server.shutdown()


def opened(chromium, url, view="", *, width=1280, dark=False):
    command = chromium.execute_cdp_cmd
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    command("Emulation.setEmulatedMedia", {"features": [scheme]})
    command("Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False})  # fmt: skip
    chromium.get("about:blank")
    chromium.get(f"{url}#/{view}")
    wait(chromium, "body[data-ready]")
    return chromium


def wait(chromium, css):
    WebDriverWait(chromium, 10).until(lambda c: c.find_elements(By.CSS_SELECTOR, css))
    return chromium.find_element(By.CSS_SELECTOR, css)


def until(chromium, css, text):
    def there(c):
        found = c.find_elements(By.CSS_SELECTOR, css)
        return any(text in (element.get_property("textContent") or "") for element in found)

    WebDriverWait(chromium, 10, ignored_exceptions=[Exception]).until(there)


def all_of(chromium, css):
    return chromium.find_elements(By.CSS_SELECTOR, css)


def button(chromium, text):
    [found] = [b for b in all_of(chromium, "button") if b.text.startswith(text)]
    return found


def test_curves_of_seeds_are_a_mean_and_a_band_and_come_apart_by_a_click(page):
    c = page("curves")
    wait(c, "#curves .plot .scatterlayer .trace")
    lines = "return document.querySelector('#curves .plot').data.map(t => [t.fill || '', t.y])"
    drawn = c.execute_script(lines)  # accuracy: of two groups an evaluation, the band of one, ...
    assert sum(fill == "tonexty" for fill, _ in drawn) == 1
    training = [y for _, y in drawn if len(y) == 4]
    # of seeds 0 and 1, (0.1 + 0.11) / 2 at step 1; the run of rank 4 alone is at 0.1
    assert sorted(round(y[0], 4) for y in training) == [0.1, 0.105]
    c.find_element(By.ID, "apart").click()
    wait(c, "#apart[aria-pressed=true]")
    assert not any(fill == "tonexty" for fill, _ in c.execute_script(lines))
    assert [cell.text for cell in all_of(c, "#runs th")][:3] == ["run", "lora_r", "seed"]


@pytest.mark.slow
def test_a_run_is_hidden_by_a_click_and_shown_again(page):
    c = page("curves")
    count = "return document.querySelector('#curves .plot').data.length"
    wait(c, "#curves .plot .scatterlayer .trace")
    before = c.execute_script(count)
    button(c, "c").click()
    assert c.execute_script(count) == before - 2
    button(c, "c").click()
    assert c.execute_script(count) == before


def test_completions_are_filtered_sorted_and_opened(page):
    c = page("completions?run=0&step=2")
    until(c, "#one .verdict", "Right")
    assert len(all_of(c, ".list [data-row]")) == 6
    button(c, "Wrong and boxed 2").click()
    until(c, "#one .verdict", "Wrong")
    assert [b.get_attribute("data-row") for b in all_of(c, ".list [data-row]")] == ["1", "4"]
    button(c, "All 6").click()
    sort = next(s for s in all_of(c, "select") if s.accessible_name.startswith("Sort"))
    Select(sort).select_by_visible_text("highest advantage")
    order = [b.get_attribute("data-row") for b in all_of(c, ".list [data-row]")]
    assert order == ["0", "3", "2", "5", "1", "4"]
    c.find_element(By.ID, "after").click()
    until(c, "#one .verdict", "Right")
    assert c.execute_script("return page.views.completions.where().step") == 3


@pytest.mark.slow
def test_tokens_are_coloured_by_logprob_and_say_their_numbers_by_keys(page):
    c = page("completions?run=0&step=2&row=0")
    wait(c, "#tokens [data-i]")
    colours = [s.value_of_css_property("background-color") for s in all_of(c, "#tokens [data-i]")]
    assert colours[0] == "rgba(0, 0, 0, 0)"  # logprob 0
    alphas = [float(x.split(",")[3].strip(" )")) for x in colours[1:6]]
    assert alphas == sorted(alphas)
    assert alphas[0] > 0
    c.find_element(By.ID, "tokens").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    until(c, "#token", "token 3 of")
    assert "logprob -1 (probability 36.8 %)" in c.find_element(By.ID, "token").text
    assert not button(c, "Gap").is_enabled()
    until(c, "#one .note", "trainer's logprobs were not kept")


def test_arrow_keys_go_through_the_list_and_the_tabs(page):
    c = page("completions?run=0&step=2")
    until(c, "#one .verdict", "Right")
    c.find_element(By.CSS_SELECTOR, ".list [data-row='0']").send_keys(Keys.ARROW_DOWN)
    until(c, "#one .verdict", "Wrong")
    assert c.switch_to.active_element.get_attribute("data-row") == "1"
    c.find_element(By.ID, "tab-completions").send_keys(Keys.ARROW_RIGHT)
    wait(c, "#met")
    assert c.switch_to.active_element.get_attribute("id") == "tab-problem"


@pytest.mark.slow
def test_a_completion_leads_to_its_problem_in_all_runs(page):
    c = page("completions?run=0&step=2&row=4")
    wait(c, "#through").click()
    until(c, "#problem .raw", "What is 2 + 5?")
    rows = all_of(c, "#met tbody tr")
    assert len(rows) == 11  # 4 + 4 + 3: the last step of run c is of another problem
    rows[0].find_elements(By.TAG_NAME, "button")[1].click()
    until(c, "#answer .verdict", "Wrong")


def test_hostile_text_is_text(page):
    c = page("completions?run=2&step=4&row=0")
    until(c, "#tokens", "<script>window.broken = 1</script>")
    shown = [b.text for b in all_of(c, "#tokens b")]
    assert shown[:3] == ["\\e", "\\e", "U+202E"]
    assert {"U+202C", "U+200B", "\\r", "U+0000"} <= set(shown)
    assert not all_of(c, "main img, main script")
    assert c.execute_script("return getComputedStyle(tokens).unicodeBidi") == "isolate"


@pytest.mark.slow
def test_megabytes_open_in_part_and_the_rest_on_demand(page):
    c = page("completions?run=2&step=4&row=1")
    more = "Show the other 2,950,000 characters"
    until(c, "#tokens button", more)
    length = "return document.getElementById('tokens').textContent.length"
    assert c.execute_script(length) == 50_000 + len(more)
    button(c, more).click()
    assert c.execute_script(length) == 3_000_000


@pytest.mark.slow
def test_health_tells_each_value_of_worry(page):
    c = page("health")
    wait(c, "#healths")
    text = c.find_element(By.ID, "health").text
    assert "worry above 80.0 %" in text
    assert "worry above 1.0e-4" in text
    assert "▲" not in text
    wait(c, "#health .barlayer .trace")


@pytest.mark.slow
def test_a_report_s_script_is_text(page):
    c = page("report")
    until(c, ".report h1", "What it found")
    assert "<script>window.broken = 3</script>" in c.find_element(By.CSS_SELECTOR, ".report").text


@pytest.mark.slow
def test_it_follows_a_run_that_goes_on(page, folder):
    c = page("curves")
    until(c, "#runs td", "4 of 4")
    with (folder / "a/metrics.jsonl").open("a") as file:
        file.write(json_line({"step": 5, "time/step": 1.0, "train/accuracy": 0.9}))
    until(c, "#runs td", "5 of 4")


@pytest.mark.slow
@pytest.mark.parametrize("dark", [True, False])
@pytest.mark.parametrize("width", [400, 1280])
def test_no_view_is_wider_than_the_screen(page, width, dark):
    for view in ("curves", "completions?run=2&step=4", "problem", "health", "report"):
        c = page(view, width=width, dark=dark)
        wait(c, "main section:not([hidden]) *")
        time.sleep(0.3)  # pictures settle
        assert c.execute_script("return document.documentElement.scrollWidth") <= width, view
    ground = c.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) is dark


def test_the_file_that_is_sent_works_by_itself(chromium, folder, tmp_path):
    out = write(given([folder]), tmp_path / "page.html", [2])
    c = opened(chromium, f"file://{out}", "completions")
    until(c, "#one .verdict", "Right")
    wait(c, "#tokens [data-i]")
    c.find_element(By.ID, "tab-curves").click()
    wait(c, "#curves .plot .scatterlayer .trace")
    asked = "return performance.getEntriesByType('resource').map(e => e.name)"
    assert [n for n in c.execute_script(asked) if not n.startswith(("data:", "blob:"))] == []
    assert not c.get_log("browser")
    assert Path(out).stat().st_size < 8e6
