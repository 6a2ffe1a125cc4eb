// Checks the quantized-slice kernels against a double-precision reference on fresh random inputs, then times
// them over more than 1 GB of slices. Stands alone (no libtorch, no test framework): exit status 1 if a check
// fails. Arguments: "check", "small" (checks of a tiny shape, for a memory checker), "time" with an
// optional number of tokens, or none for all.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "runtime/kernels/quant_slice.h"

namespace {

using namespace lighter::kernels;

void must(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(2);
}

int failures = 0;

void expect(bool good, const std::string& what) {
  if (good) return;
  if (++failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

const char* name(Encoding e) {
  return e == Encoding::int8 ? "int8" : "int4";
}

// Device memory between two guards, all of it poisoned with bytes that read as NaN.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    must(cudaMalloc(&base_, bytes + 2 * guard), "cudaMalloc");
    poison();
  }
  ~Buffer() { cudaFree(base_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <typename T = void>
  T* get() const {
    return reinterpret_cast<T*>(base_ + guard);
  }
  void poison() { must(cudaMemset(base_, 0xff, bytes_ + 2 * guard), "poison"); }
  void put(const void* from, size_t bytes) {
    must(cudaMemcpy(get(), from, bytes, cudaMemcpyHostToDevice), "put");
  }
  template <typename T>
  std::vector<T> read(size_t offset, size_t count) const {
    std::vector<T> values(count);
    must(cudaMemcpy(values.data(), base_ + guard + offset, count * sizeof(T), cudaMemcpyDeviceToHost),
         "read");
    return values;
  }
  bool intact() const {
    std::vector<unsigned char> bytes(2 * guard);
    must(cudaMemcpy(bytes.data(), base_, guard, cudaMemcpyDeviceToHost), "guard");
    must(cudaMemcpy(bytes.data() + guard, base_ + guard + bytes_, guard, cudaMemcpyDeviceToHost), "guard");
    return std::all_of(bytes.begin(), bytes.end(), [](unsigned char b) { return b == 0xff; });
  }

 private:
  static constexpr size_t guard = 4096;
  char* base_ = nullptr;
  size_t bytes_;
};

template <typename T>
bool same_bits(const T* a, const T* b, size_t count) {
  return std::memcmp(a, b, count * sizeof(T)) == 0;
}

struct HostSlice {
  std::vector<unsigned char> bytes;
  // Logical values, gate | up | down, and for each group its scale and minimum.
  std::vector<int8_t> q;
  std::vector<float> scale, minimum;
};

HostSlice random_slice(Encoding e, QuantSliceShape s, std::mt19937& random) {
  const size_t elements = s.hidden * s.width, group = group_size(e), groups = elements / group;
  HostSlice slice;
  slice.bytes.resize(quant_slice_bytes(e, s));
  slice.q.resize(3 * elements);
  std::uniform_real_distribution<float> scale(0.5f, 1.5f);
  const float unit = e == Encoding::int8 ? 0.0003f : 0.004f;
  for (size_t i = 0; i < 3 * groups; ++i) {
    const __half half = __float2half(unit * scale(random));
    const __half low = __float2half(-unit * 7.5f * scale(random));
    slice.scale.push_back(__half2float(half));
    slice.minimum.push_back(e == Encoding::int4 ? __half2float(low) : 0.0f);
    const size_t q_bytes = e == Encoding::int8 ? 3 * elements : 3 * elements / 2;
    std::memcpy(&slice.bytes[q_bytes + i * 2], &half, 2);
    if (e == Encoding::int4) std::memcpy(&slice.bytes[q_bytes + (3 * groups + i) * 2], &low, 2);
  }
  for (size_t i = 0; i < 3 * elements; ++i) {
    const uint32_t bits = random() >> 8;
    slice.q[i] = static_cast<int8_t>(e == Encoding::int8 ? static_cast<int>(bits % 255) - 127 : bits % 16);
    if (e == Encoding::int8) {
      slice.bytes[i] = static_cast<unsigned char>(slice.q[i]);
    } else {
      const size_t in_group = i % 64;
      slice.bytes[i / 64 * 32 + in_group % 32] |=
          static_cast<unsigned char>(slice.q[i] << (in_group / 32 * 4));
    }
  }
  return slice;
}

struct HostActivations {
  std::vector<int8_t> q;
  std::vector<float> scales, sums;
};

HostActivations quantize(Encoding e, const std::vector<float>& x) {
  const size_t group = group_size(e);
  HostActivations a;
  a.q.resize(x.size());
  for (size_t g = 0; g < x.size() / group; ++g) {
    float most = 0;
    for (size_t i = 0; i < group; ++i) most = std::max(most, std::fabs(x[g * group + i]));
    const float unit = most / 127.0f;
    int total = 0;
    for (size_t i = g * group; i < (g + 1) * group; ++i) {
      a.q[i] = static_cast<int8_t>(unit == 0 ? 0 : std::nearbyint(x[i] / unit));
      total += a.q[i];
    }
    a.scales.push_back(unit);
    a.sums.push_back(unit * static_cast<float>(total));
  }
  return a;
}

// Row `row` (counted from the first gate row in units of `length`) of a matrix times one token, in double.
double dot(Encoding e, const HostSlice& s, size_t first, size_t length, const int8_t* q,
           const float* scales) {
  const size_t group = group_size(e);
  double sum = 0;
  for (size_t g = 0; g < length / group; ++g) {
    int products = 0, total = 0;
    for (size_t i = g * group; i < (g + 1) * group; ++i) {
      products += s.q[first + i] * q[i];
      total += q[i];
    }
    const size_t at = first / group + g;
    sum += static_cast<double>(scales[g]) *
           (static_cast<double>(s.scale[at]) * products + static_cast<double>(s.minimum[at]) * total);
  }
  return sum;
}

// The largest |difference| over the root mean square of the reference.
double error_of(const std::vector<float>& values, const std::vector<double>& reference) {
  double square = 0, most = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    square += reference[i] * reference[i];
    const double difference = std::fabs(values[i] - reference[i]);
    if (!(difference <= most)) most = difference;
  }
  return most / std::sqrt(square / static_cast<double>(values.size()));
}

void check_shape(Encoding e, QuantSliceShape s, const std::vector<int>& counts, unsigned seed) {
  std::mt19937 random(seed);
  const int most = counts.back(), tokens = max_tokens;
  const size_t H = s.hidden, W = s.width, group = group_size(e), bytes = quant_slice_bytes(e, s);
  const std::string where = std::string(name(e)) + " " + std::to_string(H) + "x" + std::to_string(W) + ": ";

  std::vector<HostSlice> slices;
  Buffer weights(most * bytes);
  std::vector<const void*> pointers, in_host;
  void* pinned = nullptr;
  must(cudaHostAlloc(&pinned, most * bytes, cudaHostAllocMapped), "pinned");
  for (int i = 0; i < most; ++i) {
    slices.push_back(random_slice(e, s, random));
    std::memcpy(static_cast<char*>(pinned) + i * bytes, slices[i].bytes.data(), bytes);
    pointers.push_back(weights.get<char>() + i * bytes);
    in_host.push_back(static_cast<char*>(pinned) + i * bytes);
  }
  weights.put(pinned, most * bytes);
  Buffer table(most * sizeof(void*));
  table.put(pointers.data(), most * sizeof(void*));

  // Activations, from bf16 and from fp32.
  std::normal_distribution<float> normal;
  std::vector<float> x(tokens * H);
  std::vector<__nv_bfloat16> x16(tokens * H);
  for (size_t i = 0; i < x.size(); ++i) {
    x16[i] = __float2bfloat16(i / group == 1 ? 0.0f : normal(random));
    x[i] = __bfloat162float(x16[i]);
  }
  const HostActivations expected = quantize(e, x);
  Buffer x_device(x.size() * 4), x16_device(x.size() * 2), q(x.size()), scales(x.size() / group * 4),
      sums(x.size() / group * 4);
  x_device.put(x.data(), x.size() * 4);
  x16_device.put(x16.data(), x.size() * 2);
  const QuantizedActivations a{q.get<int8_t>(), scales.get<float>(), sums.get<float>()};
  for (const ActivationType type : {ActivationType::fp32, ActivationType::bf16}) {
    for (Buffer* b : {&q, &scales, &sums}) b->poison();
    quantize_activations(e, type, tokens, s.hidden,
                         type == ActivationType::fp32 ? x_device.get() : x16_device.get(), a, nullptr);
    must(cudaDeviceSynchronize(), "quantize");
    const size_t groups = x.size() / group;
    expect(same_bits(q.read<int8_t>(0, x.size()).data(), expected.q.data(), x.size()), where + "activations");
    expect(same_bits(scales.read<float>(0, groups).data(), expected.scales.data(), groups), where + "scales");
    if (e == Encoding::int4) {
      expect(same_bits(sums.read<float>(0, groups).data(), expected.sums.data(), groups), where + "sums");
    }
  }

  Buffer workspace(workspace_bytes(e, s, most, tokens)), sum(tokens * H * 4);
  std::vector<float> before(tokens * H);
  for (float& v : before) v = normal(random);
  auto run = [&](const std::vector<const void*>& list, bool on_device, int n, bool one_by_one) {
    sum.poison();
    sum.put(before.data(), n * H * 4);
    if (one_by_one) {
      for (const void* slice : list)
        slices_forward(e, s, {&slice, nullptr, 1}, n, a, workspace.get(), sum.get<float>(), nullptr);
    } else {
      SliceList all{list.data(), nullptr, static_cast<int>(list.size())};
      if (on_device) all = {nullptr, table.get<const void*>(), static_cast<int>(list.size())};
      slices_forward(e, s, all, n, a, workspace.get(), sum.get<float>(), nullptr);
    }
    must(cudaDeviceSynchronize(), "forward");
    expect(sum.intact() && workspace.intact(), where + "wrote outside its buffers");
    if (n < tokens) {
      const auto rest = sum.read<unsigned>(n * H * 4, (tokens - n) * H);
      expect(std::all_of(rest.begin(), rest.end(), [](unsigned v) { return v == ~0u; }),
             where + "extra tokens");
    }
    return sum.read<float>(0, n * H);
  };

  // The hidden values of all slices and tokens against the reference, and their quantization bit for bit.
  // Read back from two calls, since calls for very many tokens of a large model are split inside.
  const size_t values = static_cast<size_t>(most) * tokens * W;
  std::vector<float> h(values), h_scales(values / group), h_sums(values / group);
  std::vector<int8_t> h_q(values);
  constexpr int half = max_tokens / 2;
  const WorkspaceLayout layout = workspace_layout(e, s, most, half);
  for (int first = 0; first < tokens; first += half) {
    const size_t skip = first * H;
    const QuantizedActivations part{a.q + skip, a.scales + skip / group, a.sums + skip / group};
    sum.put(before.data(), half * H * 4);
    slices_forward(e, s, {pointers.data(), nullptr, most}, half, part, workspace.get(), sum.get<float>(),
                   nullptr);
    must(cudaDeviceSynchronize(), "forward");
    auto collect = [&](auto& to, size_t offset, size_t unit) {
      using T = std::remove_reference_t<decltype(to[0])>;
      const size_t run = half * W / unit;
      const auto from = workspace.read<T>(offset, most * run);
      for (int i = 0; i < most; ++i) {
        std::copy_n(from.begin() + i * run, run, to.begin() + (i * tokens + first) * W / unit);
      }
    };
    collect(h, layout.hidden_values, 1);
    collect(h_q, layout.q, 1);
    collect(h_scales, layout.scales, group);
    if (e == Encoding::int4) collect(h_sums, layout.sums, group);
  }
  std::vector<double> h_reference(values);
  for (int i = 0; i < most; ++i) {
    for (int t = 0; t < tokens; ++t) {
      for (size_t r = 0; r < W; ++r) {
        const int8_t* xq = &expected.q[t * H];
        const float* xs = &expected.scales[t * (H / group)];
        const double gate = dot(e, slices[i], r * H, H, xq, xs),
                     up = dot(e, slices[i], (W + r) * H, H, xq, xs);
        h_reference[(static_cast<size_t>(i) * tokens + t) * W + r] = gate / (1 + std::exp(-gate)) * up;
      }
    }
  }
  const double h_error = error_of(h, h_reference);
  expect(h_error <= 1e-5, where + "hidden values");
  const HostActivations hq = quantize(e, h);
  expect(same_bits(h_q.data(), hq.q.data(), values), where + "hidden q");
  expect(same_bits(h_scales.data(), hq.scales.data(), values / group), where + "hidden scales");
  if (e == Encoding::int4)
    expect(same_bits(h_sums.data(), hq.sums.data(), values / group), where + "hidden sums");

  // The sums, count by count, continuing the reference from one count to the next.
  std::vector<double> reference(before.begin(), before.end());
  double error = 0;
  int added = 0;
  for (const int count : counts) {
    for (; added < count; ++added) {
      for (int t = 0; t < tokens; ++t) {
        const size_t token = static_cast<size_t>(added) * tokens + t;
        for (size_t r = 0; r < H; ++r) {
          reference[t * H + r] +=
              dot(e, slices[added], 2 * W * H + r * W, W, &hq.q[token * W], &hq.scales[token * (W / group)]);
        }
      }
    }
    const std::vector<const void*> list(pointers.begin(), pointers.begin() + count);
    const auto base = run(list, false, tokens, false);
    error = std::max(error, error_of(base, reference));
    for (const int n : {1, 2, 3, 5, 8, 9, 16}) {
      const std::string what = where + std::to_string(count) + " slices, " + std::to_string(n) + " tokens, ";
      for (int again = 0; again < 3; ++again) {
        expect(same_bits(run(list, again == 1, n, false).data(), base.data(), n * H), what + "all at once");
      }
      expect(same_bits(run(list, false, n, true).data(), base.data(), n * H), what + "one at a time");
    }
    const std::vector<const void*> host_list(in_host.begin(), in_host.begin() + count);
    expect(same_bits(run(host_list, false, 3, false).data(), base.data(), 3 * H), where + "in pinned memory");
    auto holes = list;
    holes.insert(holes.begin() + count / 2, nullptr);
    if (count < most)
      expect(same_bits(run(holes, false, 2, false).data(), base.data(), 2 * H), where + "null entry");
  }
  expect(error <= 1e-5, where + "sum");

  Buffer gate_up(2 * W * H * 2), down(W * H * 2);
  dequantize_slice(e, s, pointers[0], gate_up.get(), down.get(), nullptr);
  must(cudaDeviceSynchronize(), "dequantize");
  auto dense = gate_up.read<__nv_bfloat16>(0, 2 * W * H);
  const auto down_values = down.read<__nv_bfloat16>(0, W * H);
  dense.insert(dense.end(), down_values.begin(), down_values.end());
  size_t wrong = 0;
  for (size_t i = 0; i < dense.size(); ++i) {
    const float value = std::fma(slices[0].scale[i / group], static_cast<float>(slices[0].q[i]),
                                 slices[0].minimum[i / group]);
    wrong += __bfloat162float(dense[i]) != __bfloat162float(__float2bfloat16(value));
  }
  expect(wrong == 0 && gate_up.intact() && down.intact(), where + "dequantize");
  std::printf("%s hidden error %.1e, sum error %.1e, failures so far %d\n", where.c_str(), h_error, error,
              failures);
  must(cudaFreeHost(pinned), "free");
}

__global__ void fill(uint4* to, size_t count, unsigned mask, unsigned set) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    unsigned v = static_cast<unsigned>(i) * 2654435761u + 12345u, w[4];
    for (unsigned& word : w) {
      v ^= v << 13, v ^= v >> 17, v ^= v << 5;
      word = (v & mask) | set;
    }
    to[i] = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

// The read rate to compare with: every byte once, eight 16-byte loads in flight a thread.
__global__ void __launch_bounds__(512) read_all(const uint4* from, size_t count, unsigned* out) {
  unsigned sum = 0;
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x;
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < count; i += 8 * stride) {
    uint4 v[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = i + k * stride < count ? __ldcs(from + i + k * stride) : uint4{};
#pragma unroll
    for (int k = 0; k < 8; ++k) sum += v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  if (sum == 0x12345678) *out = sum;
}

// Median time of one replay of what `enqueue` puts on the stream.
template <typename Enqueue>
double time_us(cudaStream_t stream, int repeats, const Enqueue& enqueue) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  enqueue();
  must(cudaStreamEndCapture(stream, &graph), "end of capture");
  must(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin), "event");
  must(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i < repeats + 3; ++i) {
    must(cudaEventRecord(begin, stream), "record");
    must(cudaGraphLaunch(exec, stream), "launch");
    must(cudaEventRecord(end, stream), "record");
    must(cudaEventSynchronize(end), "synchronize");
    float ms = 0;
    must(cudaEventElapsedTime(&ms, begin, end), "elapsed");
    if (i >= 3) times.push_back(ms * 1000);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

// only_tokens: 0 for all cases.
void time_encoding(Encoding e, int only_tokens, cudaStream_t stream) {
  const QuantSliceShape s{5120, 256};
  const size_t bytes = quant_slice_bytes(e, s), H = s.hidden;
  const int total = static_cast<int>((size_t{2} << 30) / bytes / 32 * 32);
  Buffer weights(total * bytes), x(max_tokens * H * 2), q(max_tokens * H), scales(max_tokens * H / 64 * 4),
      sums(max_tokens * H / 64 * 4), workspace(workspace_bytes(e, s, 32, max_tokens)),
      sum(max_tokens * H * 4), gate_up(2 * H * 256 * 2), down(H * 256 * 2);
  fill<<<1024, 256, 0, stream>>>(weights.get<uint4>(), total * bytes / 16, ~0u, 0);
  const size_t q_bytes = 3 * H * 256 / (e == Encoding::int8 ? 1 : 2);
  for (int i = 0; i < total; ++i) {
    fill<<<32, 256, 0, stream>>>(reinterpret_cast<uint4*>(weights.get<char>() + i * bytes + q_bytes),
                                 (bytes - q_bytes) / 16, 0x83ff83ffu, 0x0c000c00u);
  }
  fill<<<64, 256, 0, stream>>>(x.get<uint4>(), max_tokens * H / 8, 0x807f807fu, 0x3f003f00u);
  must(cudaMemset(sum.get(), 0, max_tokens * H * 4), "memset");
  const QuantizedActivations a{q.get<int8_t>(), scales.get<float>(), sums.get<float>()};
  auto slice = [&](int i) { return static_cast<const void*>(weights.get<char>() + i % total * bytes); };
  const double all = static_cast<double>(total) * bytes;
  const double read =
      all / 1e3 / time_us(stream, 9, [&] {
        read_all<<<132 * 4, 512, 0, stream>>>(weights.get<uint4>(), total * bytes / 16, sum.get<unsigned>());
      });
  std::printf("%s: plain read of %.2f GB: %.0f GB/s\n", name(e), all / 1e9, read);
  for (const auto& [count, tokens] :
       {std::pair{32, 1}, {32, 2}, {32, 4}, {32, 8}, {32, 16}, {7, 1}, {1, 1}, {32, 1}}) {
    quantize_activations(e, ActivationType::bf16, max_tokens, s.hidden, x.get(), a, stream);
    if (only_tokens != 0 && (tokens != only_tokens || count != 32)) continue;
    const int calls = total / 32;
    const double us = time_us(stream, 9,
                              [&, count = count, tokens = tokens] {
                                for (int call = 0; call < calls; ++call) {
                                  std::vector<const void*> list;
                                  for (int i = 0; i < count; ++i) list.push_back(slice(call * 32 + i));
                                  slices_forward(e, s, {list.data(), nullptr, count}, tokens, a,
                                                 workspace.get(), sum.get<float>(), stream);
                                }
                              }) /
                      calls;
    const double rate = static_cast<double>(count) * bytes / 1e3 / us;
    std::printf("%s %2d slices %2d tokens: %7.2f us a call, %5.0f GB/s, %.1f %% of plain read\n", name(e),
                count, tokens, us, rate, 100 * rate / read);
  }
  const double us = time_us(stream, 9,
                            [&] {
                              for (int i = 0; i < total; ++i)
                                dequantize_slice(e, s, slice(i), gate_up.get(), down.get(), stream);
                            }) /
                    total;
  std::printf("%s dequantize: %.2f us a slice\n", name(e), us);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "all";
  const unsigned seed = std::random_device{}();
  if (what != "time") {
    std::printf("seed %u\n", seed);
    for (const Encoding e : {Encoding::int8, Encoding::int4}) {
      check_shape(e, {128, 256}, {1, 2, 9}, seed);
      if (what == "small") continue;
      check_shape(e, {384, 512}, {1, 7, 33}, seed + 1);
      check_shape(e, {8192, 1024}, {3}, seed + 2);
      check_shape(e, {5120, 256}, {1, 7, 32}, seed + 3);
    }
    std::printf("%s\n", failures == 0 ? "all checks passed" : "CHECKS FAILED");
  }
  if (what != "check" && what != "small") {
    cudaStream_t stream;
    must(cudaStreamCreate(&stream), "stream");
    for (const Encoding e : {Encoding::int8, Encoding::int4})
      time_encoding(e, argc > 2 ? std::atoi(argv[2]) : 0, stream);
    must(cudaStreamSynchronize(stream), "end");
    cudaStreamDestroy(stream);
  }
  return failures == 0 ? 0 : 1;
}
