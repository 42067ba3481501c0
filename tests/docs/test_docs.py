"""The documentation says what is there: its links, its tests, its settings, its code."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from byrd import errors
from byrd.cli import main
from byrd.cli.metrics import registry_of
from byrd.model import RunStatus
from byrd.store.metrics import OPEN_RUN, Metrics, QueueMetrics
from tests.cluster import ROOT

PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"), *ROOT.glob("benchmarks/*.md")]
)
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
each_page = pytest.mark.parametrize("page", PAGES, ids=IDS)


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def blocks(page: Path, *kinds: str) -> list[str]:
    found = re.findall(r"^( *)```(\w+)\n(.*?)^\1```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, kind, code in found if kind in kinds]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the page's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def rows_of(title: str) -> set[str]:
    """The names that begin the rows of a section of operations.md."""
    section = (ROOT / "docs" / "operations.md").read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    starts = re.findall(r"^\| (`byrd_[^|]*`) \|", section, re.MULTILINE)
    return {name for start in starts for name in re.findall(r"`(byrd_[^`]+)`", start)}


def everything() -> str:
    return "\n".join(page.read_text() for page in PAGES)


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", prose(page)):
        link = target[0] or target[1]
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(found), f"{link}: no such heading"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [
        page.name for page in ROOT.glob("docs/*.md") if page.name != "README.md" and f"]({page.name})" not in index
    ]
    assert missing == []


@each_page
def test_the_tests_that_are_named_exist(page: Path) -> None:
    sources = "\n".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))
    defined = set(re.findall(r"^def (test_\w+)\(", sources, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))
    assert named <= defined


@each_page
def test_python_compiles(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")


@each_page
def test_commands_exist_with_their_options(page: Path) -> None:
    text = "\n".join(blocks(page, "console")) + "\n".join(re.findall(r"`([^`\n]+)`", prose(page)))
    for words in re.findall(r"\bbyrd (?:-A \S+ )?([a-z]+(?:-[a-z]+)*)((?: (?!#)[^\s`;)]+)*)", text):
        name, rest = words
        assert name in main.commands, f"byrd {name}: no such command"
        known = {option for parameter in main.commands[name].params for option in parameter.opts}
        assert set(re.findall(r"(?<!\S)--[a-z-]+", rest)) <= known, f"byrd {name}{rest}: no such option"


def test_every_setting_is_documented() -> None:
    sources = "\n".join(path.read_text() for path in ROOT.glob("byrd/**/*.py"))
    settings = set(re.findall(r"conf\.get\(\s*\"(byrd_\w+)\"", sources))
    assert {"byrd_lease_seconds", "byrd_database_url"} <= settings
    assert rows_of("Settings") == settings


def test_every_gauge_is_documented_with_its_label() -> None:
    zero = Metrics(datetime.now(UTC), dict.fromkeys(OPEN_RUN, 0), {"due": 0}, {"q": QueueMetrics(0, 0.0)}, 0, 0, 0, 0)
    samples = [family.samples[0] for family in registry_of(lambda: zero).collect()]
    assert rows_of("Metrics") == {s.name + "".join(f"{{{label}}}" for label in s.labels) for s in samples}


def test_every_variable_is_documented() -> None:
    inside = {"BYRD_WORKER_ID", "BYRD_SLICE_SECONDS"}  # a worker tells it to its own children
    found: set[str] = set()
    for part in ("byrd", "beat", "tasks"):
        for path in ROOT.glob(f"{part}/**/*.py"):
            found |= set(re.findall(r"\"((?:BYRD|MONITOR|FLOWER)_[A-Z_]+)\"", path.read_text()))
    assert {"BYRD_DATABASE_URL", "MONITOR_REPORTS", "BYRD_WEB_BIND"} <= found
    assert found - inside <= set(re.findall(r"`((?:BYRD|MONITOR|FLOWER)_[A-Z_]+)`", everything()))


def test_the_tree_of_errors_is_the_one_in_the_code() -> None:
    tree = [line.strip() for line in (errors.__doc__ or "").partition("::\n")[2].splitlines() if line.strip()]
    [shown] = [block for block in blocks(ROOT / "docs" / "errors.md", "text") if "ByrdError" in block]
    assert [line.strip() for line in shown.splitlines() if line.strip()] == tree
    own = [value for value in vars(errors).values() if getattr(value, "__module__", None) == errors.__name__]
    classes = {value.__name__ for value in own if isinstance(value, type)}
    assert "ByrdError" in classes
    assert all(re.search(rf"\b{name}\b", shown) for name in classes)


def test_statuses_of_runs_that_are_named_exist() -> None:
    named = re.findall(r"--status (\w+)", everything())
    assert named
    assert set(named) <= set(RunStatus)
