"""The released packages whose tests run on Lightning and on levin, pinned."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Package:
    """One package.

    Args:
        name: On the package index.
        version: Pinned.
        tests: Arguments of pytest, relative to the unpacked source distribution; ``usage/...`` is a script of ours, where
            none are shipped.
        requirements: What its tests need besides.
        without: Tests left out: part of the name -> the reason.
        made: A script of ours that makes what the tests lack; it gets their folder.
        note: What the table says about the choice.
    """

    name: str
    version: str
    tests: tuple[str, ...]
    requirements: tuple[str, ...] = ()
    without: dict[str, str] = field(default_factory=dict)
    made: str = ""
    note: str = ""

    @property
    def is_ours(self) -> bool:
        """Whether the tests are a script of ours."""
        return self.tests[0].startswith("usage/")


PACKAGES = (
    Package(
        "optuna-integration",
        "5.0.0",
        ("usage/optuna_integration.py",),
        ("optuna==5.0.0",),
        note="ships no tests for Lightning; used as its documentation says",
    ),
    Package("chemprop", "2.3.1", ("usage/chemprop.py",), note="ships no tests; used as its documentation says"),
    Package(
        "pytorch-forecasting",
        "1.8.0",
        (
            "tests/test_callbacks.py",
            "tests/test_models/test_nbeats.py",
            "tests/test_models/test_baseline.py",
            "tests/test_models/test_temporal_fusion_transformer.py",
            "tests/test_models/test_dlinear_v2.py",
            "tests/test_models/test_tft_v2.py",
            "tests/test_models/test_base_model_v2.py",
            "tests/test_models/test_deepar.py",
            "tests/test_models/test_nhits.py",
            "tests/test_models/test_mlp.py",
        ),
        ("pyarrow",),
        made="made/stallion.py",
        note="its tests download a data set; here it is a made one with the same columns",
    ),
    Package(
        "cellarium-ml",
        "0.0.15",
        (
            "tests/test_callbacks.py",
            "tests/test_ppca.py",
            "tests/test_onepass_mean_var_std.py",
            "tests/test_logistic_regression.py",
            "tests/test_tdigest.py",
            "tests/test_ipca.py",
            "tests/test_hvg_seurat_v3.py",
            "tests/test_cli.py",
        ),
        ("lightning==2.5.2",),
        made="made/cellarium_common.py",
        note="its tests import a helper file that the source distribution leaves out; here it is one of ours",
    ),
    Package(
        "neuralforecast",
        "3.3.0",
        (
            "tests/test_malicious_artifacts.py",
            "tests/test_core_serialization.py",
            "tests/test_migrate.py",
            "tests/test_sample_weight.py",
            "tests/test_categorical.py",
        ),
    ),
    Package("darts", "0.48.1", ("usage/darts.py",), note="ships no tests; used as its documentation says"),
)
