"""The built site: offline, whole, and no wider than a window."""

import ast
import importlib.util
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import aftcli

ROOT = Path(__file__).parents[2]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
# Attributes that a browser loads by itself, by tag; links are followed by people only.
LOADED = {
    "script": ["src"],
    "img": ["src", "srcset"],
    "source": ["src", "srcset"],
    "iframe": ["src"],
    "link": ["href"],
    "use": ["href"],
    "object": ["data"],
    "video": ["src", "poster"],
}
# Loads each page at two widths, and tells the server what is wrong.
PROBE = """<!doctype html><html><body><script>
const pages = %s, wrong = [];
async function look(page, width) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0`;
  frame.src = page;
  document.body.append(frame);
  await new Promise(done => frame.onload = done);
  const inner = frame.contentDocument, root = inner.documentElement;
  const images = [...inner.images];
  await Promise.all(images.map(i => i.decode().catch(() => 0)));
  for (const i of images) if (!i.naturalWidth) wrong.push(`${page}: no image ${i.src}`);
  if (root.scrollWidth > root.clientWidth)
    wrong.push(`${page}: ${root.scrollWidth} pixels wide in a window of ${width}`);
  frame.remove();
}
(async () => {
  for (const page of pages) for (const width of [1280, 400]) await look(page, width);
  await fetch("/wrong", {method: "POST", body: JSON.stringify(wrong)});
})();
</script></body></html>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return out


class Loads(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "link" and attrs.get("rel") in ("next", "prev", "canonical"):
            return
        for name in LOADED.get(tag, ()):
            self.found += [part.split()[0] for part in (attrs.get(name) or "").split(",") if part]
        self.found += re.findall(r"url\(['\"]?([^'\")]+)", attrs.get("style") or "")


def loads(path):
    parser = Loads()
    parser.feed(path.read_text("utf-8"))
    return parser.found


def is_outside(address):
    return re.match(r"(?:[a-z]+:)?//", address) is not None


@pytest.mark.slow
def test_nothing_is_loaded_from_outside(site):
    pages = sorted(site.rglob("*.html"))
    found = {page: loads(page) for page in pages}
    assert len(pages) >= 20 and all(len(addresses) > 3 for addresses in found.values())
    outside = [(page.name, a) for page, all_ in found.items() for a in all_ if is_outside(a)]
    for sheet in site.rglob("*.css"):
        text = sheet.read_text("utf-8")
        addresses = re.findall(r"url\(\s*['\"]?([^'\")]+)", text)
        addresses += re.findall(r"@import\s+['\"]([^'\"]+)", text)
        outside += [(sheet.name, address) for address in addresses if is_outside(address)]
    assert not outside


def test_what_a_page_loads_is_found(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<script src="//a.b/c.js"></script><img src="x.png" srcset="https://a.b/2.png 2x">'
        '<link rel="stylesheet" href="https://a.b/f.css"><link rel="next" href="https://a.b/n">'
        '<a href="https://a.b"></a><p style="background:url(http://a.b/i.png)">'
    )
    assert [a for a in loads(page) if is_outside(a)] == [
        "//a.b/c.js",
        "https://a.b/2.png",
        "https://a.b/f.css",
        "http://a.b/i.png",
    ]


@pytest.mark.slow
def test_lists_and_tables_are_not_run_into_paragraphs(site):
    """GitHub begins them behind any line, the site behind an empty one."""
    found = {}
    for page in site.rglob("*.html"):
        paragraphs = re.findall(r"<p>(.*?)</p>", page.read_text("utf-8"), re.S)
        found[page.name] = [p for p in paragraphs if re.search(r"^(- |\d+\. |\|)", p, re.M)]
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.slow
def test_each_public_name_is_explained(site):
    text = (site / "reference/python.html").read_text("utf-8")
    ids = re.findall(r'<h\d id="aftcli\.(\w+)" class="doc doc-heading"', text)
    assert sorted(ids) == sorted(aftcli.__all__)


def test_each_public_name_is_in_one_group():
    text = (ROOT / "docs/reference/python.md").read_text("utf-8")
    assert sorted(re.findall(r"^::: aftcli\.(\w+)$", text, re.M)) == sorted(aftcli.__all__)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_pages_fit_their_window_and_have_their_images(site, tmp_path):
    assert probed(site, tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_page_that_does_not_fit_is_told(tmp_path):
    wide = tmp_path / "site" / "wide.html"
    wide.parent.mkdir()
    wide.write_text('<div style="width:500px">x</div><img src="none.png">')
    found = [re.sub(r"http\S+/", "", line) for line in probed(wide.parent, tmp_path)]
    assert found == [
        "wide.html: no image none.png",
        "wide.html: no image none.png",
        "wide.html: 508 pixels wide in a window of 400",
    ]


def probed(site, tmp_path):
    """List what is wrong with the pages of a folder, as Chromium shows them."""
    pages = [page.relative_to(site).as_posix() for page in sorted(site.rglob("*.html"))]
    told = queue.Queue()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

        def do_GET(self):
            if self.path != "/probe":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write((PROBE % json.dumps(pages)).encode())

        def do_POST(self):
            told.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--remote-debugging-port=0"]
    command += [f"http://127.0.0.1:{server.server_port}/probe"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return told.get(timeout=60)
    finally:
        browser.terminate()
        browser.wait(20)
        server.shutdown()
        server.server_close()


def strings_of(tree):
    """The texts of a module, each with "\0" for the values in it."""
    inner = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inner.update(id(part) for part in ast.walk(node) if part is not node)
            parts = (p.value if isinstance(p, ast.Constant) else "\0" for p in node.values)
            yield "".join(parts)
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner
        ):
            yield node.value


def test_messages_that_are_explained_are_those_of_the_code():
    page = (ROOT / "docs/guides/troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"^```text\n(.+)\n```$", page, re.M)
    files = (ROOT / "aftcli").rglob("*.py")
    known = [text for path in files for text in strings_of(ast.parse(path.read_text("utf-8")))]
    assert len(messages) == len(set(messages)) == page.count("\n### ") == 20
    for message in messages:
        pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.S)
        assert any(map(pattern.search, known)), message


def test_the_gallery_shows_the_commands_of_its_pictures():
    spec = importlib.util.spec_from_file_location("make_gallery", ROOT / "docs/make_gallery.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs/guides/gallery.md").read_text("utf-8")
    commands = {command for _, _, command in script.PICTURES.values()}
    assert set(re.findall(r"^\$ (.+)$", page, re.M)) == commands
    pictures = {f"../images/gallery/{name}.jpg" for name in script.PICTURES}
    assert {p for p in re.findall(r"\]\((.+?)\)", page) if "/gallery/" in p} == pictures
    paths = [ROOT / "docs/guides" / path for path in pictures]
    assert sum(path.stat().st_size for path in paths) < 1_500_000
