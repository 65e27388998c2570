"""A real Chromium, JupyterLab and the docs site for the tests, each started once; screenshots go to build/screenshots."""

import contextlib
import functools
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHOTS = ROOT / "build" / "screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
REQUIRED = bool(os.environ.get("AOI_REQUIRE_BROWSER"))

IN_BROWSER = [
    pytest.mark.browser,
    pytest.mark.timeout(240),
    pytest.mark.skipif(not CHROMIUM and not REQUIRED, reason="no Chromium on PATH (Debian: apt-get install chromium)"),
]


class Visit:
    "A page of the browser that remembers what it asked for and what went wrong."

    def __init__(self, page):
        self.page, self.requests, self.errors = page, [], []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def outside(self) -> list[str]:
        "The requests that left for another host."
        hosts = [(urllib.parse.urlsplit(url), url) for url in self.requests]
        return [url for p, url in hosts if p.scheme not in ("data", "blob", "about") and p.hostname != "127.0.0.1"]

    def shoot(self, name: str, **options) -> None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", **options)


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "AOI_REQUIRE_BROWSER is set, and there is no Chromium on PATH"
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=60_000)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, request):
    "Open a page of a given size; at the end, which may be a failure, a last screenshot is taken and all are closed."
    context = []

    def open_page(width: int = 1280, height: int = 900) -> Visit:
        context.append(browser.new_context(viewport={"width": width, "height": height}))
        page = context[-1].new_page()
        page.set_default_timeout(60_000)
        return Visit(page)

    yield open_page
    for c in context:
        SHOTS.mkdir(parents=True, exist_ok=True)
        c.pages[0].screenshot(path=SHOTS / f"{request.node.name}-end.png")
        c.close()


# the docs site


@pytest.fixture(scope="session")
def site():
    "The docs on a loopback port, built if they are not there."
    docs = ROOT / "_docs"
    if not (docs / "index.html").exists():
        subprocess.run([sys.executable, "tools/build_docs.py"], cwd=ROOT, check=True, timeout=200)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(docs))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(10)


# notebooks in JupyterLab


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "JupyterLab, stopped at the end."
    with serve("jupyterlab", tmp_path_factory.mktemp("lab")) as url:
        yield url


@pytest.fixture(scope="session")
def notebook(tmp_path_factory):
    "Notebook 7, stopped at the end; skipped where it is not installed."
    if find_spec("notebook") is None:
        pytest.skip("Notebook 7 is not installed (pip install notebook)")
    with serve("notebook", tmp_path_factory.mktemp("notebook")) as url:
        yield url


@contextlib.contextmanager
def serve(application: str, home: Path) -> Iterator[str]:
    "A Jupyter application on a loopback port, over copies of the notebooks, with settings of its own."
    work = home / "work"
    shutil.copytree(ROOT / "nbs", work, ignore=shutil.ignore_patterns(".*", "_*"))
    cells = [
        {"cell_type": "code", "id": "a", "metadata": {}, "outputs": [], "execution_count": None, "source": source}
        for source in ("import aoi_ssl\nprint('aoi_ssl', aoi_ssl.__version__, 6 * 7)",)
    ]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    small = {"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    (work / "small.ipynb").write_text(json.dumps(small))
    options = {  # every cell is drawn, scrolled to or not; no question about news
        "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
        "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }
    for name, value in options.items():
        file = home / "settings" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")}
    env |= {f"JUPYTER_{k}_DIR": str(home / k.lower()) for k in ("CONFIG", "DATA", "RUNTIME")}
    env |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", application, "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=test", f"--ServerApp.root_dir={work}"]
    with open(home / "log", "w") as log:
        server = subprocess.Popen(command, cwd=work, env=env, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            assert server.poll() is None, (home / "log").read_text()[-3000:]
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{url}/api/status?token=test", timeout=5).read()
                break
            time.sleep(0.5)
        else:
            raise AssertionError(f"{application} did not start in 60 s:\n" + (home / "log").read_text()[-3000:])
        yield url
    finally:
        with contextlib.suppress(OSError):  # asks it to stop, kernels first; then whatever is left of its group
            stop = urllib.request.Request(f"{url}/api/shutdown?token=test", method="POST")
            urllib.request.urlopen(stop, timeout=20).read()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(10)


def open_notebook(v: Visit, url: str, path: str, *, application: str = "lab") -> None:
    "Open a notebook in JupyterLab or Notebook 7 and wait until its cells are drawn."
    pages = {"lab": f"lab/workspaces/auto-{Path(path).stem}/tree/{path}?token=test&reset", "notebook": f"notebooks/{path}?token=test"}
    v.page.goto(f"{url}/{pages[application]}")
    v.page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    v.page.wait_for_function("document.querySelectorAll('.jp-Notebook .jp-Cell.jp-mod-active').length > 0")
