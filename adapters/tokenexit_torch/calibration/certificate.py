"""Certificates of PyTorch models: fingerprints, writing, and loading onto the model that was certified.

The statistics are `tokenexit.guarantees.calibration`, the file is `tokenexit.guarantees.certificate`; `calibrate`
makes both.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from tokenexit import TokenExitError, folders
from tokenexit.errors import require
from tokenexit.guarantees import certificate
from tokenexit.guarantees.certificate import Certificate, Fingerprints
from tokenexit_torch._files import fingerprint
from tokenexit_torch.exits.base import WithExits
from tokenexit_torch.heads.reading import radius_of

__all__ = ["fingerprints", "load_certificate", "save_certificate"]

_FILE = "certificate.json"
_ADAPTER = "torch"


def fingerprints(model: nn.Module, /, *, resolution: tuple[int, int], preprocessing: str) -> Fingerprints:
    """What must be the same in use as at the calibration.

    Under `torch.autocast`, its dtype is part of the dtype: take fingerprints under the autocast that the model runs in.

    Args:
        model: The model, with its exits: backbone, exit heads and final head.
        resolution: Height and width of the images, in pixels.
        preprocessing: What is done to images before the model sees them, in your own words; compared letter by letter.

    Returns:
        A SHA-256 for each tensor of the state dict, and for the radius of each head that looks around; and the rest.

    Raises:
        TokenExitError: If the model has no tensors, or an argument is not what it should be.
    """
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    weights = {name: fingerprint([value]) for name, value in tensors.items()}
    # The same weights say something else with another radius, which no tensor holds.
    wide = {f"{name}.radius": radius_of(part) for name, part in model.named_modules() if radius_of(part) > 0}
    weights |= {name: fingerprint([torch.tensor(radius)]) for name, radius in wide.items()}
    return Fingerprints(weights, _dtype(tensors), resolution, preprocessing, _ADAPTER)


def save_certificate(certified: Certificate, folder: str | Path, /) -> None:
    """Write a certificate: `certificate.json`.

    Args:
        certified: The certificate.
        folder: Where to, as beside the exits that `save` wrote; made if it is not there.

    Raises:
        TokenExitError: If it is no certificate, or the folder cannot be written to.
    """
    rule = "be a Certificate, as `calibrate` gives unless it says never exit"
    require(isinstance(certified, Certificate), "certified", rule, type(certified).__name__)
    folders.write(Path(folder) / _FILE, certificate.to_json(certified).encode())


def load_certificate(
    folder: str | Path, model: WithExits, /, *, resolution: tuple[int, int], preprocessing: str
) -> Certificate:
    """Read a certificate, see that it is for this model, and let the model follow the plan that was certified.

    Args:
        folder: Where `save_certificate` wrote it.
        model: The model with exits; it is retuned, and left as it was if the certificate is refused.
        resolution: As for `fingerprints`: what the model will be used with.
        preprocessing: As for `fingerprints`.

    Returns:
        The certificate.

    Raises:
        TokenExitError: If the file is missing, cut off or edited, or the certificate is for other weights, another
            dtype, resolution or preprocessing.
    """
    file = Path(folder) / _FILE
    require(file.is_file(), "folder", f"hold the file {_FILE}", folder)
    try:
        found = certificate.from_json(folders.text_of(file, "folder"))
    except TokenExitError as error:
        raise TokenExitError(f"`folder` must hold a valid {_FILE}, got {file}: {error}") from error
    certificate.require_matches(found, fingerprints(model, resolution=resolution, preprocessing=preprocessing))
    model.retune(found.schedule)
    return found


def _dtype(tensors: dict[str, Tensor]) -> str:
    """Of the weights, and of autocast where it is active, as `float32, autocast to bfloat16`."""
    floating = [value for value in tensors.values() if value.is_floating_point()]
    kinds = sorted({_name(value.dtype) for value in floating})
    cast = [
        f"autocast to {_name(torch.get_autocast_dtype(device))}"
        for device in sorted({value.device.type for value in floating})
        if torch.is_autocast_enabled(device)
    ]
    return ", ".join([*kinds, *cast])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
