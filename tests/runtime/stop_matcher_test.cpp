#include "runtime/engine/stop_matcher.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <random>

namespace lighter {
namespace {

struct Shown {
  std::string text;
  bool stopped = false;
};

Shown show(StopMatcher& matcher, const std::vector<std::string>& pieces) {
  Shown shown;
  for (const std::string& piece : pieces) {
    shown.text += matcher.push(piece);
    if (matcher.stopped()) break;
  }
  shown.stopped = matcher.stopped();
  if (!shown.stopped) shown.text += matcher.flush();
  return shown;
}

}  // namespace

TEST_CASE("without stop strings everything is shown at once") {
  StopMatcher matcher({});
  CHECK(matcher.push("hello") == "hello");
  CHECK(matcher.push("") == "");
  CHECK(matcher.flush() == "");
  CHECK_FALSE(matcher.stopped());
}

TEST_CASE("the text ends before the stop string, wherever its pieces are cut") {
  for (size_t cut = 0; cut <= 12; ++cut) {
    const std::string text = "one STOP two";
    StopMatcher matcher({"STOP"});
    const Shown shown = show(matcher, {text.substr(0, cut), text.substr(cut)});
    CHECK(shown.text == "one ");
    CHECK(shown.stopped);
  }
}

TEST_CASE("what may become a stop string is held back, and shown when it does not") {
  StopMatcher matcher({"\n\nUser:"});
  CHECK(matcher.push("fine\n") == "fine");
  CHECK(matcher.push("\nUs") == "");
  CHECK(matcher.push("ually") == "\n\nUsually");
  CHECK(matcher.push("\n\n") == "");
  CHECK(matcher.flush() == "\n\n");
  CHECK(matcher.flush() == "");
}

TEST_CASE("a stop string that begins within another's beginning is found") {
  StopMatcher matcher({"aab"});
  CHECK(matcher.push("aa") == "");
  CHECK(matcher.push("a") == "a");
  CHECK(matcher.push("b") == "");
  CHECK(matcher.stopped());
}

TEST_CASE("of several stop strings the earliest in the text counts") {
  StopMatcher matcher({"three", "two"});
  const Shown shown = show(matcher, {"one two three"});
  CHECK(shown.text == "one ");
}

TEST_CASE("after a stop nothing more is shown") {
  StopMatcher matcher({"."});
  CHECK(matcher.push("a.b") == "a");
  CHECK(matcher.push("c") == "");
  CHECK(matcher.flush() == "");
}

TEST_CASE("an empty stop string stops nothing") {
  StopMatcher matcher({"", "x"});
  CHECK(matcher.push("abc") == "abc");
  CHECK_FALSE(matcher.stopped());
}

TEST_CASE("cut anyhow, the text is what a search in the whole text finds") {
  std::mt19937 random(5);
  const auto letters = [&](int most) {
    std::string text;
    for (size_t i = random() % most; i-- > 0;) text += static_cast<char>('a' + random() % 2);
    return text;
  };
  for (int round = 0; round < 5000; ++round) {
    const std::string stop = "a" + letters(5);
    std::vector<std::string> pieces;
    std::string whole;
    for (size_t i = random() % 12; i-- > 0;) whole += pieces.emplace_back(letters(5));
    StopMatcher matcher({stop});
    const Shown shown = show(matcher, pieces);
    const size_t found = whole.find(stop);
    REQUIRE(shown.stopped == (found != std::string::npos));
    REQUIRE(shown.text == whole.substr(0, found));
  }
}

}  // namespace lighter
