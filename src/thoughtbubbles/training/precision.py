"""Which precision a run computes in, where its recipe leaves that to the machine."""

import os

import torch

# oneDNN multiplies for torch; held back to one of these it has no instructions of bfloat16.
WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")


def device_type() -> str:
    """The type of device that a run trains on."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type


def choose_precision(asked: str, device: str) -> str:
    """`float32` or `bfloat16`: what a recipe asks for, where that is `auto` the faster one on a type of device."""
    if asked != "auto":
        return asked
    return "bfloat16" if has_bfloat16(device) else "float32"


def has_bfloat16(device: str) -> bool:
    """Whether this machine multiplies bfloat16 in hardware; elsewhere it is emulated, many times slower than float32.

    Of a processor the capabilities count that torch and oneDNN are let use: `ATEN_CPU_CAPABILITY` and
    `ONEDNN_MAX_CPU_ISA` may hold them back.
    """
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and torch.backends.mkldnn.is_available() and _processor_has_bfloat16()


def _processor_has_bfloat16() -> bool:
    found = torch.cpu.get_capabilities()
    if found.get("bf16"):  # the extension of ARM
        return True
    most = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    if most.upper() in WITHOUT_BFLOAT16 or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
