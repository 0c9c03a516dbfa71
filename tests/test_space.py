"""The Space: what its runs tell, its page, and a browser that uses it as visitors do.

gradio, a browser and playwright are not among the packages of the other tests: without them those parts are skipped.
"""

from __future__ import annotations

import io
import re
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from browser import find as find_browser
from test_callers import tiny_tokenizer
from tiny import llama

from specformer import Round, RowRound, SpecFormerConfig, SpecFormerModel

ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "spaces" / "specformer"
sys.path.insert(0, str(SPACE))  # where app.py finds its modules by itself
import look  # noqa: E402
import models  # noqa: E402
import runs  # noqa: E402

pytestmark = pytest.mark.one_version

PROMPTS = "the other note\nand in the end\n\n is it? <b>&amp;"
LONG = 150
"""New tokens of a run that is stopped."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A target with its tokenizer, a drafter for it, and a smaller model."""
    home = tmp_path_factory.mktemp("space")
    target = llama(torch.float32, max_position_embeddings=512)
    for name, model in (("target", target), ("small", llama(torch.float32, num_hidden_layers=1))):
        model.generation_config.eos_token_id = None  # texts as long as is asked for
        model.save_pretrained(home / name)
        tiny_tokenizer().save_pretrained(home / name)
    torch.manual_seed(0)
    network = SpecFormerModel(SpecFormerConfig.from_target_config(target.config, initializer_range=0.3))
    network.save_pretrained(home / "drafter")
    return {name: str(home / name) for name in ("target", "drafter", "small")}


@pytest.fixture(scope="module")
def loaded(folders) -> models.Models:
    where = folders["drafter"]
    return models.load(folders["target"], "a tiny model", where, where, folders["small"], "float32")


def settings(loaded, **changes):
    given = dict(drafter=models.NETWORK, num_tokens=3, tree_size=0, temperature=0, seed=0, max_new_tokens=24)
    given["text"] = PROMPTS
    return runs.checked(**(given | changes), models=loaded)


def finished(loaded, **changes) -> runs.Run:
    run = runs.Run(loaded, settings(loaded, **changes))
    for _ in run.looks():
        pass
    return run


# ---- runs


@pytest.mark.parametrize("drafter", [models.NETWORK, models.ALONE, models.COPIES, models.ASSISTANT])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_run(drafter: str, temperature: float, loaded):
    run = finished(loaded, drafter=drafter, temperature=temperature, seed=4)
    assert run.is_complete and run.identical is True
    ours, theirs = run.speculative, run.plain
    assert ours.tokens == theirs.tokens == 3 * 24
    assert theirs.tokens_per_pass == 1 <= ours.tokens_per_pass
    for row in (*ours.rows, *theirs.rows):
        assert "".join(piece.text for piece in row.pieces) == row.shown
        assert row.shown == loaded.tokenizer.decode(row.ids, skip_special_tokens=True)
    assert [sum(accepted + 1 for accepted, _ in row.rounds) >= 23 for row in ours.rows] == [True] * 3
    told = {piece.source for row in ours.rows for piece in row.pieces}
    expected = {
        models.NETWORK: {None, "network", "copy"},
        models.ALONE: {None, "network"},
        models.COPIES: {None, "copy"},
        models.ASSISTANT: {None, "assistant"},
    }
    assert told <= expected[drafter]
    assert {piece.source for row in theirs.rows for piece in row.pieces} == {None}
    if drafter != models.COPIES:
        assert any(piece.rejected for row in ours.rows for piece in row.pieces)
        assert all(right <= count for right, count in zip(ours.accepted, ours.drafted, strict=True))


@pytest.mark.parametrize("drafter", [models.NETWORK, models.ALONE])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_run_with_trees(drafter: str, temperature: float, loaded):
    run = finished(loaded, drafter=drafter, temperature=temperature, tree_size=12)
    assert run.is_complete and run.identical is True
    side = run.speculative
    assert len(side.drafted) <= 3 < max(drafted for row in side.rows for _, drafted in row.rounds)
    assert all(right <= count for right, count in zip(side.accepted, side.drafted, strict=True))


def test_copies_as_trees(loaded):
    """Of a text that repeats itself."""
    text = "the hen the cow the hen the fox the hen the cow the hen the"
    run = finished(loaded, text=text, drafter=models.COPIES, tree_size=12)
    assert run.is_complete and run.identical is True
    assert {piece.source for row in run.speculative.rows for piece in row.pieces} <= {None, "copy"}
    assert max(drafted for row in run.speculative.rows for _, drafted in row.rounds) > 3  # tokens of a chain


def test_no_drafts_at_all(loaded):
    run = finished(loaded, num_tokens=0)
    assert run.identical and run.speculative.tokens_per_pass == 1 and run.speculative.drafted == []
    assert "identical" in look.page(run)


def test_the_sign_can_say_different(loaded):
    run = finished(loaded)
    assert ">identical<" in look.sign(run)
    run.plain.rows[1].ids[-1] += 1
    assert run.identical is False and ">different<" in look.sign(run)
    run.plain.state = "runs"
    assert ">different so far<" in look.sign(run)
    run.plain.rows[1].ids.pop()
    assert ">identical so far<" in look.sign(run)
    for row in run.plain.rows:
        row.ids.clear()
    assert run.identical is None and "identical" not in look.sign(run)


def test_rows_that_end():
    """Where the target ends a row, both sides do, and the padding after it is no text."""
    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    side = runs.Side([runs.Row(tokenizer), runs.Row(tokenizer)], slots=4)
    for column in ([10, 11], [end, 12], [0, 13]):
        side.take_column(column, {end})
    assert [row.ids for row in side.rows] == [[10, end], [11, 12, 13]]
    assert side.passes == 3 and side.tokens_per_pass == 1


def test_what_a_round_says_is_shown():
    tokenizer = tiny_tokenizer()
    side = runs.Side([runs.Row(tokenizer), runs.Row(tokenizer)], slots=4)
    side.take(Round(0, (RowRound(0, None, (), 0, (6,), False), RowRound(1, None, (), 0, (6,), False)), (1, 1), False))
    rows = RowRound(0, "network", (7, 8, 9), 1, (7, 10), False), RowRound(1, "copy", (7,), 1, (7, 11), True)
    side.take(Round(1, rows, (3, 3), False))
    assert [piece.source for piece in side.rows[0].pieces] == [None, "network", None]
    assert side.rows[0].pieces[2].rejected == tokenizer.decode([8, 9])
    assert (side.drafted, side.accepted, side.passes) == ([2, 1, 1], [2, 0, 0], 2)
    assert side.tokens_per_pass == 2 and [row.finished for row in side.rows] == [False, True]


def test_text_is_escaped(loaded):
    shown = look.page(finished(loaded))
    assert "is it? &lt;b&gt;&amp;amp;" in shown and "<b>&amp;" not in shown
    assert look.marked(runs.Piece("<i>", None, '"<"')).count("<") == 2


def test_a_run_that_is_stopped(loaded):
    """At the next round, without an error; the next run is not disturbed."""
    run = runs.Run(loaded, settings(loaded, max_new_tokens=LONG))
    looks = run.looks()
    slowly = loaded.target.register_forward_hook(lambda *_: time.sleep(0.02))
    try:
        while run.speculative.tokens < 6:
            next(looks)
        run.stop.set()
        for _ in looks:
            pass
    finally:
        slowly.remove()
    assert run.speculative.state == "stopped" and run.plain.state == "waits"
    assert 6 <= run.speculative.tokens < 3 * LONG
    assert finished(loaded).identical


def test_a_visitor_who_leaves(loaded):
    """What is no longer looked at does not go on."""
    looks = runs.Run(loaded, settings(loaded, max_new_tokens=LONG)).looks()
    next(looks)
    looks.close()
    assert not loaded.lock.locked() and threading.active_count() < 20
    assert finished(loaded).identical


def test_two_at_once(loaded):
    """Each gets the text of its own seed: one waits for the other, since both would take torch's one generator."""
    expected = [finished(loaded, temperature=1.0, seed=seed).speculative.rows[0].ids for seed in (1, 2)]
    both = [runs.Run(loaded, settings(loaded, temperature=1.0, seed=seed)) for seed in (1, 2)]
    threads = [threading.Thread(target=lambda run=run: list(run.looks())) for run in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [run.speculative.rows[0].ids for run in both] == expected and expected[0] != expected[1]
    assert all(run.identical for run in both)


def test_an_error_is_told(loaded, monkeypatch):
    def fail(**arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loaded.target, "generate", fail)
    run = runs.Run(loaded, settings(loaded))
    with pytest.raises(RuntimeError, match="out of memory"):
        list(run.looks())
    assert run.speculative.state == "failed" and not loaded.lock.locked()


BAD = {
    "nothing to answer yet": dict(text=" \n "),
    "These are 9 prompts; this page takes up to 8": dict(text="the\n" * 9),
    "Prompt 2 has .* tokens; this page takes up to 400": dict(text="the\n" + "o " * 500),
    "There is no drafter 'magic' here; choose": dict(drafter="magic"),
    "The seed should be a whole number": dict(seed=None),
    "seed should be a whole": dict(seed=-1),
    "The temperature should be a number from 0 to 2": dict(temperature=float("nan")),
    "The number of drafted tokens should be": dict(num_tokens=99),
    "The number of new tokens should be": dict(max_new_tokens=0),
    "The size of a tree should be a number from 0 to 32": dict(tree_size=33),
    "A smaller model drafts no trees": dict(tree_size=4, drafter=models.ASSISTANT),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input_gets_a_sentence(said: str, loaded):
    with pytest.raises(runs.BadInput, match=said):
        settings(loaded, **BAD[said])


def test_a_target_without_a_drafter(folders):
    loaded = models.load(folders["target"], "a tiny model", folders["drafter"], None, None, "float32")
    assert loaded.drafters == [models.COPIES]
    assert finished(loaded, drafter=models.COPIES).identical


# ---- the Space as a repository


def test_versions_are_those_that_are_tested():
    pins = dict(
        line.lower().split("==")
        for name in ("constraints.txt", "constraints-pages.txt")
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    )
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = dict(line.split("==") for line in lines if not line.startswith("--"))
    assert {name: version.removesuffix("+cpu") for name, version in wanted.items()} == {
        name: pins[name] for name in wanted
    }
    head = (SPACE / "README.md").read_text(encoding="utf-8").split("---")[1]
    assert f"sdk_version: {pins['gradio']}\n" in head
    assert len(re.search("short_description: (.*)", head)[1]) <= 60


# ---- the page, in a browser


@pytest.fixture(scope="module")
def address(loaded):
    """A page of a target that takes its time."""
    pytest.importorskip("gradio", reason="gradio is not installed: pip install 'specformer[space]'")
    from app import CSS, build

    slowly = loaded.target.register_forward_hook(lambda *_: time.sleep(0.03))
    blocks = build(loaded, "# A page")
    _, url, _ = blocks.queue().launch(prevent_thread_lock=True, css=CSS, quiet=True, ssr_mode=False)
    yield url
    blocks.close()
    slowly.remove()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    place = find_browser()
    if place is None:
        pytest.skip("no Chromium is installed: python tests/browser.py")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=place, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visitor:
    """Somebody with a window of their own."""

    def __init__(self, browser, address: str, width: int = 1400):
        self.page = browser.new_context(viewport=dict(width=width, height=900)).new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(address)
        self.page.wait_for_selector("#start")

    def start(self, prompts: str) -> None:
        self.page.fill("#prompts textarea", prompts)
        self.page.click("#start")

    def wait_for_status(self, beginning: str) -> None:
        self.page.wait_for_function(f"document.querySelector('#status').innerText.startsWith({beginning!r})")

    def marks(self) -> int:
        return self.page.locator("#texts .row mark").count()

    def sees(self, text: str) -> bool:
        return text in self.page.inner_text("#texts")


def bars_in(picture: bytes) -> int:
    """Pixels of a chart that are of its bars."""
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(picture)).convert("RGB")
    pixels = torch.tensor(list(image.getdata()))
    return int(((pixels - torch.tensor([249, 115, 22])).abs().sum(dim=1) < 60).sum())


def test_the_page_in_short(address, browser):
    """Two prompts; drafts are coloured before the end; what comes of it."""
    visitor = Visitor(browser, address)
    assert bars_in(visitor.page.locator("#chart").screenshot()) == 0
    visitor.start("the other note\nand in the end")
    visitor.page.wait_for_selector("#texts .row mark")
    assert visitor.page.inner_text("#status").startswith("Generating with drafts")
    early = visitor.marks()
    visitor.wait_for_status("Done")
    assert visitor.marks() > early
    assert visitor.sees("identical") and not visitor.sees("so far") and not visitor.sees("different")
    assert visitor.page.locator("#texts .row").count() == 2
    assert visitor.page.locator("#texts .bars i").count() > 10
    chart = visitor.page.locator("#chart")
    chart.scroll_into_view_if_needed()
    visitor.page.wait_for_timeout(1000)
    assert bars_in(chart.screenshot()) > 500
    wrong = visitor.page.locator("#texts .row .instead").first
    wrong.hover()
    assert wrong.evaluate("each => getComputedStyle(each, '::after').content").startswith('"not taken: ')
    assert not visitor.errors


@pytest.mark.slow
def test_the_page(address, browser, loaded):
    """Stopped in the middle, started again, at two widths, by two visitors at once, one of whom leaves."""
    first, second = Visitor(browser, address), Visitor(browser, address, width=400)
    first.page.locator("#stop").wait_for()
    first.start("the other note\nand in the end")
    first.page.wait_for_selector("#texts .row mark")
    first.page.click("#stop")
    first.wait_for_status("Stopped.")
    stopped = first.page.inner_text("#texts .row .ours")
    first.page.wait_for_timeout(500)
    assert first.page.inner_text("#texts .row .ours") == stopped and not first.sees("identical\n")

    first.start("a hen on the hill\none, two")
    second.start("is it?\nso it is\nthe rat")
    second.page.wait_for_function("document.querySelector('#status').innerText.includes('yours is next')")
    first.wait_for_status("Done")
    second.wait_for_status("Done")
    for visitor, prompts in ((first, ["a hen on the hill", "one, two"]), (second, ["is it?", "so it is", "the rat"])):
        assert visitor.page.locator("#texts .prompt").all_inner_texts() == prompts
        assert visitor.sees("identical") and not visitor.sees("different")
        wide = visitor.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1], "nothing stands out on the right"
    boxes = [visitor.page.locator("#texts .row .plain").first.bounding_box() for visitor in (first, second)]
    assert boxes[0]["x"] > 600 and boxes[1]["x"] < 100  # beside each other, and under one another

    first.start("")
    first.wait_for_status("There is nothing to answer yet")
    first.start("the end")
    first.page.wait_for_selector("#texts .row mark")
    first.page.close()
    second.start("the other one")
    second.wait_for_status("Done")
    assert second.sees("identical") and not [*first.errors, *second.errors]
