"""The command `vllm-omni`, after what it needs on a machine without CUDA."""

from __future__ import annotations

import torchvision_operators  # noqa: F401 - before torchvision

if __name__ == "__main__":
    from vllm_omni.entrypoints.cli.main import main

    main()
