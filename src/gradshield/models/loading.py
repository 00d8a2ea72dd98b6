"""Load a causal LM with its tokenizer, or wrap the caller's own. Device and dtype are decided here, once.

Only safetensors are read (a pickle can run code), and a model's own code runs only with ``trust_remote_code``.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import logging
import os
import re
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradshield.errors import HubError, ModelError, UsageError, first_line

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
QUANTIZED = ("4bit", "8bit")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
# The files a causal LM needs from its repository: top level only, no pickles, no copies in another format.
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
HUB_LEAVE_OUT = ("*/*", "consolidated*", "*.msgpack")


@dataclass(frozen=True)
class ModelSource:
    """The arguments of `load`: a model to be loaded later, or by another process."""

    name: str
    adapter: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    revision: str | None = None
    quantize: str | None = None
    device_map: str | None = None
    device: str = "auto"

    def load(self, device: str | None = None) -> LoadedModel:
        """The model; on one ``device`` alone if it is given. Raises like `load`."""
        own = self if device is None else replace(self, device=device, device_map=None)
        return load(**vars(own))


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that is ready to be scored.

    ``digest`` is the SHA-256 of the weight files, or of the parameters of a model that was in memory.
    ``adapter`` is the folder or hub name of its PEFT adapter, None without one or if the caller made it.
    ``source`` holds the arguments of `load`, None if the caller gave the model itself.
    """

    model: torch.nn.Module
    tokenizer: Any
    name: str
    device: torch.device
    dtype: torch.dtype
    digest: str
    is_peft: bool = False
    adapter: str | None = None
    source: ModelSource | None = None

    @property
    def pad_token_id(self) -> int:
        """Padding id: the tokenizer's, else its end of sequence, else 0. The tokenizer is not changed."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((int(i) for i in ids if i is not None), 0)


def load(
    name: str | Path,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    quantize: str | None = None,
    device_map: str | None = None,
) -> LoadedModel:
    """Load a causal LM from a folder or the hub, in eval mode.

    ``name`` is a model, or a PEFT adapter that names its base; ``adapter`` an adapter for it. ``device`` ``auto`` takes
    CUDA, else MPS, else the CPU; ``dtype`` ``auto`` is bfloat16 on a CUDA device that supports it, else float32. ``revision``
    is a branch, tag or commit of a hub model. ``quantize`` is ``4bit`` (NF4) or ``8bit``: the linear layers' weights are
    quantised by bitsandbytes and computed with in ``dtype``; they have no gradient, so only the subspace ``lora`` can be
    scored. ``device_map`` is ``auto``, ``balanced``, ``balanced_low_0`` or ``sequential``: layers on several GPUs, as
    accelerate splits them; ``device`` stays ``auto``.

    Raises UsageError for a device or dtype that is not available and for a model that does not fit on the devices of
    ``device_map``; HubError if the hub cannot be reached or has no such model; ModelError for no such folder, no safetensors,
    missing or broken weights, and a model with its own code without ``trust_remote_code``.
    """
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    placed = placing(where, kind, device, quantize, device_map)
    source = ModelSource(
        _whole(name),
        None if adapter is None else _whole(adapter),
        str(kind).removeprefix("torch."),
        trust_remote_code,
        revision,
        quantize,
        device_map,
        device,
    )
    from transformers import AutoModelForCausalLM

    folder = fetch(name, revision, trust_remote_code)
    extra = None if adapter is None else fetch(adapter, None, trust_remote_code)
    if extra is None and (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists():
        adapter, extra = name, folder
        folder = fetch(_base_of(extra), None, trust_remote_code)
    check_folder(folder, str(name), trust_remote_code)
    if extra is not None:
        _check_adapter(extra, str(adapter))
    tokenizer = tokenizer_of([extra, folder] if extra else [folder], str(name), trust_remote_code)
    options = {"dtype": kind, "trust_remote_code": trust_remote_code, **placed}
    model = pretrained(AutoModelForCausalLM, folder, str(name), "causal language model", **options)
    if extra is not None:
        model = _add_adapter(model, extra, str(adapter))
    if not placed:
        model.to(where)
    check_placed(model, device_map)
    model.eval()
    logger.info("%s on %s in %s (%s)", name, where.type, source.dtype, why(str(dtype), where))
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=str(name),
        device=next(model.parameters()).device if device_map else where,
        dtype=kind,
        digest=files_digest([folder] if extra is None else [folder, extra]),
        is_peft=extra is not None,
        adapter=None if adapter is None else str(adapter),
        source=source,
    )


def load_tokenizer(name: str | Path, trust_remote_code: bool = False) -> Any:
    """Only the tokenizer of a model's folder or hub name. Raises HubError and ModelError like `load`."""
    return tokenizer_of([fetch(name, None, trust_remote_code)], str(name), trust_remote_code)


def wrap(model: Any, tokenizer: Any) -> LoadedModel:
    """The caller's own model as a ``LoadedModel``. Nothing about it changes: no mode, no ``requires_grad``, no token.

    It stays on its device; a model on the CPU of a machine with a GPU raises a warning. Raises UsageError if it is no torch
    module or there is no tokenizer, ModelError if it has no parameters in memory.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"the model is a {type(model).__name__}: give a causal LM of transformers, or a path to one")
    if tokenizer is None or not hasattr(tokenizer, "apply_chat_template"):
        raise UsageError("a model given as an object needs its tokenizer: pass tokenizer=...")
    first = next(model.parameters(), None)
    if first is None or any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("the model has no weights in memory (it is empty or on the meta device): load them first")
    better = choose_device().type
    if better != "cpu" and all(parameter.device.type == "cpu" for parameter in model.parameters()):
        warnings.warn(
            f"the model is on the CPU, where from_pretrained puts it, and this machine has a GPU ({better}): move it with "
            f"model.to({better!r}) first, or it is measured on the CPU",
            stacklevel=2,
        )
    config = getattr(model, "config", None)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=getattr(config, "_name_or_path", "") or type(model).__name__,
        device=first.device,
        dtype=_widest_float(model),
        digest=parameters_digest(model),
        is_peft=hasattr(model, "peft_config"),
    )


def parameters_digest(model: torch.nn.Module, some: int | None = None) -> str:
    """SHA-256 over name, dtype, shape and bytes of every parameter, one at a time, in the order of their names.

    With ``some``, of that many values of each, evenly spaced, and up to twice as many.
    """
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        data = parameter.detach().contiguous().reshape(-1)
        data = data if some is None else data[:: max(1, len(data) // some)].contiguous()
        digest.update(data.view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def fingerprint(loaded: LoadedModel, model: torch.nn.Module) -> str:
    """SHA-256 that tells whether this is the loaded model, maybe with an adapter, or has other weights since."""
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    given = f"{loaded.digest} {loaded.dtype} {loaded.device.type} {type(model)} {attention}"
    return hashlib.sha256(f"{given}\n{parameters_digest(model, 64)}".encode()).hexdigest()


def _widest_float(model: torch.nn.Module) -> torch.dtype:
    """The dtype of most floating-point parameters: an adapter or a norm may have another."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0] if sizes else next(model.parameters()).dtype


def fetch(name: str | Path, revision: str | None, code: bool) -> Path:
    """The folder of a model: as given, or downloaded. Raises ModelError, HubError."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(
            f"{name} is a file: give the model's folder (with config.json and *.safetensors) or a hub name"
        )
    if isinstance(name, Path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ModelError(f"there is no folder {name}: give a model's folder (with config.json) or a hub name")
    from huggingface_hub import snapshot_download

    online = reachable()
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*HUB_FILES, *(["*.py"] if code else [])],
                ignore_patterns=list(HUB_LEAVE_OUT),
                local_files_only=not online,
            )
        )
    except Exception as error:
        if not online:
            raise HubError(
                f"the model {name!r} cannot be fetched: there is no such folder, and the hub cannot be reached; "
                "check the path or the network, or download the model and give its folder"
            ) from None
        raise HubError(
            f"the model {name!r} could not be fetched from the hub ({first_line(error)}): "
            "check its name and revision, and log in with `hf auth login` if it is gated"
        ) from error


def _whole(name: str | Path) -> str:
    """A folder's absolute path; a hub name is returned unchanged."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else str(name)


def _base_of(adapter: Path) -> str:
    """Folder or hub name of an adapter's base model; a relative folder may also be relative to the adapter's."""
    base = _json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"the adapter {adapter} does not name its base model: give the base as the model, and it as adapter"
        )
    relative = adapter / base
    return str(relative) if relative.is_dir() and not Path(base).is_dir() else str(base)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({first_line(error)}): give a complete model folder") from None
    return value if isinstance(value, dict) else {}


def check_folder(folder: Path, name: str, code: bool) -> None:
    if not (folder / "config.json").exists():
        raise ModelError(f"{name} has no config.json: give the folder of a model that transformers can load")
    if not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
            raise ModelError(
                f"{name} has its weights only as pickles, which can run code when they are loaded: if you trust them, convert "
                "them with model.save_pretrained(folder, safe_serialization=True), and give that folder"
            )
        raise ModelError(f"{name} has no *.safetensors: give a folder with the weights")
    config = _json(folder / "config.json")
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as BUILT_IN

    if config.get("auto_map") and not code and config.get("model_type") not in BUILT_IN:
        raise ModelError(
            f"{name} needs its own code ({config.get('model_type', 'no model type')} is not part of transformers): read it, "
            "and pass --trust-remote-code (trust_remote_code=True) to run it"
        )


def _check_adapter(folder: Path, name: str) -> None:
    if not (folder / ADAPTER_CONFIG).exists():
        raise ModelError(f"{name} has no {ADAPTER_CONFIG}: give the folder of a PEFT adapter")
    if not (folder / "adapter_model.safetensors").exists():
        raise ModelError(f"{name} has no adapter_model.safetensors: save the adapter with safe_serialization=True")


def tokenizer_of(folders: list[Path], name: str, code: bool) -> Any:
    """The adapter's tokenizer if it has one (it may hold the template of its training), else the model's."""
    from transformers import AutoTokenizer

    folder = next((f for f in folders if (f / "tokenizer_config.json").exists()), folders[-1])
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=code, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"the tokenizer of {name} cannot be loaded ({first_line(error)}): save it into the model's folder "
            "with tokenizer.save_pretrained(folder)"
        ) from error


def pretrained(auto: Any, folder: Path, name: str, kind: str, **options: Any) -> Any:
    """A model of an ``Auto`` class, in words a ``kind``. Raises ModelError if it does not load or lacks weights."""
    try:
        model, info = auto.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except Exception as error:
        raise ModelError(
            f"{name} cannot be loaded as a {kind} ({first_line(error)}): check that its files are complete, and that it is one"
        ) from error
    if missing := sorted(info.get("missing_keys", ())):
        # transformers fills these in at random, which would make every number meaningless.
        raise ModelError(
            f"{name} lacks {len(missing)} weights of a {kind} ({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}): "
            "give a complete one"
        )
    return model


def _add_adapter(model: Any, folder: Path, name: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise ModelError(f"{name} is a PEFT adapter, and peft is not installed: install gradshield[train]") from None
    try:
        return PeftModel.from_pretrained(model, str(folder), use_safetensors=True, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"the adapter {name} does not fit the model ({first_line(error)}): give the base model it was trained on"
        ) from error


def files_digest(folders: list[Path]) -> str:
    """SHA-256 over name and hash of each weight file, in order of their names."""
    digest = hashlib.sha256()
    for path in (path for folder in folders for path in sorted(folder.glob("*.safetensors"))):
        with path.open("rb") as handle:
            digest.update(f"{path.name} {hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


TIMEOUT_SECONDS = 5.0  # of a quick check: the hub's own client would retry for half a minute


def reachable() -> bool:
    """Whether the hub answers, within ``TIMEOUT_SECONDS``; proxies set in the environment are used."""
    import http.client
    import ssl
    import urllib.error
    import urllib.request

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return False
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError:
        return True  # any answer will do
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # reachable: the client has its own certificates
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


# ---- device, precision, memory ---------------------------------------------------------------------------------------


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
        from transformers import BitsAndBytesConfig

        if importlib.util.find_spec("bitsandbytes") is None:
            raise UsageError("--quantize needs bitsandbytes, which is not installed: install gradshield[quantized]")
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        found["quantization_config"] = BitsAndBytesConfig(**({"load_in_8bit": True} if quantize == "8bit" else four))
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
        for option in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)
            mallopt(option, 2**30)
