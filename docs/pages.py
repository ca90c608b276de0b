"""What the site has beside the pages in docs: the README as its first page, the log, the changes. mkdocs calls this.

mkdocs serve
"""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parent.parent
ELSEWHERE = {  # page of the site: its file
    "index.md": "README.md",
    "project/benchmarks.md": "benchmarks/README.md",
    "project/log.md": "benchmarks/LOG.md",
    "project/changes.md": "CHANGELOG.md",
    "project/contributing.md": "CONTRIBUTING.md",
}
PAGES = {path: page for page, path in ELSEWHERE.items()}
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
IMAGE = re.compile(r"(!\[[^\]]*\])\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are files elsewhere in the repository."""
    for page, path in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(REPOSITORY / path).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site has them: to its own pages; what is in the repository alone is named without a link."""
    uri = page.file.src_uri
    here, folder = os.path.dirname(ELSEWHERE.get(uri, f"docs/{uri}")), os.path.dirname(uri)

    def on_site(target: str) -> str | None:
        path = os.path.normpath(os.path.join(here, target))
        found = PAGES.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        return found and os.path.relpath(found, folder or ".")

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target:
            return match[0]
        return f"[{text}]({to}{anchor})" if (to := on_site(target)) else text

    markdown = IMAGE.sub(lambda match: f"{match[1]}({on_site(match[2]) or match[2]})", markdown)
    return LINK.sub(link, markdown)
