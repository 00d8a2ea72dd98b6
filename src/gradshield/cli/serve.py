"""``gradshield serve`` and ``gradshield keys``: the gateway and who may use it."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gradshield.cli.common import err, out, plain, quiet_processes
from gradshield.cli.options import Judges, Lookalikes, Probes, Safety, Tokens, json_file
from gradshield.errors import UsageError
from gradshield.options import number

if TYPE_CHECKING:
    from gradshield.gateway.settings import Policy, Settings
    from gradshield.gateway.store import Store
    from gradshield.gateway.tables import Project

Folder = Annotated[Path, typer.Option(help="Folder of the gateway: database, files, jobs and models.")]
Rows = Annotated[
    str | None,
    typer.Option("--policy", help="What happens to harmful rows: remove, reject or review.", show_default=False),
]
Defence = Annotated[
    str | None,
    typer.Option("--defence", "--defense", help="Screening, as of train; none turns it off.", show_default=False),
]
Limit = Annotated[
    str | None,
    typer.Option(help="Highest upper bound of the attack success rate that is served, such as 6%.", show_default=False),
]
Database = Annotated[str, typer.Option(help="Database URL, if the gateway has one of its own.")]
GATEWAY = Path("gradshield-gateway")


def serve(
    context: typer.Context,
    model: Annotated[
        list[str],
        typer.Option(
            "--model", "-m", help="Folder or hub name to fine-tune, repeatable; NAME=FOLDER names it; lab is bundled."
        ),
    ],
    folder: Folder = GATEWAY,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback it needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    workers: Annotated[int, typer.Option(help="Jobs that run at once; 0 leaves them to another process.", min=0)] = 1,
    ray: Annotated[str, typer.Option(help="Run jobs on the Ray cluster at this address: host:port, or auto.")] = "",
    database: Annotated[
        str, typer.Option(help="sqlite:///FILE or postgresql://USER@HOST/NAME (default: a file).")
    ] = "",
    files: Annotated[str, typer.Option(help="Folder or fsspec URL of uploaded files (default: in --folder).")] = "",
    queue: Annotated[str, typer.Option(help="redis://HOST (default: as the database).")] = "",
    rows: Rows = None,
    defence: Defence = None,
    limit: Limit = None,
    upstream: Annotated[
        str, typer.Option("--chat-url", help="OpenAI-compatible server that answers chats, such as vLLM's /v1.")
    ] = "",
    upstream_key: Annotated[str, typer.Option("--chat-key", envvar="GRADSHIELD_CHAT_KEY", help="Its key.")] = "",
    webhook: Annotated[list[str] | None, typer.Option(help="URL to call at every job's end, repeatable.")] = None,
    webhook_secret: Annotated[
        str,
        typer.Option(envvar="GRADSHIELD_WEBHOOK_SECRET", help="Secret that signs them (default: made and printed)."),
    ] = "",
    training_config: Annotated[
        Path | None, typer.Option(help="JSON of every job's SFTConfig and DPOConfig options.")
    ] = None,
    lora_config: Annotated[
        Path | None, typer.Option(help="JSON of a PEFT config; without one, all weights are trained.")
    ] = None,
    probes: Probes = None,
    lookalikes: Lookalikes = None,
    safety: Safety = "builtin",
    judge: Judges = None,
    max_new_tokens: Tokens = 64,
) -> None:
    """Serve a fine-tuning API on the OpenAI wire that screens what it trains on and checks what it serves.

    Ctrl-C stops it; jobs go on at the next start.
    """
    quiet_processes()
    _installed()
    import uvicorn

    from gradshield.gateway.app import create_app
    from gradshield.gateway.settings import Settings, made
    from gradshield.gateway.worker import Worker, configure, new_secret

    options = {name: value for name, value in context.params.items() if name in Settings.model_fields}
    options["webhook_secret"] = webhook_secret or (new_secret() if webhook else "")
    settings = made(
        Settings,
        **options,
        models=dict(map(_named, model)),
        policy=_policy({}, rows, defence, limit),
        webhooks=webhook or (),
        training=json_file("--training-config", training_config),
        lora=json_file("--lora-config", lora_config),
        judges=judge or ("refusal-phrases",),
    )
    configure()
    if ray and settings.database_url.startswith("sqlite"):
        why = "--ray runs jobs on other machines, which cannot share a SQLite file"
        raise UsageError(f"{why}: give --database postgresql://USER@HOST/NAME")
    if ray:
        from gradshield.scanning.workers import Workers, connected

        with connected(Workers(ray=ray).ray, 0):  # which says why, if no cluster answers
            pass
    app = create_app(settings)
    key = _first_key(app.state.gateway.store, settings)
    settings.save()
    if webhook and not webhook_secret:
        out.print(f"webhook secret  {plain(options['webhook_secret'])}")
    if key:
        out.print(f"API key of the project default, shown once: [bold]{plain(key)}[/bold]\n")
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    lines = (
        "import openai",
        f'client = openai.OpenAI(base_url="{address}", api_key="{key or "YOUR KEY"}")',
        'file = client.files.create(file=open("data.jsonl", "rb"), purpose="fine-tune")',
        f'job = client.fine_tuning.jobs.create(model="{next(iter(settings.models))}", training_file=file.id)',
    )
    for line in lines:
        out.print(plain(line))
    worker = Worker(settings) if workers else None
    try:
        uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=10)
    finally:
        if worker is not None:
            worker.stop()


def _first_key(store: Store, settings: Settings) -> str | None:
    """The key of a new project at the first start on loopback. Raises UsageError beyond loopback without any key."""
    if any(key.revoked_at is None for key in store.all_keys()):
        return None
    if not _loopback(settings.host):
        why = f"{settings.host} can be reached from other machines, and there is no key"
        raise UsageError(f"{why}: make one first with `gradshield keys create --folder {settings.folder}`")
    project = _project(store, "default") or store.add_project("default", settings.policy)
    return store.add_key(project.id, "first", "operator")[1]


def _loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _named(text: str) -> tuple[str, str]:
    """``NAME=FOLDER``, or a folder or hub name that is called by its last part. Raises UsageError."""
    name, given, where = text.partition("=")
    if not given:
        name, where = Path(text).expanduser().name, text
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(f"the model name {name!r} is not of letters, digits, dots and dashes: give NAME=FOLDER")
    return name, where


def _policy(base: Mapping[str, Any], rows: str | None, defence: str | None, limit: str | None) -> Policy:
    """A policy with what was given in place of ``base``. Raises UsageError."""
    from gradshield.gateway.settings import Policy, made

    share = None if limit is None else number(limit)
    if share is not None and not 0 < share < 1:
        raise UsageError(f"--limit got {limit!r}: give a percentage such as 6%, or a number between 0 and 1")
    given = {"rows": rows, "defence": defence, "limit": share}
    return made(Policy, **{**base, **{name: value for name, value in given.items() if value is not None}})


def _installed() -> None:
    try:
        import fastapi  # noqa: F401
        import huey  # noqa: F401
        import sqlalchemy  # noqa: F401
    except ImportError:
        raise UsageError("the gateway is not installed: run pip install 'gradshield[gateway]'") from None


keys = typer.Typer(name="keys", help="API keys of the gateway, and their projects' policies.", no_args_is_help=True)


def _settings(folder: Path, database: str) -> tuple[Settings, bool]:
    """The settings of a folder, or those that a gateway in it would have; and whether there is a database."""
    _installed()
    from gradshield.gateway.settings import DATABASE, NAME, Settings

    found = Settings.read(folder) if (folder / NAME).exists() else Settings(models={}, folder=folder)
    found = found.model_copy(update={"database": database}) if database else found
    return found, bool(found.database) or (found.folder / DATABASE).exists()


def _there(folder: Path, database: str) -> Store:
    """The store of a gateway. Raises UsageError if the folder holds none, and leaves nothing in it then."""
    settings, there = _settings(folder, database)
    if not there:
        known = f"there is no gateway in {str(folder)!r}"
        raise UsageError(f"{known}: give its --folder, or make a first key with keys create")
    return _store(settings)


def _store(settings: Settings) -> Store:
    from gradshield.gateway.store import Store

    return Store(settings.database_url).migrate()


def _project(store: Store, name: str) -> Project | None:
    return next((project for project in store.projects() if project.name == name), None)


@keys.command("create")
def create(
    project: Annotated[str, typer.Option(help="Project of the key; made if there is none.")] = "default",
    name: Annotated[str, typer.Option(help="What the key is called in lists and in the audit log.")] = "key",
    role: Annotated[
        Literal["user", "operator"], typer.Option(help="An operator also decides on jobs that wait.")
    ] = "user",
    rows: Rows = None,
    defence: Defence = None,
    limit: Limit = None,
    folder: Folder = GATEWAY,
    database: Database = "",
) -> None:
    """Make a key and print it, once. A project that this makes has the policy of serve, but for what is given here."""
    settings, there = _settings(folder, database)
    wanted = _policy(settings.policy.model_dump(), rows, defence, limit)
    if not there:
        start = f"start it with gradshield serve --model M --folder {folder}"
        err.print(plain(f"there is no gateway in {str(folder)!r} yet: {start}"))
    store = _store(settings)
    owner = _project(store, project)
    if owner is not None and (rows or defence or limit):
        raise UsageError(f"the project {project!r} has a policy: change it with `gradshield keys policy {project}`")
    owner = owner or store.add_project(project, wanted)
    made, secret = store.add_key(owner.id, name, role)
    err.print(f"{plain(made.id)} of the project {plain(project)}, shown once:")
    out.print(plain(secret))


@keys.command("list")
def listed(folder: Folder = GATEWAY, database: Database = "") -> None:
    """List every key by its id and its start."""
    store = _there(folder, database)
    names = {project.id: project.name for project in store.projects()}
    for key in store.all_keys():
        state = "revoked" if key.revoked_at else key.role
        out.print(plain(f"{key.id}  {key.prefix}...  {names[key.project_id]}  {key.name}  {state}"))


@keys.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(help="Id or start of the key.")],
    folder: Folder = GATEWAY,
    database: Database = "",
) -> None:
    """Revoke a key, at once."""
    found = _there(folder, database).revoke(key)
    out.print(f"revoked {plain(found.id)}")


@keys.command("policy")
def of_project(
    project: Annotated[str, typer.Argument(help="Name of the project.")],
    rows: Rows = None,
    defence: Defence = None,
    limit: Limit = None,
    reason: Annotated[str, typer.Option(help="Why it changes, for the audit log.")] = "",
    folder: Folder = GATEWAY,
    database: Database = "",
) -> None:
    """Print a project's policy, after changing what is given, for jobs that are made from now on."""
    store = _there(folder, database)
    if (found := _project(store, project)) is None:
        known = ", ".join(one.name for one in store.projects()) or "none yet"
        raise UsageError(f"there is no project {project!r}: choose one of those that have keys ({known})")
    wanted = _policy(found.policy, rows, defence, limit)
    if rows or defence or limit:
        if not reason.strip():
            raise UsageError("a change of a policy needs a reason, which the audit log keeps: give --reason")
        store.set_policy(found.id, wanted, reason)
    for name, value in wanted.model_dump().items():
        out.print(plain(f"{name:8} {value}"))
