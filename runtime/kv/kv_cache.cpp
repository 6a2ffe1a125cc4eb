#include "runtime/kv/kv_cache.h"

#include <ATen/ops/arange.h>

#include <algorithm>
#include <numeric>

#include "runtime/torch/tensors.h"

namespace lighter {
namespace {

std::array<BlockTable, 2> tables_for(const KvShape& shape) {
  const int64_t block = shape.usable_block();
  return {BlockTable(block, 0, shape.context, shape.sequences),
          BlockTable(block, shape.chunk, shape.context, shape.sequences)};
}

}  // namespace

int64_t KvShape::usable_block() const {
  return any_chunked() ? std::gcd(block, chunk) : block;
}

int64_t KvShape::max_tokens_from(int64_t position) const {
  const int64_t left = context - position;
  return any_chunked() ? std::min(left, chunk - position % chunk) : left;
}

bool KvShape::any_chunked() const {
  return std::find(chunked.begin(), chunked.end(), true) != chunked.end();
}

uint64_t KvShape::bytes() const {
  const auto tables = tables_for(*this);
  uint64_t rows = 0;
  for (const bool is_chunked : chunked) rows += tables[is_chunked].total_blocks() * usable_block();
  return 2 * rows * kv_heads * head_dim * dtype_size(dtype);
}

KvCache::KvCache(Device& device, const KvShape& shape)
    : device_(device),
      shape_(shape),
      tables_(tables_for(shape)),
      memory_(device.allocate(shape.bytes(), "KV cache")) {
  std::byte* next = memory_.data();
  for (const bool is_chunked : shape.chunked) {
    const int64_t rows = tables_[is_chunked].total_blocks() * shape.usable_block();
    for (auto* tensors : {&keys_, &values_}) {
      tensors->push_back(view_of(next, {rows, shape.kv_heads, shape.head_dim}, device, shape.dtype));
      next += rows * shape.kv_heads * shape.head_dim * dtype_size(shape.dtype);
    }
  }
}

KvCache::StepIndex KvCache::index(const Step& step) {
  StepIndex result;
  for (const bool is_chunked : {false, true}) {
    if (std::find(shape_.chunked.begin(), shape_.chunked.end(), is_chunked) == shape_.chunked.end()) continue;
    BlockTable& table = tables_[is_chunked];
    auto& group = result.groups[is_chunked];
    std::vector<int64_t> writes;
    const bool batch = step.sequences.size() > 1 && step.tokens.size() == step.sequences.size();
    for (size_t i = 0; i < step.sequences.size(); ++i) {
      const int sequence = step.sequences[i];
      const int64_t last = step.positions[step.offsets[i + 1] - 1];
      table.extend(sequence, last);
      for (int64_t t = step.offsets[i]; t < step.offsets[i + 1]; ++t) {
        writes.push_back(table.row(sequence, step.positions[t]));
      }
      if (batch) continue;
      Reads reads;
      reads.first_position = table.first_visible(last);
      reads.keys = last + 1 - reads.first_position;
      std::vector<int64_t> rows(reads.keys);
      for (int64_t k = 0; k < reads.keys; ++k) rows[k] = table.row(sequence, reads.first_position + k);
      reads.rows = to_device(rows, device_);
      group.reads.push_back(std::move(reads));
    }
    group.writes = to_device(writes, device_);
    if (batch) index_batch(step, table, group);
  }
  return result;
}

void KvCache::index_batch(const Step& step, const BlockTable& table, StepIndex::Group& group) const {
  const size_t count = step.sequences.size();
  std::vector<int64_t> lengths;
  for (const int64_t last : step.positions) lengths.push_back(last + 1 - table.first_visible(last));
  group.keys = *std::ranges::max_element(lengths);
  std::vector<int64_t> rows(count * group.keys);
  for (size_t i = 0; i < count; ++i) {
    const int64_t first = table.first_visible(step.positions[i]);
    for (int64_t k = 0; k < lengths[i]; ++k)
      rows[i * group.keys + k] = table.row(step.sequences[i], first + k);
  }
  group.batch_rows = to_device(rows, device_);
  if (std::ranges::count(lengths, group.keys) == static_cast<int64_t>(count)) return;
  const at::Tensor ends = to_device(lengths, device_).unsqueeze(1);
  group.batch_hidden = at::arange(group.keys, ends.options()).unsqueeze(0).ge(ends);
}

void KvCache::write(int layer, const StepIndex& index, const at::Tensor& keys, const at::Tensor& values) {
  const at::Tensor& rows = index.groups[shape_.chunked[layer]].writes;
  keys_[layer].index_copy_(0, rows, keys);
  values_[layer].index_copy_(0, rows, values);
}

void KvCache::reserve(int sequence, int64_t position) {
  for (const bool is_chunked : {false, true}) {
    if (std::find(shape_.chunked.begin(), shape_.chunked.end(), is_chunked) == shape_.chunked.end()) continue;
    tables_[is_chunked].extend(sequence, position);
  }
}

void KvCache::release(int sequence) {
  for (BlockTable& table : tables_) table.release(sequence);
}

}  // namespace lighter
