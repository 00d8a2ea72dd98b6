"""Device and precision of a model: one device or several, full precision or 4 or 8 bits."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from gradshield.errors import UsageError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZED = ("4bit", "8bit")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_KEPT = 2**30


def choose_device(device: str = "auto") -> torch.device:
    """The device for ``auto``, ``cpu``, ``mps``, ``cuda`` or ``cuda:N``. Raises UsageError if it is not available."""
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    here = ["auto", "cpu", *(["mps"] if mps else [])]
    here += ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))] if cuda else []
    if device not in here:
        raise UsageError(f"the device {device!r} is not available here: choose one of {', '.join(here)}")
    return torch.device(device)


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype for ``auto`` or a name of ``DTYPES``. Raises UsageError for any other."""
    import torch

    if dtype == "auto":
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"the dtype {name!r} is not known: choose one of auto, {', '.join(DTYPES)}")
    return getattr(torch, name)  # type: ignore[no-any-return]


def why(dtype: str, device: torch.device) -> str:
    """Why a model of this ``dtype`` as typed is loaded as `choose_dtype` says."""
    import torch

    if dtype != "auto":
        return "as asked for"
    if device.type == "cuda":
        has = choose_dtype(dtype, device) == torch.bfloat16
        return "this GPU computes in it" if has else "this GPU has no bfloat16"
    if device.type != "cpu":
        return "as on every Apple GPU"
    units: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # newer torch
    if units.get("amx_bf16"):
        return "as on every CPU, so that scores are the same on all; this one is faster with --dtype bfloat16"
    return "this CPU has no bfloat16 units"


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64, on its device; on the CPU if the device lacks float64 (Apple's)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def keep_freed_memory() -> None:
    """Let this process keep up to 1 GiB of freed memory, so that new tensors need not be mapped and zeroed again.

    Every pass frees and allocates the same buffers. glibc returns the large ones to the system in between, which costs a
    quarter of the CPU time. Only for GradShield's own processes; the user's environment settings win, and other allocators
    are unaffected.
    """
    set_by_user = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"} & os.environ.keys()
    if sys.platform != "linux" or set_by_user:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's alone
    if mallopt is not None:
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            mallopt(option, _KEPT)


def warn_of_unused_gpu(model: torch.nn.Module) -> None:
    """Warn about a model on the CPU of a machine with a GPU: it is measured on the CPU."""
    better = choose_device().type
    if better != "cpu" and all(parameter.device.type == "cpu" for parameter in model.parameters()):
        warnings.warn(
            f"the model is on the CPU, where from_pretrained puts it, and this machine has a GPU ({better}): move it with "
            f"model.to({better!r}) first, or it is measured on the CPU",
            stacklevel=3,
        )


def placing(
    where: torch.device, dtype: torch.dtype, device: str, quantize: str | None, device_map: str | None
) -> dict[str, Any]:
    """The from_pretrained arguments for quantisation and devices; empty for a full model on one device. Raises UsageError."""
    for option, value, known in (("quantize", quantize, QUANTIZED), ("device-map", device_map, DEVICE_MAPS)):
        if value is not None and value not in known:
            raise UsageError(f"--{option} is {value!r}: choose one of {', '.join(known)}")
    if device_map is not None and device != "auto":
        raise UsageError(f"--device {device} is one device, and --device-map uses several: leave out one of them")
    found: dict[str, Any] = {}
    if device_map is not None or quantize is not None:
        found["device_map"] = device_map or {"": where}
    if quantize is not None:
        found["quantization_config"] = _quantization(quantize, dtype)
    return found


def check_placed(model: Any, device_map: str | None) -> None:
    """Raises UsageError if accelerate left weights on the CPU or the disk, to be fetched layer by layer."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    left = places & {"disk", *(["cpu"] if len(places) > 1 else [])}
    if device_map is not None and left:
        raise UsageError(
            f"the model does not fit on the devices of --device-map {device_map} (some layers are on the "
            f"{' and the '.join(sorted(left))}), and offloaded layers cannot be scored: use more or larger devices, "
            "--dtype bfloat16, or --quantize"
        )


def _quantization(quantize: str, dtype: torch.dtype) -> Any:
    import importlib.util

    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("--quantize needs bitsandbytes, which is not installed: install gradshield[quantized]")
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
