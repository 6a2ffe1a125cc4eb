#include "runtime/error.h"
#include "runtime/moe/quantized_cuda.h"

namespace lighter::quantized_cuda {
namespace {

[[noreturn]] void absent() {
  throw ConfigError("this build has no CUDA; build with ./bootstrap.sh build --cuda");
}

}  // namespace

void prepare(Device&, SliceShape, SliceEncoding, std::span<const RowRange>, int, RoutedInput&) {
  absent();
}

void accumulate(Device&, SliceShape, SliceEncoding, int, std::span<const std::byte* const>,
                const RoutedInput&, RowRange) {
  absent();
}

void finish(const RoutedInput&, RowRange) {
  absent();
}

}  // namespace lighter::quantized_cuda
