"""`tokenexit info`: versions, devices, and what of the library is available."""

import argparse
import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

__all__ = ["run"]

_PACKAGES = (
    "torch", "torchvision", "jax", "timm", "transformers", "onnx", "onnxscript", "onnxruntime", "matplotlib", "pillow",
    "numpy",
)  # fmt: skip
_PARTS = {
    "PyTorch adapter": (("torch", "einops", "safetensors", "tqdm"), "torch"),
    "JAX adapter": (("jax", "einops", "safetensors"), "jax"),
    "ViTs of timm": (("torch", "timm"), "torch,timm"),
    "ViTs of transformers": (("torch", "transformers"), "torch,transformers"),
    "ONNX export": (("torch", "onnx", "onnxscript"), "onnx"),
    "assess, segment": (("torch", "einops", "safetensors", "tqdm", "PIL"), "torch,viz"),
    "calibrate, show": (("torch", "einops", "safetensors", "tqdm", "PIL", "matplotlib"), "torch,viz"),
}  # fmt: skip

_IMPORTED = {
    "ViTs of timm": ("timm",),
    "ViTs of transformers": ("transformers.models.dinov2.modeling_dinov2",),
}
"""What is imported, for it may be there and not work: beside a torchvision of another PyTorch."""


def run(given: argparse.Namespace) -> int:  # noqa: ARG001 - all commands are alike
    """Print what there is. It never fails.

    Args:
        given: The command line.

    Returns:
        0.
    """
    lines = [
        ("tokenexit", _version("tokenexit")),
        ("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        *((package, _version(package)) for package in _PACKAGES),
        ("devices", _devices()),
        *((part, _available(part, packages, extra)) for part, (packages, extra) in _PARTS.items()),
    ]
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:<{width}}  {said}" for name, said in lines))
    return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    cores = f"{os.cpu_count()} CPU cores"
    if find_spec("torch") is None:
        return cores
    try:
        import torch

        found = [f"{cores}, {torch.get_num_threads()} threads"]
        found += [f"cuda:{one} {torch.cuda.get_device_name(one)}" for one in range(torch.cuda.device_count())]
        found += ["mps"] if torch.backends.mps.is_available() else []
    except Exception as error:  # whatever is wrong with an installation, this command is to show it
        return f"{cores}; torch does not say more: {type(error).__name__}: {' '.join(str(error).split())}"
    return "; ".join(found)


def _available(part: str, packages: tuple[str, ...], extra: str) -> str:
    lacking = [package for package in packages if find_spec(package) is None]
    if lacking:
        return f"no, for want of {', '.join(lacking)}: pip install 'tokenexit[{extra}]'"
    for module in _IMPORTED.get(part, ()):
        try:
            import_module(module)
        except Exception as error:  # as above
            said = " ".join(str(error).split())
            hint = "; torchvision is of another PyTorch, install the two together" if "torchvision" in said else ""
            return f"no, {module} cannot be imported: {type(error).__name__}: {said}{hint}"
    return "yes"
