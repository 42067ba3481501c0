"""The pytest plugin: a fixture and a marker, ``byrd_crash_points``, and their summary."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:  # importing Celery and SQLAlchemy must not slow down each start of pytest
    from byrd.testing.crash import CrashPoints

_MARKER = "byrd_crash_points"
_PROPERTY = "byrd_crash_points"
_MADE = pytest.StashKey["CrashPoints"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("byrd", "durable workflows")
    group.addoption(
        "--byrd-crash-point",
        metavar="NAME",
        default=None,
        help="kill at this boundary only, named as in the report of a failure",
    )
    group.addoption(
        "--byrd-crash-pairs",
        metavar="N",
        default=None,
        help="try so many pairs of boundaries in each test that tries pairs; 'all' for each pair",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        f"{_MARKER}(engine=None, *, pool='solo', concurrency=1, pairs=False, timeout=60, skip=None): the test returns "
        "a canvas or a run, or calls the fixture; that is executed once for each boundary, with a process killed there",
    )


@pytest.fixture
def byrd_crash_points(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Execute a workflow once for each boundary, with a process killed there: see ``byrd.testing.CrashPoints``."""
    made = _crash_points(request.node, tmp_path_factory)
    yield made
    for report in made.reports:
        request.node.user_properties.append((_PROPERTY, str(report)))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Take a marked test that does not ask for the fixture as a scenario."""
    marker = pyfuncitem.get_closest_marker(_MARKER)
    if marker is None or _MARKER in pyfuncitem.fixturenames:
        return None
    request = pyfuncitem._request  # noqa: SLF001 - pytest gives a hook no other way to a fixture
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}  # noqa: SLF001
    made = _crash_points(pyfuncitem, request.getfixturevalue("tmp_path_factory"))
    engine = _engine(marker.args[0] if marker.args else marker.kwargs.get("engine"), request)
    report = made(engine, partial(pyfuncitem.obj, **arguments))
    pyfuncitem.user_properties.append((_PROPERTY, str(report)))
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a marked test that passed without having anything executed."""
    yield
    made = item.stash.get(_MADE, None)
    if item.get_closest_marker(_MARKER) is not None and (made is None or not made.calls):
        pytest.fail(
            f"it is marked with {_MARKER}, but nothing was killed: a test that asks for the fixture {_MARKER} has to "
            "call it; any other is a function that returns a canvas or a run",
            pytrace=False,
        )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many boundaries were tried."""
    lines = [
        f"{report.nodeid}: {value}"
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "teardown" or getattr(report, "when", None) == "call"
        for name, value in getattr(report, "user_properties", ())
        if name == _PROPERTY
    ]
    if lines:
        terminalreporter.section("crash points")
        for line in dict.fromkeys(lines):
            terminalreporter.write_line(line)


def _crash_points(item: Any, folders: pytest.TempPathFactory) -> CrashPoints:
    from byrd.testing.crash import CrashPoints

    marker = item.get_closest_marker(_MARKER)
    options = {k: v for k, v in marker.kwargs.items() if k != "engine"} if marker else {}
    wanted = item.config.getoption("--byrd-crash-pairs")
    if wanted is not None and options.get("pairs"):
        options["pairs"] = True if wanted == "all" else int(wanted)
    only = item.config.getoption("--byrd-crash-point")
    item.stash[_MADE] = made = CrashPoints(folders.mktemp("crash"), only=only, **options)
    return made


def _engine(given: Any, request: Any) -> Any:
    """Return the engine that the marker gives or names, or that the test's own fixture ``byrd_engine`` does."""
    if given is None:
        try:
            return request.getfixturevalue("byrd_engine")
        except pytest.FixtureLookupError as exc:
            if exc.argname != "byrd_engine":
                raise
            pytest.fail(f"no engine: say {_MARKER}(engine), or define a fixture byrd_engine", pytrace=False)
    if isinstance(given, str):
        module, _, name = given.partition(":")
        return getattr(importlib.import_module(module), name or "engine")
    return given
