"""What a validation ran with."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import jax


def environment() -> dict[str, str]:
    """Versions, hardware and the date, in words; nothing that names a person or a machine."""
    device = jax.devices()[0]
    found = {"date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"}
    for package in ("gpt2-jax", "jax", "jaxlib", "flax", "torch", "transformers", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {
        "Python": platform.python_version(),
        "JAX device": f"{jax.device_count()} x {device.device_kind} ({jax.default_backend()})",
        "CPU": f"{_cpu()}, {os.cpu_count()} cores",
        "operating system": f"{_system()}, {platform.machine()}",
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # only Linux has it
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(models), platform.processor() or platform.machine())


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()}"
