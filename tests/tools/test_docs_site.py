"""The links of pages are rewritten for the site."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("docs_site", ROOT / "tools" / "docs_site.py")
tool = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tool)


@pytest.mark.parametrize(
    "source, link, shown",
    [
        ("README.md", "[one](docs/one.md)", "[one](one.md)"),
        ("README.md", "[log](CHANGELOG.md)", "[log](changelog.md)"),
        ("README.md", "[results](benchmarks/results/README.md)", "results"),
        ("README.md", "![it](docs/pictures/a.svg#gh-dark)", "![it](pictures/a.svg#gh-dark)"),
        ("docs/one.md", "[two](two.md#three)", "[two](two.md#three)"),
        ("docs/one.md", "[`code`](../ldae/method.py)", "`code`"),
        ("docs/one.md", "![it](../benchmarks/a/b.png)", "![it](measured/benchmarks-a-b.png)"),
        ("docs/one.md", "[front](../README.md)", "[front](index.md)"),
        ("CONTRIBUTING.md", "[add](docs/extending.md)", "[add](extending.md)"),
        ("docs/one.md", "[out](https://host/a.md)", "[out](https://host/a.md)"),
        ("docs/one.md", "[here](#there)", "[here](#there)"),
    ],
)
def test_links_lead_to_pages_of_the_site(source, link, shown):
    assert tool.rewrite(f"a {link} b", source) == f"a {shown} b"


def test_code_stays_as_it_is():
    text = "```python\nvalue[0](docs/one.md)\n```\n"
    assert tool.rewrite(text, "README.md") == text
    assert tool.targets(text, "README.md") == []


def test_every_picture_of_a_page_has_a_place():
    for path in [ROOT / name for name in tool.PAGES] + sorted((ROOT / "docs").glob("*.md")):
        source = path.relative_to(ROOT).as_posix()
        for target in tool.targets(path.read_text(), source):
            assert tool.site_path(target) or not target.endswith((".svg", ".png")), target
