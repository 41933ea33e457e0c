"""Write webdataset-1.0.2.tar beside this file, with `pip install webdataset==1.0.2`."""

from pathlib import Path

import numpy as np
import webdataset


def main() -> None:
    """Three examples; the k-th picture is all [k, 100 + k, 200 + k], 8 high and 10 wide."""
    path = Path(__file__).with_name("webdataset-1.0.2.tar")
    with webdataset.TarWriter(str(path), mtime=0, user="", group="") as tar:
        for k in range(3):
            pixels = np.full((8, 10, 3), [k, 100 + k, 200 + k], np.uint8)
            said = {"txt": f"picture {k}"} if k else {"json": {"caption": f"picture {k}"}}
            tar.write({"__key__": f"some/{k:04}", "png": pixels, "cls": k, **said})


if __name__ == "__main__":
    main()
