"""What mkdocs does beside its plugins: the pages of the commands, and code blocks that tests know more about."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the pages of the folder `commands`, which are generated, in the navigation."""
    folder = Path(config.docs_dir) / "commands"
    pages = sorted(folder.glob("*.md"), key=lambda page: (page.stem != "index", page.stem))
    for section in config.nav or []:
        if section == {"Commands": "commands"}:
            section["Commands"] = [f"commands/{page.name}" for page in pages]
    return config


def on_page_markdown(markdown: str, **context: object) -> str:
    """Leaves `python` of `python no-run` and `python timm`: what tests do with a block is not for readers."""
    return re.sub(r"^```python .*$", "```python", markdown, flags=re.MULTILINE)
