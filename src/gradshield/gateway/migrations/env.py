"""Run by Alembic, with the connection of `Database.migrate`."""

from alembic import context

from gradshield.gateway.tables import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
