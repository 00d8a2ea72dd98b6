"""Whatever fits the OpenAPI document, and much that does not, is answered as the document says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gateway.running import serving

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,unsupported_method,"
    "negative_data_rejection,ignored_auth,use_after_free,ensure_resource_availability"
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_api_answers_as_its_document_says(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    database = request.getfixturevalue("postgres").database() if kind == "postgresql" else ""
    with serving(tmp_path / "gateway", database=database) as served:
        options = ["--checks", CHECKS, "--max-examples", "10", "--seed", "1", "--no-color", "--continue-on-failure"]
        key = f"Authorization: Bearer {served.key()}"
        program = Path(sys.executable).with_name("st")
        done = subprocess.run(
            [str(program), "run", f"{served.url}/openapi.json", "-H", key, *options],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(r"Selected: (\d+)/\1\n", done.stdout)
