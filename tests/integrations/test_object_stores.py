"""Checkpoints in an object store that speaks S3: moto's server on loopback, through s3fs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from levin import Trainer
from levin.callbacks import ModelCheckpoint
from levin.checkpoint import AsyncCheckpointIO, consolidate
from levin.checkpoint.sharded import ShardedCheckpointIO
from levin.checkpoint.verify import find_newest_intact, verify
from levin.utilities.filesystem import list_folder
from tests.distributed import _free_port
from tests.integrations.proxy import Proxy, running
from tests.integrations.times import Clock, print_times
from tests.strategies.small import QUIET, Small

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::ResourceWarning",
    "ignore:Checkpoint directory",
    "ignore:torch.distributed is disabled",
    "ignore:Skipping a checkpoint",
)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, f"http://127.0.0.1:{port}/", tmp_path_factory.mktemp("server") / "log"):
        yield port


@pytest.fixture
def proxy(server: int) -> Iterator[Proxy]:
    proxy = Proxy(server)
    yield proxy
    proxy.stop()


@pytest.fixture
def folder(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty bucket."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}", "AWS_MAX_ATTEMPTS": "2",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{time.time_ns()}"
    fsspec.filesystem("s3").mkdir(bucket)
    yield f"s3://{bucket}/run"
    s3fs.S3FileSystem.clear_instance_cache()


def fit(folder: str, epochs: int, ckpt_path: str | None = None, **options: Any) -> tuple[Trainer, Small]:
    saved = ModelCheckpoint(
        f"{folder}/saved", filename="{epoch}", monitor="val_loss", mode="min", save_top_k=2, save_last=True
    )
    trainer = Trainer(**{
        **QUIET, "devices": 1, "max_epochs": epochs, "callbacks": [saved], "default_root_dir": folder, **options,
    })  # fmt: skip
    module = Small(size=32)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer, module


def names(url: str) -> list[str]:
    filesystem = fsspec.filesystem("s3")
    filesystem.invalidate_cache()
    return sorted(name.rsplit("/", 1)[1] for name in filesystem.ls(url, detail=False))


@pytest.mark.parametrize("is_async", [False, True], ids=["waits", "background"])
@pytest.mark.parametrize("how", ["last", "auto", "a url"])
def test_a_run_is_kept_and_goes_on_from_the_store(folder, is_async, how):
    plugins = [AsyncCheckpointIO()] if is_async else None
    trainer, _ = fit(folder, 3, plugins=plugins)
    # The loss falls, so the last two are the best two.
    assert names(f"{folder}/saved") == ["epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"]
    for name in names(f"{folder}/saved"):
        verify(f"{folder}/saved/{name}")
    path = trainer.checkpoint_callback.best_model_path if how == "a url" else how
    resumed, module = fit(folder, 5, path, plugins=plugins)
    assert str(resumed.ckpt_path).startswith(folder) and resumed.global_step == 40
    _, unbroken = fit(f"{folder}-unbroken", 5)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, module.state_dict()[name])
    best = torch.load(fsspec.open(resumed.checkpoint_callback.best_model_path).open(), weights_only=False)
    assert best["epoch"] == 4


def test_a_connection_that_is_cut_leaves_the_file_whole_or_absent(folder, proxy):
    trainer, module = fit(folder, 1)
    path = f"{folder}/model.ckpt"
    trainer.save_checkpoint(path)
    before = fsspec.filesystem("s3").cat(path)
    module.register_buffer("large", torch.randn(4_000_000))  # 16 MB: several parts of an upload
    for target in (path, f"{folder}/new.ckpt"):
        proxy.num_bytes_left = 9_000_000
        with pytest.raises(Exception) as caught:  # noqa: PT011  (whatever s3fs makes of it)
            trainer.save_checkpoint(target)
        assert not isinstance(caught.value, AssertionError)
    proxy.num_bytes_left = float("inf")
    assert fsspec.filesystem("s3").cat(path) == before
    assert "new.ckpt" not in names(folder)
    trainer.save_checkpoint(path)
    verify(path)
    assert torch.load(fsspec.open(path).open(), weights_only=False)["state_dict"]["large"].numel() == 4_000_000


def test_a_store_that_is_slow_holds_up_the_save_alone_and_in_the_background_nothing(folder, proxy):
    conditions: dict[str, Callable[[], object]] = {
        "healthy": lambda: None, "slow (0.1 s a piece)": lambda: setattr(proxy, "delay_s", 0.1), "refuses": proxy.stop,
    }  # fmt: skip
    times, whole_s, ends = {}, {}, {}
    for how, plugins in (("waits", None), ("background", [AsyncCheckpointIO()])):
        for condition, act in conditions.items():
            name = f"{how}, {condition}"
            clock = Clock({20: act})
            saved = ModelCheckpoint(f"{folder}/{how}-{condition[:4]}", every_n_train_steps=50)
            trainer = Trainer(**{
                **QUIET, "devices": 1, "max_epochs": 1, "callbacks": [saved, clock], "plugins": plugins, "limit_val_batches": 0,
                "default_root_dir": folder,
            })  # fmt: skip
            began = time.perf_counter()
            try:
                trainer.fit(Small(size=4 * 95))
                ends[name] = "success"
            except Exception as error:  # Whatever s3fs makes of it.
                ends[name] = type(error).__name__
            whole_s[name], times[name] = time.perf_counter() - began, clock.seconds
            proxy.delay_s = 0.0
            if condition == "refuses":
                proxy.start()
    print_times("S3, one save", times, whole_s)
    print(ends)
    for name, end in ends.items():
        assert (end == "success") == ("refuses" not in name), ends
    # The step that saves waits, unless the save is in the background.
    assert max(times["waits, slow (0.1 s a piece)"]) > 0.3
    assert sorted(times["background, slow (0.1 s a piece)"])[-2] < 0.25
    assert len(times["waits, refuses"]) == 49


def test_a_background_save_that_fails_is_raised(folder, proxy):
    trainer, module = fit(folder, 1, plugins=[AsyncCheckpointIO()])
    module.register_buffer("large", torch.randn(4_000_000))
    proxy.num_bytes_left = 9_000_000
    trainer.save_checkpoint(f"{folder}/new.ckpt")
    with pytest.raises(Exception) as caught:  # noqa: PT011
        trainer.strategy.finish_saves()
    assert not isinstance(caught.value, AssertionError)
    proxy.num_bytes_left = float("inf")
    assert "new.ckpt" not in names(folder)


def test_credentials_that_are_missing_are_told_at_the_first_save(folder, monkeypatch, tmp_path):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(Exception, match=r"(?i)credential|forbidden|denied|permission"):
        fit(folder, 1)


SHARDED = """
import sys
from levin import Trainer
from levin.callbacks import ModelCheckpoint
from levin.strategies import FSDPStrategy
from tests.strategies.small import QUIET, Small
if __name__ == "__main__":
    folder, devices, epochs, async_save, ckpt_path = sys.argv[1:]
    saved = ModelCheckpoint(folder, filename="{epoch}", monitor="val_loss", save_top_k=2, save_last=True,
                            async_save=async_save == "True")
    trainer = Trainer(**{**QUIET, "devices": int(devices), "max_epochs": int(epochs), "callbacks": [saved],
                         "default_root_dir": folder, "strategy": FSDPStrategy(state_dict_type="sharded")})
    trainer.fit(Small(size=32, batch_size=8 // int(devices)), ckpt_path=ckpt_path or None)
"""


def fit_sharded(tmp_path, *arguments: object) -> None:
    script = tmp_path / "train.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-W", "ignore", str(script), *map(str, arguments)]
    subprocess.run(command, check=True, timeout=200, env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"})


@pytest.mark.timeout(820)  # four trainings, each with a limit of its own
@pytest.mark.parametrize("is_async", [False, True], ids=["waits", "background"])
def test_folders_of_several_processes_are_kept_in_the_store_and_any_number_goes_on(folder, tmp_path, is_async):
    fit_sharded(tmp_path, folder, 2, 3, is_async, "")
    assert names(folder) == ["epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"]
    for name in names(folder):
        verify(f"{folder}/{name}")
        assert len(names(f"{folder}/{name}")) == 4  # the index, meta.pt and two parts, of however many saves
    fit_sharded(tmp_path, folder, 1, 4, is_async, "last")
    fit_sharded(tmp_path, folder, 2, 5, is_async, "auto")
    fit_sharded(tmp_path, f"{folder}-unbroken", 1, 5, False, "")
    resumed, unbroken = (consolidate(f"{url}/last.ckpt")["state_dict"] for url in (folder, f"{folder}-unbroken"))
    torch.testing.assert_close(resumed, unbroken)


def test_a_connection_that_is_cut_leaves_a_folder_whole_or_absent(folder, proxy):
    checkpoint_io = ShardedCheckpointIO()
    checkpoint_io.save_checkpoint({"weights": {"w": torch.ones(3)}, "note": "before"}, f"{folder}/a.ckpt")
    for name in ("a.ckpt", "new.ckpt"):
        proxy.num_bytes_left = 9_000_000
        with pytest.raises(Exception) as caught:  # noqa: PT011  (whatever s3fs makes of it)
            checkpoint_io.save_checkpoint(
                {"weights": {"w": torch.ones(4_000_000)}, "note": "after"}, f"{folder}/{name}"
            )
        assert not isinstance(caught.value, AssertionError)
        proxy.num_bytes_left = float("inf")
    assert consolidate(f"{folder}/a.ckpt")["note"] == "before"
    assert find_newest_intact(folder) == f"{folder}/a.ckpt"
    checkpoint_io.save_checkpoint({"weights": {"w": torch.ones(3)}, "note": "after"}, f"{folder}/a.ckpt")
    assert consolidate(f"{folder}/a.ckpt")["note"] == "after"
    assert len(names(f"{folder}/a.ckpt")) == 3


def test_folders_are_listed_as_they_are_now(folder):
    fsspec.filesystem("s3").pipe(f"{folder}/a.txt", b"a")
    assert [name for name in list_folder(folder) if name.endswith("a.txt")]
    # Another process writes meanwhile.
    code = f"import fsspec; fsspec.filesystem('s3').pipe('{folder}/b.txt', b'b')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert [name for name in list_folder(folder) if name.endswith("b.txt")]
