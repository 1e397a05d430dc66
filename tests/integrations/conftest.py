"""Tests against real services and schedulers, which `make test-integrations` installs and starts; nothing else runs them."""

from __future__ import annotations

import os

collect_ignore_glob = [] if os.environ.get("LEVIN_TEST_INTEGRATIONS") else ["test_*.py"]
