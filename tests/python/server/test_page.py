"""The page in a real browser, with an engine that paints squares."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.browser import Browser, Tab
from helpers.serving import Log, StubEngine, image_file, serving, wait_until

ACCENT = {False: "rgb(11, 99, 181)", True: "rgb(108, 180, 255)"}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("browser"))
    yield started
    started.close()


@pytest.fixture
def address(engine: StubEngine, log: Log, tmp_path: Path) -> Iterator[str]:
    (tmp_path / "ink.safetensors").touch()
    with serving(engine, log, lora_dir=tmp_path) as address:
        yield address
        engine.gate.set()


def ready(tab: Tab) -> None:
    wait(tab, "document.getElementById('model').textContent")


def wait(tab: Tab, condition: str) -> None:
    wait_until(lambda: tab.run(f"return Boolean({condition})"))


def fill(tab: Tab, **values: object) -> None:
    for name, value in values.items():
        tab.run(f"$('{name}').value = {json.dumps(value)}")


def draw(tab: Tab, images: int = 1) -> None:
    tab.run("$('draw').click()")
    wait(tab, f"document.querySelectorAll('figure[data-done]').length === {images}")
    wait(tab, "running === null")


def red_of_figure(tab: Tab, number: int = 0) -> int:
    """The level of red in the middle of an image."""
    return int(
        tab.run(f"""
            const image = document.querySelectorAll('figure img')[{number}];
            await image.decode();
            const context = document.createElement('canvas').getContext('2d');
            context.drawImage(image, 0, 0);
            return context.getImageData(9, 9, 1, 1).data[0];
        """)
    )


def test_an_image_and_its_settings(browser: Browser, address: str, engine: StubEngine) -> None:
    with browser.open(f"{address}/") as tab:
        ready(tab)
        assert tab.run("return $('model').textContent") == "stub"
        assert tab.run("return [$('width').value, $('height').value]") == ["64", "48"]
        wait(tab, "document.querySelector('.lora')")
        fill(tab, prompt="a <b>fox</b>", seed=7, steps=5, n=2, width=96)
        tab.run("document.querySelector('.lora input').click()")
        tab.run("document.querySelector('.lora input[type=number]').value = 0.5")
        draw(tab, 2)
        settings = engine.drawn[0].settings
        assert (settings.prompt, settings.seed, settings.steps) == ("a <b>fox</b>", 7, 5)
        assert (settings.width, settings.height, settings.batch) == (96, 48, 2)
        assert [(file.name, weight) for file, weight in settings.loras] == [
            ("ink.safetensors", 0.5)
        ]
        assert engine.drawn[0].previews == 3
        assert [red_of_figure(tab, i) for i in range(2)] == [8, 7]  # the newest comes first
        caption = tab.run("return document.querySelector('figcaption').textContent")
        assert caption == "a <b>fox</b>seed 8, 96x48, 5 steps, ink 0.5"
        # Other settings, and those of the first image again.
        fill(tab, prompt="else", steps=1, width=64, n=1)
        tab.run("document.querySelector('.lora input').click()")
        draw(tab, 3)
        assert engine.drawn[1].settings.loras == ()
        tab.run("document.querySelectorAll('figure')[2].querySelectorAll('button')[0].click()")
        draw(tab, 4)
        again = engine.drawn[2].settings
        assert (again.prompt, again.seed, again.steps, again.width) == ("a <b>fox</b>", 7, 5, 96)
        assert again.batch == 1 and again.loras == settings.loras
        assert red_of_figure(tab) == 7
        assert {url.split("?")[0].split(",")[0] for url in tab.requests()} <= {
            *(f"{address}{path}" for path in ("/", "/v1/models", "/sdapi/v1/loras")),
            f"{address}/v1/images/generations",
            *("data:", "data:image/png;base64"),
        }
        assert tab.console() == []


def test_previews_progress_and_stop(
    browser: Browser, address: str, engine: StubEngine, log: Log
) -> None:
    with browser.open(f"{address}/") as tab:
        ready(tab)
        engine.pause_at = 4
        fill(tab, prompt="a", steps=8)
        tab.run("$('draw').click()")
        wait(tab, "$('status').textContent === 'step 3 of 8'")
        wait(tab, "document.querySelector('figure .coming').naturalWidth === 8")
        assert tab.run("return [$('bar').value, $('bar').hidden, $('draw').disabled]") == [
            *(0.375, False, True),
        ]
        tab.run("$('stop').click()")
        wait(tab, "running === null")
        wait_until(lambda: log.lines()[-1]["status"] == 499)
        engine.pause_at = None
        engine.gate.set()
        assert tab.run("return document.querySelectorAll('figure').length") == 0
        assert tab.run("return [$('empty').hidden, $('error').hidden]") == [False, True]
        fill(tab, steps=1)
        draw(tab)
        assert engine.steps == 3 + 1 + 1


def transfer_of(content: bytes) -> str:
    """JavaScript that makes `transfer`, which holds a file."""
    return f"""
        const bytes = Uint8Array.from(atob("{base64.b64encode(content).decode()}"),
            (c) => c.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "a.png", {{type: "image/png"}}));
    """


def drop(tab: Tab, content: bytes) -> None:
    """Drop a file on the page."""
    tab.run(f"""
        {transfer_of(content)}
        $("drop").dispatchEvent(new DragEvent("drop", {{dataTransfer: transfer}}));
    """)


def test_the_same_file_can_be_chosen_again(browser: Browser, address: str) -> None:
    choose = f"""
        {transfer_of(image_file())}
        $("file").files = transfer.files;
        $("file").dispatchEvent(new Event("change"));
    """
    with browser.open(f"{address}/") as tab:
        ready(tab)
        tab.run(choose)
        wait(tab, "!$('initial').hidden")
        # A browser tells nothing if the same file is chosen as before.
        assert tab.run("return $('file').value") == ""


def test_image_to_image(browser: Browser, address: str, engine: StubEngine) -> None:
    with browser.open(f"{address}/") as tab:
        ready(tab)
        drop(tab, image_file((40, 70)))
        wait(tab, "$('height').value === '64'")
        assert tab.run("return [$('width').value, $('initial').hidden]") == ["32", False]
        fill(tab, prompt="a", strength=0.25, steps=4)
        draw(tab)
        settings = engine.drawn[0].settings
        assert settings.init_image.size == (40, 70)
        assert (settings.width, settings.height, settings.strength) == (32, 64, 0.25)
        tab.run("[...document.querySelectorAll('figure button')].at(-1).click()")  # its image
        fill(tab, n=2)
        draw(tab, 3)
        assert engine.drawn[1].settings.init_image.size == (32, 64)
        tab.run("$('clear').click()")
        draw(tab, 5)
        assert engine.drawn[2].settings.init_image is None
        assert tab.console() == []


def test_errors_are_shown(browser: Browser, address: str, engine: StubEngine) -> None:
    with browser.open(f"{address}/") as tab:
        ready(tab)
        fill(tab, prompt="a", width=4096, height=4096)
        tab.run("$('draw').click()")
        wait(tab, "!$('error').hidden")
        message = tab.run("return $('error').textContent")
        assert message.startswith("size must have at most 4,194,304 pixels")
        engine.failure = MemoryError()
        fill(tab, width=64, height=48)
        tab.run("$('draw').click()")
        wait(tab, "$('error').textContent.includes('too little memory')")
        assert tab.run("return document.querySelectorAll('figure').length") == 0
        engine.failure = None
        draw(tab)
        assert tab.run("return $('error').hidden")


def test_the_key_is_asked_for(browser: Browser, engine: StubEngine) -> None:
    with serving(engine, api_key="s3cret") as address, browser.open(f"{address}/") as tab:
        wait(tab, "$('ask').open")
        unusable = "s3cret\u200b"  # which fetch cannot send
        for key, problem in (("wrong", "wrong"), (unusable, "copy it again"), ("s3cret", "")):
            fill(tab, key=key)
            tab.run("$('login').requestSubmit()")
            if problem:
                wait(tab, f"$('ask').open && $('wrong').textContent.includes('{problem}')")
        ready(tab)
        fill(tab, prompt="a")
        draw(tab)
        assert len(engine.drawn) == 1


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1400, 390])
def test_it_fits_and_follows_the_scheme(
    browser: Browser, address: str, width: int, dark: bool
) -> None:
    with browser.open(f"{address}/", width=width, dark=dark) as tab:
        ready(tab)
        fill(tab, prompt="x" * 300, n=3)
        draw(tab, 3)
        assert tab.run("return document.documentElement.scrollWidth") <= width
        style: dict[str, Any] = tab.run(
            "const style = getComputedStyle($('draw'));"
            "return {color: style.backgroundColor, width: $('draw').offsetWidth}"
        )
        assert style["color"] == ACCENT[dark] and style["width"] > 200
        assert tab.image().mean() > 128 if not dark else tab.image().mean() < 128
        missing = tab.run(
            "return [...document.querySelectorAll('input, textarea')]"
            ".filter((each) => !each.closest('label') && !each.getAttribute('aria-label')).length"
        )
        assert missing == 0
