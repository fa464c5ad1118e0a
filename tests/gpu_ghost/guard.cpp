// A CUDA device for a PyTorch without CUDA: every call of its guard and hooks does nothing and says device 0.
// Autograd and autocast ask for it before they run an operation of a tensor that says cuda:0.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_set>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device kDevice(DeviceType::CUDA, 0);
Stream only_stream() { return Stream(Stream::DEFAULT, kDevice); }

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return kDevice; }
  Device exchangeDevice(Device) const override { return kDevice; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Stream getStream(Device) const noexcept override { return only_stream(); }
  Stream getDefaultStream(Device) const override { return only_stream(); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return only_stream(); }
  Stream exchangeStream(Stream) const noexcept override { return only_stream(); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};

// Memory that says it is page-locked.
struct Pinned final : c10::Allocator {
  std::unordered_set<const void*> blocks;
  std::mutex lock;
  c10::DataPtr allocate(size_t size) override {
    void* data = std::malloc(size ? size : 1);
    std::lock_guard<std::mutex> guard(lock);
    blocks.insert(data);
    return {data, data, &Pinned::release, Device(DeviceType::CPU)};
  }
  static void release(void* data);
  c10::DeleterFnPtr raw_deleter() const override { return &Pinned::release; }
  void copy_data(void* to, const void* from, std::size_t size) const override { std::memcpy(to, from, size); }
  bool has(const void* data) {
    std::lock_guard<std::mutex> guard(lock);
    return blocks.count(data) > 0;
  }
};

Pinned pinned;

void Pinned::release(void* data) {
  std::lock_guard<std::mutex> guard(pinned.lock);
  pinned.blocks.erase(data);
  std::free(data);
}

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  bool isPinnedPtr(const void* data) const override { return pinned.has(data); }
};

using at::CUDAHooks;
REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at
