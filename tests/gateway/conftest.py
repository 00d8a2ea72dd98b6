"""A running gateway on each kind of database, and a real PostgreSQL where its server is installed."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gradshield.gateway.settings import Limits
from gradshield.gateway.store import Store
from tests.gateway.running import PROGRAMS, Postgres, Served, serving


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    if not PROGRAMS:
        pytest.skip("PostgreSQL's server is not installed")
    folder = Path(f"/tmp/gradshield-pg-{secrets.token_hex(6)}")  # short: a socket's path is; and nobody may enter it
    folder.mkdir(mode=0o700)
    server = Postgres(folder)
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], str]:
    """Makes the URL of a new, empty database."""
    if request.param == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        return server.database
    return lambda: f"sqlite:///{tmp_path_factory.mktemp('database')}/gateway.db"


@pytest.fixture
def store(database: Callable[[], str]) -> Iterator[Store]:
    found = Store(database(), webhooks=("http://127.0.0.1:9/hook",))
    found.migrate()
    yield found
    found.close()


@pytest.fixture(scope="session")
def served(database: Callable[[], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("gateway"), database=database()) as found:
        yield found


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Served]:
    """A gateway with small limits."""
    limits = Limits(upload=100_000, body=2000, project=250_000, requests=60, jobs=2, idle=0.5)
    with serving(tmp_path, limits=limits) as found:
        yield found
