"""schemathesis writes requests from the schema that the server publishes, and checks the answers.

It is in no extra, as the other clients' packages are not: CONTRIBUTING.md says how to run this.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.servers import server

pytest.importorskip("schemathesis", reason="needs: pip install schemathesis")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

#: A request may fit the schema and still be refused: a choice between no strings, a top_p of 7.
EXCLUDED = "positive_data_acceptance"


def test_what_fits_the_schema_is_answered_as_the_schema_says(tmp_path: Path) -> None:
    """No status and no body that the schema does not know, no 500, and nothing stays behind."""
    with server() as running:
        command = [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{running.address}/openapi.json"),
            *("--phases", "examples,coverage,fuzzing", "--exclude-checks", EXCLUDED),
            *("--max-examples", os.environ.get("MINIVLLM_SCHEMA_EXAMPLES", "10")),
            *("--seed", "1", "--request-timeout", "100", "--no-color"),
        ]
        found = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=800, check=False
        )
        assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]
        assert "10/10" in found.stdout, "every operation is tested"
        assert running.is_idle()
