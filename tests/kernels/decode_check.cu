// Checks the decode kernels against double precision on fresh random inputs, and times them. Needs a GPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "runtime/kernels/decode.h"
#include "runtime/kernels/decode_attention.h"
#include "tests/kernels/check_cuda.h"

using namespace lighter::kernels;

namespace {

int failures = 0;

std::mt19937 engine(std::random_device{}());

template <typename T>
T* to_device(const std::vector<T>& values) {
  T* memory = nullptr;
  check(cudaMalloc(&memory, values.size() * sizeof(T)));
  check(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return memory;
}

template <typename T>
T* device_zeros(size_t count) {
  T* memory = nullptr;
  check(cudaMalloc(&memory, count * sizeof(T)));
  check(cudaMemset(memory, 0, count * sizeof(T)));
  return memory;
}

template <typename T>
std::vector<T> to_host(const T* memory, size_t count) {
  std::vector<T> values(count);
  check(cudaMemcpy(values.data(), memory, count * sizeof(T), cudaMemcpyDeviceToHost));
  return values;
}

std::vector<float> normal(size_t count, float scale) {
  std::normal_distribution<float> distribution(0, scale);
  std::vector<float> values(count);
  for (float& value : values) value = distribution(engine);
  return values;
}

int group_of(WeightFormat f) {
  return f == WeightFormat::int8 ? 128 : 64;
}
const char* name_of(WeightFormat f) {
  return f == WeightFormat::bf16 ? "bf16" : f == WeightFormat::int8 ? "int8" : "int4";
}

// A random matrix as it is stored, and its values.
struct Matrix {
  std::vector<std::byte> weights, scales, minimums;
  std::vector<double> values;
};

Matrix random_matrix(WeightFormat f, int64_t rows, int64_t columns) {
  Matrix m;
  const int64_t count = rows * columns;
  m.values.resize(count);
  std::uniform_int_distribution<int> bits(0, 255);
  const float unit = 1.0f / std::sqrt(static_cast<float>(columns));
  if (f == WeightFormat::bf16) {
    m.weights.resize(count * 2);
    for (int64_t i = 0; i < count; ++i) {
      const __nv_bfloat16 w = __float2bfloat16_rn((bits(engine) - 127.5f) / 74 * unit);
      reinterpret_cast<__nv_bfloat16*>(m.weights.data())[i] = w;
      m.values[i] = __bfloat162float(w);
    }
    return m;
  }
  const int group = group_of(f);
  m.scales.resize(count / group * 2);
  auto* const scales = reinterpret_cast<__half*>(m.scales.data());
  std::uniform_real_distribution<float> spread(0.5f, 1.5f);
  for (int64_t g = 0; g < count / group; ++g) {
    scales[g] = __float2half_rn(spread(engine) * unit / (f == WeightFormat::int8 ? 74 : 4.6f));
  }
  if (f == WeightFormat::int8) {
    m.weights.resize(count);
    for (int64_t i = 0; i < count; ++i) {
      const int q = bits(engine) % 255 - 127;
      m.weights[i] = static_cast<std::byte>(q);
      m.values[i] = q * static_cast<double>(__half2float(scales[i / group]));
    }
    return m;
  }
  m.weights.resize(count / 2);
  m.minimums.resize(m.scales.size());
  auto* const minimums = reinterpret_cast<__half*>(m.minimums.data());
  for (int64_t g = 0; g < count / group; ++g) {
    minimums[g] = __float2half_rn(-__half2float(scales[g]) * 7.5f * spread(engine));
    for (int j = 0; j < 32; ++j) {
      const int byte = bits(engine);
      m.weights[g * 32 + j] = static_cast<std::byte>(byte);
      m.values[g * 64 + j] = __half2float(scales[g]) * (byte & 15) + __half2float(minimums[g]);
      m.values[g * 64 + 32 + j] = __half2float(scales[g]) * (byte >> 4) + __half2float(minimums[g]);
    }
  }
  return m;
}

// What the kernels make of activations: quantized for quantized weights, else rounded to bf16.
std::vector<double> as_seen(WeightFormat f, const std::vector<float>& x) {
  std::vector<double> seen(x.size());
  if (f == WeightFormat::bf16) {
    for (size_t i = 0; i < x.size(); ++i) seen[i] = __bfloat162float(__float2bfloat16_rn(x[i]));
    return seen;
  }
  const size_t group = group_of(f);
  for (size_t g = 0; g < x.size() / group; ++g) {
    float most = 0;
    for (size_t i = 0; i < group; ++i) most = std::max(most, std::fabs(x[g * group + i]));
    const float scale = most / 127.0f;
    for (size_t i = 0; i < group; ++i) {
      seen[g * group + i] = scale == 0 ? 0 : static_cast<double>(scale) * std::rint(x[g * group + i] / scale);
    }
  }
  return seen;
}

std::vector<double> times(const Matrix& m, int64_t rows, int64_t columns, const std::vector<double>& x) {
  std::vector<double> y(rows);
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t c = 0; c < columns; ++c) sum += m.values[r * columns + c] * x[c];
    y[r] = sum;
  }
  return y;
}

double norm_factor(const std::vector<float>& x, double eps) {
  double squares = 0;
  for (const float value : x) squares += static_cast<double>(value) * value;
  return 1 / std::sqrt(squares / static_cast<double>(x.size()) + eps);
}

// weight: bf16.
std::vector<float> normed(const std::vector<float>& x, const std::vector<__nv_bfloat16>& weight, double eps) {
  const double factor = norm_factor(x, eps);
  std::vector<float> y(x.size());
  for (size_t i = 0; i < x.size(); ++i)
    y[i] = static_cast<float>(x[i] * factor * __bfloat162float(weight[i]));
  return y;
}

// What the kernels make of it: the factor comes after the rounding.
std::vector<double> normed_as_seen(WeightFormat f, const std::vector<float>& x,
                                   const std::vector<__nv_bfloat16>& weight, double eps) {
  std::vector<float> y(x.size());
  for (size_t i = 0; i < x.size(); ++i) y[i] = x[i] * __bfloat162float(weight[i]);
  std::vector<double> seen = as_seen(f, y);
  const double factor = norm_factor(x, eps);
  for (double& value : seen) value *= factor;
  return seen;
}

std::vector<__nv_bfloat16> norm_weight(size_t count) {
  std::vector<__nv_bfloat16> weight(count);
  for (auto& value : weight) value = __float2bfloat16_rn(1 + normal(1, 0.1f)[0]);
  return weight;
}

void expect(const char* what, WeightFormat f, const std::vector<float>& got,
            const std::vector<double>& wanted, double tolerance) {
  double most = 0, error = 0;
  for (size_t i = 0; i < wanted.size(); ++i) {
    most = std::max(most, std::fabs(wanted[i]));
    const double e = std::fabs(got[i] - wanted[i]);
    error = std::max(error, std::isnan(e) ? 1e30 : e);
  }
  const bool good = error <= tolerance * most;
  failures += !good;
  std::printf("%-34s %s  error %.2e of %.2e%s\n", what, name_of(f), error, most, good ? "" : "  FAILED");
}

void check_linear(WeightFormat f, int64_t rows, int64_t columns, bool with_norm) {
  const Matrix m = random_matrix(f, rows, columns);
  const auto x = normal(columns, 3), before = normal(rows, 1);
  const auto weight = norm_weight(columns);
  DecodeLinear linear;
  linear.format = f;
  linear.rows = rows;
  linear.columns = columns;
  linear.weights = to_device(m.weights);
  if (f != WeightFormat::bf16) linear.scales = to_device(m.scales);
  if (f == WeightFormat::int4) linear.minimums = to_device(m.minimums);
  linear.out = to_device(before);
  linear.best = device_zeros<unsigned long long>(1);
  const float* const on_device = to_device(x);
  if (with_norm) {
    linear.normed = {on_device, to_device(weight), 1e-5f};
  } else {
    linear.x = on_device;
    linear.add = true;
  }
  decode_linear(linear, nullptr);
  check(cudaDeviceSynchronize());
  auto wanted = times(m, rows, columns, with_norm ? normed_as_seen(f, x, weight, 1e-5) : as_seen(f, x));
  const auto best = std::max_element(wanted.begin(), wanted.end()) - wanted.begin();
  const auto got_best = 0xffffffffu - static_cast<unsigned>(to_host(linear.best, 1)[0]);
  if (static_cast<int64_t>(got_best) != best) {
    ++failures;
    std::printf("best row %u, not %lld\n", got_best, static_cast<long long>(best));
  }
  if (!with_norm) {
    for (int64_t i = 0; i < rows; ++i) wanted[i] += before[i];
  }
  expect(with_norm ? "linear, normed" : "linear, added", f, to_host(linear.out, rows), wanted,
         with_norm ? 2e-3 : 1e-5);
}

struct Slices {
  std::vector<std::vector<Matrix>> matrices;  // by slice: gate, up, down
  std::vector<std::byte> bytes;               // one after the other
  int64_t each = 0;
};

Slices random_slices(WeightFormat f, int count, int64_t hidden, int64_t width) {
  Slices s;
  for (int i = 0; i < count; ++i) {
    std::vector<Matrix> m = {random_matrix(f, width, hidden), random_matrix(f, width, hidden),
                             random_matrix(f, hidden, width)};
    for (const auto part : {&Matrix::weights, &Matrix::scales, &Matrix::minimums}) {
      for (const Matrix& one : m) s.bytes.insert(s.bytes.end(), (one.*part).begin(), (one.*part).end());
    }
    s.matrices.push_back(std::move(m));
    if (i == 0) s.each = static_cast<int64_t>(s.bytes.size());
  }
  return s;
}

std::vector<double> slice_output(WeightFormat f, const std::vector<Matrix>& m, const std::vector<double>& x,
                                 int64_t hidden, int64_t width, double weight, int64_t valid) {
  const auto gate = times(m[0], width, hidden, x), up = times(m[1], width, hidden, x);
  std::vector<float> h(width);
  for (int64_t i = 0; i < valid; ++i) {
    const double g = gate[i] * weight;
    h[i] = static_cast<float>(g / (1 + std::exp(-g)) * up[i] * weight);
  }
  return times(m[2], hidden, width, as_seen(f, h));
}

// Of hidden activations.
void* room(int jobs, int64_t width) {
  return device_zeros<float>(jobs * width);
}

// Two of some experts, a shared one, some slices missed and read from host memory.
void check_moe(WeightFormat f, int64_t hidden, int64_t width, bool paged, int experts = 8, int fixed = 3) {
  constexpr int slices = 4, k = 2;
  const Slices all = random_slices(f, experts * slices, hidden, width);
  const Slices shared = random_slices(f, fixed, hidden, width);
  const Matrix router = random_matrix(WeightFormat::bf16, experts, hidden);
  const auto residual = normal(hidden, 2);
  const auto weight = norm_weight(hidden);
  std::byte* const on_device = to_device(all.bytes);
  std::byte* mapped = nullptr;
  check(cudaHostAlloc(&mapped, all.bytes.size(), cudaHostAllocMapped));
  std::copy(all.bytes.begin(), all.bytes.end(), mapped);
  std::vector<const std::byte*> here, there;
  for (int i = 0; i < experts * slices; ++i) {
    const bool missed = paged && i % slices >= 2;
    here.push_back(missed ? nullptr : on_device + i * all.each);
    there.push_back(mapped + i * all.each);
  }
  const unsigned step_number = 7;
  unsigned* const step = to_device(std::vector<unsigned>{step_number});
  const auto list = [&] {
    return reinterpret_cast<JobList*>(device_zeros<std::byte>(JobList::bytes(k * slices)));
  };
  const int groups = static_cast<int>(width) / group_of(f);
  // All but the last of the missed groups are the GPU's; the last one is nobody's here.
  const int missed_groups = k * 2 * groups, zero_copied = missed_groups - 1;
  DecodeRouter r;
  r.experts = experts;
  r.k = k;
  r.slices = slices;
  r.hidden = hidden;
  r.weight = to_device(router.weights);
  r.score = RouterScore::softmax_normalised;
  float* const stream_in = to_device(residual);
  r.input = {stream_in, to_device(weight), 1e-5f};
  r.device_table = to_device(here);
  r.groups_per_slice = groups;
  r.resident = list();
  r.logits = device_zeros<float>(experts);
  r.arrived = device_zeros<unsigned>(1);
  r.chosen = device_zeros<int>(k);
  r.weights = device_zeros<float>(experts);
  r.computed = device_zeros<unsigned char>(k * slices);
  r.positions = device_zeros<int>(1);
  r.step = step;
  if (paged) {
    r.host_table = to_device(there);
    r.zero_copy = list();
    r.zero_copy_share =
        to_device(std::vector<unsigned>{static_cast<unsigned>(65536.0 * zero_copied / missed_groups)});
  }
  const std::byte* const fixed_slices = to_device(shared.bytes);
  float* const out = to_device(residual);
  DecodeGateUp g;
  g.format = f;
  g.hidden = hidden;
  g.width = width;
  g.input = r.input;
  g.fixed = fixed_slices;
  g.fixed_jobs = fixed;
  g.list = r.resident;
  g.input_weights = paged ? r.weights : nullptr;  // once on the input, once on the output
  g.out = room(fixed + k * slices, width);
  DecodeDown d;
  d.format = f;
  d.hidden = hidden;
  d.width = width;
  d.fixed = fixed_slices;
  d.fixed_jobs = fixed;
  d.list = r.resident;
  d.most_list_jobs = k * slices;
  d.output_weights = paged ? nullptr : r.weights;
  d.experts = experts;
  d.hidden_activations = g.out;
  unsigned* const error = device_zeros<unsigned>(1);
  LayerTimes* const taken = device_zeros<LayerTimes>(1);
  void* const host_room = room(k * slices, width);
  auto* const post_x = device_zeros<int8_t>(hidden);
  float* const post_x_scales = device_zeros<float>(hidden / 64);
  float* const post_scale = device_zeros<float>(1);
  int* const post_experts = device_zeros<int>(k);
  float* const post_weights = device_zeros<float>(k);
  unsigned* const posted = device_zeros<unsigned>(1);
  const Matrix next_router = random_matrix(WeightFormat::bf16, experts, hidden);
  const auto next_norm = norm_weight(hidden);
  int* const guessed_experts = device_zeros<int>(k);
  unsigned* const guessed = device_zeros<unsigned>(1);
  r.guess = {to_device(next_router.weights), to_device(next_norm), nullptr, guessed_experts, guessed};
  for (int round = 0; round < 2; ++round) {  // the second shows that the first left the counters as they were
    check(cudaMemcpy(out, residual.data(), hidden * 4, cudaMemcpyHostToDevice));
    g.router = &r;
    g.signals = device_zeros<LayerSignals>(1);
    d.signals = g.signals;
    if (!paged) {
      d.residual = out;
      decode_gate_up(g, nullptr);
      decode_down(d, nullptr);
    } else {
      d.fixed_sum = device_zeros<float>(hidden);
      d.partials = device_zeros<float>(k * slices * hidden);
      g.host_list = d.host_list = r.zero_copy;
      d.host_activations = g.host_out = host_room;
      g.host_blocks = d.host_blocks = 16;
      r.post = {post_x, post_x_scales, post_scale, group_of(f), post_experts, post_weights, posted};
      r.times = g.times = d.times = taken;
      decode_gate_up(g, nullptr);
      decode_down(d, nullptr);
      DecodeCombine c;
      c.hidden = hidden;
      c.fixed_sum = d.fixed_sum;
      c.partials = d.partials;
      c.computed = r.computed;
      c.positions = r.positions;
      c.step = step;
      c.error = error;
      c.residual = out;
      decode_combine(c, nullptr);
    }
    check(cudaDeviceSynchronize());
  }

  const auto x = normed(residual, weight, 1e-5);
  // The experts by falling logit.
  const auto ordered = [&](const std::vector<double>& logits) {
    std::vector<int> order(experts);
    for (int i = 0; i < experts; ++i) order[i] = i;
    std::sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
    return order;
  };
  const auto logits = times(router, experts, hidden, {x.begin(), x.end()});
  const std::vector<int> order = ordered(logits);
  std::vector<double> weights(experts);
  double total = 0;
  for (int i = 0; i < k; ++i) total += weights[order[i]] = std::exp(logits[order[i]] - logits[order[0]]);
  const auto seen = normed_as_seen(f, residual, weight, 1e-5);
  std::vector<double> wanted(hidden);
  const auto add = [&](const std::vector<double>& y, double w) {
    for (int64_t i = 0; i < hidden; ++i) wanted[i] += w * y[i];
  };
  for (int i = 0; i < fixed; ++i) add(slice_output(f, shared.matrices[i], seen, hidden, width, 1, width), 1);
  std::vector<int> chosen(order.begin(), order.begin() + k);
  std::sort(chosen.begin(), chosen.end());
  int missed = 0;
  for (const int e : chosen) {
    const double w = weights[e] / total;
    for (int s = 0; s < slices; ++s) {
      const bool is_missed = paged && s >= 2;
      missed += is_missed;
      const int64_t valid = is_missed && missed == k * 2 ? width - group_of(f) : width;
      add(slice_output(f, all.matrices[e * slices + s], seen, hidden, width, paged ? w : 1, valid),
          paged ? 1 : w);
    }
  }
  const auto got = to_host(out, hidden);
  std::vector<float> change(hidden);
  for (int64_t i = 0; i < hidden; ++i) change[i] = got[i] - residual[i];
  if (paged) {
    if (f != WeightFormat::bf16) {
      const auto q = to_host(post_x, hidden);
      const auto scales = to_host(post_x_scales, hidden / 64);
      const float factor = to_host(post_scale, 1)[0];
      std::vector<float> posted_x;
      for (int64_t i = 0; i < hidden; ++i) posted_x.push_back(q[i] * scales[i / group_of(f)] * factor);
      expect("what is posted", f, posted_x, seen, 1e-5);
    }
    std::vector<double> wanted_weights;
    for (int i = 0; i < k; ++i) wanted_weights.push_back(weights[order[i]] / total);
    expect("posted weights", f, to_host(post_weights, k), wanted_weights, 1e-4);
    const auto experts_posted = to_host(post_experts, k);
    failures += !std::equal(experts_posted.begin(), experts_posted.end(), order.begin());
    failures += to_host(posted, 1)[0] != step_number;
    const auto next_x = normed(residual, next_norm, 1e-5);
    const auto wanted_guess = ordered(times(next_router, experts, hidden, {next_x.begin(), next_x.end()}));
    const auto guess = to_host(guessed_experts, k);
    const bool right =
        std::equal(guess.begin(), guess.end(), wanted_guess.begin()) && to_host(guessed, 1)[0] == step_number;
    if (!right) std::printf("FAILED: what is guessed of the next layer\n");
    failures += !right;
    const LayerTimes at = to_host(taken, 1)[0];
    const bool in_order = at.routed > 0 && at.host_hidden > at.routed &&
                          at.host_down_begun >= at.host_hidden && at.host_down > at.host_down_begun &&
                          at.device_hidden > at.routed && at.device_down > at.device_hidden;
    if (!in_order) std::printf("FAILED: the times of the layer's parts are not in their order\n");
    failures += !in_order;
  }
  expect(paged ? "experts, some from host memory" : "experts, all resident", f, change, wanted, 1e-2);
}

double microseconds(const std::function<void(cudaStream_t)>& enqueue, int repeats) {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  enqueue(stream);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  for (int i = 0; i < 3; ++i) check(cudaGraphLaunch(executable, stream));
  check(cudaEventRecord(begin, stream));
  for (int i = 0; i < repeats; ++i) check(cudaGraphLaunch(executable, stream));
  check(cudaEventRecord(end, stream));
  check(cudaEventSynchronize(end));
  float ms = 0;
  check(cudaEventElapsedTime(&ms, begin, end));
  return ms * 1000 / repeats;
}

__global__ void fill_with_noise(uint64_t* to, int64_t count, uint64_t seed) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    uint64_t z = seed + static_cast<uint64_t>(i) * 0x9e3779b97f4a7c15ull;  // splitmix64
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    to[i] = (z ^ z >> 31) & 0xbfffbfffbfffbfffull;  // neither infinite nor NaN as bf16 or half
  }
}

// Attention of 128 values a head, over keys and values of 8 heads, which are zeros.
DecodeAttention plain_attention(int heads, int64_t context) {
  DecodeAttention a;
  a.qkv = to_device(normal((heads + 2 * 8) * 128, 1));
  a.position = to_device(std::vector<int>{static_cast<int>(context) - 1});
  a.keys = device_zeros<__nv_bfloat16>(context * 8 * 128);
  a.values = device_zeros<__nv_bfloat16>(context * 8 * 128);
  std::vector<int> table(context / 256);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int>(i);
  a.block_table = to_device(table);
  a.block = 256;
  a.heads = heads;
  a.kv_heads = 8;
  a.head_dim = 128;
  a.rope = true;
  a.inverse_frequencies = device_zeros<float>(64);
  a.context = context;
  a.workspace = device_zeros<std::byte>(decode_attention_workspace_bytes(heads, 8, 128));
  a.out = device_zeros<float>(heads * 128);
  return a;
}

// Of a weight, with its part of the scale and minimum.
double value_bytes(WeightFormat f) {
  return f == WeightFormat::bf16 ? 2 : f == WeightFormat::int8 ? 1 + 2 / 128. : 0.5 + 4 / 64.;
}

// Layers of a model's sizes: qkv, attention over 256 keys, o, experts. weights: random bytes, enough for
// several layers, so that caches do not help.
void time_layers(const char* name, WeightFormat f, int64_t hidden, int64_t qkv, int64_t o_columns,
                 int64_t ffn, bool moe) {
  constexpr int layers = 12;
  const int64_t width = f == WeightFormat::bf16 ? 256 : 512;  // of the slices that Scout has
  const auto bytes_of = [&](double values) {
    return (static_cast<int64_t>(values * value_bytes(f)) + 255) / 256 * 256;
  };
  const int slices = static_cast<int>(ffn / width);
  const int64_t slice = bytes_of(3.0 * hidden * width);
  const int64_t layer_bytes = bytes_of(static_cast<double>(hidden) * qkv) +
                              bytes_of(static_cast<double>(hidden) * o_columns) +
                              slice * slices * (moe ? 2 : 1);
  std::byte* const memory = device_zeros<std::byte>(layer_bytes * layers);
  fill_with_noise<<<1024, 256>>>(reinterpret_cast<uint64_t*>(memory), layer_bytes * layers / 8, engine());
  check(cudaDeviceSynchronize());
  float* const residual = to_device(normal(hidden, 1));
  DecodeAttention attention = plain_attention(static_cast<int>(o_columns / 128), 256);
  float* const qkv_out = device_zeros<float>(qkv);
  attention.qkv = qkv_out;
  void* const weight = to_device(norm_weight(hidden));
  unsigned* const step = to_device(std::vector<unsigned>{1});
  std::vector<DecodeRouter> routers(layers);
  std::vector<JobList*> lists;
  void* const h = room(slices * 2, f == WeightFormat::bf16 ? ffn : width);
  auto* const signals = device_zeros<LayerSignals>(layers);
  void* const router_weight = device_zeros<__nv_bfloat16>(16 * hidden);
  float* const router_logits = device_zeros<float>(16);
  unsigned* const arrived = device_zeros<unsigned>(1);
  unsigned char parts = 31;
  FirstPairs next_pairs;
  const auto linear = [&](const std::byte* at, int64_t rows, int64_t columns, const float* x, float* out,
                          bool add, cudaStream_t stream) {
    DecodeLinear l;
    l.format = f;
    l.rows = rows;
    l.columns = columns;
    l.weights = at;
    l.scales = at + rows * columns / (f == WeightFormat::int4 ? 2 : 1);
    l.minimums = l.scales + rows * columns / 64 * 2;
    if (x == nullptr) {
      l.normed = {residual, weight, 1e-5f};
    } else {
      l.x = x;
    }
    l.out = out;
    l.add = add;
    if (!add && (parts & 16) && f != WeightFormat::bf16) {
      l.next = at + bytes_of(static_cast<double>(hidden) * qkv);
      l.next_bytes = std::min<int64_t>(bytes_of(static_cast<double>(hidden) * o_columns), 4 << 20);
    }
    l.after_small = parts & 16;
    l.late_next = !add && (parts & 16);
    if (add && (parts & 16) && moe && f == WeightFormat::int4) l.first_pairs = next_pairs;
    decode_linear(l, stream);
  };
  for (int i = 0; i < layers && moe; ++i) {
    const std::byte* const at = memory + i * layer_bytes + slice * slices;
    std::vector<const std::byte*> table(16 * slices);
    for (int j = 0; j < 16 * slices; ++j) table[j] = at + j % slices * slice;
    DecodeRouter& r = routers[i];
    r.experts = 16;
    r.k = 1;
    r.slices = slices;
    r.hidden = hidden;
    r.weight = router_weight;
    r.input = {residual, weight, 1e-5f};
    r.device_table = to_device(table);
    r.groups_per_slice = static_cast<int>(width) / group_of(f);
    r.resident = reinterpret_cast<JobList*>(device_zeros<std::byte>(JobList::bytes(slices)));
    r.chosen = device_zeros<int>(1);
    r.weights = device_zeros<float>(16);
    r.logits = router_logits;
    r.arrived = arrived;
    r.step = step;
  }
  const auto layer = [&](int i, cudaStream_t stream) {
    const std::byte* at = memory + i * layer_bytes;
    if (parts & 4) {
      DecodeGateUp g;
      g.format = f;
      g.hidden = hidden;
      g.width = moe || f != WeightFormat::bf16 ? width : ffn;
      g.input = {residual, weight, 1e-5f};
      g.fixed = at;
      g.fixed_jobs = moe || f != WeightFormat::bf16 ? slices : 1;
      g.out = h;
      if (moe) {
        g.list = routers[i].resident;
        g.router = &routers[i];
        g.signals = signals + i;
        g.input_weights = routers[i].weights;
      }
      decode_gate_up(g, stream);
      g.fixed = memory + (i + 1) % layers * layer_bytes;
      next_pairs = first_pairs(g);
    }
    if (parts & 8) {
      if (f == WeightFormat::bf16 && !moe) {
        DecodeLinear l;
        l.format = f;
        l.rows = hidden;
        l.columns = ffn;
        l.weights = at + 2 * ffn * hidden * 2;
        l.x_bf16 = h;
        l.out = residual;
        l.add = true;
        decode_linear(l, stream);
      } else {
        DecodeDown d;
        d.format = f;
        d.hidden = hidden;
        d.width = width;
        d.fixed = at;
        d.fixed_jobs = slices;
        if (moe) {
          d.list = routers[i].resident;
          d.most_list_jobs = slices;
          d.signals = signals + i;
        }
        d.hidden_activations = h;
        d.residual = residual;
        decode_down(d, stream);
      }
    }
    at += slice * slices * (moe ? 2 : 1);
    if (parts & 1) linear(at, qkv, hidden, nullptr, qkv_out, false, stream);
    if (parts & 16) decode_attention(attention, stream);
    at += bytes_of(static_cast<double>(hidden) * qkv);
    if (parts & 2) linear(at, hidden, o_columns, attention.out, residual, true, stream);
  };
  const double qkv_bytes = bytes_of(static_cast<double>(hidden) * qkv),
               o_bytes = bytes_of(static_cast<double>(hidden) * o_columns);
  const double moe_bytes = static_cast<double>(slice) * slices * (moe ? 2 : 1);
  const struct {
    const char* name;
    unsigned char parts;
    double bytes;
  } works[] = {{"qkv", 1, qkv_bytes},
               {"o", 2, o_bytes},
               {"gate and up", 4, moe_bytes * 2 / 3},
               {"down", 8, moe_bytes / 3},
               {"gate, up, down", 12, moe_bytes},
               {"qkv, attention, o", 19, qkv_bytes + o_bytes},
               {"all but attention", 15, qkv_bytes + o_bytes + moe_bytes},
               {"all", 31, qkv_bytes + o_bytes + moe_bytes}};
  for (const auto& work : works) {
    parts = work.parts;
    if (moe) {  // the list must be there when its maker is left out
      routers[0].step = step;
    }
    const double us = microseconds(
                          [&](cudaStream_t s) {
                            for (int i = 0; i < layers; ++i) layer(i, s);
                          },
                          20) /
                      layers;
    std::printf("%-10s %-5s %-17s %7.1f us a layer, %5.0f GB/s\n", name, name_of(f), work.name, us,
                work.bytes / us / 1e3);
  }
  check(cudaFree(memory));
}

}  // namespace

// Attention of one token against double precision: a few steps, so that the cache fills, over shuffled
// blocks.
void check_attention(int heads, int kv_heads, int head_dim, int64_t window, bool rope, bool interleaved,
                     int first_position, int64_t context) {
  constexpr int block = 16;
  const int64_t kept = window == 0 ? context : window;
  std::vector<int> table(kept / block);
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int>(i);
  std::shuffle(table.begin(), table.end(), engine);
  const size_t row = static_cast<size_t>(kv_heads) * head_dim;
  std::vector<__nv_bfloat16> keys(kept * row), values(kept * row);
  for (auto* cache : {&keys, &values}) {
    for (auto& value : *cache) value = __float2bfloat16_rn(normal(1, 1)[0]);
  }
  std::vector<float> frequencies(head_dim / 2);
  for (int i = 0; i < head_dim / 2; ++i) frequencies[i] = std::pow(10000.0f, -2.0f * i / head_dim);
  DecodeAttention a;
  int* const position = device_zeros<int>(1);
  float* const qkv_on_device = device_zeros<float>((heads + 2 * kv_heads) * head_dim);
  a.qkv = qkv_on_device;
  a.position = position;
  a.keys = to_device(keys);
  a.values = to_device(values);
  a.block_table = to_device(table);
  a.block = block;
  a.window = window;
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.head_dim = head_dim;
  a.rope = rope;
  a.interleaved = interleaved;
  a.inverse_frequencies = to_device(frequencies);
  a.qk_norm = rope;
  a.eps = 1e-5f;
  a.temperature_scale = rope ? 0.0f : 0.1f;
  a.floor_scale = 64;
  a.context = context;
  a.workspace = device_zeros<std::byte>(decode_attention_workspace_bytes(heads, kv_heads, head_dim));
  a.out = device_zeros<float>(heads * head_dim);
  for (int p = first_position; p < first_position + 3; ++p) {
    const auto qkv = normal((heads + 2 * kv_heads) * head_dim, 1);
    check(cudaMemcpy(qkv_on_device, qkv.data(), qkv.size() * 4, cudaMemcpyHostToDevice));
    check(cudaMemcpy(position, &p, 4, cudaMemcpyHostToDevice));
    decode_attention(a, nullptr);
    check(cudaDeviceSynchronize());
    const auto head = [&](int number, bool rotate, double scale) {
      std::vector<double> x(qkv.begin() + number * head_dim, qkv.begin() + (number + 1) * head_dim);
      double squares = 0;
      for (int i = 0; i < head_dim / 2 && rotate && rope; ++i) {
        double& u = x[interleaved ? 2 * i : i];
        double& v = x[interleaved ? 2 * i + 1 : i + head_dim / 2];
        const double angle = static_cast<double>(static_cast<float>(p) * frequencies[i]);
        const double c = std::cos(angle), s = std::sin(angle), w = u;
        u = w * c - v * s;
        v = w * s + v * c;
      }
      for (const double value : x) squares += value * value;
      if (rotate && rope) scale /= std::sqrt(squares / head_dim + 1e-5);
      for (double& value : x) value *= scale;
      return x;
    };
    const auto row_of = [&](int64_t at) {
      const int64_t in = window == 0 ? at : at % window;
      return (table[in / block] * static_cast<int64_t>(block) + in % block) * static_cast<int64_t>(row);
    };
    for (int h = 0; h < kv_heads; ++h) {
      const auto k = head(heads + h, true, 1), v = head(heads + kv_heads + h, false, 1);
      for (int i = 0; i < head_dim; ++i) {
        keys[row_of(p) + h * head_dim + i] = __float2bfloat16_rn(static_cast<float>(k[i]));
        values[row_of(p) + h * head_dim + i] = __float2bfloat16_rn(static_cast<float>(v[i]));
      }
    }
    const double temperature = rope ? 1 : 1 + 0.1 * std::log1p(std::floor((p + 1) / 64.0));
    std::vector<double> wanted;
    for (int h = 0; h < heads; ++h) {
      const auto q = head(h, true, temperature / std::sqrt(static_cast<double>(head_dim)));
      const int64_t first = window == 0 ? 0 : p / window * window;
      std::vector<double> out(head_dim), weights;
      double total = 0;
      for (int64_t at = first; at <= p; ++at) {
        double score = 0;
        const int64_t from = row_of(at) + h / (heads / kv_heads) * head_dim;
        for (int i = 0; i < head_dim; ++i) score += q[i] * __bfloat162float(keys[from + i]);
        total += std::exp(score);
        for (int i = 0; i < head_dim; ++i) out[i] += std::exp(score) * __bfloat162float(values[from + i]);
      }
      for (const double value : out) wanted.push_back(value / total);
    }
    char what[64];
    std::snprintf(what, sizeof what, "attention %d/%d x %d, %d keys", heads, kv_heads, head_dim, p + 1);
    expect(what, WeightFormat::bf16, to_host(a.out, heads * head_dim), wanted, 5e-3);
  }
}

// The head of a model: logits, and the best of them.
void time_head(const char* name, WeightFormat f, int64_t rows, int64_t columns) {
  const int64_t bytes = static_cast<int64_t>(static_cast<double>(rows * columns) * value_bytes(f)) / 16 * 16;
  std::byte* const memory = device_zeros<std::byte>(bytes);
  fill_with_noise<<<1024, 256>>>(reinterpret_cast<uint64_t*>(memory), bytes / 8, engine());
  DecodeLinear l;
  l.format = f;
  l.rows = rows;
  l.columns = columns;
  l.weights = memory;
  l.scales = memory + rows * columns / (f == WeightFormat::int4 ? 2 : 1);
  l.minimums = l.scales + rows * columns / 64 * 2;
  l.normed = {to_device(normal(columns, 1)), to_device(norm_weight(columns)), 1e-5f};
  l.out = device_zeros<float>(rows);
  l.best = device_zeros<unsigned long long>(1);
  const double us = microseconds([&](cudaStream_t s) { decode_linear(l, s); }, 20);
  std::printf("%-10s %-5s %-17s %7.1f us,         %5.0f GB/s\n", name, name_of(f), "head", us,
              static_cast<double>(bytes) / us / 1e3);
  check(cudaFree(memory));
}

void time_attention(int heads, int64_t context) {
  const DecodeAttention a = plain_attention(heads, context);
  const double us = microseconds(
                        [&](cudaStream_t s) {
                          for (int i = 0; i < 48; ++i) decode_attention(a, s);
                        },
                        20) /
                    48;
  std::printf("attention %d/8, %lld keys: %.1f us\n", heads, static_cast<long long>(context), us);
}

void check_all() {
  for (const int64_t context : {kFewKeys, 4 * kFewKeys}) {
    check_attention(40, 8, 128, 0, true, true, 0, context);
    check_attention(32, 8, 128, 0, true, false, 500, context);
    check_attention(8, 8, 64, 0, false, false, 62, context);
    check_attention(8, 2, 64, 64, true, true, 126, context);
    check_attention(8, 1, 128, 0, true, false, static_cast<int>(context) - 3, context);
    check_attention(16, 2, 128, 0, false, false, static_cast<int>(context) - 3, context);
  }
  for (const WeightFormat f : {WeightFormat::bf16, WeightFormat::int8, WeightFormat::int4}) {
    for (const bool with_norm : {false, true}) {
      check_linear(f, 7168, 5120, with_norm);
      check_linear(f, 1001, 1024, with_norm);
      check_linear(f, 300, 4096, with_norm);
      check_linear(f, 200, with_norm ? 8192 : 14336, with_norm);
    }
    for (const bool paged : {false, true}) {
      check_moe(f, 1024, 256, paged);
      check_moe(f, 2048, 512, paged);
      // Sizes that there are kernels of their own for.
      check_moe(f, 4096, 256, paged, 3, 1);
      check_moe(f, 5120, 512, paged, 3, 1);
    }
  }
}

// With the argument "times" it only times.
int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  if (argc < 2 || std::string(argv[1]) != "times") check_all();
  time_layers("Scout", WeightFormat::int8, 5120, 7168, 5120, 8192, true);
  time_layers("Scout", WeightFormat::int4, 5120, 7168, 5120, 8192, true);
  time_layers("Llama-8B", WeightFormat::bf16, 4096, 6144, 4096, 14336, false);
  for (const WeightFormat f : {WeightFormat::bf16, WeightFormat::int8, WeightFormat::int4}) {
    time_head("Scout", f, 202048, 5120);
  }
  for (const int64_t context : {256, 1024, 2048, 8192}) {
    time_attention(40, context);
    time_attention(32, context);
  }
  std::printf(failures == 0 ? "all good\n" : "%d FAILED\n", failures);
  return failures != 0;
}
