"""Whether a user's class replaces a method of ours."""

from __future__ import annotations

import functools

import pytest

import levin
from levin.demos.boring_classes import BoringModel
from levin.utilities.overrides import has_own, innermost, is_overridden


class Net(BoringModel):
    validation_step = None
    wrapped = levin.LightningModule.on_fit_end

    def on_fit_start(self):
        super().on_fit_start()

    @functools.wraps(levin.LightningModule.on_train_start)
    def on_train_start(self):
        super().on_train_start()


def test_a_method_of_a_users_class_is_told_from_the_default():
    module, kind = Net(), levin.LightningModule
    assert is_overridden("on_fit_start", module) and is_overridden("on_fit_start", module, kind)
    assert is_overridden("training_step", module, kind) and not is_overridden("training_step", module, BoringModel)
    assert not is_overridden("on_fit_end", module) and not is_overridden("on_fit_end", module, kind)
    assert not is_overridden("validation_step", module, kind) and not is_overridden("on_fit_start", None, kind)
    assert not is_overridden("absent", module)
    with pytest.raises(ValueError, match="LightningModule has no method 'wrapped' that could be overridden"):
        is_overridden("wrapped", module, kind)
    with pytest.raises(ValueError, match="must inherit from a class of levin's, received int"):
        is_overridden("on_fit_start", 3)


def test_a_wrapper_of_the_default_is_a_method_of_its_own_and_overrides_nothing():
    module, kind = Net(), levin.LightningModule
    assert has_own("on_train_start", module, kind) and not is_overridden("on_train_start", module, kind)
    assert has_own("on_fit_start", module, kind) and not has_own("on_fit_end", module, kind)
    assert not has_own("validation_step", module, kind)
    module.on_fit_end = functools.partial(module.on_fit_end)
    assert has_own("on_fit_end", module, kind) and not is_overridden("on_fit_end", module, kind)
    assert innermost(module.on_fit_end) is kind.on_fit_end
