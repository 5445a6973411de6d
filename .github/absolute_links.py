"""Make the links of README.md absolute, for a package index, which shows the README elsewhere.

`python .github/absolute_links.py https://HOST/OWNER/NAME v0.2.0` rewrites README.md in place. The
workflow `package` calls it with the address and the tag of the repository that it runs in.
"""

import re
import sys
from pathlib import Path

LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!https?:|#)([^)\s]+)\)")


def absolute(text: str, repository: str, revision: str) -> str:
    """The Markdown `text` with relative links replaced: pictures by raw files, others by pages."""

    def whole(match: re.Match[str]) -> str:
        picture, label, path = match.groups()
        kind = "raw" if picture else "blob"
        return f"{picture}{label}({repository}/{kind}/{revision}/{path})"

    return LINK.sub(whole, text)


if __name__ == "__main__":
    readme = Path(__file__).parents[1] / "README.md"
    readme.write_text(absolute(readme.read_text("utf-8"), *sys.argv[1:3]), "utf-8")
