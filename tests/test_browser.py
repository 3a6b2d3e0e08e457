"""The widget notebooks in JupyterLab, in a real browser: run from a fresh kernel, clicked, dragged, scrubbed.

Screenshots and times are left in `runs/screenshots`. Skipped, with the reason, without chromium or playwright."""
import json

import pytest

from browser import CHROMIUM, ROOT, SHOTS, Lab, jupyter
from esam3.disagreement import disagreement, open_images, sample_at
from esam3.evaluation import load_model

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium here: apt-get install chromium")

SAYS = "([text]) => document.querySelector('.esam3-says').innerText.includes(text)"
SHOWN = "([name, text]) => document.querySelector(`.esam3-${name}`).innerHTML != text"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A browser window on a JupyterLab with copies of the widget notebooks, which take the small recipe."
    folder = tmp_path_factory.mktemp("lab")
    for path in (ROOT / "nbs").glob("6[01]_*.ipynb"):
        text = path.read_text().replace(r'recipe: str = \"toy\"', r'recipe: str = \"tiny\"')
        (folder / path.name).write_text(text)
    with jupyter(folder) as address, playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        window = Lab(browser.new_page(viewport={"width": 1280, "height": 900}), address)
        yield window
        browser.close()
    (SHOTS / "times.json").write_text(json.dumps(window.times, indent=1))
    print("\nseconds:", window.times)


@pytest.fixture(scope="module")
def opened(lab):
    "60_disagreement, run whole; its canvas on the prompts' tab."
    lab.run_all("60_disagreement.ipynb")
    lab.until("60: run all to the first figure", "() => document.querySelector('.jp-RenderedImage img')")
    lab.done()
    lab.wait(SAYS, "agree")
    return lab


def canvas(lab: Lab, number: int = 0):
    "A figure that is shown and hears the mouse: the upper of its two layers."
    return lab.page.locator(".jupyter-matplotlib canvas:nth-of-type(2):visible").nth(number)


def test_a_fresh_kernel_runs_the_notebook_without_an_error(opened):
    assert not opened.failures()
    assert opened.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling"
    wide = opened.page.locator(".jp-OutputArea-output").evaluate_all(
        "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).length")
    assert not wide, "no output is wider than its cell"


def test_clicks_and_boxes_give_the_numbers_of_the_function(opened):
    lab, page = opened, opened.page
    lab.write("prompts", "")
    lab.wait(SAYS, "click on the image")
    canvas(lab).scroll_into_view_if_needed()
    area = canvas(lab).bounding_box()
    before = page.screenshot(clip=area)
    page.mouse.click(area["x"] + area["width"] / 2, area["y"] + area["height"] / 2)  # one image as long as no prompt is
    lab.drawn("60: a click answered and drawn", area, before)
    lab.wait(SAYS, "agree")
    lab.shot("60_click")
    numbers = lab.at("numbers").inner_html()
    page.mouse.click(area["x"] + 90, area["y"] + area["height"] / 2, button="right")
    lab.until("60: a second click answered", SHOWN, "numbers", numbers)
    assert lab.field("prompts").input_value().split()[1].startswith("-"), "the right button is a negative point"
    x, y = area["x"] + 60, area["y"] + area["height"] / 2 - 40
    numbers, before = lab.at("numbers").inner_html(), page.screenshot(clip=area)
    page.mouse.move(x, y); page.mouse.down(); page.mouse.move(x + 60, y + 70, steps=5); page.mouse.up()
    lab.until("60: a box answered", SHOWN, "numbers", numbers)
    lab.drawn("60: a box drawn", area, before)
    lab.shot("60_box")
    words = lab.field("prompts").input_value()
    assert words.startswith("[") and "+" in words and " -" in words
    wanted = disagreement(load_model("toy"), load_model("toy-student"), sample_at(open_images("tiny"), 3), words)
    found = lab.table("numbers")
    assert abs(found["IoU of both"][0] - wanted.iou) < 1e-6
    for name, answer in zip(wanted.names, wanted.answers): assert abs(found[name][0] - answer.predicted) < 1e-6


def test_a_step_shows_the_losses_of_training(opened):
    lab = opened
    lab.at("draw").click()
    lab.wait(SAYS, "agree")
    terms = lab.at("terms").inner_html()
    lab.at("step").click()
    lab.until("60: a step", SHOWN, "terms", terms)
    lab.at("terms").scroll_into_view_if_needed()
    lab.shot("60_step")
    assert {"distill", "task mask", "task iou", "task score"} == lab.table("terms").keys()
    assert "IoU" in lab.says() or "too little" in lab.says()


def test_concepts_thresholds_and_the_worst(opened):
    lab, page = opened, opened.page
    page.get_by_role("tab", name="concept").click()
    lab.write("phrase", "giraffe")
    lab.wait(SAYS, "knows no word")
    lab.write("phrase", sample_at(open_images("tiny"), 3).phrases[0].text)
    lab.until("60: a concept", SAYS, "invented")
    lab.shot("60_concept")
    counts = lab.says()
    lab.at("threshold-0").locator(".noUi-handle, input[type=range]").first.focus()
    page.keyboard.press("End")
    lab.wait("([text]) => document.querySelector('.esam3-says').innerText != text", counts)
    assert lab.says() != counts, "a threshold of 1 leaves nothing of the first model"
    page.get_by_role("tab", name="worst first").click()
    lab.write("count", "6")
    canvas(lab).scroll_into_view_if_needed()
    area = canvas(lab).bounding_box()
    before = page.screenshot(clip=area)
    lab.at("rank").click()
    lab.until("60: six images ranked", SAYS, "instances")
    lab.drawn("60: and shown", area, before)
    lab.shot("60_worst")
    lab.at("open-this").click()
    lab.wait(SAYS, "agree")


def test_what_is_wrong_is_said_in_one_line(opened):
    lab, page = opened, opened.page
    page.get_by_role("tab", name="prompts").click()
    for name, text, line in (("prompts", "+900,900", "outside the image"), ("prompts", "the middle", "no prompt")):
        lab.write(name, text)
        lab.wait(SAYS, line)
    lab.field("path").fill("nowhere.png")
    lab.at("open").click()
    lab.wait(SAYS, "no such file")
    lab.shot("60_wrong")
    assert canvas(lab).is_visible() and not lab.failures(), "the last figure stays, and no traceback is shown"


NAME = "e => [...(e?.closest('[class*=esam3-]')?.classList ?? [])].find(c => c.startsWith('esam3-'))"


def test_the_keyboard_reaches_every_control(opened):
    page = opened.page
    wanted = set(page.evaluate(f"""() => [...document.querySelectorAll('[class*=esam3-]')].filter(
        e => e.offsetParent && (e.matches('button') || e.querySelector('input, select, .noUi-handle'))).map({NAME})"""))
    opened.field("number").focus()
    reached = set()
    for _ in range(3 * len(wanted)):
        reached.add(page.evaluate(f"() => ({NAME})(document.activeElement)"))
        page.keyboard.press("Tab")
    assert {"esam3-prompts", "esam3-step", "esam3-opacity"} <= wanted <= reached, wanted - reached


@pytest.fixture(scope="module")
def reading(lab):
    "61_memory_attention, run whole, its explorer in sight."
    lab.run_all("61_memory_attention.ipynb")
    lab.until("61: run all to the first figure", "() => document.querySelector('.jp-RenderedImage img')")
    lab.done()
    lab.wait("() => document.querySelector('img.esam3-reading, .esam3-reading img')?.naturalWidth > 100")
    lab.at("canvas").scroll_into_view_if_needed()
    return lab


def picture(lab: Lab) -> str:
    "The address of the reading's picture, another one for each."
    return lab.page.locator("img.esam3-reading, .esam3-reading img").first.get_attribute("src")


OTHER = "([src]) => document.querySelector('img.esam3-reading, .esam3-reading img').src != src"


def test_memory_is_read_frame_by_frame(reading):
    lab = reading
    assert not lab.failures()
    before = picture(lab)
    lab.at("next").click()
    lab.until("61: the next frame read", OTHER, before)
    lab.shot("61_next")
    before = picture(lab)
    lab.at("frame").locator(".noUi-handle").focus()
    lab.page.keyboard.press("ArrowRight")
    lab.until("61: a frame by the keyboard", OTHER, before)
    assert lab.at("frame").locator(".widget-readout").inner_text() == "3", "from 1 by a button and a key"


def test_a_click_chooses_the_pixel_that_reads(reading):
    lab, page = reading, reading.page
    before, place = picture(lab), [lab.field(name).input_value() for name in "xy"]
    canvas(lab).scroll_into_view_if_needed()
    area = canvas(lab).bounding_box()
    page.mouse.click(area["x"] + area["width"] * 0.62, area["y"] + area["height"] * 0.6)
    lab.until("61: a click answered", OTHER, before)
    lab.shot("61_click")
    assert [lab.field(name).input_value() for name in "xy"] != place
    page.mouse.click(area["x"] + 3, area["y"] + 3)
    lab.wait("() => document.querySelector('.esam3-line').innerText.includes('outside')")
    lab.at("fall").click()
    lab.wait("() => /frame|does not fall/.test(document.querySelector('.esam3-line').innerText)")
    lab.shot("61_fall")
    assert not lab.failures()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no sideways scrolling"
