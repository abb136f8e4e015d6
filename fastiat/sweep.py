"""Sweeps: PGD's error over radii (Table 6 of the paper) and over numbers of steps (Table 7)."""

import time
from dataclasses import replace
from itertools import product

from fastiat.engine.device import own_defaults, pick_device
from fastiat.evaluate import UNITS, Job, open_runs, prepare, table, unusual
from fastiat.measuring.one_pass import error_rates
from fastiat.queries import SweepConfig
from fastiat.runs.results import Rate, provenance

Key = tuple[str, float, int]
"""Split, eps and steps."""


@own_defaults()
def sweep(config: SweepConfig) -> dict[str, dict[Key, Rate]]:
    """Measure every run of `config` at each eps and number of steps, and print tables.

    Returns {run: {(split, eps, steps): rate}}; run directories keep the results as `evaluate`'s.
    One pass measures all numbers of steps. The step is the run's own alpha, whatever the radius,
    unless `config` gives one. Raises `InputError` for runs or data that are missing or do not fit.
    """
    config.check()
    jobs = prepare(open_runs(config), config)
    rates = {job.name: _measure(job, config) for job in jobs}
    several = len(set(config.steps)) > 1
    for split, eps in product(
        dict.fromkeys(config.splits), dict.fromkeys(config.eps) if several else (None,)
    ):
        print(_table(rates, config, split, eps), flush=True)
    return rates


def _measure(job: Job, config: SweepConfig) -> dict[Key, Rate]:
    rates = {}
    config = replace(config, batch_size=job.batch_size(config))
    alpha = job.alpha(config)
    for (split_name, split), eps in product(job.splits.items(), dict.fromkeys(config.eps)):
        started = time.monotonic()
        attacks = {f"pgd-{steps}": steps for steps in config.steps}
        with job.within_memory("sweep", config):
            found = error_rates(
                job.model, split, tuple(attacks), eps=eps, alpha=alpha, config=config
            )
        made = provenance(pick_device(config.device), time.monotonic() - started)
        for attack, rate in found.items():
            rates[split_name, eps, attacks[attack]] = rate
            job.keep(job.entry("sweep", split_name, attack, rate, config, eps, alpha) | made)
    return rates


def _table(
    rates: dict[str, dict[Key, Rate]], config: SweepConfig, split: str, eps: float | None
) -> str:
    """Write a split's rates as text, a row per run: over the steps at `eps`, or over all radii."""
    at, steps = dict.fromkeys(config.eps), dict.fromkeys(config.steps)
    if eps is None:
        heading, columns = f"PGD-{config.steps[0]}, eps across", [f"{eps:g}" for eps in at]
    else:
        heading, columns = f"eps {eps:.4g}, PGD steps across", [str(n) for n in steps]
    rows, counts = {}, set()
    for name, found in rates.items():
        row = [rate for key, rate in found.items() if key[0] == split and eps in (None, key[1])]
        rows[name] = [str(rate) for rate in row]
        counts.add(row[0].n)
    # Runs on different data sets may be swept together.
    n = " or ".join(map(str, sorted(counts)))
    step = "" if config.alpha is None else f", alpha {config.alpha:.4g}"
    return table(
        f"{split}, {n} images, {config.norm} {heading}{step}{unusual(config)}: {UNITS}",
        columns,
        rows,
    )
