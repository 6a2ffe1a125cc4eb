// The assembler takes the files in as they are; CMakeLists.txt says where they lie.
#include "bench/embed.h"

// clang-format off
#define EMBED(name, file)                                                  \
  asm(".pushsection .rodata\n" #name "_begin: .incbin \"" file "\"\n"      \
      #name "_end: .byte 0\n.popsection\n");                               \
  extern "C" const char name##_begin[] __attribute__((visibility("hidden"))); \
  extern "C" const char name##_end[] __attribute__((visibility("hidden")))
// clang-format on

EMBED(lighter_report_template, LIGHTER_REPORT_TEMPLATE);
EMBED(lighter_chart_library, LIGHTER_CHART_LIBRARY);

namespace lighter::bench {

std::string_view report_template() {
  return {lighter_report_template_begin, lighter_report_template_end};
}

std::string_view chart_library() {
  return {lighter_chart_library_begin, lighter_chart_library_end};
}

}  // namespace lighter::bench
