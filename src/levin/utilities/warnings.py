"""Warning categories and the switch that silences the hints."""

from __future__ import annotations

import os
import warnings


class PossibleUserWarning(UserWarning):
    """A hint about something that is probably, but not certainly, a mistake."""


class LightningDeprecationWarning(DeprecationWarning):
    """Something of levin, or of a package that tells its users so, will go away."""


def disable_possible_user_warnings(module: str = "") -> None:
    """Silence every :class:`PossibleUserWarning`.

    Setting the environment variable ``POSSIBLE_USER_WARNINGS=0`` (or ``off``) before the import does the same.

    Args:
        module: Regular expression for the modules it holds in; all by default.
    """
    warnings.filterwarnings("ignore", module=module, category=PossibleUserWarning)


if os.environ.get("POSSIBLE_USER_WARNINGS", "").lower() in ("0", "off"):
    disable_possible_user_warnings()
