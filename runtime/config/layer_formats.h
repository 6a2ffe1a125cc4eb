// Weight formats as YAML keys give them: one for all layers, or by selectors of layers. Pure values.
#pragma once

#include <algorithm>
#include <string_view>
#include <vector>

#include "runtime/config/selector.h"
#include "runtime/quant/packed_slice.h"

namespace lighter {

// As in YAML: "dtype", "int8", "int4".
constexpr std::string_view format_name(SliceEncoding encoding) {
  return encoding == SliceEncoding::dense ? "dtype" : encoding_name(encoding);
}

struct LayerFormats {
  struct Rule {
    IndexSet layers;  // no "*"; the rules' sets do not overlap
    SliceEncoding encoding = SliceEncoding::dense;
  };
  SliceEncoding others = SliceEncoding::dense;  // of the layers that no rule names
  std::vector<Rule> rules;

  SliceEncoding at(int layer) const {
    for (const Rule& rule : rules) {
      if (rule.layers.contains(layer)) return rule.encoding;
    }
    return others;
  }
  // The largest layer named, -1 if none is; lets the reader check it against the model.
  int max_layer() const {
    int largest = -1;
    for (const Rule& rule : rules) largest = std::max(largest, rule.layers.max_index());
    return largest;
  }
};

}  // namespace lighter
