"""The store on every kind of database: migrations, leases, decisions, deliveries."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from fastapi import FastAPI, Request, Response
from openai import InvalidWebhookSignatureError, OpenAI

from gradshield.errors import UsageError
from gradshield.gateway import worker
from gradshield.gateway.database import AWAY, Caller, Missing, Page, Refused
from gradshield.gateway.settings import LAB, Policy, Settings
from gradshield.gateway.store import UNSAFE, Lost, Store
from gradshield.gateway.tables import Base, Delivery, Event, Job, Model
from tests.gateway.running import Postgres, listening, serving

METHOD: dict[str, Any] = {"type": "supervised", "supervised": {"hyperparameters": {}}}


@pytest.fixture
def project(store: Store) -> str:
    return store.add_project("p", Policy()).id


@pytest.fixture
def operator(project: str) -> Caller:
    return Caller(project, "key-op", "operator")


def job(store: Store, project: str) -> str:
    return store.add_job(
        project,
        100,
        model=LAB,
        training_file="file-x",
        validation_file=None,
        method=METHOD,
        seed=1,
        suffix=None,
        labels=None,
    ).id


def held(store: Store, project: str, movable: bool = True) -> str:
    id = job(store, project)
    store.claim(id, "me", 60)
    store.hold(id, "me", {"code": "review", "message": "look", "removed": 1, "movable": movable}, "look")
    return id


def status(store: Store, project: str, id: str) -> str:
    return store.get(Job, project, id).status


def messages(store: Store, project: str, id: str) -> list[str]:
    found, _ = store.page(Event, project, Page(100, None, False), Event.job_id == id)
    return [event.message for event in found]


def test_the_migrations_make_exactly_the_tables(store: Store) -> None:
    store.migrate()  # again changes nothing
    with store.reader.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []


def test_two_servers_that_start_at_once_both_find_the_tables(database: Callable[[], str]) -> None:
    url = database()
    stores = [Store(url) for _ in range(3)]
    threads = [threading.Thread(target=one.migrate) for one in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.projects() for one in stores] == [[], [], []]
    for one in stores:
        one.close()


def test_of_many_processes_one_gets_a_job(store: Store, project: str) -> None:
    id, got = job(store, project), []

    def claim(owner: str) -> None:
        if store.claim(id, owner, 60) is not None:
            got.append(owner)

    threads = [threading.Thread(target=claim, args=(f"o{i}",)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    assert store.get(Job, project, id).attempt == 1
    assert store.claim(id, "late", 60) is None  # a message that came twice


def test_a_job_whose_process_is_silent_goes_to_another_which_alone_may_end_it(store: Store, project: str) -> None:
    id = job(store, project)
    assert store.claim(id, "first", 0.05) is not None
    assert store.waiting() == []
    time.sleep(0.1)
    assert store.waiting() == [id]
    found = store.claim(id, "second", 60)
    assert found is not None
    assert found.attempt == 2
    late: list[Callable[[], None]] = [
        lambda: store.beat(id, "first", 60),
        lambda: store.say(id, "first", "I am still here"),
        lambda: store.note(id, "first", stage="training", done=1, total=2),
        lambda: store.add_checkpoint(id, "first", 1, {}),
        lambda: store.hold(id, "first", {}, "look"),
        lambda: store.fail(id, "first", "x", "x"),
        lambda: store.finish(id, "first", "ft:1"),
    ]
    for change in late:
        with pytest.raises(Lost):
            change()
    assert not store.give_up(id, "first")
    store.finish(id, "second", "ft:2")
    with pytest.raises(Lost):
        store.finish(id, "second", "ft:3")
    assert [model.id for model in store.page(Model, project, Page())[0]] == ["ft:2"]
    assert messages(store, project, id) == ["Created fine-tuning job", "The job has successfully completed"]
    assert len(store.due()) == 1


def test_a_process_that_gives_up_may_be_followed_at_once_or_later(store: Store, project: str) -> None:
    id = job(store, project)
    store.claim(id, "a", 60)
    assert store.give_up(id, "a")
    assert store.waiting() == [id]
    store.claim(id, "b", 60)
    assert store.give_up(id, "b", 60)
    assert store.waiting() == []
    assert store.claim(id, "c", 60) is None


@pytest.mark.parametrize("change", ["cancel", "pause"])
def test_a_process_loses_a_job_that_is_cancelled_or_paused(store: Store, project: str, change: str) -> None:
    id = job(store, project)
    store.claim(id, "me", 60)
    getattr(store, change)(Caller(project, "k"), id)
    with pytest.raises(Lost):
        store.beat(id, "me", 60)
    with pytest.raises(Lost):
        store.finish(id, "me", "ft:1")
    assert store.page(Model, project, Page())[0] == []


def test_a_checkpoint_is_listed_once(store: Store, project: str) -> None:
    from gradshield.gateway.tables import Checkpoint

    id = job(store, project)
    store.claim(id, "me", 60)
    for step in (5, 10, 5):
        store.add_checkpoint(id, "me", step, {"step": step})
    assert [one.step for one in store.page(Checkpoint, project, Page(), Checkpoint.job_id == id)[0]] == [10, 5]


def test_only_an_operator_with_a_reason_decides(store: Store, project: str, operator: Caller) -> None:
    id = held(store, project)
    for decide in (store.approve, store.reject):
        with pytest.raises(Refused, match="operator"):
            decide(Caller(project, "k", "user"), id, "because")
        with pytest.raises(Refused, match="reason"):
            decide(operator, id, " ")
        with pytest.raises(Missing):
            decide(Caller("proj-other", "k", "operator"), id, "because")
    assert status(store, project, id) == "paused"
    assert store.audits(project) == []


def test_an_approval_is_kept_with_what_it_released(store: Store, project: str, operator: Caller) -> None:
    first, second, third = (held(store, project) for _ in range(3))
    store.approve(operator, first, "fine")
    store.approve(operator, second, "a false alarm", released=["b", "a", "a"])
    store.approve(operator, third, "move it", cut=0.9)
    assert [store.get(Job, project, id).decision for id in (first, second, third)] == [
        {"released": [], "threshold": None},
        {"released": ["a", "b"], "threshold": None},
        {"released": [], "threshold": "fixed:value=0.9"},
    ]
    assert [(line.action, line.reason) for line in store.audits(project)] == [
        ("override cut", "move it"),
        ("release rows", "a false alarm"),
        ("approve job", "fine"),
    ]
    assert status(store, project, first) == "queued"
    with pytest.raises(Refused, match="does not wait"):
        store.approve(operator, first, "again")


def test_a_cut_of_the_policy_is_not_replaced(store: Store, operator: Caller, project: str) -> None:
    id = held(store, project, movable=False)
    with pytest.raises(Refused, match="a cut of its own"):
        store.approve(operator, id, "move it", cut=0.9)
    assert status(store, project, id) == "paused"


def test_a_rejected_job_fails_with_the_reason(store: Store, project: str, operator: Caller) -> None:
    id = held(store, project)
    found = store.reject(operator, id, "looks planted")
    assert (found.status, found.hold, (found.error or {})["code"]) == ("failed", None, "rejected")
    assert "looks planted" in found.error["message"]  # type: ignore[index]
    assert [line.action for line in store.audits(project)] == ["reject job"]


def test_a_withheld_model_is_served_once_an_operator_releases_it(store: Store, project: str, operator: Caller) -> None:
    id = job(store, project)
    store.claim(id, "me", 60)
    with pytest.raises(Refused, match="no withheld model"):
        store.release_model(operator, id, "ft:x", "needed")
    store.fail(id, "me", UNSAFE, "withheld")
    assert store.page(Model, project, Page())[0] == []
    with pytest.raises(Refused, match="operator"):
        store.release_model(Caller(project, "k"), id, "ft:x", "needed")
    found = store.release_model(operator, id, "ft:x", "needed")
    assert (found.status, found.error, found.fine_tuned_model) == ("succeeded", None, "ft:x")
    assert [model.id for model in store.page(Model, project, Page())[0]] == ["ft:x"]
    assert [(line.action, line.target, line.reason) for line in store.audits(project)] == [
        ("release model", "ft:x", "needed")
    ]


def test_a_database_that_restarts_is_used_again(postgres: Postgres) -> None:
    found = Store(postgres.database())
    found.migrate()
    project = found.add_project("p", Policy()).id
    id = job(found, project)
    assert found.claim(id, "me", 60) is not None
    postgres.stop()
    with pytest.raises(AWAY):
        found.beat(id, "me", 60)
    postgres.start()
    found.beat(id, "me", 60)
    found.finish(id, "me", "ft:1")
    assert status(found, project, id) == "succeeded"
    found.close()


def test_a_server_whose_database_is_away_says_so_and_recovers(postgres: Postgres, tmp_path: Any) -> None:
    with serving(tmp_path, database=postgres.database()) as served, served.raw() as raw:
        assert raw.get("/v1/files").status_code == 200
        postgres.stop()
        try:
            found = raw.get("/v1/files")
            assert (found.status_code, found.json()["error"]["code"]) == (503, "unavailable")
            assert raw.get("/readyz").status_code == 503
            assert raw.get("/healthz").status_code == 200
        finally:
            postgres.start()
        assert raw.get("/v1/files").status_code == 200


def test_a_url_of_another_database_is_refused() -> None:
    for url in ("mysql://x/y", "nothing", "sqlite://"):
        with pytest.raises(UsageError):
            Store(url)


# Webhooks


def called(store: Store, project: str, answers: list[int], rounds: int) -> list[tuple[dict[str, str], bytes]]:
    """What comes in at a receiving end that gives these answers, over some rounds of deliveries."""
    calls: list[tuple[dict[str, str], bytes]] = []
    receiving = FastAPI()

    @receiving.post("/hook")
    async def hook(request: Request) -> Response:
        calls.append((dict(request.headers), await request.body()))
        return Response(status_code=answers[min(len(calls), len(answers)) - 1])

    with listening(receiving) as url:
        store.webhooks = (f"{url}/hook",)
        id = job(store, project)
        store.claim(id, "me", 60)
        store.finish(id, "me", "ft:1")
        settings = Settings(models={}, folder="/nowhere", webhook_secret=SECRET)
        for _ in range(rounds):
            worker.deliver(settings, store)
            with store.writing() as session:  # the wait until the next attempt
                for one in session.query(Delivery).where(Delivery.due_at.is_not(None)):
                    one.due_at = 0.0
    return calls


SECRET = worker.new_secret()


def test_a_call_is_signed_so_that_the_client_unwraps_it_once_it_is_new(store: Store, project: str) -> None:
    ((headers, body),) = called(store, project, [200], 3)
    client = OpenAI(api_key="x", webhook_secret=SECRET)
    event: Any = client.webhooks.unwrap(body, headers)
    assert (event.type, event.object) == ("fine_tuning.job.succeeded", "event")
    assert status(store, project, event.data.id) == "succeeded"
    with pytest.raises(InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.replace(b"succeeded", b"failed"), headers)
    with pytest.raises(InvalidWebhookSignatureError):
        OpenAI(api_key="x", webhook_secret=worker.new_secret()).webhooks.unwrap(body, headers)
    old = int(headers["webhook-timestamp"]) - 3600  # a call that is played again later
    replayed = {**headers, "webhook-timestamp": str(old)}
    with pytest.raises(InvalidWebhookSignatureError, match="too old"):
        client.webhooks.unwrap(body, replayed)
    signed = worker.signature(SECRET, headers["webhook-id"], old, body.decode())
    with pytest.raises(InvalidWebhookSignatureError, match="too old"):
        client.webhooks.unwrap(body, {**replayed, "webhook-signature": signed})


def test_a_call_is_made_again_under_the_same_id_until_it_is_taken(store: Store, project: str) -> None:
    calls = called(store, project, [500, 302, 200], 5)
    assert len(calls) == 3
    assert len({headers["webhook-id"] for headers, _ in calls}) == 1
    assert len({json.loads(body)["id"] for _, body in calls}) == 1
    assert store.due() == []


def test_a_call_that_nobody_takes_is_given_up(store: Store, project: str) -> None:
    assert len(called(store, project, [500], worker.ATTEMPTS + 3)) == worker.ATTEMPTS
    (one,) = store.page(Delivery, project, Page())[0]
    assert (one.due_at, one.delivered_at, one.error) == (None, None, "status 500")


def test_two_workers_do_not_make_one_call_twice(store: Store, project: str) -> None:
    id = job(store, project)
    store.cancel(Caller(project, "k"), id)
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(store.due()))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 0, 0, 0, 0, 1]
