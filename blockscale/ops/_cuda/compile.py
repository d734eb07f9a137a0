"""From CUDA C++ text to a loaded kernel: NVRTC, a cache of machine code on disk, and the driver.

NVRTC and `cuda.bindings` come with PyTorch's CUDA 13 wheels; no CUDA toolkit and no host compiler are needed.
Machine code is kept in the user's cache folder under a name that hashes everything it depends on (all source
text, the compiler's options and version), written under a temporary name and renamed, so that processes may
share the folder. Where nothing can be written, every process compiles for itself.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from blockscale.errors import BlockscaleError
from blockscale.paths import cache_folder, replace_file

ARCHITECTURE = "sm_90a"
_OPTIONS = (f"--gpu-architecture={ARCHITECTURE}", "--std=c++17", "--device-as-default-execution-space")
_FOLDER = Path(__file__).parent


@functools.cache
def source_text(name: str) -> str:
    """The text of a source file of this folder."""
    return (_FOLDER / name).read_text(encoding="utf-8")


def machine_code(main: str, headers: Mapping[str, str]) -> bytes:
    """The cubin of the source file `main`, which may include `headers` (name to text); cached on disk.

    Raises:
        BlockscaleError: the source does not compile, or there is no NVRTC.
    """
    path = cache_folder() / "cubin" / f"{_key(main, headers)}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    code, _ = compile_source(main, headers)
    with suppress(OSError):  # a cache that cannot be written costs the next process a second
        replace_file(path, code)
    return code


def compile_source(main: str, headers: Mapping[str, str]) -> tuple[bytes, str]:
    """(cubin, log of the compiler with registers and spills) of a source file; nothing is cached."""
    nvrtc = _bindings("nvrtc")
    texts = [text.encode() for text in headers.values()]
    names = [name.encode() for name in headers]
    program = _nvrtc(
        nvrtc.nvrtcCreateProgram(source_text(main).encode(), main.encode(), len(texts), texts, names)
    )
    try:
        options = [option.encode() for option in _OPTIONS]
        status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
        log = bytearray(_nvrtc(nvrtc.nvrtcGetProgramLogSize(program)))
        _nvrtc(nvrtc.nvrtcGetProgramLog(program, log))
        text = log.rstrip(b"\0").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise BlockscaleError(f"NVRTC cannot compile this kernel: {text}", where=main)
        code = bytearray(_nvrtc(nvrtc.nvrtcGetCUBINSize(program)))
        _nvrtc(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(code), text


def load_kernel(code: bytes, name: str, shared_bytes: int) -> Any:
    """The kernel `name` of a cubin in the current context, with `shared_bytes` of dynamic shared memory."""
    driver = _bindings("driver")
    module = check(driver.cuModuleLoadData(code))
    function = check(driver.cuModuleGetFunction(module, name.encode()))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    check(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return function


def check(result: tuple[Any, ...]) -> Any:
    """What a driver call returned besides its status.

    Raises:
        BlockscaleError: the status is not success.
    """
    if result[0] != 0:
        raise BlockscaleError(f"the CUDA driver reports {result[0].name}", where="blockscale CUDA kernels")
    return result[1] if len(result) == 2 else result[1:]


def _nvrtc(result: tuple[Any, ...]) -> Any:
    if result[0] != 0:
        raise BlockscaleError(f"NVRTC reports {result[0].name}", where="blockscale CUDA kernels")
    return result[1] if len(result) == 2 else result[1:]


@functools.cache
def _bindings(part: str) -> Any:
    try:
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        raise BlockscaleError(
            "the CUDA kernels need the package cuda-bindings",
            where="blockscale CUDA kernels",
            got=repr(error),
            remedy="pip install cuda-bindings nvidia-cuda-nvrtc, in the version of PyTorch's CUDA",
        ) from error
    return {"driver": driver, "nvrtc": nvrtc}[part]


def _key(main: str, headers: Mapping[str, str]) -> str:
    version = _nvrtc(_bindings("nvrtc").nvrtcVersion())
    parts = [main, source_text(main), *(text for item in sorted(headers.items()) for text in item)]
    return hashlib.sha256(repr((version, _OPTIONS, parts)).encode()).hexdigest()[:40]
