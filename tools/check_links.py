"""Check a built site: every link, anchor and picture inside it leads somewhere, every picture is described, and no page
loads from another host."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADS = {tag: "src" for tag in ("script", "img", "iframe", "source", "video", "audio", "embed")}
LINK_ONLY = {"canonical", "license", "author", "next", "prev", "alternate"}  # <link rel=...> that fetch nothing


class Page(HTMLParser):
    "The anchors that a page has, the links it makes, what it loads and what it says of its pictures."

    def __init__(self, html: str) -> None:
        super().__init__()
        self.anchors, self.links, self.loads, self.words = set(), [], [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        a = {name: value or "" for name, value in attrs}
        self.anchors |= {a[name] for name in ("id", "name") if a.get(name)}
        if tag == "a" and "href" in a:
            self.links.append(a["href"])
        elif tag == "link" and "href" in a and not set(a.get("rel", "").split()) & LINK_ONLY:
            self.loads.append(a["href"])
        elif tag in LOADS and a.get(LOADS[tag]):
            self.loads.append(a[LOADS[tag]])
        if tag == "img":
            self.words.append((a.get("alt", ""), a.get("src", "")))
        self.loads += re.findall(r"""url\(['"]?([^'")]+)""", a.get("style", ""))

    handle_startendtag = handle_starttag


def check_site(site: Path) -> list[str]:
    "List what is wrong in a folder of pages, a line for each fault."
    site = site.resolve()
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    faults = [] if pages else [f"{site}: no page in it"]

    def target(source: Path, link: str) -> str | None:
        "Why a link from a page does not lead anywhere, or None."
        parts = urlsplit(link)
        if parts.path.startswith("/"):
            return "starts at the root of the host, and the site may live in a folder"
        file = (source.parent / unquote(parts.path)).resolve() if parts.path else source
        file = file / "index.html" if file.is_dir() else file
        if not file.is_relative_to(site) or not file.is_file():
            return "no such file"
        if parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].anchors:
            return "no such anchor"
        return None

    for path, page in pages.items():
        name = path.relative_to(site)
        for link in page.links + page.loads:
            outside = bool(urlsplit(link).scheme or link.startswith("//"))
            if outside and link in page.loads and not link.startswith("data:"):
                faults.append(f"{name}: loads {link[:100]} from another host")
            elif not outside and link not in ("#", "") and (why := target(path, link)):
                faults.append(f"{name}: {link}: {why}")
        for words, source in page.words:
            if len(words.split()) < 3:
                faults.append(f"{name}: {source[:60]}: a picture described by {words!r}; give its cell a `#| fig-alt:` line")
    remote = re.compile(r"""(?:@import\s+|url\()\s*['"]?((?:https?:)?//[^'")\s]+)""")
    for path in site.rglob("*.css"):
        for link in remote.findall(path.read_text(encoding="utf-8")):
            faults.append(f"{path.relative_to(site)}: loads {link[:100]} from another host")
    return list(dict.fromkeys(faults))


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "_docs")
    found = check_site(folder)
    print("\n".join(found) if found else f"{folder}: no broken link, every picture described, nothing loaded from another host.")
    sys.exit(bool(found))
