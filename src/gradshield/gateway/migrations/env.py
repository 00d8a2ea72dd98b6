"""Run by Alembic, with the connection of ``upgrade``."""

from alembic import context

from gradshield.gateway.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
