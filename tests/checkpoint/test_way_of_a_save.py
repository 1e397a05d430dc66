"""A save is a short way: from the callback's decision to the file, apart from what gathers the state of the run."""

from __future__ import annotations

import sys
from pathlib import Path

import levin
from levin.callbacks import ModelCheckpoint
from tests.callbacks.small import Small, loader, trainer

ROOT = str(Path(levin.__file__).parent)
# Whoever owns a part of the state is asked for it, in a file of its own.
OWNERS = ("resume/checkpoint_tree.py", "collect")


class Watched(ModelCheckpoint):
    """Notes the files of levin that its second save goes through, but for what collects the state."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_saves, self.files = 0, set()

    def _save(self, trainer, is_always_last=False):
        self.num_saves += 1
        if self.num_saves != 2:
            super()._save(trainer, is_always_last)
            return
        frames = []

        def watch(frame, event, argument):
            code = frame.f_code
            if not code.co_filename.startswith(ROOT) or event not in ("call", "return"):
                return
            if event == "return":
                frames.pop()
                return
            place = (code.co_filename[len(ROOT) + 1 :], code.co_name)
            frames.append(place)
            if OWNERS not in frames:
                self.files.add(place[0])

        sys.setprofile(watch)
        try:
            super()._save(trainer, is_always_last)
        finally:
            sys.setprofile(None)


def test_a_save_goes_through_few_files(tmp_path):
    callback = Watched(tmp_path / "saved", monitor="val", save_top_k=2, save_last=True)
    trainer(tmp_path, [callback], max_epochs=3).fit(Small((3.0, 2.0, 1.0)), loader(), loader(2))
    assert 10 < len(callback.files) <= 12, sorted(callback.files)
