"""The first tables: those of `tables`, until a second version writes out here what they were."""

from alembic import op

from gradshield.gateway.tables import Base

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    Base.metadata.create_all(op.get_bind())
