"""Writes monthly sales of drinks where pytorch-forecasting keeps the data set that it would download: same columns, made values."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from pytorch_forecasting.data import examples

DAYS = (
    "easter_day good_friday new_year christmas labor_day independence_day revolution_day_memorial regional_games "
    "fifa_u_17_world_cup football_gold_cup beer_capital music_fest"
).split()


def make() -> pd.DataFrame:
    random = np.random.default_rng(0)
    dates = pd.date_range("2013-01-01", "2017-12-01", freq="MS")
    frames = []
    for agency in ("Agency_01", "Agency_02", "Agency_03"):
        population, income = int(random.integers(1e5, 1e6)), int(random.integers(1e5, 2e5))
        for sku in ("SKU_01", "SKU_02", "SKU_03"):
            season = 1 + np.sin(2 * np.pi * dates.month / 12) / 3
            regular = 1000 + 10 * random.random(len(dates))
            discount = 50 * random.random(len(dates))
            frames.append(
                pd.DataFrame(
                    {
                        "agency": agency, "sku": sku, "date": dates,
                        "volume": 50 * season * (1 + random.random(len(dates)) / 5),
                        "industry_volume": random.integers(4e8, 6e8, len(dates)),
                        "soda_volume": random.integers(7e8, 9e8, len(dates)),
                        "avg_max_temp": 20 + 8 * season, "price_regular": regular,
                        "price_actual": regular - discount, "discount": discount,
                        "discount_in_percent": 100 * discount / regular,
                        "avg_population_2017": population, "avg_yearly_household_income_2017": income,
                        **{day: (dates.month == 1 + i).astype(int) for i, day in enumerate(DAYS)},
                        "timeseries": len(frames),
                    }
                )
            )  # fmt: skip
    return pd.concat(frames, ignore_index=True)


make().to_parquet(examples.DATA_PATH / "stallion.parquet")
print(Path(sys.argv[1]))
