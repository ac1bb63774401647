// A CUDA device that PyTorch's CPU build believes in: one GPU, one stream, nothing behind it. Fake tensors need no more,
// since no kernel ever runs on them; autograd asks for the device's streams and events, and generators for a seed.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {

struct PretendedGuard final : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device device() { return Device(DeviceType::CUDA, 0); }
  static Stream stream() { return Stream(Stream::DEFAULT, device()); }
  Device exchangeDevice(Device) const override { return device(); }
  Device getDevice() const override { return device(); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, PretendedGuard);

}  // namespace c10::impl

namespace at {

struct PretendedGenerator final : CPUGeneratorImpl {
  PretendedGenerator() { device_ = c10::impl::PretendedGuard::device(); }
  void set_offset(uint64_t) override {}
};

struct CUDAHooks final : CUDAHooksInterface {  // PyTorch looks for this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  void init() const override {}
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  Generator getNewGenerator(DeviceIndex) const override { return make_generator<PretendedGenerator>(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

// Memory of the host, and operators that make their results without a value in them: enough for everything that the host
// does in a step to run, and to be timed.

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/native/TensorShape.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

namespace {

using at::Tensor;

struct PretendedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = malloc(bytes + 1);
    return {memory, memory, &free, c10::impl::PretendedGuard::device()};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void*, const void*, std::size_t) const override {}
} memory;

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CUDA);

c10::ScalarType type(c10::optional<c10::ScalarType> given) { return given.value_or(c10::ScalarType::Float); }

Tensor empty(c10::IntArrayRef size, c10::optional<c10::ScalarType> dtype, c10::optional<c10::Layout>,
             c10::optional<c10::Device>, c10::optional<bool>, c10::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, kKeys, type(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, c10::optional<c10::ScalarType> dtype,
                     c10::optional<c10::Layout>, c10::optional<c10::Device>, c10::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory, kKeys, type(dtype));
}

// Any other operator: its results as they are on the meta device.
void nothing(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  std::vector<std::pair<Tensor, Tensor>> given;
  auto without_data = [&](const Tensor& x) {
    if (!x.defined() || !x.is_cuda()) return x;
    given.emplace_back(x, at::empty_strided(x.sizes(), x.strides(), x.options().device(c10::kMeta)));
    return given.back().second;
  };
  auto with_memory = [&](const Tensor& x) {
    for (auto& [ours, meta] : given)
      if (meta.is_same(x)) return ours;
    return x.is_meta() ? at::empty_strided(x.sizes(), x.strides(), x.options().device(c10::kCUDA)) : x;
  };
  auto each = [](c10::IValue& value, auto change) {
    if (value.isTensor()) value = change(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& x : value.toTensorVector()) list.push_back(change(x));
      value = list;
    }
  };
  for (auto& value : torch::jit::last(stack, op.schema().arguments().size())) {
    each(const_cast<c10::IValue&>(value), without_data);
    if (value.isDevice()) const_cast<c10::IValue&>(value) = c10::Device(c10::kMeta);
  }
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), stack);
  for (auto& value : torch::jit::last(stack, op.schema().returns().size()))
    each(const_cast<c10::IValue&>(value), with_memory);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&nothing>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("copy_", [](Tensor& self, const Tensor&, bool) -> Tensor& { return self; });
}

}  // namespace
