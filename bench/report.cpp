#include "bench/report.h"

#include <stdexcept>

#include "bench/embed.h"

namespace lighter::bench {
namespace {

void fill(std::string& page, const std::string& mark, std::string_view text) {
  const size_t at = page.find(mark);
  if (at == page.npos) throw std::logic_error("report.html has no " + mark);
  page.replace(at, mark.size(), text);
}

// A script ends at "</script" even inside a JavaScript string, and a comment may begin at "<!--".
std::string for_script(std::string json) {
  for (size_t at = json.find('<'); at != json.npos; at = json.find('<', at + 1))
    json.replace(at, 1, "\\u003c");
  return json;
}

std::string for_text(const std::string& text) {
  std::string escaped;
  for (const char c : text) {
    if (c == '<') {
      escaped += "&lt;";
    } else if (c == '&') {
      escaped += "&amp;";
    } else {
      escaped += c;
    }
  }
  return escaped;
}

}  // namespace

std::string results_html(const Json& results) {
  std::string page(report_template());
  // The data come last: they may hold anything.
  fill(page, "<!--TITLE-->", for_text(results["name"].get<std::string>()));
  fill(page, "/*CHART LIBRARY*/", chart_library());
  fill(page, "/*RESULTS*/null", for_script(results.dump(-1, ' ', false, Json::error_handler_t::replace)));
  return page;
}

}  // namespace lighter::bench
