"""Arrays of NumPy in files, as an adapter's store would keep those of its framework."""

import hashlib
import json
import zipfile

import numpy as np

from tokenexit import TokenExitError, folders


class Files:
    """Arrays of NumPy in files with a hash; others on their way in and out."""

    def __init__(self, array=np.asarray):
        self.array = array

    def write(self, file, arrays, metadata, /, *, argument):
        arrays = {name: np.asarray(value) for name, value in arrays.items()}
        text = json.dumps([metadata, self._content(arrays, metadata)])
        with folders.replacing(file, argument=argument) as part, part.open("wb") as opened:
            np.savez(opened, metadata=np.asarray(text), **arrays)

    def read(self, file, argument, /):
        try:
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as found:
                arrays = {name: found[name] for name in found.files}
            metadata, content = json.loads(str(arrays.pop("metadata")))
        except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise TokenExitError(f"`{argument}` must hold a valid {file.name}, got {error}") from error
        if content != self._content(arrays, metadata):
            raise TokenExitError(f"`{argument}` must hold {file.name} as it was written, got another")
        return {name: self.array(value) for name, value in arrays.items()}, metadata

    def fingerprint(self, arrays, /):
        found = hashlib.sha256()
        for one in map(np.asarray, arrays):
            found.update(f"{one.dtype} {one.shape} ".encode() + one.tobytes())
        return found.hexdigest()

    def _content(self, arrays, metadata):
        return hashlib.sha256(
            json.dumps([sorted(arrays), metadata, self.fingerprint(arrays[name] for name in sorted(arrays))]).encode()
        ).hexdigest()
