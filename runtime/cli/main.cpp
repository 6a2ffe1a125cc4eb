// The lighter program: reads the command line, runs a command, and turns errors into messages and exit codes.
#include <c10/util/Exception.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "runtime/cli/commands.h"
#include "runtime/cli/console.h"
#include "runtime/error.h"

namespace {

constexpr int kFailure = 1;
constexpr int kUserMistake = 2;
constexpr int kInterrupted = 130;

int report(const std::string& message, int code) {
  std::fprintf(stderr, "lighter: %s\n", message.c_str());
  return code;
}

void add_common(CLI::App& command, lighter::cli::CommonOptions& options) {
  command.add_option("CONFIG", options.config, "The YAML file that describes model, device and budgets")->required();
  command.add_option("--set", options.overrides, "Overrides a key of the file; may be repeated")
      ->type_name("KEY.PATH=VALUE")
      ->expected(1)
      ->take_all();
  command.add_flag("--json", options.json, "Writes one JSON object to stdout");
}

int dispatch(int argc, char** argv) {
  using namespace lighter::cli;
  CLI::App app("Runs Mixture-of-Experts models that are too large for one GPU.", "lighter");
  app.require_subcommand(1);
  app.set_version_flag("--version", "lighter 0.1.0");

  RunOptions run;
  CLI::App* run_app = app.add_subcommand("run", "Generates text");
  add_common(*run_app, run.common);
  auto* prompt = run_app->add_option("--prompt", run.prompt, "The text to continue");
  auto* ids = run_app->add_option("--prompt-ids", run.prompt_ids, "The same as token ids, 1,2,3")->delimiter(',');
  ids->excludes(prompt);
  auto* chat = run_app->add_flag("--chat", run.chat, "Puts the prompt into the model's chat format");
  chat->needs(prompt);
  run_app->add_option("--system", run.system, "The system message, with --chat")->needs(chat);
  run_app->add_option("--max-tokens", run.max_tokens, "Generates at most so many tokens")
      ->check(CLI::Range(0ll, 1ll << 40));
  run_app->add_option("--logprobs", run.logprobs, "With --json: the so many likeliest tokens at each place")
      ->check(CLI::Range(0, 1000));

  CommonOptions plan;
  add_common(*app.add_subcommand("plan", "Shows where every byte would go, and whether it fits"), plan);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kUserMistake;
  }
  run.prompt_given = prompt->count() > 0;
  if (app.got_subcommand("plan")) return plan_command(plan);
  return run_command(run);
}

}  // namespace

int main(int argc, char** argv) {
  lighter::cli::catch_ctrl_c();
  try {
    return dispatch(argc, argv);
  } catch (const lighter::Interrupted&) {
    return report("interrupted", kInterrupted);
  } catch (const lighter::ConfigError& error) {
    return report(error.what(), kUserMistake);
  } catch (const lighter::CheckpointError& error) {
    return report(error.what(), kUserMistake);
  } catch (const lighter::CapacityError& error) {
    return report(error.what(), kUserMistake);
  } catch (const c10::OutOfMemoryError& error) {
    return report("the device's workspace is used up; lower memory.prefill_chunk or memory.context (libtorch: " +
                      std::string(error.what_without_backtrace()) + ")",
                  kUserMistake);
  } catch (const c10::Error& error) {
    return report(std::string("libtorch: ") + error.what_without_backtrace(), kFailure);
  } catch (const std::exception& error) {
    return report(error.what(), kFailure);
  }
}
