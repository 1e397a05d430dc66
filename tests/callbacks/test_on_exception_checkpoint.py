"""OnExceptionCheckpoint: which failures leave a checkpoint, and which runs take it away; files stand beside Lightning's in tests/parity."""

from __future__ import annotations

import pytest

from levin.callbacks import OnExceptionCheckpoint
from levin.utilities.exceptions import MisconfigurationException
from tests.callbacks.small import Small, loader, names, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")


class Fails(Small):
    """Fails in the hook that is named."""

    def __init__(self, hook):
        super().__init__()
        self.hook = hook

    def training_step(self, batch, batch_idx):
        if self.hook == "training_step":
            raise RuntimeError("broken")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if self.hook == "validation_step":
            raise RuntimeError("broken")


def run(folder, hook, method="fit", loaders=None, **flags):
    callback = OnExceptionCheckpoint(folder / "files")
    loaders = [loader()] if loaders is None else loaders
    getattr(trainer(folder, [callback], max_epochs=1, **flags), method)(Fails(hook), *loaders)


def test_a_failed_fit_leaves_a_checkpoint_until_a_fit_ends_well(tmp_path, caplog):
    (tmp_path / "files").mkdir()
    with pytest.raises(RuntimeError, match="broken"), caplog.at_level("INFO", "levin"):
        run(tmp_path, "training_step", loaders=[loader(), []])
    path = tmp_path / "files" / "on_exception.ckpt"
    assert f"RuntimeError was raised; saved a checkpoint to {path}" in caplog.messages
    run(tmp_path, None, "validate")
    run(tmp_path, None, fast_dev_run=True, loaders=[loader(), loader()])
    assert names(tmp_path / "files") == ["on_exception.ckpt"]
    run(tmp_path, None, loaders=[loader(), []])
    assert names(tmp_path / "files") == []


@pytest.mark.parametrize(
    ("hook", "method", "flags"),
    [
        ("validation_step", "validate", {}),
        ("training_step", "fit", {"fast_dev_run": True, "loaders": [loader(), loader()]}),
        (None, "fit", {"loaders": []}),
    ],
    ids=["validation", "dry run", "before the run"],
)
def test_other_failures_leave_none(tmp_path, hook, method, flags):
    with pytest.raises((RuntimeError, MisconfigurationException)):
        run(tmp_path, hook, method, **flags)
    assert not (tmp_path / "files").exists()


def test_a_file_needs_a_name():
    with pytest.raises(MisconfigurationException, match="filename must not be empty"):
        OnExceptionCheckpoint("files", "")
