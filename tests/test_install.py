"""What a user gets: the wheel in an environment of its own, what loading imports, and the report in a browser."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
ADAPTER = ROOT / "tests" / "data" / "adapter-0.1"
#: what only `recover` and the studies need
HEAVY = (
    "caprese.distill",
    "caprese.data_gen",
    "caprese.recovery",
    "datasets",
    "matplotlib",
    "pyarrow",
    "reasoning_gym",
)
_LOAD = f"""
import sys
import caprese
model = caprese.load("reasoner-tiny", {str(ADAPTER)!r})
assert type(model).__name__ == "PeftModelForCausalLM"
heavy = {HEAVY!r}
print([name for name in sys.modules if name in heavy or name.startswith(tuple(f"{{each}}." for each in heavy))])
"""


def test_loading_is_light():
    done = subprocess.run([sys.executable, "-c", _LOAD], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_oldest_that_are_tested_are_the_oldest_that_are_named():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    ours = [each for name in ("compressed", "quantized", "eval", "dev") for each in extras[name]]
    wanted = map(Requirement, [*project["dependencies"], *ours])
    named = {f"{each.name}{each.specifier}".replace(">=", "==") for each in wanted if each.specifier}
    tested = (ROOT / "oldest-constraints.txt").read_text().split("\n")[1:-1]
    # another torch than that of constraints.txt is Makefile's to choose
    assert sorted(tested) == sorted(each for each in named if not each.startswith("torch=="))


def test_the_house_is_as_it_says():
    done = subprocess.run([sys.executable, "docs/house.py", "check"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The python of an environment that holds the wheel and what it needs, and nothing else."""
    place = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(place),
        str(ROOT),
    ]
    subprocess.run(build, check=True)
    (wheel,) = place.glob("caprese-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(place / "env")], check=True)
    python = place / "env" / "bin" / "python"
    (torch,) = (line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("torch=="))
    # torch first and pinned, as in the Makefile: what else asks for it then takes what is there
    for wanted in ([torch], ["-c", str(ROOT / "constraints.txt"), str(wheel)]):
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    return python


@pytest.fixture(scope="module")
def made(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with it, from another directory."""
    place = tmp_path_factory.mktemp("elsewhere")
    command = [installed.parent / "caprese", "recover", "--recipe", "reasoner-tiny-quick", "--output", "out", "--json"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    quality = json.loads(done.stdout)["quality"]
    assert quality["dense"]["kl"] == 0 and quality["recovered"]["kl"] < quality["efficient"]["kl"]
    return place / "out"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_stands_alone(installed: Path, made: Path):
    where = subprocess.run(
        [installed, "-c", "import caprese; print(caprese.__file__)"], capture_output=True, text=True, cwd=made
    )
    assert Path(where.stdout.strip()).is_relative_to(installed.parent.parent), where.stderr
    said = subprocess.run(
        [installed.parent / "caprese", "generate", "-m", "reasoner-tiny", "-a", "out", "-p", "12+30", "--json"],
        capture_output=True,
        text=True,
        cwd=made.parent,
    )
    assert said.returncode == 0 and json.loads(said.stdout)["new_tokens"] > 1, said.stderr


@pytest.fixture
def page(made: Path) -> Iterator[str]:
    """The report's address on loopback."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """The console is for the browser's."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(made)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/report.html"
    server.shutdown()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_in_a_browser(page: str, width: int):
    """No error in its console, and nothing to scroll to sideways."""
    webdriver = pytest.importorskip("selenium.webdriver")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        chrome.get(page)
        assert chrome.execute_script("return innerWidth") == width
        assert chrome.execute_script("return document.documentElement.scrollWidth") <= width
        assert chrome.execute_script("return document.querySelectorAll('img').length") > 0
        broken = "return [...document.images].filter(i => !(i.complete && i.naturalWidth)).length"
        assert chrome.execute_script(broken) == 0
        # a browser asks for an icon by itself; this server has none
        errors = [line for line in chrome.get_log("browser") if "favicon.ico" not in line["message"]]
        assert not errors
    finally:
        chrome.quit()
