"""Whether Vulkan, which WebGPU stands on under Linux, has nothing but processors to compute on."""

from __future__ import annotations

import ctypes
import functools
import sys

# Of VkStructureType, VkPhysicalDeviceType and VkPhysicalDeviceProperties in Vulkan 1.0.
_INSTANCE_CREATE_INFO = 1
_INFO_BYTES = 64
_CPU = 4
_TYPE_AT, _NAME_AT, _NAME_BYTES, _PROPERTIES_BYTES = 16, 20, 256, 4096
_MOST = 16


@functools.cache
def software_device() -> str:
    """The name of the device that stands for a graphics card, if all there are run on processors; else empty.

    A driver such as SwiftShader or llvmpipe is a device of the type CPU.
    """
    kinds = _devices()
    return next(iter(kinds))[1] if kinds and all(kind == _CPU for kind, _ in kinds) else ""


def _devices() -> list[tuple[int, str]]:
    """Type and name of every device; none where Vulkan is not there."""
    try:
        vulkan = ctypes.CDLL("libvulkan.so.1") if sys.platform == "linux" else None
    except OSError:
        vulkan = None
    if vulkan is None:
        return []
    info = (ctypes.c_uint32 * (_INFO_BYTES // 4))(_INSTANCE_CREATE_INFO)
    instance = ctypes.c_void_p()
    if vulkan.vkCreateInstance(ctypes.byref(info), None, ctypes.byref(instance)):
        return []
    try:
        count, devices = ctypes.c_uint32(_MOST), (ctypes.c_void_p * _MOST)()
        vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), devices)
        return [_properties(vulkan, device) for device in devices[: count.value]]
    finally:
        vulkan.vkDestroyInstance(instance, None)


def _properties(vulkan: ctypes.CDLL, device: int | None) -> tuple[int, str]:
    told = ctypes.create_string_buffer(_PROPERTIES_BYTES)
    vulkan.vkGetPhysicalDeviceProperties(ctypes.c_void_p(device), told)
    kind = int.from_bytes(told.raw[_TYPE_AT : _TYPE_AT + 4], sys.byteorder)
    name = told.raw[_NAME_AT : _NAME_AT + _NAME_BYTES].split(b"\0")[0]
    return kind, name.decode(errors="replace")
