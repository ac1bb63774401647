"""Triton and inductor on the GPU that is not there (`pretended_cuda`): kernels are compiled for it and launched, by all
the code of the host that does so on a real one; the launch itself does nothing.

Call `pretend_launches` after `pretended_cuda.pretend`. Results are memory that nobody wrote.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

PROPERTIES = SimpleNamespace(
    name="a pretended H100",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    gcnArchName="sm_90",
)


def pretend_launches() -> None:
    """For the rest of this process."""
    import torch
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    for name, value in {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "mem_get_info": lambda device=None: (PROPERTIES.total_memory, PROPERTIES.total_memory),
    }.items():
        setattr(torch.cuda, name, value)
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]
    torch._C._dynamo.guards._empty_strided_cuda = _empty_strided  # type: ignore[attr-defined]
    for owner in (CudaInterface, CudaInterface.Worker):
        for name, value in {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "exchange_device": lambda device: 0,
            "maybe_exchange_device": lambda device: 0,
            "get_device_properties": lambda device=None: PROPERTIES,
            "get_compute_capability": lambda device=None: 90,
            "get_raw_stream": lambda device: 0,
            "synchronize": lambda device=None: None,
            "is_bf16_supported": lambda *args, **kwargs: True,
            "is_triton_capable": lambda device=None: True,
            "raise_if_triton_unavailable": lambda device=None: None,
        }.items():
            setattr(owner, name, staticmethod(value))
    config.compile_threads = 1
    config.joint_graph_constant_folding = False  # would read values
    config.shape_padding = False  # would time products
    for name in ("use_static_triton_launcher", "use_static_cuda_launcher"):
        if hasattr(config, name):
            setattr(config, name, False)
    import triton

    triton.runtime.driver.set_active(_Driver())
    triton_heuristics.CachingAutotuner.bench = lambda self, launcher, *args, **kwargs: 1.0  # all choices are as fast
    triton_helpers.set_driver_to_gpu = lambda: None


def _empty_strided(size: Any, stride: Any, dtype: Any) -> Any:
    import torch

    return torch.empty_strided(size, stride, dtype=dtype, device="cuda")


class _Driver:
    """As much of Triton's driver as its own launcher and inductor ask for."""

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (0, 0, 32, 0, 1024),
            get_device_properties=lambda device: {
                "max_shared_mem": PROPERTIES.shared_memory_per_block_optin,
                "multiprocessor_count": PROPERTIES.multi_processor_count,
                "warpSize": PROPERTIES.warp_size,
                "max_num_regs": PROPERTIES.regs_per_multiprocessor,
            },
            unload_module=lambda module: None,
        )
        self.launcher_cls = _Launcher

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        import torch

        return torch.cuda

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cuda", 0)

    def is_active(self) -> bool:
        return True


class _Launcher:
    """Counts launches and does nothing."""

    launched = 0

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        _Launcher.launched += 1


def launched() -> int:
    """Kernels, since the process began."""
    return _Launcher.launched


def compile_nothing() -> None:
    """For the rest of this process, inductor writes its kernels and does not compile them."""
    from torch._inductor.async_compile import AsyncCompile

    AsyncCompile.triton = lambda self, name, source, device_str: _Written()  # type: ignore[method-assign]


class _Written:
    def run(self, *arguments: Any, **options: Any) -> None:
        _Launcher.launched += 1
